"""How far a sampler's states are from the path's own law, at each noise level.

An exact sampler of an exact model has the law of alpha data + sigma noise at every time. Where a sampler leaves it is
where its model or its steps are at fault: errors made near the noise are carried along, errors near the data are seen
in the last levels alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fluvial import grids, inputs, random, sampling, solvers
from fluvial.errors import OptionError, ShapeError
from fluvial.measure.distances import energy_distance, pairs_of_one_class, require_finite, sliced_wasserstein
from fluvial.model import Model
from fluvial.paths import Path
from fluvial.solvers import Solver

# Beside the streams of fluvial.random and of the other measures.
_NOISED = 133


class Curve(NamedTuple):
    """A distance at each time: its mean over the repeats, and their standard deviation."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Drift:
    """What `marginal_drift` found, in path units.

    Attributes:
        times: where, on the model's own path.
        sliced_wasserstein, energy: the sampler's states to the forward process.
        sliced_wasserstein_floor, energy_floor: the forward process to itself, as a perfect sampler would measure.
        n: states on each side.
        repeats: how often, each time with another split of the data, other noise and another seed of the sampler.
        nfe: network calls for each state.
        seed: the first of the sampler's seeds.
    """

    times: list[float]
    sliced_wasserstein: Curve
    sliced_wasserstein_floor: Curve
    energy: Curve
    energy_floor: Curve
    n: int
    repeats: int
    nfe: int
    seed: int


def marginal_drift(
    model: Model,
    data: Tensor,
    *,
    times: Sequence[float] | None = None,
    solver: str | Solver = "heun",
    steps: int = 64,
    seed: int = 0,
    cond: Mapping[str, Tensor] | None = None,
    guidance: Callable[[Model], Model] | None = None,
    repeats: int = 3,
) -> Drift:
    """Distances between a sampler's states at t and the forward process alpha(t) data + sigma(t) noise.

    The data are split at random into two disjoint halves A and B. The sampler's states are compared with the forward
    process of B; the floor is the forward process of A, with other noise, compared with that same one. So both sides of
    both comparisons are n independent draws, and a perfect sampler, which also draws data anew, is at the floor. (The
    same data with other noise on both sides would be a floor of 0 near t = 1, which no sampler could reach.)

    Args:
        model: any model, sampled on its own path, by an ODE or an SDE.
        data: (N, …), 4 or more, in the data's own units, as `sample` gives them; n is about N/2.
        times: where to look, rising in [0, 1]; each becomes a node of the grid. Default: the noise levels with
            alpha/(alpha + sigma) = 0, 1/8, …, 1, as far as the path has them.
        solver, steps: of the sampler; steps of equal length on the path's clock, as nearly as `times` allow.
        seed: of the first repeat's sampler; the next takes seed + 1.
        cond: conditions of the data by name, (N, …): the sampler is asked for those of B. With a "label" both halves
            have the same number of each class.
        guidance: as for `sample`. Its states have no reason to keep to the path's law.
        repeats: 2 or more, for the standard deviation.

    Raises:
        ShapeError: data of another shape than the model's, or too few; conditions that do not go with them.
        OptionError: NaN or infinity; times outside [0, 1]; fewer steps than there are times; repeats below 2.
        DependenceError: a stochastic solver of a model that has no score.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 2:
        raise OptionError(f"repeats is {repeats!r}; expected a whole number, 2 or more")
    solver, seed = solvers.named(solver), inputs.checked_seed(seed)
    nodes = levels(model.path) if times is None else grids.resolve(list(times), model.path, None, 1)
    grid = grids.Split.shared(sorted({0.0, *nodes, 1.0}), steps)
    x = inputs.fitting(model, model.normalisation.apply(inputs.as_state(data)), "data").to(model.device)
    require_finite(x, "data")
    cond = inputs.conditions(model, cond, x)
    labels = cond.get("label", torch.zeros(len(x), dtype=torch.int64)).cpu()
    found: list[tuple[list[float], ...]] = []
    n = nfe = 0
    for repeat in range(repeats):
        pairs = pairs_of_one_class(labels, seed, repeat).to(x.device)
        if (n := len(pairs)) < 2:
            raise ShapeError(f"data has {len(x)} samples; expected two or more disjoint pairs of one class")
        asked = {name: value[pairs[:, 1]] for name, value in cond.items()}
        states, nfe = _states(model, x[:n], nodes, grid, solver, seed + repeat, asked, guidance)
        forward = [_forward(model.path, x[pairs[:, side]], nodes, 2 * repeat + side, seed) for side in (0, 1)]
        found.append(tuple(
            [distance(a[t], forward[1][t]) for t in nodes]
            for distance in (sliced_wasserstein, energy_distance)
            for a in (states, forward[0])
        ))  # fmt: skip
    sliced, sliced_floor, energy, energy_floor = (_curve(runs) for runs in zip(*found))
    return Drift(nodes, sliced, sliced_floor, energy, energy_floor, n, repeats, nfe, seed)


def levels(path: Path, count: int = 9) -> list[float]:
    """Rising times of this path where alpha/(alpha + sigma) is 0, …, 1 in equal parts, as far as it has such levels."""
    shares = [k / (count - 1) for k in range(1, count - 1)]
    return sorted({0.0, *(path.time(2.0 * math.log(share / (1.0 - share))) for share in shares), 1.0})


def _states(
    model: Model,
    like: Tensor,
    times: Sequence[float],
    grid: grids.Split,
    solver: Solver,
    seed: int,
    cond: Mapping[str, Tensor],
    guidance: Callable[[Model], Model] | None,
) -> tuple[dict[float, Tensor], int]:
    """The sampler's states in path units at these times, and the network calls each took."""
    noise = random.normal(len(like), like.shape[1:], seed, stream=random.START, dtype=like.dtype, device=like.device)
    states, calls = {0.0: model.path(0.0).sigma * noise}, [0]

    def keep(step: sampling.StepReport) -> None:
        calls.append(step.nfe)
        if step.t in times:
            states[step.t] = step.x

    sampling.sample(model, noise, solver=solver, times=grid, seed=seed, cond=cond, guidance=guidance, callback=keep)
    return states, calls[-1]


def _forward(path: Path, data: Tensor, times: Sequence[float], draw: int, seed: int) -> dict[float, Tensor]:
    """alpha data + sigma noise at these times; at t = 1 the data, on which a sampler lands from any path."""
    noise = random.normal(len(data), data.shape[1:], seed, draw, _NOISED, data.dtype, data.device)
    states = {t: c.alpha * data + c.sigma * noise for t, c in zip(times, path.table(times))}
    return {**states, 1.0: data}


def _curve(runs: Sequence[Sequence[float]]) -> Curve:
    """The repeats' distances, each a list over the times."""
    by_time = list(zip(*runs))
    return Curve([statistics.fmean(values) for values in by_time], [statistics.stdev(values) for values in by_time])
