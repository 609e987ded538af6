"""Sampling: one loop for every solver and every model.

The plan is made first: the times, and each step's rows (see `solvers.rows`), all in float64 as Python floats. Then the
loop only calls the network, multiplies and adds, in float32 (float64 if the user's tensors are), without a host
synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fluvial import grids, inputs, random, solvers
from fluvial.errors import DependenceError, OptionError
from fluvial.model import Model
from fluvial.paths import Coefficients
from fluvial.predictions import Query
from fluvial.solvers import Solver
from fluvial.solvers.rows import At, Row, Step, trace

DEFAULT_SOLVER, DEFAULT_STEPS = "heun", 18


@dataclass
class Trajectory:
    """What a recorded run went through.

    Attributes:
        x: (steps + 1, B, …) the states, in path units.
        data: (steps, B, …) the data estimate made in each step, in the data's own units.
        times: the steps + 1 times.
        nfe: network evaluations per sample.
        seed: what the noise came from.
    """

    x: Tensor
    data: Tensor
    times: list[float]
    nfe: int
    seed: int

    @property
    def samples(self) -> Tensor:
        """The last data estimate: the samples (B, …), in the data's own units, of a run that ended on the data."""
        return self.data[-1]


@dataclass
class StepReport:
    """What a callback is told after each step.

    Attributes:
        index: the step, from 0.
        t: the time reached.
        x: (B, …) the state there, in path units.
        data: (B, …) the data estimate made in this step, in the data's own units: what a preview should show.
        nfe: network evaluations per sample so far.
    """

    index: int
    t: float
    x: Tensor
    nfe: int
    _data: Callable[[], Tensor] = field(repr=False)

    @property
    def data(self) -> Tensor:
        return self._data()


def plan(model: Model, solver: Solver, times: Sequence[float]) -> list[Step]:
    """The rows of every step of this solver along these times."""
    return _Planner(model, solver, times).steps()


def nfe(model: Model, solver: str | Solver, steps: int | None = None, times: Any = None) -> int:
    """Network evaluations per sample that `sample` would make with these arguments."""
    nodes = grids.resolve(times, model.path, steps, DEFAULT_STEPS)
    return sum(len(step.stages) for step in plan(model, solvers.named(solver), nodes))


class _Planner:
    """Traces the steps, asking the model for the queries of all times at once: first the grid's, then any between."""

    def __init__(self, model: Model, solver: Solver, times: Sequence[float]) -> None:
        self.model, self.solver, self.times = model, solver, list(times)
        # A run that ends on the data never calls the network at sigma = 0, whatever the path's own end.
        self.lands = self.times[-1] == 1.0
        visited = self.times[:-1] if self.lands else self.times
        self.queries: dict[float, Query] = dict(zip(visited, model.queries(visited)))

    def query_at(self, t: float) -> Query:
        if t not in self.queries:
            self.queries[t] = self.model.queries([t])[0]
        return self.queries[t]

    def steps(self) -> list[Step]:
        steps, last = [], len(self.times) - 2
        for index, (t, s) in enumerate(pairwise(self.times)):
            lands = self.lands and index == last
            end = Coefficients(1.0, 0.0, 0.0, 0.0) if lands else self.query_at(s).c
            at = At(t, s, self.query_at(t).c, end, lands, self.query_at)
            steps.append(trace(self.solver.step, at))
        return steps

    def reversed_steps(self) -> list[Step]:
        """The rows of the way back, from the data to the first time."""
        back = self.times[-2::-1]
        data = Coefficients(1.0, 0.0, 0.0, 0.0)
        steps = [trace(_leave_data, At(1.0, back[0], data, self.query_at(back[0]).c, False, self.query_at))]
        for t, s in pairwise(back):
            at = At(t, s, self.query_at(t).c, self.query_at(s).c, False, self.query_at)
            steps.append(trace(self.solver.step, at))
        return steps


def sample(
    model: Model,
    noise: int | Sequence[int] | Tensor | None = None,
    *,
    solver: str | Solver = DEFAULT_SOLVER,
    steps: int | None = None,
    times: Any = None,
    seed: int | None = None,
    first: int = 0,
    cond: Mapping[str, Tensor] | None = None,
    guidance: Callable[[Model], Model] | None = None,
    init: Tensor | None = None,
    state: Tensor | None = None,
    record: bool = False,
    callback: Callable[[StepReport], None] | None = None,
    progress: bool = False,
) -> Any:
    """Samples (B, …) in the data's own units; a `Trajectory` when `record`.

    Args:
        model: any model, in any notation.
        noise: the shape (B, …) to draw, a count B (the model knows its samples' shape), or the noise itself: a
            unit-variance tensor (B, …). The state starts at sigma(t0) * noise.
        solver: a name or an object; default "heun".
        steps: N steps use N + 1 times; default 18 (35 network calls with heun).
        times: a grid (`fl.grids`) or its name, or an explicit rising list or tensor in [0, 1]; default uniform. A run
            that ends at 1 lands on the data, without noise; one that ends before returns its state, in path units.
        seed: of the start noise and the steps' noise, which are separate streams; None draws one from torch's
            generator (a Trajectory records it).
        first: makes these the samples first, first + 1, … of the seed: noise depends on (seed, sample) alone.
        cond: conditions by name, batch first, such as {"label": (B,) long}; what is missing is null.
        guidance: such as `fl.guidance.CFG(3.0)`.
        init: data (B, …), in the data's own units, to start from: alpha(t0) * init + sigma(t0) * noise.
        state: a state (B, …) in path units to resume from; noise is then not used.
        record: return the whole Trajectory.
        callback: called after every step with its `StepReport`.
        progress: show a progress bar.

    Raises:
        OptionError, ShapeError: for arguments that do not fit, before the first network call.
        DependenceError: for a stochastic solver on a model whose noise is not independent of its data.
    """
    solver = solvers.named(solver)
    model = inputs.guided(model, guidance)
    if solver.stochastic and not model.independent:
        raise DependenceError(
            f"solver {solver.name} needs the score, and this model's noise is not independent of its data (trained on "
            "pairs, by optimal transport or reflow); use an ODE solver, or model.assume_independent()"
        )
    nodes = grids.resolve(times, model.path, steps, DEFAULT_STEPS)
    seed, first = inputs.checked_seed(seed), inputs.checked_first(first)
    rows = plan(model, solver, nodes)
    x = inputs.start(model, noise, nodes[0], seed, first, init, state)
    run = _Run(model, rows, seed, first, inputs.conditions(model, cond, x))
    with torch.no_grad():
        return run(x, nodes, record, callback, progress)


