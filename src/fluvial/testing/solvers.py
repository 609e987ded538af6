"""The contract of a solver."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fluvial import paths, sampling, solvers
from fluvial.errors import DependenceError
from fluvial.exact import Empirical
from fluvial.model import Model
from fluvial.paths import Path, Rectified
from fluvial.plans import forward
from fluvial.solvers import Dopri5, Leg, Solver
from fluvial.solvers.rows import At, Row, trace
from fluvial.testing.oracle import line, normal, plane, quantiles, std_ratio, uniform
from fluvial.testing.report import Fault, Figure, Report, label, run

PATHS = ("rectified", "vp", "cosine", "ve", "edm")

_LOW, _HIGH = 0.05, 0.95
_FLOOR = 1e-11  # an error this small is rounding, and says nothing of an order


def check_solver(solver: str | Solver, paths: Sequence[str | Path] = PATHS) -> Report:
    """Checks a solver: facts, order, exact cases, landing, counted calls, no hidden state, and the law.

    Args:
        solver: an object, or a name.
        paths: on which to check it, paths or their names: the law on the first two, all else on all.

    Returns:
        What was measured.

    Raises:
        ContractError: at the first check that fails.
    """
    given = solvers.named(solver)
    adaptive = isinstance(given, Dopri5)
    return run(label(given), _ADAPTIVE if adaptive else _CHECKS, given, [_path(path) for path in paths])


def _path(path: str | Path) -> Path:
    return paths.named(path)


# What it says of itself


def facts(solver: Solver, on: list[Path]) -> Iterator[Figure]:
    """Order, stages and memory are whole numbers; what is said of noise is true; the legs cover the times."""
    if not isinstance(solver, Solver):
        raise Fault(f"a {type(solver).__name__} was given; expected a subclass of fl.solvers.Solver")
    for name, least in (("order", 1), ("stages", 1), ("memory", 0)):
        value = getattr(solver, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise Fault(f"{name} is {value!r}; expected a whole number, {least} or more")
        yield Figure(name, value, least=least)
    if not isinstance(solver.stochastic, bool):
        raise Fault(f"stochastic is {solver.stochastic!r}; expected True or False")
    needed = ("velocity", "data", "noise", "v", "score")
    if solver.needs not in needed:
        raise Fault(f"needs is {solver.needs!r}; expected one of {', '.join(needed)}")
    if solver.stochastic != (solver.needs == "score"):
        raise Fault(
            f"needs is {solver.needs!r} and stochastic {solver.stochastic}; expected 'score' where there is noise"
        )
    if isinstance(solver, Dopri5):
        return
    drawn = sum(len(step.noises) for step in forward(line().model(on[0]), solver, uniform(5)))
    if bool(drawn) != solver.stochastic:
        raise Fault(f"stochastic is {solver.stochastic} and {drawn} noises are drawn in 5 steps; expected agreement")
    legs = solver.legs(uniform(6), on[0])
    joined = all(a.s == b.t for a, b in pairwise(legs))
    if not (joined and legs[0].t == 0.0 and legs[-1].s == 1.0):
        raise Fault(f"the legs of a run go {[(leg.t, leg.s) for leg in legs]}; expected each from where the last ended")


def stages(solver: Solver, on: list[Path]) -> Iterator[Figure]:
    """A step well on its way, that does not land, makes `stages` calls."""
    for path in on:
        step = forward(plane().model(path), solver, uniform(solver.memory + 4, high=0.9))[-1]
        yield Figure(f"calls of a step on {label(path)}", len(step.stages), solver.stages, solver.stages)


def calls(solver: Solver, on: list[Path]) -> Iterator[Figure]:
    """Calls counted at the network are those reported, and none is made at sigma = 0."""
    for path in on:
        for steps in (1, 2, 5):
            network = _Network()
            model = Model(network, path, "v")
            result = sampling.sample(model, normal(3, 2), solver=solver, steps=steps, seed=0, record=True)
            what = f"{steps} steps on {label(path)}"
            if not isinstance(solver, Dopri5):  # which may ask at the last noise level of a path that has one
                yield Figure(f"calls at t = 1, {what}", network.times.count(1.0), 0, 0)
            yield Figure(f"smallest sigma asked, {what}", min(path(t).sigma for t in network.times), least=1e-300)
            yield Figure(f"calls counted, {what}", len(network.times), result.nfe, result.nfe)
            if not isinstance(solver, Dopri5):
                planned = sampling.nfe(model, solver, steps)
                yield Figure(f"calls planned, {what}", planned, result.nfe, result.nfe)


def few_steps(solver: Solver, on: list[Path]) -> Iterator[Figure]:
    """One, two and three steps give finite samples, in float32 and float64."""
    for path in on:
        for steps in (1, 2, 3):
            for dtype in (torch.float32, torch.float64):
                x = _run(plane().model(path), solver, normal(16, 2, dtype=dtype), steps)
                if x.dtype != dtype:
                    raise Fault(f"samples are {x.dtype} for noise of {dtype}; expected the same")
                bad = int((~x.isfinite()).sum())
                yield Figure(f"count of non-finite numbers, {steps} steps on {label(path)}", bad, 0, 0)


# Exact cases


def landing(solver: Solver, on: list[Path]) -> Iterator[Figure]:
    """Of a single data point any run ends on that point: it lands on the data estimate, and leaves no noise."""
    point = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    for path in on:
        for steps in (1, 2, 3, 10):
            x = _run(Empirical(point).model(path), solver, normal(8, 2), steps)
            error = float((x - point).abs().nan_to_num(nan=math.inf).max())
            yield Figure(f"distance from a single data point, {steps} steps on {label(path)}", error, 1e-9)


def straight_flow(solver: Solver, on: list[Path]) -> Iterator[Figure]:
    """A rectified flow on straight lines is solved in any number of steps (one, where another path's clock is used)."""
    if solver.stochastic:
        return
    shift, noise = torch.tensor([2.0, -1.0], dtype=torch.float64), normal(8, 2)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return shift - 0.75 * (x - t[:, None] * shift) / (1.0 - 0.75 * t[:, None])

    for steps in (1,) if getattr(solver, "along", None) not in (None, Rectified()) else (1, 2, 7):
        x = _run(Model(velocity, Rectified(), independent=False), solver, noise, steps)
        error = float((x - (0.25 * noise + shift)).abs().nan_to_num(nan=math.inf).max())
        yield Figure(f"error on a straight flow, {steps} steps", error, 1e-9)


# Convergence


def order(solver: Solver, on: list[Path]) -> Iterator[Figure]:
    """Without noise, the error falls as steps^-order: no more than 0.2 below what is declared."""
    if solver.stochastic:
        return
    steps = 200 if solver.order >= 4 and solver.memory else 150
    for path in on:
        first, second = (_error(solver, path, n) for n in (steps, 2 * steps))
        observed = math.log2(first / second) if second > _FLOOR else float(solver.order)
        yield Figure(f"order on {label(path)}", observed, least=solver.order - 0.2)


def law(solver: Solver, on: list[Path]) -> Iterator[Figure]:
    """On Gaussian data the standard deviation tends to the true one: within 5 % at 200 steps, and nearer than at 50."""
    for path in on[:2]:
        coarse, fine, between = (
            abs(std_ratio(path, solver, steps, end) - 1.0) for steps, end in ((50, 1.0), (200, 1.0), (200, 0.8))
        )
        yield Figure(f"relative error of std, 200 steps on {label(path)}", fine, 0.05)
        # What a run does once, however many its steps (a restart, say), may leave this little.
        yield Figure(f"the same, against 50 steps on {label(path)}", fine, max(0.8 * coarse, 2e-3))
        yield Figure(f"relative error of std at t = 0.8, 200 steps on {label(path)}", between, 0.05)


def tolerance(solver: Dopri5, on: list[Path]) -> Iterator[Figure]:
    """The error follows the tolerances: within a hundred of them, and smaller by ten where they are by a hundred."""
    for path in on:
        errors = []
        for wanted in (1e-3, 1e-5, 1e-7):
            errors.append(_error(replace(solver, rtol=wanted, atol=wanted), path, 1))
            yield Figure(f"error at tolerance {wanted:g} on {label(path)}", errors[-1], 100 * wanted)
        for coarse, fine in pairwise(errors):
            yield Figure(f"error at a hundredth of the tolerance on {label(path)}", fine, coarse / 10)


def _error(solver: Solver, path: Path, steps: int) -> float:
    """The root mean square error over the states at t = 0.95, of runs from t = 0.05."""
    x = sampling.sample(
        line().model(path), state=quantiles(path, _LOW), solver=solver, times=uniform(steps, _LOW, _HIGH), seed=0
    )
    return float((x - quantiles(path, _HIGH)).square().mean().sqrt())


# Runs that do not know of each other


def batch(solver: Solver, on: list[Path]) -> Iterator[Figure]:
    """A sample does not depend on those beside it."""
    noise = normal(4, 2)
    for path in on:
        model = plane().model(path)
        whole = _run(model, solver, noise, 5)
        alone = torch.cat([_run(model, solver, noise[i : i + 1], 5, first=i) for i in range(4)])
        yield Figure(f"sample alone against in a batch, on {label(path)}", _largest(alone - whole), 1e-9)


def repeats(solver: Solver, on: list[Path]) -> Iterator[Figure]:
    """The same run gives the same, again and with other runs before it and inside it."""
    noise = normal(4, 2)
    for path in on:
        # A model of its own each time: plans are kept with the model, and would hide what a solver remembers.
        other = partial(_run, plane().model(path), solver, normal(3, 2))
        first = _run(plane().model(path), solver, noise, 5)
        again = _run(plane().model(path), solver, noise, 5)
        other(3)
        inside = _run(plane().model(path), solver, noise, 5, callback=lambda step, other=other: other(step.index + 2))
        yield Figure(f"a second run against the first, on {label(path)}", _largest(again - first), 0.0)
        yield Figure(f"with other runs between, on {label(path)}", _largest(inside - first), 0.0)


def pure(solver: Solver, on: list[Path]) -> Iterator[Figure]:
    """A step is a function of what it is given: traced twice, it is the same."""
    for path in on:
        twice = _Twice(solver)
        plan = forward(plane().model(path), twice, uniform(6))
        yield Figure(f"steps that differ when traced again, on {label(path)}", twice.differing[0], 0, 0)
        yield Figure(f"steps traced on {label(path)}", len(plan), least=6)


def dependence(solver: Solver, on: list[Path]) -> Iterator[Figure]:
    """Noise needs a score: a stochastic solver refuses a model without one before any call, others do not ask."""
    network = _Network()
    model = Model(network, on[0], "v", independent=False)
    try:
        _run(model, solver, normal(3, 2), 3)
    except DependenceError:
        if not solver.stochastic:
            raise Fault("a model of dependent noise was refused; expected an ODE solver to take it") from None
        yield Figure("network calls before the refusal", len(network.times), 0, 0)
        return
    if solver.stochastic:
        raise Fault("a model of dependent noise was taken; expected a DependenceError, as there is no score")
    yield Figure("network calls on a model of dependent noise", len(network.times), least=1)


class _Network:
    """Returns its input, and remembers the times it was asked at."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(float(t[0]))
        return x


@dataclass(frozen=True)
class _Twice(Solver):
    """A solver whose every step is traced twice, and compared."""

    solver: Solver
    differing: list[int] = field(default_factory=lambda: [0], compare=False)

    @property
    def memory(self) -> int:
        return self.solver.memory

    def legs(self, times: Sequence[float], path: Path) -> list[Leg]:
        return self.solver.legs(times, path)

    def step(self, at: At) -> Row:
        again = copy.copy(at)
        again.stages, again.noises, again.kept = list(at.stages), list(at.noises), {}
        other, row = trace(self.solver.step, again), self.solver.step(at)
        asked = [(stage.state, stage.t) for stage in at.stages]
        kept = tuple(kept.fixed() for kept in at.kept.values())
        found = (row.fixed(), kept, asked)
        expected = (other.next, other.kept, [(stage.state, stage.t) for stage in other.stages])
        self.differing[0] += repr(found) != repr(expected)
        return row


def _run(
    model: Model,
    solver: Solver,
    noise: Tensor,
    steps: int,
    first: int = 0,
    callback: Callable[[Any], Any] | None = None,
) -> Tensor:
    return sampling.sample(
        model, noise, solver=solver, steps=steps, seed=0, first=first, callback=callback, check=False
    )


def _largest(difference: Tensor) -> float:
    return float(difference.abs().nan_to_num(nan=math.inf).max())


_ADAPTIVE = (facts, calls, few_steps, landing, straight_flow, tolerance, batch, repeats, dependence)
_CHECKS = (
    facts, stages, calls, few_steps, landing, straight_flow, order, law, batch, repeats, pure, dependence,
)  # fmt: skip
