"""Rates of noise: how much of its noise a state exchanges for fresh noise, per unit of what, and every name for it.

A stochastic sampler forgets the noise N of its state at a rate kappa per unit of log-SNR, and takes as much fresh noise
in. Over a step from t to s,

    E = integral from t to s of kappa d(log_snr),        rho² = 1 - exp(-E)

is the share of variance that is renewed: of noise mixed in one step, or of many small steps together. So the law of the
samples does not depend on how a run is cut into steps. The rate is known by many names; with
w = alpha' sigma - alpha sigma' (so that d(log_snr)/dt = 2w/(alpha sigma)) and on a uniform clock of N steps,

| knob      | of                                   | kappa                                   |
|---|---|---|
| kappa     | reverse SDE; 1 is DDPM               | kappa                                   |
| gamma     | Langevin-corrected flow              | alpha gamma                             |
| sigma_l   | strength of its score term, sigma_l² | sigma_l² alpha/(w sigma)                |
| eta       | DDIM, ancestral (in small steps)     | eta²                                    |
| refresh   | noise refresh, per unit of time      | refresh alpha sigma/(2w)                |
| rho       | the same share rho of each of N steps| -N log(1 - rho²) alpha sigma/(2w)       |
| churn     | EDM's S_churn                        | churn alpha sigma/w                     |
| overshoot | AMO's c                              | overshoot (1 - t)                       |

kappa does not depend on the path, the others do. A share per step, `rho`, has no limit as steps grow: the same rho at
twice the steps is twice the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch

from fluvial.errors import OptionError, PathTimeError, one_of
from fluvial.paths import Coefficients, Path
from fluvial.solvers.base import Solver
from fluvial.solvers.integrals import gauss
from fluvial.solvers.rows import At

Rate = float | Callable[[float], float]


class Stochastic(Solver):
    """A solver that adds noise, and so needs the score; without a rate it needs what its ODE needs. Order 1, mostly."""

    ode_needs: ClassVar[str] = "velocity"

    @property
    def order(self) -> int:
        return 1

    @property
    def needs(self) -> str:  # type: ignore[override]
        return "score" if self.stochastic else self.ode_needs


def check_rate(name: str, rate: Rate) -> None:
    """Raises if a rate that is no function is not a number >= 0."""
    if not callable(rate):
        _check(name, rate)


def rate_at(name: str, rate: Rate, t: float) -> float:
    """The rate at time t, of a number or a function."""
    if not callable(rate):
        return rate
    value = float(rate(t))
    _check(name, value, t)
    return value


def positive(rate: Rate) -> bool:
    """Whether the rate is, or may be, above zero."""
    return callable(rate) or rate > 0.0


def _check(name: str, rate: object, t: float | None = None) -> None:
    if not (isinstance(rate, (int, float)) and 0.0 <= rate < math.inf):
        where = "" if t is None else f" at t = {t:g}"
        raise OptionError(f"{name} is {rate!r}{where}; expected a finite number, 0 or more, or a function giving one")


# The exponent E of a step


def exponent_of_kappa(at: At, kappa: Rate) -> float:
    """E = integral of kappa d(log_snr) over the step; 0 from pure noise, which is stationary already."""
    if at.start.alpha == 0.0:
        return 0.0
    if not callable(kappa):
        return kappa * log_snr_gain(at.start, at.end) if kappa else 0.0
    return _integral(at, lambda t, c: rate_at("kappa", kappa, t))


def exponent_of_gamma(at: At, gamma: Rate) -> float:
    """E = integral of 2 gamma w/sigma dt over the step: finite from pure noise too."""
    if not callable(gamma) and not gamma:
        return 0.0
    return _integral(at, lambda t, c: rate_at("gamma", gamma, t) * c.alpha)


def exponent_of_refresh(at: At, rate: Rate) -> float:
    """E = integral of the rate dt over the step."""
    if not callable(rate):
        return rate * (at.s - at.t)
    points, weights = gauss(_POINTS)
    half = (at.s - at.t) / 2
    return half * sum(w * rate_at("rate", rate, at.t + half * (1.0 + u)) for u, w in zip(points, weights))


def log_snr_gain(of: Coefficients, to: Coefficients) -> float:
    """The log-SNR gained on the way."""
    return 2.0 * (math.log(to.alpha / of.alpha) + math.log(of.sigma / to.sigma))


_POINTS = 32


def _integral(at: At, kappa: Callable[[float, Coefficients], float]) -> float:
    """The integral of kappa d(log_snr) over the step, by Gauss-Legendre.

    From pure noise the log-SNR is infinite, and it goes over m = log(1 + alpha/sigma) instead, which begins at 0:
    d(log_snr) = 2 (alpha + sigma)/alpha dm.
    """
    pure = at.start.alpha == 0.0
    low, high = (
        math.log1p(c.alpha / c.sigma) if pure else 2.0 * math.log(c.alpha / c.sigma) for c in (at.start, at.end)
    )
    points, weights = gauss(_POINTS)
    half = (high - low) / 2
    levels = low + half * (1.0 + torch.tensor(points, dtype=torch.float64))
    times = at.path.time(2.0 * torch.expm1(levels).log() if pure else levels).tolist()
    total = 0.0
    for weight, t, c in zip(weights, times, at.path.table(times)):
        total += weight * kappa(t, c) * (2.0 * (c.alpha + c.sigma) / c.alpha if pure else 1.0)
    return half * total


# Translations between knobs


class _Here(NamedTuple):
    """Where a knob is translated: a time, the coefficients there, and the number of steps of a uniform clock."""

    path: Path
    t: float
    c: Coefficients
    steps: int

    @property
    def per_time(self) -> float:
        """alpha sigma/w = 2 dt/d(log_snr)."""
        return self.c.alpha * self.c.sigma**2 / self.path.langevin(self.t)


_Formula = Callable[[float, _Here], float]

# knob: (kappa from it, it from kappa)
_KNOBS: dict[str, tuple[_Formula, _Formula]] = {
    "kappa": (lambda v, here: v, lambda k, here: k),
    "gamma": (lambda v, here: v * here.c.alpha, lambda k, here: k / here.c.alpha),
    "sigma_l": (
        lambda v, here: v * v * here.c.alpha / here.path.langevin(here.t),
        lambda k, here: math.sqrt(k * here.path.langevin(here.t) / here.c.alpha),
    ),
    "eta": (lambda v, here: v * v, lambda k, here: math.sqrt(k)),
    "refresh": (lambda v, here: v * here.per_time / 2, lambda k, here: 2 * k / here.per_time),
    "rho": (
        lambda v, here: -here.steps * math.log1p(-v * v) * here.per_time / 2,
        lambda k, here: math.sqrt(-math.expm1(-2 * k / (here.per_time * here.steps))),
    ),
    "churn": (lambda v, here: v * here.per_time, lambda k, here: k / here.per_time),
    "overshoot": (lambda v, here: v * (1 - here.t), lambda k, here: k / (1 - here.t)),
}


def translate(path: Path, value: Rate, given: str, wanted: str, steps: int | None = None) -> Callable[[float], float]:
    """One knob's setting as another's: a function of t that gives the same rate on this path.

    `translate(path, 1.0, "kappa", "gamma")` is the gamma(t) of the reverse SDE, for `Langevin`. Exact in the limit of
    small steps.

    Args:
        path: what the states lie on.
        value: of the knob `given`, a number or a function of t.
        given, wanted: knobs: kappa, gamma, sigma_l, eta, refresh, rho, churn, overshoot; see the module's table.
        steps: how many steps a uniform clock makes, for `rho`.

    Raises:
        OptionError: for an unknown knob, a bad value, or rho without steps.
        PathTimeError: from the function, at a time where no value of the wanted knob gives this rate.
    """
    for knob in (given, wanted):
        if knob not in _KNOBS:
            raise one_of("knob", knob, _KNOBS)
    check_rate(given, value)
    if "rho" in (given, wanted) and (steps is None or steps < 1):
        raise OptionError(f"steps is {steps}; expected how many steps a uniform clock makes, for a share rho of each")

    def translated(t: float) -> float:
        here = _Here(path, t, path(t), steps or 0)
        number = rate_at(given, value, t)
        if given == "rho" and not number < 1.0:
            raise OptionError(f"rho is {number:g} at t = {t:g}; expected a share below 1")
        try:
            return _KNOBS[wanted][1](_KNOBS[given][0](number, here), here)
        except ZeroDivisionError:
            raise PathTimeError(f"{given} = {number:g} at t = {t:g} is no finite {wanted} there") from None

    return translated
