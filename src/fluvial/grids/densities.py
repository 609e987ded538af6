"""Densities of training times: each turns uniform numbers into times by its quantile function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fluvial.errors import OptionError
from fluvial.grids.base import Clocked


@dataclass(frozen=True)
class LogitNormal:
    """logit(t) ~ Normal(mean, std²): most often in the middle. A negative mean dwells on the noisy side.

    Source: Esser et al.: Scaling rectified flow transformers (2024), https://arxiv.org/abs/2403.03206, eq. 19
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _positive_std(self.std)

    def quantile(self, u: Tensor, path: Clocked) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


def _positive_std(std: float) -> None:
    if not std > 0:
        raise OptionError(f"std is {std}; expected a positive number")


@dataclass(frozen=True)
class UShaped:
    """p(t) ∝ cosh(a (t - 1/2)): most often at both ends, where the velocity of a straightened model is hard.

    Source: Lee, Lin, Fanti: Improving the training of rectified flows (2024), https://arxiv.org/abs/2405.20320
    """

    sharpness: float = 4.0

    def __post_init__(self) -> None:
        if not self.sharpness > 0:
            raise OptionError(f"sharpness is {self.sharpness}; expected a positive number, such as 4")

    def quantile(self, u: Tensor, path: Clocked) -> Tensor:
        half = math.sinh(self.sharpness / 2)
        return (0.5 + ((2.0 * u - 1.0) * half).asinh() / self.sharpness).clamp(0.0, 1.0)


@dataclass(frozen=True)
class ExponentialDensity:
    """p(t) ∝ exp(rate t): a positive rate dwells near the data, a negative one near the noise.

    Source: Lee, Lin, Fanti: Improving the training of rectified flows (2024), https://arxiv.org/abs/2405.20320, whose
    U-shaped density is the even mixture of the two rates a and -a
    """

    rate: float = -4.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and self.rate):
            raise OptionError(f"rate is {self.rate}; expected a number other than 0, such as -4")

    def quantile(self, u: Tensor, path: Clocked) -> Tensor:
        return (torch.log1p(u * math.expm1(self.rate)) / self.rate).clamp(0.0, 1.0)


@dataclass(frozen=True)
class LogNormal:
    """log(sigma/alpha) ~ Normal(mean, std²), as EDM trains; levels outside the path fall on its ends.

    Source: Karras, Aittala, Aila, Laine: Elucidating the design space (2022), https://arxiv.org/abs/2206.00364
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _positive_std(self.std)

    def quantile(self, u: Tensor, path: Clocked) -> Tensor:
        # Noisy is early: the upper quantiles of sigma are the lower ones of t.
        return path.time(-2.0 * (self.mean - self.std * torch.special.ndtri(u)))
