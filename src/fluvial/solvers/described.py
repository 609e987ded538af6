"""Solvers for people who type: the facts of each in a row, and its options read from text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fluvial import paths
from fluvial.errors import OptionError, one_of
from fluvial.paths import Path
from fluvial.solvers.base import Solver

# In a few words: a class that has several names says what all of them share.
_SUMMARIES = {
    "euler": "along the velocity, on the path's own clock",
    "heun": "Euler, corrected by the velocity at its end",
    "midpoint": "the velocity half-way",
    "rk4": "classical Runge-Kutta",
    "dopri5": "to a tolerance, with steps of its own",
    "ddim": "the pair remixed at the next time; natural Euler",
    "jump": "a flow map's: one call to the next time",
    "dpmpp_2m": "DPM-Solver++(2M): the last two data estimates",
    "dpmpp_3m": "DPM-Solver++(3M): the last three data estimates",
    "dpmpp_2s": "DPM-Solver++(2S): one-step, no memory",
    "dpmpp_3s": "DPM-Solver++(3S): one-step, no memory",
    "unipc": "UniPC: as dpmpp_2m, each step taken again with its end",
    "deis": "DEIS: the last three noise estimates, in time",
    "ipndm": "iPNDM: the last four noise estimates, fixed weights",
    "vab": "Adams-Bashforth of v, in the angle",
    "vabm": "Adams-Bashforth-Moulton of v, in the angle",
    "euler_maruyama": "the reverse SDE at rate kappa",
    "langevin": "the flow with a Langevin correction at rate gamma",
    "ddpm": "DDPM's ancestral sampling",
    "ancestral": "another name of ddpm",
    "stochastic_euler": "noise mixed afresh at rate gamma, then ddim",
    "noise_refresh": "noise mixed afresh per unit of time, then ddim",
    "overshoot": "Euler past the target, and noised back to it",
    "churn": "EDM's: noise raised before each Heun step",
    "restart": "noised back and integrated again, several times",
    "sde_dpmpp_2m": "SDE-DPM-Solver++(2M)",
    "seeds": "SEEDS-2: one-step, for the reverse SDE",
    "predictor_corrector": "a step of ddim, then Langevin steps in place",
    "annealed_langevin": "Langevin steps at every noise level, no ODE",
}


@dataclass(frozen=True)
class Facts:
    """What a solver is, by its name and default options: see `Solver`."""

    name: str
    kind: Literal["ODE", "SDE"]
    order: int
    calls: int
    memory: int
    needs: str
    summary: str


def facts(name: str, solver: Solver) -> Facts:
    """The facts of a solver; a name without a summary of its own is described by its class."""
    summary = _SUMMARIES.get(name) or (type(solver).__doc__ or "").splitlines()[0]
    kind = "SDE" if solver.stochastic else "ODE"
    return Facts(name, kind, solver.order, solver.stages, solver.memory, solver.needs, summary)


_READERS: dict[Any, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
    Path: paths.named,
}
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", Path: "the name of a path"}


def read_option(solver: Solver, name: str, text: str) -> Any:
    """The value of an option as typed, read as what the solver's field of this name holds.

    Raises:
        OptionError: for an option that the solver lacks or no text can hold, and for a text that is no such value.
    """
    allowed = [field.name for field in fields(solver)]
    if name not in allowed:
        raise one_of(f"option of {solver.name}", name, allowed)
    hint = get_type_hints(type(solver))[name]
    expected: list[str] = []
    for kind in (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,):
        if get_origin(kind) is Literal:
            if text in get_args(kind):
                return text
            expected += get_args(kind)
        elif kind in _READERS:
            expected.append(_EXPECTED[kind])
            with contextlib.suppress(KeyError, ValueError):
                return _READERS[kind](text)
    if not expected:
        raise OptionError(f"option {name!r} of {solver.name} cannot be given as text; expected a solver made in Python")
    raise OptionError(f"option {name!r} of {solver.name} is {text!r}; expected {' or '.join(expected)}")
