"""Settings: how samples are drawn, and how that is typed on a command line."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluvial import grids, paths, sampling, solvers
from fluvial.errors import OptionError, one_of
from fluvial.guidance import CFG
from fluvial.model import Model, convert
from fluvial.paths import Path
from fluvial.running import StepReport
from fluvial.solvers import Dopri5, Solver

Axes = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """How samples are drawn: the arguments of `fl.sample`; `nfe` instead of steps is a budget of network calls.

    Of a system the solver may be several, by stage.
    """

    solver: Any
    steps: int | None = None
    nfe: int | None = None
    times: Any = None
    guidance: float | None = None
    path: Path | None = None

    def view(self, model: Model) -> Model:
        """The model in the notation it is sampled in."""
        return model if self.path is None else convert(model, path=self.path)

    def guide(self, model: Model) -> tuple[CFG | None, dict[str, float]]:
        """The guidance, and what the model is told of it: one that has learned to follow a scale is told it instead."""
        if self.guidance is None:
            return None, {}
        return (None, {"guidance": self.guidance}) if "guidance" in (model.null or {}) else (CFG(self.guidance), {})

    def fitted(self, model: Model) -> Setting:
        """The same with as many steps as are made: those that fit the budget, or the grid's own.

        Raises:
            OptionError: for a budget that is too small, and times that cannot be used.
        """
        view = self.view(model)
        solver = sampling.suited(self.solver, view)
        if self.nfe is None:
            default = 1 if isinstance(solver, Dopri5) else sampling.DEFAULT_STEPS
            nodes = view.times(self.times, self.steps, default)
            return replace(self, solver=solver, steps=len(nodes) - 1)
        # No step is without a call, and more steps never take fewer calls.
        costs = range(1, self.nfe + 1)
        steps = bisect_right(costs, self.nfe, key=lambda n: sampling.nfe(view, self.solver, n, self.times))
        if steps == 0:
            least = sampling.nfe(view, self.solver, 1, self.times)
            raise OptionError(f"nfe is {self.nfe}; expected {least} or more, which one step of {self.solver} takes")
        return replace(self, solver=solver, steps=steps)

    def record(self, model: Model) -> dict[str, Any]:
        """In words that JSON can hold."""
        return {
            "solver": repr(self.solver),
            "steps": self.steps,
            "grid": self.times or "uniform",
            "guidance": self.guidance,
            "path": self.view(model).path.config(),
        }


class Start(NamedTuple):
    """What all cells share: n noises of a seed, conditions by name, and whether the steps' noise is Brownian."""

    n: int
    seed: int = 0
    cond: Mapping[str, Tensor] = {}
    noise: str = "independent"


class Calls:
    """A callback of `fl.sample` that counts network calls: of every stage, `by_stage`, where there are several."""

    def __init__(self) -> None:
        self.by_stage: list[int] = []

    def __call__(self, step: StepReport) -> None:
        # A stage begins where the count of its steps does.
        if step.index == 0:
            self.by_stage.append(0)
        self.by_stage[-1] = step.nfe


class Drawn(NamedTuple):
    """Samples (n, …) on the processor, the network calls each took, and the seconds all of them took."""

    x: Tensor
    nfe: int
    seconds: float


def draw(model: Model, setting: Setting, start: Start, first: int = 0, progress: bool = False) -> Drawn:
    """The samples of a setting, from noises first … first + n - 1."""
    calls, began = Calls(), time.perf_counter()
    guidance, told = setting.guide(model)
    cond = {**start.cond, **{name: torch.full((start.n,), value) for name, value in told.items()}}
    x = sampling.sample(
        setting.view(model),
        start.n,
        noise=start.noise,
        solver=setting.solver,
        steps=setting.steps,
        times=setting.times,
        seed=start.seed,
        first=first,
        cond=cond,
        guidance=guidance,
        callback=calls,
        progress=progress,
    )
    return Drawn(x.cpu(), sum(calls.by_stage), time.perf_counter() - began)


# As typed.


def solver(name: str, options: Sequence[str]) -> Solver:
    """A solver from its name and its options, each name=value."""
    plain, read = solvers.named(name), {}
    for text in options:
        option, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"the solver's option is {text!r}; expected name=value")
        read[option] = solvers.read_option(plain, option, value)
    return solvers.named(name, **read)


def spelled(solver: Solver) -> str:
    """A solver as it is typed: its name and, after -O, the options that are not those of the name."""
    known = {name: solvers.named(name) for name in solvers.names()}
    exact = [name for name, other in known.items() if other == solver]
    if exact:
        return exact[0]
    spellings = []
    for name, other in known.items():
        if type(other) is type(solver):
            options = {field.name: getattr(solver, field.name) for field in fields(solver)}
            differs = [f"-O {key}={value}" for key, value in options.items() if value != getattr(other, key)]
            spellings.append([name, *differs])
    # Of several that are as close, the last: names go from plain to elaborate.
    return " ".join(min(spellings[::-1], key=len, default=[repr(solver)]))


def times(text: str) -> list[float]:
    """The times of "0,0.5,1"."""
    try:
        return [float(t) for t in text.split(",")]
    except ValueError:
        raise OptionError(f"times are {text!r}; expected numbers rising in [0, 1], such as 0,0.5,1") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise OptionError(f"{text!r} is no count; expected a whole number, 1 or more")
    return int(text)


def _scale(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"guidance is {text!r}; expected a number") from None


def _grid(text: str) -> str:
    if text not in grids.names():
        raise one_of("grid", text, grids.names())
    return text


READ: dict[str, Callable[[str], Any]] = {
    "solver": solvers.named,
    "steps": _count,
    "nfe": _count,
    "grid": _grid,
    "guidance": _scale,
    "path": paths.named,
}


def axes(texts: Sequence[str]) -> Axes:
    """What "solver=euler,heun" and "steps=4,8" ask to compare: {option: {value as given: what it means}}.

    Raises:
        OptionError: for more than two options, ones that cannot be compared, and values they do not have.
    """
    found: Axes = {}
    for text in texts:
        option, equals, values = text.partition("=")
        if not equals or not all(values.split(",")):
            raise OptionError(f"{text!r} is no comparison; expected option=value,value such as solver=euler,heun")
        if option not in READ:
            raise one_of("option to compare", option, READ)
        if option in found:
            raise OptionError(f"{option} is compared twice; expected all its values at once: {option}=value,value")
        found[option] = {value: READ[option](value) for value in values.split(",")}
    if not 1 <= len(found) <= 2:
        raise OptionError(f"{len(found)} options are compared; expected one or two")
    if "steps" in found and "nfe" in found:
        raise OptionError("steps and nfe are compared; expected one of them, since a budget says how many steps")
    return found