class _Run:
    """One pass over the rows."""

    def __init__(self, model: Model, rows: list[Step], seed: int, first: int, cond: Mapping[str, Tensor]) -> None:
        self.model, self.rows, self.seed, self.first, self.cond = model, rows, seed, first, cond

    def __call__(
        self,
        x: Tensor,
        nodes: list[float],
        record: bool,
        callback: Callable[[StepReport], None] | None,
        progress: bool,
    ) -> Any:
        invert, nfe = self.model.normalisation.invert, 0
        states, estimates = [x], []
        for index, step in enumerate(_tracked(self.rows, progress)):
            slots: list[Any] = [x] + [None] * (step.slots - 1)
            for slot in step.noises:
                slots[slot] = self._noise(x, index, slot)
            for stage in step.stages:
                slots[stage.slot] = stage.query.call(stage.state(slots), self.cond)
            x, nfe = step.next(slots), nfe + len(step.stages)
            if record:
                states.append(x)
                estimates.append(invert(step.data(slots)))
            if callback is not None:
                callback(StepReport(index, step.s, x, nfe, lambda step=step, slots=slots: invert(step.data(slots))))
        if record:
            return Trajectory(torch.stack(states), torch.stack(estimates), nodes, nfe, self.seed)
        return invert(x) if nodes[-1] == 1.0 else x

    def _noise(self, x: Tensor, index: int, slot: int) -> Tensor:
        samples = range(self.first, self.first + len(x))
        draw = index * 16 + slot
        return random.normal(samples, x.shape[1:], self.seed, draw, random.STEP, x.dtype, x.device)


def encode(
    model: Model,
    data: Tensor,
    *,
    solver: str | Solver = DEFAULT_SOLVER,
    steps: int | None = None,
    times: Any = None,
    cond: Mapping[str, Tensor] | None = None,
    guidance: Callable[[Model], Model] | None = None,
    progress: bool = False,
) -> Tensor:
    """The unit-variance noise (B, …) that `sample` turns back into these data, by the ODE run backwards.

    The first step leaves sigma = 0, where no network is called: it solves x = alpha data + sigma noise(x) at the first
    noise level by four fixed-point calls, which is the inverse of the sampler's landing. Arguments as for `sample`, in
    the same sense: `times` rise, and give the levels visited in reverse.

    Raises:
        OptionError: for a stochastic solver, times that do not end on the data, or a single step from it to pure noise.
    """
    solver = solvers.named(solver)
    if solver.stochastic:
        raise OptionError(f"solver {solver.name} is stochastic and cannot be run backwards; expected an ODE solver")
    model = inputs.guided(model, guidance)
    nodes = grids.resolve(times, model.path, steps, DEFAULT_STEPS)
    if nodes[-1] != 1.0:
        raise OptionError(f"times end at {nodes[-1]:g}; expected an end at 1, where the data are")
    if model.path(nodes[-2]).alpha == 0.0:
        raise OptionError(
            "one step leads from the data straight to pure noise, which keeps nothing of them; expected 2"
        )
    x = inputs.fitting(model, model.normalisation.apply(inputs.as_state(data)), "data")
    run = _Run(model, _Planner(model, solver, nodes).reversed_steps(), 0, 0, inputs.conditions(model, cond, x))
    with torch.no_grad():
        state = run(x, [*nodes[::-1]], False, None, progress)
    return state / model.path(nodes[0]).sigma


def _leave_data(at: At) -> Row:
    """From the data to the first noise level: x = alpha data + sigma noise(x), by fixed-point iteration."""
    alpha, sigma = at.end.alpha, at.end.sigma
    state = alpha * at.x
    for _ in range(4):
        state = alpha * at.x + sigma * at.ask(state, at.s).noise
    return state


def _tracked(rows: list[Step], progress: bool) -> Any:
    if not progress:
        return rows
    from rich.progress import track

    return track(rows, description="sampling")
