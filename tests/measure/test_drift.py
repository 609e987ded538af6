"""Marginal drift: an exact sampler is at the floor, a wrong one is above it where it went wrong."""

from __future__ import annotations

import statistics

import pytest
import torch

from fluvial import Model, exact, measure, paths, predictions, random, sample
from fluvial.convention import Normalisation
from fluvial.errors import OptionError, ShapeError
from fluvial.measure import marginal_drift
from fluvial.measure.drift import levels
from problems import gaussian, mixture, normal

DATA = mixture().sample(800, dtype=torch.float64)
OPTIONS = {"solver": "rk4", "steps": 24, "times": [0.0, 0.5, 1.0], "repeats": 3}


def excess(drift) -> list[float]:
    """How far above the floor the sliced distance is, in the floor's own size."""
    return [a / b - 1.0 for a, b in zip(drift.sliced_wasserstein.mean, drift.sliced_wasserstein_floor.mean)]


@pytest.mark.parametrize("path", [paths.Rectified(), paths.VP(), paths.EDM()], ids=lambda p: type(p).__name__)
def test_an_exact_sampler_is_at_the_floor_everywhere(path):
    found = marginal_drift(mixture().model(path), DATA, solver="rk4", steps=20)
    assert max(map(abs, excess(found))) < 0.6
    for own, floor in zip(found.energy.mean, found.energy_floor.mean):
        assert own < 3.0 * floor
    assert len(found.times) == 9
    shares = [c.alpha / (c.alpha + c.sigma) for c in path.table(found.times[1:-1])]
    assert shares == pytest.approx([k / 8 for k in range(1, 8)])
    assert (found.n, found.repeats, found.nfe) == (400, 3, 79)


def test_a_stochastic_sampler_keeps_the_law_too():
    found = marginal_drift(mixture().model(paths.Cosine()), DATA, **{**OPTIONS, "solver": "ddpm", "steps": 200})
    assert max(excess(found)) < 0.6


def test_an_error_appears_where_it_is_made():
    # Of data twice as wide as the model believes, and of a model that is wrong from the middle on.
    wide = marginal_drift(gaussian(0.0, 0.5).model(paths.Rectified()), 2.0 * gaussian().sample(400), **OPTIONS)
    assert excess(wide)[0] < 1.0
    assert excess(wide)[2] > 3.0
    exactly = mixture().model(paths.Rectified())

    def bent(x, t):
        return exactly(x, float(t[0])).velocity + (t[0] >= 0.5) * 1.0

    late = marginal_drift(Model(bent, paths.Rectified()), DATA, **OPTIONS)
    assert excess(late)[1] < 0.6
    assert excess(late)[2] > 1.5
    # A shift by 0.5 in both of two dimensions is 0.5 in every direction's mean square.
    assert late.sliced_wasserstein.mean[2] == pytest.approx(0.5, rel=0.15)


def test_distances_are_those_of_the_states_at_the_times():
    model, times = mixture().model(paths.VP()), [0.3, 0.6]
    found = marginal_drift(model, DATA, times=times, steps=10, seed=4, repeats=2)
    sampled = []
    for seed in (4, 5):
        nodes = [
            *(0.3 * k / 3 for k in range(3)),
            *(0.3 + 0.3 * k / 3 for k in range(3)),
            *(0.6 + 0.1 * k for k in range(5)),
        ]
        states = sample(model, normal_start(400, seed), times=nodes, record=True)
        sampled.append([states.x[states.times.index(t)] for t in times])
    forward = [paths.VP()(t).alpha * mixture().sample(4000, seed=9, dtype=torch.float64) for t in times]
    for k, t in enumerate(times):
        level = forward[k] + paths.VP()(t).sigma * normal(4000, 2, seed=10)
        expected = [measure.sliced_wasserstein(states[k], level) for states in sampled]
        assert found.sliced_wasserstein.mean[k] == pytest.approx(statistics.fmean(expected), abs=0.06)
    assert found.times == times


