"""Times: grids of them for sampling, densities of them for training. One object each.

A sampling grid turns a path and a number of steps N into N + 1 floats, rising from 0 (noise) to 1 (data). The last is
where the sampler lands: at sigma = 0. Where the path itself stops short of the data (sigma(1) > 0: VE, EDM,
Discrete), t = 1 is no noise level to visit but the name of that landing, so the N levels visited lie below it.

A training density turns uniform numbers into times, by its quantile function: the same numbers give the same times
on any device and rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from fluvial.errors import OptionError, one_of

# Beyond these a log-SNR grid would spend its steps where nothing happens: noise over data of 90, and of .002.
LOG_SNR_MIN, LOG_SNR_MAX = -9.0, 12.4


class Clocked(Protocol):
    """What is needed of a path here: its log-SNR at a time, and the time of a log-SNR (floats or tensors)."""

    def log_snr(self, t: Any) -> Any: ...

    def time(self, log_snr: Any) -> Any: ...


class Grid(Protocol):
    """Where a sampler's N steps begin and end."""

    def times(self, path: Clocked, steps: int) -> list[float]:
        """N + 1 rising times from 0 to 1, the last of them the landing on the data."""
        ...


def resolve(times: Any, path: Clocked, steps: int | None, default_steps: int) -> list[float]:
    """The times a sampler visits, from what the user gave: None, a grid, its name, a list or a 1-D tensor.

    Raises:
        OptionError: steps below 1, a list that does not rise within [0, 1], or a list and steps that disagree.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise OptionError(f"steps is {steps!r}; expected a whole number, 1 or more")
    if times is None or isinstance(times, str):
        times = named(times or "uniform")
    if hasattr(times, "times"):
        return list(times.times(path, default_steps if steps is None else steps))
    try:
        values = [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]
    except (TypeError, ValueError):
        raise OptionError(
            f"times is a {type(times).__name__} that is no list of numbers; expected a grid such as fl.grids.Karras(), "
            "its name, or a list or 1-D tensor of rising times"
        ) from None
    if len(values) < 2 or not all(0.0 <= t <= 1.0 for t in values):
        raise OptionError(f"times is {_short(values)}; expected at least two numbers in [0, 1] (0 noise, 1 data)")
    if any(later <= earlier for earlier, later in pairwise(values)):
        raise OptionError(f"times is {_short(values)}; expected numbers that rise strictly, from noise to data")
    if steps is not None and steps != len(values) - 1:
        raise OptionError(f"steps is {steps} but times has {len(values)} entries, which is {len(values) - 1} steps")
    return values


def _short(values: Sequence[float]) -> str:
    shown = ", ".join(f"{t:g}" for t in values[:6])
    return f"[{shown}{', …' if len(values) > 6 else ''}]"


@dataclass(frozen=True)
class Uniform:
    """Equal steps of the path's own clock; as a density, p(t) = 1 on [0, 1]."""

    def times(self, path: Clocked, steps: int) -> list[float]:
        return [k / steps for k in range(steps)] + [1.0]

    def quantile(self, u: Tensor, path: Clocked) -> Tensor:
        return u


@dataclass(frozen=True)
class Shifted:
    """Equal steps of the shifted clock: the SD3/FLUX sampling shift, for any path (see `Path.shifted`)."""

    shift: float = 3.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise OptionError(f"shift is {self.shift}; expected a positive number, such as 3")

    def times(self, path: Clocked, steps: int) -> list[float]:
        return [t / (t + self.shift * (1.0 - t)) for t in Uniform().times(path, steps)]


@dataclass(frozen=True)
class Cosine:
    """t = sin²(pi s / 2) of equal steps in s: short steps at both ends."""

    def times(self, path: Clocked, steps: int) -> list[float]:
        return [math.sin(math.pi * k / (2 * steps)) ** 2 for k in range(steps)] + [1.0]


@dataclass(frozen=True)
class LogSNR:
    """Equal steps of log_snr, within the path's range clipped to [-9, 12.4]; 0 and 1 stay nodes."""

    def times(self, path: Clocked, steps: int) -> list[float]:
        low, high = max(path.log_snr(0.0), LOG_SNR_MIN), min(path.log_snr(1.0), LOG_SNR_MAX)
        count = max(steps - 1, 1)
        return _at_levels(path, [low + (high - low) * k / count for k in range(steps)])


@dataclass(frozen=True)
class Karras:
    """sigma/alpha = (sigma_max^(1/rho) + k/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, k = 0 … N-1; then 0.

    Args:
        rho: 7 puts most steps at low noise; 1 spaces them evenly in sigma.
        sigma_min: the lowest level, or the path's own if that is higher.
        sigma_max: the highest level, where the run then starts. None: the levels run from 80 (or the path's own start
            if that is lower), and the run starts at t = 0.

    Source: Karras, Aittala, Aila, Laine: Elucidating the design space (2022), https://arxiv.org/abs/2206.00364, eq. 5
    """

    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        high = math.inf if self.sigma_max is None else self.sigma_max
        if not (0.0 < self.sigma_min < high and self.rho > 0):
            raise OptionError(f"{self} makes no grid; expected 0 < sigma_min < sigma_max and rho > 0")

    def times(self, path: Clocked, steps: int) -> list[float]:
        start, end = math.exp(-path.log_snr(0.0) / 2), math.exp(-path.log_snr(1.0) / 2)
        high, low = min(self.sigma_max or 80.0, start), max(self.sigma_min, end)
        count = max(steps - 1, 1)
        roots = [high ** (1 / self.rho), low ** (1 / self.rho)]
        levels = [(roots[0] + (roots[1] - roots[0]) * k / count) ** self.rho for k in range(steps)]
        times = _at_levels(path, [-2.0 * math.log(level) for level in levels])
        if self.sigma_max is not None and self.sigma_max < start:
            times[0] = path.time(-2.0 * math.log(self.sigma_max))
        return times


def _at_levels(path: Clocked, log_snrs: list[float]) -> list[float]:
    """The times of these N log-SNRs, the first moved to 0, and the landing at 1 after them."""
    last_level = math.nextafter(1.0, 0.0)
    inner = path.time(torch.tensor(log_snrs[1:], dtype=torch.float64)).tolist() if log_snrs[1:] else []
    return [0.0, *(min(t, last_level) for t in inner), 1.0]


class Density(Protocol):
    """How often each time is trained on."""

    def quantile(self, u: Tensor, path: Clocked) -> Tensor:
        """The time on `path` below which a share u of the training times lies; u in (0, 1), any shape."""
        ...


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


_GRIDS: dict[str, type] = {
    "uniform": Uniform,
    "karras": Karras,
    "log_snr": LogSNR,
    "shifted": Shifted,
    "cosine": Cosine,
}
_DENSITIES: dict[str, type] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "u_shaped": UShaped,
    "log_normal": LogNormal,
}


def named(name: str) -> Grid:
    """A sampling grid by name."""
    if name not in _GRIDS:
        raise one_of("grid", name, _GRIDS)
    return _GRIDS[name]()


def density(times: Any) -> Density:
    """A training density by name; an object with `quantile` as it is; None is uniform."""
    if hasattr(times, "quantile") and not isinstance(times, Tensor):
        return times
    if times is None:
        return Uniform()
    if not isinstance(times, str) or times not in _DENSITIES:
        raise one_of("density of training times", times, _DENSITIES)
    return _DENSITIES[times]()
