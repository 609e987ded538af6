"""Models straightened piece by piece, and the samplers that know where the pieces end."""

from __future__ import annotations

import pytest
import torch

import fluvial as fl
from fluvial import grids, paths
from fluvial.convention import Convention
from fluvial.errors import OptionError
from problems import PATHS, one_line

LEVELS = (0.0, 0.3, 0.5, 1.0)
SPEEDS = (2.0, -1.0, 0.5)


def stepped(levels=LEVELS, speeds=SPEEDS, **convention):
    """A velocity that is one number in each segment, and nonsense within the turn before a joint."""
    asked = []

    def network(x, t):
        asked.append(float(t[0]))
        k = int(torch.bucketize(t[:1].double() + 1e-6, torch.tensor(levels[1:-1], dtype=torch.float64), right=True))
        return torch.full_like(x, speeds[k])

    segments = grids.Segments(levels, [True] * (len(levels) - 1))
    model = fl.Model(network, paths.Rectified(), independent=False).under(segments=segments, **convention)
    return model, asked


def end(levels=LEVELS, speeds=SPEEDS):
    return sum(v * (b - a) for v, a, b in zip(speeds, levels, levels[1:]))


@pytest.mark.parametrize(
    "solver", ["euler", "heun", "midpoint", "rk4", "ddim", "vab", "vabm", "ipndm", "deis", "dpmpp_2m"]
)
@pytest.mark.parametrize("steps", [(1, 1, 1), (1, 2, 3), (4, 1, 2)])
def test_every_solver_is_exact_where_the_velocity_is_constant(solver, steps):
    """Nothing is carried over a joint: not a value that was kept, not the velocity beyond it."""
    model, _ = stepped()
    noise = torch.randn(5, 3, dtype=torch.float64)
    x = fl.sample(model, noise, solver=solver, steps=steps)
    torch.testing.assert_close(x, noise + end(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "vabm"])
def test_backwards_too(solver):
    model, _ = stepped()
    noise = torch.randn(4, 2, dtype=torch.float64)
    state = noise + end() - 0.2 * SPEEDS[-1]
    back = fl.sampling.integrate(model, state, [0.8, 0.6, 0.5, 0.35, 0.3, 0.1, 0.0], solver=solver)
    torch.testing.assert_close(back, noise, rtol=0, atol=1e-9)
    data = fl.sample(model, noise, solver=solver, steps=(2, 2, 4))
    # The step off the data is solved by iteration.
    torch.testing.assert_close(fl.encode(model, data, solver=solver, steps=(2, 2, 4)), noise, rtol=0, atol=2e-4)


def test_without_segments_the_joints_are_felt():
    """The oracle's guard: the same network without its segments is integrated wrongly by the same steps."""
    model, _ = stepped()
    noise = torch.zeros(1, 2, dtype=torch.float64)
    times = [0.0, 0.3, 0.5, 1.0]
    wrong = fl.sample(model.under(segments=None), noise, solver="heun", times=times)
    assert abs(float(wrong[0, 0]) - end()) > 0.1


@pytest.mark.parametrize("name", PATHS)
def test_segments_mean_the_same_levels_in_every_notation(name):
    path = PATHS[name]
    nodes = grids.Segments(LEVELS, [True] * 3).nodes(path)
    assert (nodes[0], nodes[-1]) == (0.0, 1.0)
    for node, level in zip(nodes[1:-1], LEVELS[1:-1]):
        assert grids.level_of(path, node) == pytest.approx(level, abs=1e-9)
    model, _ = stepped()
    seen = fl.convert(model, path=path)
    assert seen.times(steps=(1, 2, 1))[1] == nodes[1]
    assert len(seen.times(steps=7)) == 8


