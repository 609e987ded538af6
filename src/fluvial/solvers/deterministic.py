"""DDIM: along the path itself, with or without fresh noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fluvial.errors import OptionError
from fluvial.solvers.mixing import mixed
from fluvial.solvers.rates import Stochastic, log_snr_gain
from fluvial.solvers.rows import At, Row


@dataclass(frozen=True)
class DDIM(Stochastic):
    """The same pair mixed at the next time; eta > 0 replaces part of the noise by fresh noise.

        x(s) = alpha_s data + √(sigma_s² - omega²) noise + omega xi,
        omega = eta sigma_s √(1 - (alpha_t sigma_s / (alpha_s sigma_t))²)

    eta = 0 is the natural Euler step, the same on every path; eta = 1 is DDPM's ancestral sampling, and on a
    variance-exploding path the ancestral Euler sampler. Between, omega is eta times DDPM's, as in the paper.

    Source: Song, Meng, Ermon: Denoising diffusion implicit models (2021), https://arxiv.org/abs/2010.02502, eq. 12, 16
    """

    eta: float = 0.0
    ode_needs = "data"

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise OptionError(f"eta is {self.eta}; expected a number from 0 (deterministic) to 1 (DDPM)")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0.0

    def step(self, at: At) -> Row:
        if self.eta == 0.0 or at.lands:
            return mixed(at, 0.0)
        gain = log_snr_gain(at.start, at.end) if at.start.alpha else math.inf
        return mixed(at, -(self.eta**2) * math.expm1(-gain))
