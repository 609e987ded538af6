"""Solvers: facts, and a step as rows of numbers. `sampling` has the one loop that runs them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fluvial import predictions
from fluvial.errors import OptionError, one_of
from fluvial.predictions import Prediction
from fluvial.solvers.adaptive import Dopri5
from fluvial.solvers.base import Leg, Solver
from fluvial.solvers.correctors import AnnealedLangevin, PredictorCorrector
from fluvial.solvers.described import Facts, facts, read_option
from fluvial.solvers.deterministic import DDIM
from fluvial.solvers.exponential import Adams, SingleStep
from fluvial.solvers.jump import Jump
from fluvial.solvers.mixing import NoiseMixing, NoiseRefresh, StochasticEuler
from fluvial.solvers.overshoot import Churn, Overshoot, Restart
from fluvial.solvers.runge_kutta import RK4, Euler, Heun, Midpoint, RungeKutta
from fluvial.solvers.sde_exponential import SDEAdams, Seeds
from fluvial.solvers.stochastic import EulerMaruyama, Langevin

__all__ = [
    "DDIM", "RK4", "Adams", "AnnealedLangevin", "Churn", "Dopri5", "Euler", "EulerMaruyama", "Facts", "Heun", "Jump",
    "Langevin", "Leg", "Midpoint", "NoiseMixing", "NoiseRefresh", "Overshoot", "PredictorCorrector", "Restart",
    "RungeKutta", "SDEAdams", "Seeds", "SingleStep", "Solver", "StochasticEuler", "named", "names", "read_option",
    "recommended", "table",
]  # fmt: skip

# The field's names: a class, and the options that make it the method of that name.
_NAMED: dict[str, tuple[type[Solver], dict[str, Any]]] = {
    "euler": (Euler, {}),
    "heun": (Heun, {}),
    "midpoint": (Midpoint, {}),
    "rk4": (RK4, {}),
    "dopri5": (Dopri5, {}),
    "ddim": (DDIM, {}),
    "jump": (Jump, {}),
    "dpmpp_2m": (Adams, {"variable": "data", "rule": "midpoint"}),
    "dpmpp_3m": (Adams, {"variable": "data", "steps": 3, "rule": "halved"}),
    "dpmpp_2s": (SingleStep, {"variable": "data", "rule": "midpoint"}),
    "dpmpp_3s": (SingleStep, {"variable": "data", "steps": 3}),
    "unipc": (Adams, {"variable": "data", "rule": "midpoint", "correct": True, "taper": True}),
    "deis": (Adams, {"variable": "noise", "clock": "time", "steps": 3}),
    "ipndm": (Adams, {"variable": "noise", "clock": "plain", "steps": 4, "rule": "equal"}),
    "vab": (Adams, {"variable": "v", "clock": "plain"}),
    "vabm": (Adams, {"variable": "v", "clock": "plain", "steps": 3, "correct": True}),
    "euler_maruyama": (EulerMaruyama, {}),
    "langevin": (Langevin, {}),
    "ddpm": (DDIM, {"eta": 1.0}),
    "ancestral": (DDIM, {"eta": 1.0}),
    "stochastic_euler": (StochasticEuler, {}),
    "noise_refresh": (NoiseRefresh, {}),
    "overshoot": (Overshoot, {}),
    "churn": (Churn, {}),
    "restart": (Restart, {}),
    "sde_dpmpp_2m": (SDEAdams, {}),
    "seeds": (Seeds, {}),
    "predictor_corrector": (PredictorCorrector, {}),
    "annealed_langevin": (AnnealedLangevin, {}),
}


def recommended(nfe: int, prediction: str | Prediction | None = None) -> tuple[Solver, str]:
    """A solver and the name of a grid for a budget of network calls, by measurement (benchmarks/accuracy_per_nfe.py).

    An Adams method in v with correction on the clock of the rectified flow, through two values below twelve calls and
    three from there on: on any path, deterministic, one call per step.

    A network that predicts the noise knows the data only to its error times sigma/alpha. What it says in pure noise
    then is worth little, and a correction, or a third value, would make much of it: two values are taken, and below
    twelve calls no correction.

    Args:
        nfe: the budget.
        prediction: what the network puts out, where that is known.
    """
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise OptionError(f"nfe is {nfe!r}; expected a whole number of network calls, 1 or more")
    if prediction is not None and isinstance(predictions.named(prediction), predictions.Noise | predictions.Score):
        return named("vab" if nfe < 12 else "vabm", steps=2), "flow"
    return named("vabm", steps=2 if nfe < 12 else 3), "flow"


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
    cls, preset = _NAMED[solver]
    allowed = [f.name for f in fields(cls)]
    for option in options:
        if option not in allowed:
            raise (
                one_of(f"option of solver {solver!r}", option, allowed)
                if allowed
                else OptionError(f"solver {solver!r} takes no options; {option!r} was given")
            )
    return cls(**{**preset, **options})


def table() -> list[Facts]:
    """The facts of every solver that has a name, with its default options."""
    return [facts(name, named(name)) for name in _NAMED]
