"""Sampling: one loop for every solver and every model.

The plan is made first: the times, and each step's rows (see `solvers.rows`), all in float64 as Python floats. Then the
loop only calls the network, multiplies and adds, in float32 (float64 if the user's tensors are), without a host
synchronisation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fluvial import inputs, plans, solvers
from fluvial.adaptive import AdaptiveRun
from fluvial.errors import DependenceError, OptionError
from fluvial.model import Model
from fluvial.plans import plan
from fluvial.running import Callback, Drawn, Run, StepReport
from fluvial.solvers import Solver

__all__ = [
    "RoundTrip",
    "StepReport",
    "Trajectory",
    "decode",
    "encode",
    "integrate",
    "nfe",
    "plan",
    "round_trip",
    "sample",
]

DEFAULT_SOLVER, DEFAULT_STEPS = "heun", 18
Steps = int | Sequence[int]


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


def nfe(model: Model, solver: str | Solver, steps: Steps | None = None, times: Any = None) -> int:
    """Network evaluations per sample that `sample` would make with these arguments."""
    solver = suited(solvers.named(solver), model)
    return sum(len(step.stages) for step in plan(model, solver, _nodes(model, solver, times, steps)))


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _or_composed(function: _Function) -> _Function:
    """The function, but for what samples by itself: compositions of models, which have a `sample_with`."""

    @functools.wraps(function)
    def call(model: Any, *start: Any, **options: Any) -> Any:
        own = getattr(model, "sample_with", None)
        return function(model, *start, **options) if own is None else own(*start, **options)

    return call  # type: ignore[return-value]


@_or_composed
def sample(
    model: Model,
    start: int | Sequence[int] | Tensor | None = None,
    /,
    *,
    noise: str | Sequence[int] | Tensor | None = None,
    solver: str | Solver | None = None,
    steps: Steps | None = None,
    nfe: int | None = None,
    times: Any = None,
    seed: int | None = None,
    first: int = 0,
    cond: Mapping[str, Tensor] | None = None,
    guidance: Callable[[Model], Model] | None = None,
    init: Tensor | None = None,
    strength: float | None = None,
    state: Tensor | None = None,
    record: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
    differentiable: bool = False,
    check: bool = True,
) -> Any:
    """Samples (B, …) in the data's own units; a `Trajectory` when `record`.

    Args:
        model: any model, in any notation.
        start: the shape (B, …) to draw, a count B (the model knows its samples' shape), or the noise itself: a
            unit-variance tensor (B, …). The state starts at sigma(t0) * noise.
        noise: "brownian" makes the steps' noise an increment of one Brownian path, which stays the same when the
            number of steps changes; "independent" (the default) numbers it by the step. A tensor or a shape here is
            taken as `start`.
        solver: a name or an object; default "heun", and "jump" in one step for a flow map.
        steps: N steps use N + 1 times; default 18 (35 network calls with heun). Dopri5 makes its own steps between
            these times, and its default is 1. A model straightened piece by piece takes a number for each segment,
            (1, 9), too; of a single number each gets its share.
        times: a grid (`fl.grids`) or its name, or an explicit rising list or tensor in [0, 1]; default uniform. A run
            that ends at 1 lands on the data, without noise; one that ends before returns its state, in path units.
        seed: of the start noise and the steps' noise, which are separate streams; None draws one from torch's
            generator (a Trajectory records it).
        first: makes these the samples first, first + 1, … of the seed: noise depends on (seed, sample) alone.
        cond: conditions by name, batch first, such as {"label": (B,) long}; what is missing is null.
        guidance: such as `fl.guidance.CFG(3.0)`.
        init: data (B, …), in the data's own units, to start from: alpha(t0) * init + sigma(t0) * noise.
        strength: how strongly to change `init`, as the share of noise sigma/(alpha + sigma) it starts with, above 0 and
            up to 1: the run makes its `steps` from that level, at the times the grid has there.
        state: a state (B, …) in path units to resume from; noise is then not used.
        record: return the whole Trajectory.
        callback: called after every step with its `StepReport`.
        progress: show a progress bar.
        differentiable: let gradients flow from the samples to the start, the network and the conditions.
        check: look at the end of the run whether all is finite; if not, name the step and the culprit.

    Raises:
        OptionError, ShapeError: for arguments that do not fit, before the first network call.
        DependenceError: for a stochastic solver on a model whose noise is not independent of its data.
        NonFiniteError: when a number that is not finite comes out.
    """
    if model.jumps and nfe is None:
        solver, steps = solver or "jump", 1 if steps is None and times is None else steps
    solver, steps, times = _chosen(model, solver, steps, times, nfe)
    solver = suited(solver, model)
    model = inputs.guided(model, guidance)
    if solver.stochastic and not model.independent:
        raise DependenceError(
            f"solver {solver.name} needs the score, and this model's noise is not independent of its data (trained on "
            "pairs, by optimal transport or reflow); use an ODE solver, or model.assume_independent()"
        )
    if model.jumps and solver.stochastic and not isinstance(solver, solvers.Jump):
        raise OptionError(
            f"solver {solver.name} needs the score, and a flow map has none; expected fl.solvers.Jump(renoise=…)"
        )
    start, brownian = inputs.noise_and_start(noise, start)
    nodes = _nodes(model, solver, times, steps, strength)
    if strength is not None and init is None:
        raise OptionError(f"strength is {strength} without init; expected the data to change, init=(B, …)")
    seed, first = inputs.checked_seed(seed), inputs.checked_first(first)
    x = inputs.start(model, start, nodes[0], seed, first, init, state)
    cond = inputs.conditions(model, cond, x)
    with torch.set_grad_enabled(differentiable):
        run = _runner(model, solver, nodes, cond, Drawn(seed, first, model.path, brownian))
        states, estimates, reached, report = [x], [], [nodes[0]], StepReport(-1, nodes[0], x, 0, lambda: x)
        for report in run.reports(x, progress):
            if record:
                reached.append(report.t)
                states.append(report.x)
                estimates.append(report.data)
            if callback is not None:
                callback(report)
        if check:
            run.check(x, report.x)
        if record:
            return Trajectory(torch.stack(states), torch.stack(estimates), reached, report.nfe, seed)
        return model.normalisation.invert(report.x) if nodes[-1] == 1.0 else report.x


def _chosen(
    model: Model, solver: str | Solver | None, steps: Steps | None, times: Any, nfe: int | None
) -> tuple[Solver, Any, Any]:
    """The solver, the steps and the times asked for, or those of a budget."""
    if nfe is None:
        return solvers.named(DEFAULT_SOLVER if solver is None else solver), steps, times
    if solver is not None or steps is not None:
        raise OptionError(f"nfe is {nfe} together with solver or steps; expected the budget alone, or those")
    while hasattr(model, "source"):  # what the network itself puts out, below conversions and guidance
        model = model.source  # type: ignore[attr-defined]
    chosen, grid = solvers.recommended(nfe, model.prediction)
    return chosen, nfe, grid if times is None else times


def suited(solver: Solver, model: Model) -> Solver:
    """The solver with what it chooses by itself for this model."""
    return solver.suited(model) if isinstance(solver, solvers.Jump) else solver


def _runner(model: Model, solver: Solver, nodes: list[float], cond: Mapping[str, Tensor], drawn: Drawn) -> Any:
    if isinstance(solver, solvers.Dopri5):
        return AdaptiveRun(model, solver, nodes, cond)
    return Run(model, plan(model, solver, nodes), cond, drawn)


def _nodes(model: Model, solver: Solver, times: Any, steps: Steps | None, strength: float | None = None) -> list[float]:
    """The times of a run."""
    default = 1 if isinstance(solver, solvers.Dopri5) else DEFAULT_STEPS
    if strength is None:
        return model.times(times, steps, default)
    if not 0.0 < strength <= 1.0:
        raise OptionError(f"strength is {strength}; expected a share of noise above 0, up to 1")
    start = model.path.time(2.0 * math.log((1.0 - strength) / strength)) if strength < 1.0 else 0.0
    # A list, or a grid of its own length, keeps what lies beyond the start; of other grids a finer one is taken, which
    # has as many steps there as were asked for.
    wanted = default if steps is None else steps
    if not isinstance(wanted, int):
        raise OptionError(f"steps is {steps} together with strength; expected one number")
    own = isinstance(times, (list, tuple, Tensor)) or (hasattr(times, "times") and hasattr(times, "count"))
    for finer in [steps] if own else range(wanted, 100 * wanted):
        inside = [t for t in model.times(times, finer, default) if t > start]
        if own or len(inside) >= wanted:
            return [start, *(inside if own else inside[-wanted:])]
    raise OptionError(f"strength is {strength}, below the levels of these times; expected a larger one, or other times")


def integrate(
    model: Model,
    x: Tensor,
    times: Sequence[float],
    *,
    solver: str | Solver = DEFAULT_SOLVER,
    cond: Mapping[str, Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """The state (B, …) at the last of these times from x at the first, by the ODE, in path units; they rise or fall.

    Nothing lands: every time is a noise level the network is asked at (t = 1 too, where it ends the times).

    Raises:
        OptionError: for a stochastic solver.
    """
    solver = _ode(solvers.named(solver))
    cond = inputs.conditions(model, cond, x)
    times = [float(t) for t in times]
    adaptive = isinstance(solver, solvers.Dopri5)
    run = (
        AdaptiveRun(model, solver, times, cond, land=False)
        if adaptive
        else Run(model, plans.along(model, solver, times), cond)
    )
    with torch.no_grad():
        for report in run.reports(x):
            x = report.x
            if callback is not None:
                callback(report)
    return x


def encode(
    model: Model,
    data: Tensor,
    *,
    solver: str | Solver = DEFAULT_SOLVER,
    steps: Steps | None = None,
    times: Any = None,
    cond: Mapping[str, Tensor] | None = None,
    guidance: Callable[[Model], Model] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """The unit-variance noise (B, …) that `sample` turns back into these data, by the ODE run backwards.

    The first step leaves sigma = 0, where no network is called: it solves x = alpha data + sigma noise(x) at the first
    noise level by four fixed-point calls, which is the inverse of the sampler's landing. Arguments as for `sample`, in
    the same sense: `times` rise, and give the levels visited in reverse.

    Raises:
        OptionError: for a stochastic solver, times that do not end on the data, or a single step from it to pure noise.
    """
    solver = _ode(solvers.named(solver))
    model = inputs.guided(model, guidance)
    nodes = _nodes(model, solver, times, steps)
    if nodes[-1] != 1.0:
        raise OptionError(f"times end at {nodes[-1]:g}; expected an end at 1, where the data are")
    if model.path(nodes[-2]).alpha == 0.0 and not isinstance(solver, solvers.Dopri5):
        raise OptionError(
            "one step leads from the data straight to pure noise, which keeps nothing of them; expected 2"
        )
    x = inputs.fitting(model, model.normalisation.apply(inputs.as_state(data)), "data")
    cond = inputs.conditions(model, cond, x)
    if isinstance(solver, solvers.Dopri5):
        run = AdaptiveRun(model, solver, nodes[::-1], cond)
    else:
        run = Run(model, plans.plan_back(model, solver, nodes), cond)
    with torch.no_grad():
        end = x
        for report in run.reports(x, progress):
            end = report.x
            if callback is not None:
                callback(report)
        run.check(x, end)
    return end / model.path(nodes[0]).sigma


def decode(model: Model, noise: Tensor, **options: Any) -> Tensor:
    """The data (B, …) of this unit-variance noise: `sample` by an ODE, the way back from `encode`. Options as there."""
    _ode(_chosen(model, options.get("solver"), None, None, None)[0])
    return sample(model, noise, **options)


@dataclass
class RoundTrip:
    """Data, encoded and decoded again.

    Attributes:
        noise: (B, …) what `encode` gave.
        data: (B, …) what came back, in the data's own units.
        error: (B,) root mean square difference to the data given.
    """

    noise: Tensor
    data: Tensor
    error: Tensor


def round_trip(model: Model, data: Tensor, **options: Any) -> RoundTrip:
    """`encode`, then `decode`, and how far the data came back from where they started. Options as for `encode`."""
    noise = encode(model, data, **options)
    back = decode(model, noise, **options)
    return RoundTrip(noise, back, (back - data).flatten(1).square().mean(1).sqrt())


def _ode(solver: Solver) -> Solver:
    if solver.stochastic:
        raise OptionError(f"solver {solver.name} is stochastic and cannot be run backwards; expected an ODE solver")
    return solver
