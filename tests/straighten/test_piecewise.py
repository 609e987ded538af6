"""The piecewise loss: what it aims at on straightened and on kept segments, and where its times fall."""

from __future__ import annotations

import pytest
import torch

import fluvial as fl
from fluvial import grids, paths, random
from fluvial.errors import OptionError, ShapeError
from fluvial.straighten import Piecewise
from problems import mixture, one_line

HALVES = grids.Segments((0.0, 0.4, 1.0), (True, False))


def teacher():
    return mixture().model(paths.Rectified())


def pairs(n, nodes, seed=0):
    """Noise, the states at the inner nodes, data: on the exact model's own trajectories."""
    noise = random.normal(n, (2,), seed, dtype=torch.float64)
    times = sorted({*(k / 64 for k in range(65)), *nodes})
    run = fl.sample(teacher(), noise, solver="rk4", times=times, record=True)
    states = torch.stack([run.x[times.index(t)] for t in nodes], dim=1)
    return noise, states, run.x[-1]


class Chord:
    """A network that answers with the chord of the segment a time lies in, of known ends."""

    def __init__(self, ends, levels):
        self.ends, self.levels = ends, torch.tensor(levels, dtype=torch.float64)

    def __call__(self, x, t):
        k = torch.bucketize(t.double(), self.levels[1:-1], right=True)
        row = torch.arange(len(x))
        chord = self.ends[row, k + 1] - self.ends[row, k]
        return chord / (self.levels[k + 1] - self.levels[k])[:, None].to(chord)


def test_the_chords_are_its_zero():
    noise, states, data = pairs(40, (0.25, 0.6))
    segments = grids.Segments((0.0, 0.25, 0.6, 1.0), (True, True, True))
    objective = Piecewise(segments=segments, teacher=teacher())
    ends = torch.stack([noise, *states.unbind(1), data], 1)
    model = fl.Model(Chord(ends, segments.levels), "rectified", independent=False)
    t = torch.linspace(0.0, 0.999, 40, dtype=torch.float64)
    loss = objective(model, data, t=t, noise=noise, states=states, seed=0)
    assert loss.max() < 1e-12
    # And the loss of any other velocity is its mean squared distance to the chord.
    off = fl.Model(lambda x, t: Chord(ends, segments.levels)(x, t) + 0.5, "rectified", independent=False)
    torch.testing.assert_close(
        objective(off, data, t=t, noise=noise, states=states, seed=0), torch.full_like(loss, 0.25)
    )


def test_states_lie_on_the_chord():
    """What the student is asked at: the straight line between the two ends, by hand."""
    noise, states, data = pairs(3, (0.4,))
    seen = []
    model = fl.Model(lambda x, t: seen.append((x, t)) or x, "rectified", independent=False)
    t = torch.tensor([0.0, 0.1, 0.39], dtype=torch.float64)
    Piecewise(segments=HALVES, teacher=teacher())(model, data, t=t, noise=noise, states=states, seed=0)
    share = (t / 0.4)[:, None]
    torch.testing.assert_close(seen[0][0], (1 - share) * noise + share * states[:, 0])


def test_the_teacher_is_the_zero_of_kept_segments():
    noise, states, data = pairs(60, (0.4,))
    objective = Piecewise(segments=HALVES, teacher=teacher())
    t = torch.linspace(0.4, 1.0, 60, dtype=torch.float64)  # both ends of the kept one
    loss = objective(teacher(), data, t=t, noise=noise, states=states, seed=3)
    assert loss.max() < 1e-20
    # The law it is anchored under is the forward process of the data: fresh noise, a function of seed and sample.
    seen = []
    model = fl.Model(lambda x, t: seen.append(x) or x, "rectified", independent=False)
    objective(model, data, t=t, noise=noise, states=states, seed=3)
    fresh = random.normal(60, (2,), 3, 0, random.TRAIN, torch.float64)
    torch.testing.assert_close(seen[0], t[:, None] * data + (1 - t[:, None]) * fresh)


def test_no_gradient_reaches_the_teacher():
    noise, states, data = pairs(8, (0.4,))
    network = torch.nn.Linear(2, 2, dtype=torch.float64)
    model = fl.Model(lambda x, t: network(x), "rectified")
    kept = fl.Model(lambda x, t: network(x), "rectified", independent=False)
    t = torch.full((8,), 0.7, dtype=torch.float64)
    loss = Piecewise(segments=HALVES, teacher=model)(kept, data, t=t, noise=noise, states=states, seed=0)
    assert loss.sum() == 0.0  # the same function: zero error, and a gradient of zero
    loss.sum().backward()
    assert network.weight.grad.abs().max() == 0.0


@pytest.mark.parametrize("times", ["uniform", "u_shaped", "exponential", "logit_normal"])
def test_times_visit_each_segment_as_often_as_it_is_long(times):
    objective = Piecewise(segments=HALVES, teacher=teacher(), times=times)
    t = objective.draw_times(teacher(), torch.arange(20000), seed=1)
    first = t[t < 0.4]
    assert len(first) / len(t) == pytest.approx(0.4, abs=0.01)
    # Nothing in the turn before the joint; everything up to it, and to the data.
    assert first.max() <= 0.4 * 0.97
    assert t.max() > 0.999
    kept = (t[t >= 0.4] - 0.4) / 0.6
    assert kept.mean() == pytest.approx(0.5, abs=0.01)
    assert kept.square().mean() == pytest.approx(1 / 3, abs=0.01)
    # Inside the straightened one they follow the density asked for.
    u = random.uniform(20000, (1,), 1, stream=random.TIME, dtype=torch.float64)[:, 0]
    low = u < 0.4
    torch.testing.assert_close(t[low] / 0.4 / 0.97, grids.density(times).quantile(u[low] / 0.4, paths.Rectified()))


def test_it_is_bound_to_its_teacher():
    described = Piecewise(segments=HALVES, teacher=teacher()).described()
    assert described["segments"] == HALVES.config()
    assert len(described["teacher"]) == 12


def test_pairs_that_do_not_fit_are_refused():
    noise, states, data = pairs(4, (0.4,))
    objective = Piecewise(segments=HALVES, teacher=teacher())
    for given, words in [({"noise": noise}, "states at 0 times"), ({"states": states}, "no noise")]:
        with pytest.raises(ShapeError) as error:
            objective(teacher(), data, **given)
        assert words in one_line(error)
    with pytest.raises(OptionError, match="density of training times"):
        Piecewise(segments=HALVES, teacher=teacher(), times="sometimes")
