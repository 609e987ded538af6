"""The paths with closed forms: rectified, cosine, VP, sub-VP, VE, EDM."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fluvial.errors import OptionError
from fluvial.paths.base import Coefficients, Path


@dataclass(frozen=True)
class Rectified(Path):
    """alpha = t, sigma = 1 - t: straight lines from noise to data.

    Source: Liu, Gong, Liu: Flow straight and fast (2022), https://arxiv.org/abs/2209.03003
    """

    def _coefficients(self, t: Tensor) -> Coefficients:
        return Coefficients(t, 1.0 - t, torch.ones_like(t), -torch.ones_like(t))

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2.0 * (t.log() - (-t).log1p())

    def _time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(log_snr / 2)


@dataclass(frozen=True)
class Cosine(Path):
    """alpha = sin(pi t / 2), sigma = sin(pi (1 - t) / 2): variance preserving, at constant angular speed.

    Source: Nichol, Dhariwal: Improved DDPM (2021), https://arxiv.org/abs/2102.09672, without their offset.
    """

    def _coefficients(self, t: Tensor) -> Coefficients:
        half = math.pi / 2
        alpha, sigma = (half * t).sin(), (half * (1.0 - t)).sin()
        return Coefficients(alpha, sigma, half * sigma, -half * alpha)

    def _time(self, log_snr: Tensor) -> Tensor:
        # Measured from the nearer end, where it keeps its relative precision.
        from_noise = (log_snr / 2).exp().atan() / (math.pi / 2)
        from_data = 1.0 - (-log_snr / 2).exp().atan() / (math.pi / 2)
        return torch.where(log_snr < 0, from_noise, from_data)


@dataclass(frozen=True)
class _LinearBeta(Path):
    """beta(u) = beta_min + u (beta_max - beta_min), B(u) its integral from 0."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0.0 < self.beta_min <= self.beta_max:
            raise OptionError(
                f"beta_min is {self.beta_min} and beta_max {self.beta_max}; expected 0 < beta_min <= beta_max"
            )

    def _beta(self, t: Tensor) -> tuple[Tensor, Tensor]:
        u, slope = 1.0 - t, self.beta_max - self.beta_min
        return self.beta_min + u * slope, u * (self.beta_min + 0.5 * u * slope)

    def _time_of_integral(self, integral: Tensor) -> Tensor:
        """The t with B(1 - t) = integral: the stable root of a quadratic."""
        slope = self.beta_max - self.beta_min
        return 1.0 - 2.0 * integral / (self.beta_min + (self.beta_min**2 + 2.0 * slope * integral).sqrt())


@dataclass(frozen=True)
class VP(_LinearBeta):
    """alpha = exp(-B(u)/2), sigma = √(1 - exp(-B(u))), beta linear in u: continuous DDPM. sigma' is -inf at t = 1.

    Source: Song et al.: Score-based generative modeling through SDEs (2021), https://arxiv.org/abs/2011.13456
    """

    def _coefficients(self, t: Tensor) -> Coefficients:
        beta, integral = self._beta(t)
        alpha, sigma = (-integral / 2).exp(), (-(-integral).expm1()).sqrt()
        return Coefficients(alpha, sigma, 0.5 * beta * alpha, -0.5 * beta * alpha.square() / sigma)

    def _log_snr(self, t: Tensor) -> Tensor:
        return -self._beta(t)[1].expm1().log()

    def _time(self, log_snr: Tensor) -> Tensor:
        # log(1 + e^-l) without overflow: below -30 it is -l to the last bit, and at -inf it stays finite.
        return self._time_of_integral(torch.nn.functional.softplus(-log_snr.clamp(min=-1e4)))

    def _langevin(self, t: Tensor) -> Tensor:
        beta, integral = self._beta(t)
        return 0.5 * beta * (-integral / 2).exp()


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    """alpha = exp(-B(u)/2), sigma = 1 - exp(-B(u)), beta linear in u: variance always below VP's.

    Source: Song et al.: Score-based generative modeling through SDEs (2021), https://arxiv.org/abs/2011.13456
    """

    def _coefficients(self, t: Tensor) -> Coefficients:
        beta, integral = self._beta(t)
        alpha, decay = (-integral / 2).exp(), (-integral).exp()
        return Coefficients(alpha, -(-integral).expm1(), 0.5 * beta * alpha, -beta * decay)

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2.0 * (2.0 * (self._beta(t)[1] / 2).sinh()).log()

    def _time(self, log_snr: Tensor) -> Tensor:
        # 2 asinh(e^(-l/2)/2), which below -60 is -l to the last bit and would overflow.
        level = log_snr.clamp(min=-1e4)
        integral = 2.0 * ((-level.clamp(min=-60.0) / 2).exp() / 2).asinh()
        return self._time_of_integral(torch.where(level < -60.0, -level, integral))


@dataclass(frozen=True)
class VE(Path):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^u: geometric.

    Source: Song et al.: Score-based generative modeling through SDEs (2021), https://arxiv.org/abs/2011.13456
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        _ordered_sigmas(self.sigma_min, self.sigma_max)

    def _coefficients(self, t: Tensor) -> Coefficients:
        rate = math.log(self.sigma_max / self.sigma_min)
        sigma = self.sigma_min * (rate * (1.0 - t)).exp()
        return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), -rate * sigma)

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2.0 * (math.log(self.sigma_min) + math.log(self.sigma_max / self.sigma_min) * (1.0 - t))

    def _time(self, log_snr: Tensor) -> Tensor:
        return 1.0 - (-log_snr / 2 - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(Path):
    """alpha = 1, sigma = (sigma_min^(1/rho) + u (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho: a clock for sigma.

    Source: Karras, Aittala, Aila, Laine: Elucidating the design space (2022), https://arxiv.org/abs/2206.00364, eq. 5
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        _ordered_sigmas(self.sigma_min, self.sigma_max)
        if not self.rho > 0:
            raise OptionError(f"rho is {self.rho}; expected a positive number, such as 7")

    def _roots(self) -> tuple[float, float]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return low, high - low

    def _coefficients(self, t: Tensor) -> Coefficients:
        low, span = self._roots()
        root = low + (1.0 - t) * span
        slope = -self.rho * span * root ** (self.rho - 1)
        return Coefficients(torch.ones_like(t), root**self.rho, torch.zeros_like(t), slope)

    def _log_snr(self, t: Tensor) -> Tensor:
        low, span = self._roots()
        return -2.0 * self.rho * (low + (1.0 - t) * span).log()

    def _time(self, log_snr: Tensor) -> Tensor:
        low, span = self._roots()
        return 1.0 - ((-log_snr / (2.0 * self.rho)).exp() - low) / span


def _ordered_sigmas(sigma_min: float, sigma_max: float) -> None:
    if not 0.0 < sigma_min < sigma_max:
        raise OptionError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}; expected 0 < sigma_min < sigma_max")
