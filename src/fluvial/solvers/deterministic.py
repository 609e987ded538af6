"""ODE solvers: dx/dt = velocity, integrated on the path's own clock, or along the path (ddim)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fluvial.errors import OptionError
from fluvial.solvers.base import Solver
from fluvial.solvers.rows import At, Row


@dataclass(frozen=True)
class Euler(Solver):
    """x + (s - t) velocity(x, t). It lands on the data estimate, which on the rectified path is the same thing."""

    order = 1
    stages = 1

    def step(self, at: At) -> Row:
        estimate = at.ask(at.x, at.t)
        if at.lands:
            return estimate.data
        return at.x + (at.s - at.t) * estimate.velocity


@dataclass(frozen=True)
class Heun(Solver):
    """x + (s - t)/2 (velocity(x, t) + velocity(x + (s - t) velocity(x, t), s)): the trapezoidal rule, explicit.

    It runs on the path's own clock; EDM's algorithm 1, which steps in sigma, is this on `EDM(rho=1)`. At sigma = 0 no
    second call is made: the last step lands on the first call's data estimate, so N steps make 2N - 1
    network calls.

    Source: Karras, Aittala, Aila, Laine: Elucidating the design space (2022), https://arxiv.org/abs/2206.00364, alg. 1
    """

    order = 2
    stages = 2

    def step(self, at: At) -> Row:
        first = at.ask(at.x, at.t)
        if at.lands:
            return first.data
        h = at.s - at.t
        slope = first.velocity
        second = at.ask(at.x + h * slope, at.s)
        return at.x + (h / 2) * (slope + second.velocity)


@dataclass(frozen=True)
class DDIM(Solver):
    """The same pair mixed at the next time; eta > 0 replaces part of the noise by fresh noise.

        x(s) = alpha_s data + √(sigma_s² - omega²) noise + omega xi,
        omega = eta sigma_s √(1 - (alpha_t sigma_s / (alpha_s sigma_t))²)

    eta = 0 is the natural Euler step, the same on every path; eta = 1 is DDPM's ancestral sampling. Between, omega is
    eta times DDPM's, as in the paper.

    Source: Song, Meng, Ermon: Denoising diffusion implicit models (2021), https://arxiv.org/abs/2010.02502, eq. 12, 16
    """

    eta: float = 0.0
    order = 1
    stages = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise OptionError(f"eta is {self.eta}; expected a number from 0 (deterministic) to 1 (DDPM)")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0.0

    def step(self, at: At) -> Row:
        estimate = at.ask(at.x, at.t)
        (alpha, sigma), (alpha_next, sigma_next) = at.start[:2], at.end[:2]
        if self.eta == 0.0 or at.lands:
            return estimate.want(alpha_next, sigma_next, "state")
        ratio = alpha * sigma_next / (alpha_next * sigma)
        omega = self.eta * sigma_next * math.sqrt(max(1.0 - ratio * ratio, 0.0))
        kept = math.sqrt(max(sigma_next**2 - omega**2, 0.0))
        return estimate.want(alpha_next, kept, "state") + omega * at.randn()
