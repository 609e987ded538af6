"""Sampling grids in closed form: equal steps of some clock, or noise levels by a formula."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fluvial.errors import OptionError
from fluvial.grids.base import LOG_SNR_MAX, LOG_SNR_MIN, Clocked, at_levels, shares


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
class Flow:
    """Equal steps of tau = alpha/(alpha + sigma), the clock of the rectified flow, on any path; 0 and 1 stay nodes.

    With a shift c the steps are equal in s, tau = s/(s + c (1 - s)): above 1 more of them near the noise. On the
    rectified path this is `Uniform`, and `Shifted`. Multistep methods in v or data - noise are at home on it.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise OptionError(f"shift is {self.shift}; expected a positive number, such as 1")

    def times(self, path: Clocked, steps: int) -> list[float]:
        low, high = (_logistic(path.log_snr(t) / 2) for t in (0.0, 1.0))
        shares = [k / (k + self.shift * (steps - k)) for k in range(steps)]
        # Where the path stops short of the data, the levels must lie on it: the last of them is its end at most.
        length = 1.0 - low if steps == 1 else min(1.0 - low, (high - low) / shares[-1])
        taus = [low + length * share for share in shares]
        return at_levels(path, [2.0 * math.log(tau / (1.0 - tau)) if tau > 0.0 else -math.inf for tau in taus])


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(min(-x, 700.0)))


@dataclass(frozen=True)
class LogSNR:
    """Equal steps of log_snr, within the path's range clipped to [-9, 12.4]; 0 and 1 stay nodes."""

    def times(self, path: Clocked, steps: int) -> list[float]:
        low, high = max(path.log_snr(0.0), LOG_SNR_MIN), min(path.log_snr(1.0), LOG_SNR_MAX)
        return at_levels(path, [low + (high - low) * share for share in shares(path, steps)])


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
        _check_ends(self)

    def times(self, path: Clocked, steps: int) -> list[float]:
        high, low = (level ** (1 / self.rho) for level in _ends(self, path))
        return _at_ratios(self, path, [(high + (low - high) * k) ** self.rho for k in shares(path, steps)])


@dataclass(frozen=True)
class Exponential:
    """sigma/alpha = sigma_max (sigma_min/sigma_max)^(1 - (1 - k/(N-1))^rho), k = 0 … N-1; then 0.

    At rho = 1 every level is the same fraction of the one before: equal steps of log-SNR between levels of your own.

    Args:
        sigma_min, sigma_max: as in `Karras`.
        rho: above 1 (polyexponential) puts more steps at low noise, below 1 at high noise.

    Sources: Lu et al.: DPM-Solver (2022), https://arxiv.org/abs/2206.00927; with rho, Crowson: k-diffusion (2022),
    https://github.com/crowsonkb/k-diffusion
    """

    sigma_min: float = 0.002
    sigma_max: float | None = None
    rho: float = 1.0

    def __post_init__(self) -> None:
        _check_ends(self)

    def times(self, path: Clocked, steps: int) -> list[float]:
        high, low = (math.log(level) for level in _ends(self, path))
        return _at_ratios(
            self, path, [math.exp(low + (high - low) * (1.0 - k) ** self.rho) for k in shares(path, steps)]
        )


def _check_ends(grid: Karras | Exponential) -> None:
    high = math.inf if grid.sigma_max is None else grid.sigma_max
    if not (0.0 < grid.sigma_min < high and grid.rho > 0):
        raise OptionError(f"{grid} makes no grid; expected 0 < sigma_min < sigma_max and rho > 0")


def _ends(grid: Karras | Exponential, path: Clocked) -> tuple[float, float]:
    """The highest and the lowest level, sigma/alpha, within the path."""
    start, end = math.exp(-path.log_snr(0.0) / 2), math.exp(-path.log_snr(1.0) / 2)
    return min(grid.sigma_max or 80.0, start), max(grid.sigma_min, end)


def _at_ratios(grid: Karras | Exponential, path: Clocked, levels: list[float]) -> list[float]:
    """The times of these levels; the run starts at the first of them where the user named it, and else at 0."""
    times = at_levels(path, [-2.0 * math.log(level) for level in levels])
    if grid.sigma_max is not None and grid.sigma_max < math.exp(-path.log_snr(0.0) / 2):
        times[0] = path.time(-2.0 * math.log(grid.sigma_max))
    return times


@dataclass(frozen=True)
class Beta:
    """Quantiles of a Beta distribution: 1 - t = Q(1 - k/N), k = 0 … N, on the path's own clock.

    With both parameters below 1 the steps crowd at the two ends; equal parameters treat the ends alike.

    Args:
        alpha: below 1, more steps near the data; as in the paper, of the distribution of the noise's clock 1 - t.
        beta: below 1, more steps near the noise.

    Source: Lee, Lee, Gye, Kim: Beta sampling is all you need (2024), https://arxiv.org/abs/2407.12173
    """

    alpha: float = 0.6
    beta: float = 0.6

    def __post_init__(self) -> None:
        if not (0.0 < self.alpha < math.inf and 0.0 < self.beta < math.inf):
            raise OptionError(f"{self} makes no grid; expected positive numbers, such as 0.6")

    def times(self, path: Clocked, steps: int) -> list[float]:
        # Counted from the data, alpha and beta change places.
        return [0.0, *(beta_quantile(k / steps, self.beta, self.alpha) for k in range(1, steps)), 1.0]


def beta_quantile(share: float, a: float, b: float) -> float:
    """The x with I_x(a, b) = share: the regularised incomplete beta function, inverted by bisection."""
    low, high = 0.0, 1.0
    while low < (x := (low + high) / 2) < high:
        low, high = (x, high) if _incomplete_beta(x, a, b) < share else (low, x)
    return high


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b) by its continued fraction, evaluated as Lentz does.

    Source: NIST Digital library of mathematical functions, https://dlmf.nist.gov/8.17, eq. 8.17.4 and 8.17.22
    """
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _incomplete_beta(1.0 - x, b, a)  # where the fraction converges fast
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    value = upper = 1.0
    lower, m, change = 0.0, 0, 0.0
    while abs(change - 1.0) > 1e-15 and m < 1000:
        m += 1
        n = m // 2
        odd = -(a + n) * (a + b + n) / ((a + 2 * n) * (a + 2 * n + 1))
        term = x * (odd if m % 2 else n * (b - n) / ((a + 2 * n - 1) * (a + 2 * n)))
        lower, upper = 1.0 / (1.0 + term * lower), 1.0 + term / upper
        change = lower * upper
        value *= change
    return front / value
