"""Noise mixing: part of the state's estimated noise is exchanged for fresh noise, at a rate that suits any steps.

    x(s) = alpha_s data + sigma_s (√(1 - rho²) noise + rho xi),        rho² = 1 - exp(-E),

E being the rate's integral over the step (see `rates`). Nothing renewed is natural Euler (DDIM), the whole of it,
rho = 1, is data noised anew. The kernel takes the data estimate for the data; what it leaves out, the variance of the
data around their estimate, vanishes with the step. Where that variance is known it can be put in:

    data | x ~ Normal(estimate, C),    C = std² sigma²/(alpha² std² + sigma²)    for data of standard deviation std

adds noise of (alpha_s - sigma_s √(1 - rho²) alpha/sigma) √C, on landing too. On Gaussian data any number of steps is
then exact.

Source: Song, Meng, Ermon: Denoising diffusion implicit models (2021), https://arxiv.org/abs/2010.02502; Bao et al.:
Analytic-DPM (2022), https://arxiv.org/abs/2201.06503, for the variance
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fluvial.errors import OptionError
from fluvial.solvers.rates import (
    Rate,
    Stochastic,
    check_rate,
    exponent_of_gamma,
    exponent_of_kappa,
    exponent_of_refresh,
    positive,
)
from fluvial.solvers.rows import At, Row


def mixed(at: At, renewed: float, data_std: float | None = None) -> Row:
    """The pair mixed at the step's end, with the share `renewed` = rho² of the noise's variance fresh."""
    estimate = at.ask(at.x, at.t)
    (alpha, sigma), (alpha_next, sigma_next) = at.start[:2], at.end[:2]
    if renewed == 0.0 and data_std is None:
        return estimate.want(alpha_next, sigma_next, "state")
    kept = sigma_next * math.sqrt(1.0 - renewed)
    added = renewed * sigma_next**2
    if data_std is not None:
        on_data = alpha_next - kept * alpha / sigma
        added += (on_data * data_std * sigma) ** 2 / (alpha**2 * data_std**2 + sigma**2)
    return estimate.want(alpha_next, kept, "state") + math.sqrt(added) * at.randn()


@dataclass(frozen=True)
class Mixing(Stochastic):
    """What samplers that mix noise share: each has a rate, a number or a function of t; at rate 0 it is `DDIM`.

    Args:
        data_std: the data's standard deviation, to put in the variance around the estimate; None leaves it out.
    """

    ode_needs = "data"
    data_std: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_rate(*self._rate())
        if self.data_std is not None and not self.data_std > 0.0:
            raise OptionError(f"data_std is {self.data_std}; expected the data's standard deviation, above 0, or None")

    @property
    def stochastic(self) -> bool:
        return positive(self._rate()[1]) or self.data_std is not None

    def step(self, at: At) -> Row:
        return mixed(at, 0.0 if at.lands else -math.expm1(-self.exponent(at)), self.data_std)

    def exponent(self, at: At) -> float:
        """The rate's integral over a step."""
        raise NotImplementedError

    def _rate(self) -> tuple[str, Rate]:
        raise NotImplementedError


@dataclass(frozen=True)
class NoiseMixing(Mixing):
    """Mixing at a rate kappa per unit of log-SNR, E = integral of kappa d(log_snr): 1 is DDPM, on any path.

    Where alpha = 0 (pure noise) the state is already stationary, and nothing is renewed in that step.

    Source: Ho, Jain, Abbeel: Denoising diffusion probabilistic models (2020), https://arxiv.org/abs/2006.11239, for 1
    """

    kappa: Rate = 1.0

    def exponent(self, at: At) -> float:
        return exponent_of_kappa(at, self.kappa)

    def _rate(self) -> tuple[str, Rate]:
        return "kappa", self.kappa


@dataclass(frozen=True)
class StochasticEuler(Mixing):
    """Mixing at a rate gamma, E = integral of 2 gamma w/sigma dt: natural Euler for the Langevin-corrected flow.

    It has the limit of `Langevin`, and steps that follow the path's own curve.

    Source: Hu, Liao, Liu, Liu: Flow to diffusion: Langevin is a guardrail (2024), https://rectifiedflow.github.io
    """

    gamma: Rate = 1.0

    def exponent(self, at: At) -> float:
        return exponent_of_gamma(at, self.gamma)

    def _rate(self) -> tuple[str, Rate]:
        return "gamma", self.gamma


@dataclass(frozen=True)
class NoiseRefresh(Mixing):
    """Mixing at a rate per unit of time, E = integral of rate dt: part of the noise made fresh before natural Euler.

        noise ← √(1 - rho²) noise + rho xi,        x(s) = alpha_s data + sigma_s noise

    A share rho fixed for each step would renew more, the more steps are made, and would converge to a wrong law.

    Source: Hu, Liao, Liu, Liu: Flow to diffusion: Langevin is a guardrail (2024), https://rectifiedflow.github.io
    """

    rate: Rate = 5.0

    def exponent(self, at: At) -> float:
        return exponent_of_refresh(at, self.rate)

    def _rate(self) -> tuple[str, Rate]:
        return "rate", self.rate