def test_natural_euler_crosses_segments_in_any_notation():
    model, _ = stepped()
    noise = torch.randn(3, 2, dtype=torch.float64)
    seen = fl.convert(model, path="cosine")
    torch.testing.assert_close(fl.sample(seen, noise, solver="ddim", steps=(1, 1, 1)), noise + end(), rtol=0, atol=1e-9)


def test_steps_are_shared_by_length():
    shares = [grids.Split.shared((0, 0.1, 1), n).steps for n in (2, 3, 10, 20)]
    assert shares == [(1, 1), (1, 2), (1, 9), (2, 18)]
    assert grids.Split.shared((0, 0.5, 1), 5).steps == (2, 3)
    model, _ = stepped()
    assert model.times(steps=10) == model.under(segments=None).times(grids.Split(LEVELS, (3, 2, 5)))
    with pytest.raises(OptionError, match="steps is 2 for 3 segments"):
        model.times(steps=2)


def test_a_grid_is_laid_into_each_segment():
    model, _ = stepped()
    times = model.times("log_snr", (2, 2, 3))
    whole = grids.Split(LEVELS, (2, 2, 3), ["log_snr"] * 3)
    assert times == model.under(segments=None).times(whole)
    assert model.times([0.0, 0.2, 1.0]) == [0.0, 0.2, 1.0]  # a list is taken as it is
    assert fl.sampling.nfe(model, "euler", (1, 2, 3)) == 6
    assert fl.sample(model, (2, 2), nfe=6, seed=0).shape == (2, 2)


def test_a_step_that_ends_at_a_joint_asks_before_it():
    model, asked = stepped()
    fl.sample(model, torch.zeros(1, 2), solver="heun", steps=(1, 1, 1))
    assert asked == pytest.approx([0.0, 0.3 - 0.03 * 0.3, 0.3, 0.5 - 0.03 * 0.2, 0.5], abs=1e-6)


def test_segments_are_kept_with_the_model():
    model, _ = stepped()
    convention = Convention.from_config(model.convention.config())
    assert convention.segments == model.segments
    assert "0 to 0.3 straight" in str(model.segments)
    assert "segments" not in model.under(segments=None).convention.config()
    assert fl.convert(fl.convert(model, path="vp"), path="rectified").segments == model.segments


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: grids.Segments((0.1, 1.0), (True,)), "rise strictly from 0 to 1"),
        (lambda: grids.Segments((0.0, 0.6, 0.5, 1.0), (True,) * 3), "rise strictly"),
        (lambda: grids.Segments((0, "half", 1), (True, True)), "expected numbers"),
        (lambda: grids.Segments((0, 1), (True, False)), "True or False for each"),
        (lambda: fl.sample(fl.Model(lambda x, t: x, "rectified"), (1, 2), steps=(1, 9)), "the model has none"),
        (lambda: fl.sample(stepped()[0], (1, 2), steps=(1, 9)), "for 3 segments"),
        (lambda: fl.sample(stepped()[0], (1, 2), steps=2), "3 segments"),
        (lambda: fl.sample(stepped()[0], (1, 2), steps=(1, 1, 1), times=grids.Split()), "has its own"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(OptionError) as error:
        make()
    assert words in one_line(error)


def test_the_exponential_density_has_its_quantiles():
    u = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    for rate in (-4.0, 0.5, 3.0):
        t = grids.ExponentialDensity(rate).quantile(u, paths.Rectified())
        torch.testing.assert_close(torch.expm1(rate * t) / torch.expm1(torch.tensor(rate, dtype=torch.float64)), u)
    # The U-shaped density is the even mixture of the two rates: so are their distribution functions.
    t = grids.UShaped(4.0).quantile(u, paths.Rectified())
    both = [torch.expm1(rate * t) / torch.expm1(torch.tensor(rate, dtype=torch.float64)) for rate in (-4.0, 4.0)]
    torch.testing.assert_close((both[0] + both[1]) / 2, u)
    with pytest.raises(OptionError, match="other than 0"):
        grids.ExponentialDensity(0.0)
