"""Solvers: facts, and a step as rows of numbers. `sampling` has the one loop that runs them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fluvial.errors import OptionError, one_of
from fluvial.solvers.base import Solver
from fluvial.solvers.deterministic import DDIM, Euler, Heun
from fluvial.solvers.stochastic import EulerMaruyama, Langevin

__all__ = ["DDIM", "Euler", "EulerMaruyama", "Heun", "Langevin", "Solver", "named", "names"]

_NAMED: dict[str, type[Solver]] = {
    "euler": Euler,
    "heun": Heun,
    "ddim": DDIM,
    "euler_maruyama": EulerMaruyama,
    "langevin": Langevin,
}


def names() -> list[str]:
    """The solvers' names, as `named` takes them."""
    return list(_NAMED)


def named(solver: str | Solver, **options: Any) -> Solver:
    """A solver by its name in the field, with its options; a Solver object as it is."""
    if isinstance(solver, Solver):
        if options:
            raise OptionError(f"{solver} has its options already; give {', '.join(options)} when making it")
        return solver
    if solver not in _NAMED:
        raise one_of("solver", solver, _NAMED)
    cls = _NAMED[solver]
    allowed = [f.name for f in fields(cls)]
    for option in options:
        if option not in allowed:
            raise (
                one_of(f"option of solver {solver!r}", option, allowed)
                if allowed
                else OptionError(f"solver {solver!r} takes no options; {option!r} was given")
            )
    return cls(**options)
