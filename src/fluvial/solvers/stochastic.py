"""SDE solvers: the flow with a Langevin correction, at any rate gamma(t).

    dZ = velocity dt + gamma w sigma score dt + √(2 gamma w sigma) dW,        w = alpha' sigma - alpha sigma'

has the path's marginals at every time for any gamma(t) >= 0: gamma = 0 is the ODE, gamma = 1/alpha the reverse SDE of
diffusion models. kappa = alpha gamma is the same rate counted per unit of log-SNR: it does not depend on the path.

Over a step from t to s the score's pull on the noise, gamma w (s - t)/sigma = r, is taken as 1 - exp(-r), which is r
for small steps and can never overshoot: large rates stay stable at few steps, with the same limit. The step that
lands on the data adds no noise.

Source: Hu, Liao, Liu, Liu: Flow to diffusion: Langevin is a guardrail (2024), https://rectifiedflow.github.io
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fluvial.errors import OptionError
from fluvial.solvers.base import Solver
from fluvial.solvers.rows import At, Row


def _euler_with_noise(at: At, gamma: float) -> Row:
    """One Euler-Maruyama step at the constant rate gamma; gamma = 0 gives Euler's row exactly."""
    estimate = at.ask(at.x, at.t)
    if at.lands:
        return estimate.data
    h = at.s - at.t
    flow = at.x + h * estimate.velocity
    if gamma == 0.0:
        return flow
    alpha, sigma, dalpha, dsigma = at.start
    pull = -math.expm1(-gamma * (dalpha * sigma - alpha * dsigma) * h / sigma)
    # w sigma score = -w noise, so the drift takes `pull` of the state's noise away, and as much variance comes back.
    return flow - (pull * sigma) * estimate.noise + (sigma * math.sqrt(2.0 * pull)) * at.randn()


@dataclass(frozen=True)
class Langevin(Solver):
    """The Langevin-corrected flow with gamma a number or a function of t; gamma = 0 is `Euler`, bit for bit.

    Args:
        gamma: >= 0; finite at both ends of the path. 0.5 is gentle; beyond 5 an imperfect model over-concentrates.
    """

    gamma: float | Callable[[float], float] = 0.5
    order = 1
    stages = 1

    def __post_init__(self) -> None:
        if not callable(self.gamma):
            _check_rate("gamma", self.gamma)

    @property
    def stochastic(self) -> bool:
        return callable(self.gamma) or self.gamma > 0.0

    def step(self, at: At) -> Row:
        return _euler_with_noise(at, _rate_at("gamma", self.gamma, at.t))


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """The reverse SDE at rate kappa = alpha gamma: 1 is the time reversal of the noising SDE, 0 is `Euler`.

    Where alpha = 0 (pure noise) the state is already stationary, and that step is a plain Euler step.

    Source: Song et al.: Score-based generative modeling through SDEs (2021), https://arxiv.org/abs/2011.13456, eq. 6
    """

    kappa: float | Callable[[float], float] = 1.0
    order = 1
    stages = 1

    def __post_init__(self) -> None:
        if not callable(self.kappa):
            _check_rate("kappa", self.kappa)

    @property
    def stochastic(self) -> bool:
        return callable(self.kappa) or self.kappa > 0.0

    def step(self, at: At) -> Row:
        kappa = _rate_at("kappa", self.kappa, at.t)
        return _euler_with_noise(at, kappa / at.start.alpha if at.start.alpha else 0.0)


def _rate_at(name: str, rate: float | Callable[[float], float], t: float) -> float:
    """The rate at time t, of a number or a function."""
    if not callable(rate):
        return rate
    value = float(rate(t))
    _check_rate(name, value, t)
    return value


def _check_rate(name: str, rate: float, t: float | None = None) -> None:
    if not (isinstance(rate, (int, float)) and math.isfinite(rate) and rate >= 0.0):
        where = "" if t is None else f" at t = {t:g}"
        raise OptionError(f"{name} is {rate!r}{where}; expected a finite number, 0 or more, or a function giving one")
