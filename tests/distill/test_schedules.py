"""Which times consistency models are trained at: counts of levels, shares, gaps and weights, worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from oracles import Gaussian, lognormal_shares

from fluvial.distill import (
    ConsistencyDistillation,
    ConsistencyTraining,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
)
from fluvial.errors import OptionError
from problems import one_line

TRUTH = Gaussian((0.7,), 0.4)


@pytest.mark.parametrize(("step", "count"), [(0, 2), (2500, 106), (5000, 150), (9999, 150)])
def test_consistency_training_counts(step, count):
    """√(1/2 (151² - 2²) + 2²) - 1 = 105.8 half way."""
    objective = ConsistencyTraining(first=2, last=150, over=5000).at(step, TRUTH.flow_map(), TRUTH.flow_map())
    assert objective.count() == count
    assert len(objective.levels) == count + 1


@pytest.mark.parametrize(
    ("step", "count"), [(0, 10), (624, 10), (625, 20), (2500, 160), (4374, 640), (4375, 1280), (5000, 1280)]
)
def test_improved_counts_double(step, count):
    """Eight stages of 5000 / 8 = 625 steps, from 10 to 1280."""
    objective = ImprovedConsistencyTraining(first=10, last=1280, over=5000)
    assert objective.at(step, TRUTH.flow_map(), TRUTH.flow_map()).count() == count


@pytest.mark.parametrize("method", [ConsistencyTraining, ImprovedConsistencyTraining])
@pytest.mark.parametrize("wrong", [{"first": 0}, {"first": 9, "last": 8}, {"over": 0}])
def test_levels_that_do_not_rise_are_refused(method, wrong):
    with pytest.raises(OptionError) as error:
        method(**wrong)
    assert "first <= last" in one_line(error.value)


@pytest.mark.parametrize(
    "grid", [[0.0, 0.2, 0.5, 1.0], (0.0, 0.2, 0.5, 1.0), torch.tensor([0, 0.2, 0.5, 1], dtype=torch.float64)]
)
def test_the_levels_may_be_listed(grid):
    objective = ConsistencyDistillation(teacher=TRUTH.teacher(), grid=grid, steps=3)
    assert objective.levels.tolist() == pytest.approx([0.0, 0.2, 0.5, 1.0], abs=1e-7)
    assert objective.after(torch.tensor([0.2], dtype=torch.float64))[0].tolist() == pytest.approx([0.5])


@pytest.mark.parametrize("steps", [2, 3, 20])
def test_improved_draws_its_levels_by_the_error_function(steps):
    objective, n = ImprovedConsistencyTraining(first=steps, last=steps), 100000
    t = objective.draw_times(TRUTH.flow_map(), torch.arange(n), seed=1)
    # Karras' levels from 80 to 0.002, rho = 7; the last pair, down to 0, is never drawn.
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    levels = [(ends[0] + k / (steps - 1) * (ends[1] - ends[0])) ** 7 for k in range(steps)]
    shares = lognormal_shares(levels, -1.1, 2.0)
    counts = torch.stack([(t == level).sum() for level in objective.levels]).double() / n
    assert float(counts[-2:].sum()) == 0.0
    assert bool(((counts[:-2] - shares).abs() <= 4 * (shares * (1 - shares) / n).sqrt()).all())
    s, weight = objective.after(objective.levels[:-2])
    torch.testing.assert_close(s, objective.levels[1:-1], rtol=0, atol=0)
    falls = torch.tensor([1 / (high - low) for high, low in pairwise(levels)], dtype=torch.float64)
    torch.testing.assert_close(weight, falls, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", [ConsistencyTraining, ImprovedConsistencyTraining])
@pytest.mark.parametrize("steps", [1, 2, 3, 30])
def test_levels_are_followed_by_their_neighbours(method, steps):
    objective = method(first=steps, last=steps)
    t = objective.draw_times(TRUTH.flow_map(), torch.arange(3000), seed=1)
    s, _ = objective.after(t)
    place = [objective.levels.tolist().index(value) for value in t.tolist()]
    assert s.tolist() == [float(objective.levels[k + 1]) for k in place]
    every = range(steps) if method is ConsistencyTraining else range(max(steps - 1, 1))
    if steps <= 3:
        assert set(place) == set(every)
    if method is ConsistencyTraining:
        shares = torch.bincount(torch.tensor(place), minlength=steps) / 3000
        assert bool(((shares - 1 / steps).abs() <= 4 * math.sqrt(1 / steps / 3000)).all())


@pytest.mark.parametrize(
    ("step", "sigma", "later"),
    [
        (0, 0.1, 0.0),  # n = 1 + 8/(1 + e^0.1) is more than 2: the pair ends on the data
        (0, 3.0, 3.0 * (1 - (1 + 8 / (1 + math.exp(3.0))) / 2)),
        (499, 3.0, 3.0 * (1 - (1 + 8 / (1 + math.exp(3.0))) / 2)),
        (500, 3.0, 3.0 * (1 - (1 + 8 / (1 + math.exp(3.0))) / 4)),
        (3999, 0.1, 0.1 * (1 - (1 + 8 / (1 + math.exp(0.1))) / 256)),
        (9999, 60.0, 60.0 * (1 - 1 / 256)),
    ],
)
def test_easy_gaps_shrink_by_stages(step, sigma, later):
    """Eight stages of 500 steps, the gap halved at each."""
    objective = EasyConsistencyTuning(q=2.0, stages=8, over=4000).at(step, TRUTH.flow_map(), TRUTH.flow_map())
    s, weight = objective.after(torch.tensor([1 / (1 + sigma)], dtype=torch.float64))
    assert weight is not None
    assert float(s) == pytest.approx(1 / (1 + later), rel=1e-12)
    assert float(weight) == pytest.approx(1 / (sigma - later), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "objective",
    [
        ConsistencyDistillation(teacher=TRUTH.teacher()),
        ConsistencyTraining(),
        ImprovedConsistencyTraining(),
        EasyConsistencyTuning(),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_both_ends_of_time_are_finite(objective, dtype):
    student, data = TRUTH.flow_map(), TRUTH.samples(6).to(dtype)
    first = 1e-9 if isinstance(objective, EasyConsistencyTuning) else 0.0
    t = torch.tensor([first, 1e-6, 0.5, 1 - 1e-3, 1 - 1e-6, 1 - 1e-9], dtype=torch.float64)
    for step in (0, 2500, 5000):
        loss = objective.at(step, student, student)(student, data, t=t, seed=0)
        assert loss.dtype == dtype
        assert bool(loss.isfinite().all())
        (slope,) = torch.autograd.grad(loss.sum(), [*student.parameters()])
        assert bool(slope.isfinite().all())
