"""Sampling: one loop for every solver and every model.

The plan is made first: the times, and each step's rows (see `solvers.rows`), all in float64 as Python floats. Then the
loop only calls the network, multiplies and adds, in float32 (float64 if the user's tensors are), without a host
synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fluvial import grids, random, solvers
from fluvial.errors import DependenceError, OptionError, ShapeError
from fluvial.model import Model
from fluvial.paths import Coefficients
from fluvial.predictions import Query
from fluvial.solvers import Solver
from fluvial.solvers.rows import At, Step, trace

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
        for index, (t, s) in enumerate(zip(self.times, self.times[1:])):
            lands = self.lands and index == last
            end = Coefficients(1.0, 0.0, 0.0, 0.0) if lands else self.query_at(s).c
            at = At(t, s, self.query_at(t).c, end, lands, self.query_at)
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
    if guidance is not None:
        model = guidance(model)
    if solver.stochastic and not model.independent:
        raise DependenceError(
            f"solver {solver.name} needs the score, and this model's noise is not independent of its data (trained on "
            "pairs, by optimal transport or reflow); use an ODE solver, or model.assume_independent()"
        )
    nodes = grids.resolve(times, model.path, steps, DEFAULT_STEPS)
    seed = _checked_seed(seed)
    rows = plan(model, solver, nodes)
    x = _start(model, noise, nodes[0], seed, first, init, state)
    run = _Run(model, rows, seed, first, _conditions(model, cond, x))
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


def _tracked(rows: list[Step], progress: bool) -> Any:
    if not progress:
        return rows
    from rich.progress import track

    return track(rows, description="sampling")


def _start(
    model: Model,
    noise: int | Sequence[int] | Tensor | None,
    t: float,
    seed: int,
    first: int,
    init: Tensor | None,
    state: Tensor | None,
) -> Tensor:
    """The state the run starts from, in path units."""
    if state is not None:
        if noise is not None or init is not None:
            raise OptionError("state was given together with noise or init; expected state alone to resume from")
        return _fitting(model, _as_state(state), "state")
    if init is not None and noise is None:
        noise = tuple(init.shape)
    if isinstance(noise, bool) or noise is None:
        raise OptionError("noise is missing; expected a shape (B, …), a count, or a noise tensor")
    if isinstance(noise, int):
        if model.shape is None:
            raise OptionError(
                f"noise is the count {noise}, but the model does not know its shape; expected ({noise}, …)"
            )
        noise = (noise, *model.shape)
    if not isinstance(noise, Tensor):
        shape = tuple(noise)
        if not shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
            raise OptionError(f"noise is {noise!r}; expected a shape of whole numbers, 1 or more, or a noise tensor")
        samples = range(first, first + shape[0])
        dtype = torch.float64 if init is not None and init.dtype == torch.float64 else torch.float32
        noise = random.normal(samples, shape[1:], seed, stream=random.START, dtype=dtype, device=model.device)
    noise = _fitting(model, _as_state(noise), "noise")
    c = model.path(t)
    if init is None:
        return noise if c.sigma == 1.0 else noise * c.sigma
    if init.shape != noise.shape:
        raise ShapeError(f"init has shape {tuple(init.shape)} and noise {tuple(noise.shape)}; expected the same")
    data = model.normalisation.apply(_as_state(init).to(noise))
    return torch.add(data * c.alpha, noise, alpha=c.sigma)


def _checked_seed(seed: int | None) -> int:
    if seed is None:
        return random.fresh_seed()
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise OptionError(f"seed is {seed!r}; expected a whole number from 0 to 2**64 - 1")
    return seed


def _as_state(x: Tensor) -> Tensor:
    """Solver states are float32, or float64 where the user's tensor is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _fitting(model: Model, x: Tensor, what: str) -> Tensor:
    """x, after checking its channels against what the model was trained on."""
    shape = model.shape
    if shape is not None and (x.ndim != len(shape) + 1 or x.shape[1] != shape[0]):
        raise ShapeError(f"{what} has shape {tuple(x.shape)}; expected (B, {', '.join(map(str, shape))})")
    return x


def _conditions(model: Model, cond: Mapping[str, Tensor] | None, x: Tensor) -> dict[str, Tensor]:
    """The conditions on x's device, checked: batch first, labels within the model's classes."""
    checked: dict[str, Tensor] = {}
    for name, value in (cond or {}).items():
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != len(x):
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"condition {name!r} has {given}; expected a tensor with {len(x)} entries, batch first")
        null = (model.null or {}).get(name)
        if isinstance(null, int) and not value.is_floating_point():
            low, high = int(value.min()), int(value.max())
            if low < 0 or high > null:
                raise OptionError(
                    f"condition {name!r} has values from {low} to {high}; expected 0 to {null - 1}, or {null} for none"
                )
        checked[name] = value.to(x.device)
    return checked