def normal_start(n: int, seed: int) -> torch.Tensor:
    return random.normal(n, (2,), seed, stream=random.START, dtype=torch.float64)


def test_labels_follow_their_data():
    data, label = mixture().sample_with_labels(600, dtype=torch.float64)
    model = mixture().model(paths.Rectified())
    found = marginal_drift(model, data, cond={"label": label}, **OPTIONS)
    assert max(excess(found)) < 0.7
    # With the same number of each class on both sides the floor is lower than without.
    loose = marginal_drift(model, data, **OPTIONS)
    assert found.sliced_wasserstein_floor.mean[2] < loose.sliced_wasserstein_floor.mean[2]
    wrong = marginal_drift(model, data, cond={"label": (label + 1) % 3}, **OPTIONS)
    assert excess(wrong)[2] > 2.0


def test_units_are_the_path_s_and_data_the_user_s():
    units = Normalisation(shift=(5.0,), scale=(3.0,))
    inner = mixture().model(paths.Rectified())
    plain = marginal_drift(inner, DATA, **OPTIONS)
    scaled = marginal_drift(inner.under(normalisation=units), units.invert(DATA), **OPTIONS)
    assert scaled.sliced_wasserstein.mean == pytest.approx(plain.sliced_wasserstein.mean, rel=1e-9)
    assert scaled.energy_floor.std == pytest.approx(plain.energy_floor.std, rel=1e-6)


def test_the_end_is_the_data_on_paths_that_keep_noise():
    # The last level of VE still has noise, and the sampler lands on the data: noised data would be twice as wide.
    path, options = paths.VE(0.1, 50.0), {"solver": "heun", "steps": 60, "repeats": 2}
    found = marginal_drift(gaussian(0.0, 0.06).model(path), gaussian(0.0, 0.06).sample(800), **options)
    assert found.times == [*levels(path)[:-1], 1.0]
    assert found.sliced_wasserstein.mean[-1] < 0.05
    assert found.sliced_wasserstein_floor.mean[-1] < 0.02


def test_start_and_noised_data_share_no_numbers():
    # At t = 0 both are pure noise; were they the same, the distance would be 0 and below its floor.
    model = exact.Empirical(normal(40, 2)).model(paths.Rectified())
    found = marginal_drift(model, normal(40, 2), **OPTIONS)
    assert found.sliced_wasserstein.mean[0] > 0.4 * found.sliced_wasserstein_floor.mean[0]
    assert isinstance(model.prediction, predictions.Data)


@pytest.mark.parametrize(
    ("data", "options", "error", "says"),
    [
        (DATA[:3], {}, ShapeError, "two or more disjoint pairs"),
        (DATA, {"repeats": 1}, OptionError, "repeats is 1"),
        (DATA, {"times": [0.5, 1.5]}, OptionError, "in \\[0, 1\\]"),
        (DATA, {"steps": 1}, OptionError, "2 or more"),
        (DATA[:, :1], {}, ShapeError, r"expected \(B, 2\)"),
        (torch.full((9, 2), torch.nan), {}, OptionError, "data has NaN"),
        (DATA, {"cond": {"label": torch.zeros(4)}}, ShapeError, "800 entries"),
    ],
)
def test_what_does_not_fit_is_said(data, options, error, says):
    with pytest.raises(error, match=says):
        marginal_drift(mixture().model(paths.Rectified()), data, **{**OPTIONS, **options})


def test_each_repeat_has_a_seed_of_its_own(monkeypatch):
    seeds = []

    def noted(*arguments, **options):
        seeds.append((options["seed"], float(arguments[1][0, 0])))
        return sample(*arguments, **options)

    monkeypatch.setattr("fluvial.measure.drift.sampling.sample", noted)
    marginal_drift(mixture().model(paths.Rectified()), DATA, **OPTIONS, seed=7)
    assert [seed for seed, _ in seeds] == [7, 8, 9]
    assert [start for _, start in seeds] == pytest.approx([float(normal_start(1, seed)[0, 0]) for seed in (7, 8, 9)])
