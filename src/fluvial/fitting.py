"""Fitting a sampling grid to a model: where its steps should lie, measured on the model's own trajectories.

Both methods draw some noise and follow it to the data along a fine grid; those trajectories are the truth.

curvature: from nodes along each trajectory the solver makes one step to the next node, and misses the trajectory there
by the distance e_k (the mean over samples, in units of √(alpha² + sigma²)). A method of order p misses by
C h^(p+1), so the step lengths that share the error out evenly give each cell of the trajectory a share of the steps
in proportion to e_k^(1/(p+1)). This is the trajectory's curvature as this solver feels it, on whatever clock it works.
One fit serves any number of steps. A multistep solver is measured by its first step, which has no history: there the
fit is a guess, and the search is to be preferred.

search: the levels of N steps themselves are moved, one at a time, so long as that brings the samples closer to where
the same noise truly leads. It begins with the best of the named grids and the fit by curvature, and so is never worse
than they on the trajectories it was given. It knows how errors grow along the way, which curvature does not, and
takes many more network calls.

Sources: Sabour, Fidler, Kreis: Align your steps (2024), https://arxiv.org/abs/2404.14507 (grids as something to
optimise, for a solver and a number of steps); Hairer, Nørsett, Wanner: Solving ordinary differential equations I
(1993), sec. II.4 (sharing out the local error).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fluvial import grids, inputs, solvers
from fluvial.errors import NonFiniteError, OptionError, one_of
from fluvial.grids import Fitted, level_of
from fluvial.model import Model, Normalisation
from fluvial.sampling import DEFAULT_SOLVER, sample
from fluvial.solvers import Solver

METHODS = ("curvature", "search")
CELLS, REFINED = 32, 4  # cells of a trajectory, and steps of the reference in each
FLOOR = 0.1  # the part of the steps that is spread over all cells alike, so that none is starved


def fit_grid(
    model: Model,
    noise: int | Sequence[int] | Tensor = 128,
    *,
    solver: str | Solver = DEFAULT_SOLVER,
    steps: int | None = None,
    method: str = "curvature",
    seed: int = 0,
    cond: Mapping[str, Tensor] | None = None,
    guidance: Callable[[Model], Model] | None = None,
) -> Fitted:
    """The grid on which this solver follows this model's trajectories best; `model.under(grid=…)` keeps it.

    Args:
        model: any model; a converted one is fitted on the path it is seen on.
        noise: how many trajectories to fit on, their shape (B, …) or their noise, as for `sample`.
        solver: the ODE solver to fit for, a name or an object.
        steps: for the search, the number of steps, 2 or more. The grid then serves others by interpolation.
        method: "curvature" or "search".
        seed: of the noise; the fit depends on nothing else.
        cond, guidance: as for `sample`; a grid fitted under strong guidance differs from one without.

    Returns a `Fitted` with `nfe`, the network evaluations per trajectory that were spent, and `n`, the trajectories.

    Raises:
        OptionError: for arguments that do not fit, before the first network call.
    """
    solver = solvers.named(solver)
    if method not in METHODS:
        raise one_of("method", method, METHODS)
    if solver.stochastic:
        raise OptionError(f"solver {solver.name} is stochastic and follows no trajectory; expected an ODE solver")
    if isinstance(solver, solvers.Dopri5):
        raise OptionError(
            f"solver {solver.name} chooses its own steps and needs no grid; expected one with fixed steps"
        )
    if method == "curvature" and steps is not None:
        raise OptionError(f"steps is {steps} but the fit by curvature is for any number; expected method='search'")
    if method == "search" and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 2):
        raise OptionError(f"steps is {steps!r}; expected the number of steps to search for, 2 or more")
    trials = _Trials(inputs.guided(model, guidance), solver, cond)
    nodes, states = trials.reference(noise, seed)
    levels, made = _by_curvature(trials, nodes, states), f"curvature, {solver.name}"
    if steps is not None:
        levels, made = _by_search(trials, states, levels, steps), f"search, {solver.name}, {steps} steps"
    return Fitted(levels, trials.nfe, len(states[0]), made)


class _Trials:
    """Runs of the model in path units, whose network calls are counted."""

    def __init__(self, model: Model, solver: Solver, cond: Mapping[str, Tensor] | None) -> None:
        self.model, self.solver, self.cond, self.nfe = model.under(normalisation=Normalisation()), solver, cond, 0

    def run(self, times: list[float], solver: str | Solver, every: int = 1, **start: Any) -> list[Tensor]:
        """The state after each `every` steps."""
        states, spent = [], 0

        def keep(step: Any) -> None:
            nonlocal spent
            spent = step.nfe
            if (step.index + 1) % every == 0:
                states.append(step.x)

        try:
            sample(self.model, solver=solver, times=times, cond=self.cond, callback=keep, **start)
        finally:
            self.nfe += spent
        return states

    def end(self, times: list[float], state: Tensor) -> Tensor:
        """Where the solver leads from `state` along these times."""
        return self.run(times, self.solver, every=len(times) - 1, state=state)[0]

    def reference(self, noise: Any, seed: int) -> tuple[list[float], list[Tensor]]:
        """The nodes between the cells and the true states there: the first is the start, the last the sample."""
        path = self.model.path
        # Half of the nodes are even in tau and half in log_snr, so that no part of the path is passed over.
        even = [grid.times(path, CELLS // 2) for grid in (Fitted([0.0, 1.0]), grids.LogSNR())]
        nodes = [0.0]
        # Nodes at the same place, or at a landing, leave no room for a cell.
        nodes += [t for before, t in itertools.pairwise(sorted(even[0] + even[1])) if before + 1e-6 < t < 1.0 - 1e-6]
        nodes.append(1.0)
        fine = [t + (s - t) * k / REFINED for t, s in itertools.pairwise(nodes) for k in range(REFINED)]
        start = inputs.start(self.model, noise, 0.0, inputs.checked_seed(seed), 0, None, None)
        return nodes, [start, *self.run([*fine, 1.0], "heun", every=REFINED, state=start)]


def _by_curvature(trials: _Trials, nodes: list[float], states: list[Tensor]) -> list[float]:
    """Levels that share out evenly what single steps of the solver miss."""
    path, misses = trials.model.path, []
    for (t, s), (state, truth) in zip(itertools.pairwise(nodes), itertools.pairwise(states)):
        c = path(s)
        size = 1.0 if s == 1.0 else math.hypot(c.alpha, c.sigma)
        misses.append((_distance(trials.end([t, s], state), truth) / size) ** (1 / (trials.solver.order + 1)))
    even, total = 1.0 / len(misses), sum(misses)
    weights = [FLOOR * even + (1.0 - FLOOR) * (miss / total if total else even) for miss in misses]
    return _equalised([*(level_of(path, t) for t in nodes[:-1]), 1.0], weights)


def _equalised(levels: list[float], weights: list[float]) -> list[float]:
    """As many levels again, the same weight between any two; the weight within a cell is spread evenly."""
    reached = [0.0, *itertools.accumulate(weights)]
    inner = []
    for k in range(1, len(weights)):
        aim = reached[-1] * k / len(weights)
        cell = bisect.bisect_right(reached, aim) - 1
        inner.append(levels[cell] + (levels[cell + 1] - levels[cell]) * (aim - reached[cell]) / weights[cell])
    return [levels[0], *inner, 1.0]


def _by_search(trials: _Trials, states: list[Tensor], fitted: list[float], steps: int) -> list[float]:
    """The levels of N steps that lead nearest to the truth: coordinate search from the best of the known grids."""
    path, start, truth = trials.model.path, states[0], states[-1]

    def error(levels: list[float]) -> float:
        try:
            return _distance(trials.end(Fitted(levels).times(path, steps), start), truth)
        except NonFiniteError:
            return math.inf

    known = [grids.named(name) for name in grids.names() if name != "fitted"]
    starts = [[level_of(path, t) for t in grid.times(path, steps)[:-1]] + [1.0] for grid in (Fitted(fitted), *known)]
    best, levels = min((error(levels), levels) for levels in starts)
    # Each level moves by a part of the way to its neighbour, on either side; the part is halved when neither helps.
    parts = [0.5] * (steps + 1)
    while max(parts[1:-1]) > 0.05:
        for k in range(1, steps):
            for neighbour in (levels[k - 1], levels[k + 1]):
                moved = [*levels[:k], levels[k] + parts[k] * (neighbour - levels[k]), *levels[k + 1 :]]
                if (found := error(moved)) < 0.999 * best:
                    best, levels = found, moved
                    break
            else:
                parts[k] /= 2
    return levels


def _distance(x: Tensor, y: Tensor) -> float:
    """The mean over samples of their distance, each the root mean square over dimensions.

    The mean of its square would be ruled by the few samples whose noise lies between two modes.
    """
    return float((x - y).double().flatten(1).square().mean(1).sqrt().mean())
