"""Paths: how data and noise mix.

    x = alpha(t) * data + sigma(t) * noise,        log_snr(t) = log(alpha² / sigma²),  rising with t

Time runs from noise (t = 0) to data (t = 1); u = 1 - t is the time to data. A path gives the two coefficients and
their derivatives in closed form, the log-SNR and its inverse, and the forward (noising) Itô SDE with this marginal,

    dx = f x du + g dW,        f = -alpha' / alpha,        g² = 2 sigma w / alpha,        w = alpha' sigma - alpha sigma'

(w is the Wronskian of the two coefficients, positive wherever the SNR rises). What a network predicts, and which
clock it counts on, are not decided here: see `predictions` and `model`.

A float t is evaluated in float64 and gives Python floats; it must lie in [0, 1], and asking for something that does
not exist at that end raises. A tensor t of any shape gives tensors of its dtype (at least float32), unchecked: an
impossible end gives inf or nan there, without a host synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fluvial.errors import OptionError, PathTimeError, one_of

Time = TypeVar("Time", float, Tensor)


class Coefficients(NamedTuple):
    """The mixture at one time: alpha, sigma and their derivatives in t. Floats, or tensors of t's shape."""

    alpha: Any
    sigma: Any
    dalpha: Any
    dsigma: Any

    @property
    def wronskian(self) -> Any:
        """w = alpha' sigma - alpha sigma', which is > 0 where the SNR rises; d(log_snr)/dt = 2 w / (alpha sigma)."""
        return self.dalpha * self.sigma - self.alpha * self.dsigma


class Path:
    """A noising path. Subclasses give `_coefficients`, and closed forms of the rest where there are any."""

    # Subclasses: these four, on float tensors.

    def _coefficients(self, t: Tensor) -> Coefficients:
        raise NotImplementedError

    def _log_snr(self, t: Tensor) -> Tensor:
        alpha, sigma, *_ = self._coefficients(t)
        return 2.0 * (alpha.log() - sigma.log())

    def _time(self, log_snr: Tensor) -> Tensor:
        """Bisection, to the last bit, where there is no closed form."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(60 if log_snr.dtype == torch.float64 else 32):
            middle = (low + high) / 2
            below = self._log_snr(middle) < log_snr
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        ends = self._log_snr(torch.tensor([0.0, 1.0], dtype=log_snr.dtype, device=log_snr.device))
        time = (low + high) / 2
        return time.masked_fill(log_snr <= ends[0], 0.0).masked_fill(log_snr >= ends[1], 1.0)

    def _langevin(self, t: Tensor) -> Tensor:
        """w * sigma, the strength of the Langevin term per unit of gamma; overridden where sigma' is infinite."""
        c = self._coefficients(t)
        return c.wronskian * c.sigma

    # What everybody else calls.

    def __call__(self, t: Any) -> Coefficients:
        """alpha, sigma, alpha', sigma' at time t (float, or Tensor of any shape)."""
        if isinstance(t, Tensor):
            return self._coefficients(_floating(t))
        return Coefficients(*(float(c) for c in self._coefficients(_exact(t))))

    def table(self, times: Sequence[float]) -> list[Coefficients]:
        """The coefficients at many float times at once, as Python floats: one evaluation instead of many."""
        if not all(0.0 <= t <= 1.0 for t in times):
            raise PathTimeError(
                f"times from {min(times)} to {max(times)}; expected times in [0, 1], 0 noise and 1 data"
            )
        columns = self._coefficients(torch.tensor(times, dtype=torch.float64))
        return [Coefficients(*row) for row in zip(*(column.tolist() for column in columns))]

    def log_snr(self, t: Time) -> Time:
        """log(alpha² / sigma²): infinite where alpha or sigma is zero."""
        if isinstance(t, Tensor):
            return self._log_snr(_floating(t))
        return self._log_snr(_exact(t)).item()

    def time(self, log_snr: Time) -> Time:
        """The t in [0, 1] with this log_snr; values outside the path's range give the nearer end."""
        if isinstance(log_snr, Tensor):
            return self._time(_floating(log_snr)).clamp(0.0, 1.0)
        return self._time(torch.tensor(float(log_snr), dtype=torch.float64)).clamp(0.0, 1.0).item()

    def langevin(self, t: Time) -> Time:
        """w * sigma: in dZ = v dt + gamma (w sigma) score dt + √(2 gamma w sigma) dW, what multiplies gamma."""
        if isinstance(t, Tensor):
            return self._langevin(_floating(t))
        return self._existing(t, self._langevin(_exact(t)), "Langevin strength")

    def drift(self, t: Time) -> Time:
        """f = -alpha'/alpha of the noising SDE dx = f x du + g dW, u = 1 - t."""
        if isinstance(t, Tensor):
            c = self(t)
            return -c.dalpha / c.alpha
        c = self._coefficients(_exact(t))
        return self._existing(t, -c.dalpha / c.alpha, "drift")

    def diffusion(self, t: Time) -> Time:
        """g = √(2 sigma w / alpha) of the noising SDE dx = f x du + g dW, u = 1 - t."""
        if isinstance(t, Tensor):
            return (2.0 * self.langevin(t) / self(t).alpha).sqrt()
        exact = _exact(t)
        return self._existing(
            t, (2.0 * self._langevin(exact) / self._coefficients(exact).alpha).sqrt(), "diffusion"
        )

    def shifted(self, shift: float) -> Path:
        """This path on another clock: noise level 1 - t becomes k(1 - t) / (1 + (k - 1)(1 - t)), as in SD3 and FLUX."""
        return Shifted(self, shift)

    @property
    def lands_on_data(self) -> bool:
        """Whether sigma(1) = 0, so that t = 1 is the data itself and not merely close to it."""
        return self(1.0).sigma == 0.0

    def config(self) -> dict[str, Any]:
        """A JSON-able description from which `from_config` makes the same path again."""
        return {"name": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]

    def _existing(self, t: float, value: Tensor, what: str) -> float:
        number = value.item()
        if not math.isfinite(number):
            raise PathTimeError(
                f"the {what} of {self} does not exist at t = {t}; expected a time inside (0, 1)"
            )
        return number


def _floating(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def _exact(t: float) -> Tensor:
    if not 0.0 <= t <= 1.0:
        raise PathTimeError(f"t is {t}; expected a time in [0, 1], where 0 is noise and 1 is data")
    return torch.tensor(float(t), dtype=torch.float64)


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
        return self._time_of_integral(2.0 * ((-log_snr.clamp(min=-1e3) / 2).exp() / 2).asinh())


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
        if self.rho <= 0:
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
        raise OptionError(
            f"sigma_min is {sigma_min} and sigma_max {sigma_max}; expected 0 < sigma_min < sigma_max"
        )


@dataclass(frozen=True)
class Discrete(Path):
    """A trained table: alpha² = alphas_cumprod[i] and sigma² = 1 - alpha² at t = 1 - i/(N - 1), N entries.

    Between the entries the angle atan2(sigma, alpha) follows a monotone cubic (Fritsch, Carlson: Monotone piecewise
    cubic interpolation, 1980, https://doi.org/10.1137/0717021), so that alpha and sigma are smooth and alpha² + sigma²
    stays 1. A zero-terminal-SNR table (last entry 0) has log_snr = -inf at t = 0.

    Args:
        alphas_cumprod: N >= 2 numbers (or a tensor) in [0, 1], strictly falling with i: index 0 is the cleanest.
    """

    alphas_cumprod: Sequence[float]
    _angles: Tensor = field(init=False, repr=False, compare=False)
    _slopes: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table = torch.as_tensor(self.alphas_cumprod, dtype=torch.float64).flatten().cpu()
        if len(table) < 2 or not bool((table.diff() < 0).all()) or table[0] > 1 or table[-1] < 0:
            raise OptionError(
                f"alphas_cumprod has {len(table)} entries from {table[:1].tolist()} to {table[-1:].tolist()}; "
                "expected at least 2 in [0, 1], strictly falling from data to noise"
            )
        # Knots in the order of t: the noisiest entry first.
        alpha, sigma = table.flip(0).sqrt(), (1.0 - table.flip(0)).sqrt()
        angles = torch.atan2(alpha, sigma)
        object.__setattr__(self, "alphas_cumprod", tuple(table.tolist()))
        object.__setattr__(self, "_angles", angles)
        object.__setattr__(self, "_slopes", _monotone_slopes(angles.diff()))

    def _angle(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """atan2(alpha, sigma), from noise to data, and its derivative in t."""
        cells = len(self._angles) - 1
        cell = (t * cells).floor().clamp(0, cells - 1)
        part, index = t * cells - cell, cell.long()
        y0, y1, m0, m1 = self._knots(index, t)
        # The cubic Hermite polynomial with these values and slopes (per cell) at its two ends.
        c, d = 3 * (y1 - y0) - 2 * m0 - m1, 2 * (y0 - y1) + m0 + m1
        value = y0 + part * (m0 + part * (c + part * d))
        return value, cells * (m0 + part * (2 * c + part * 3 * d))

    def _knots(self, index: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        angles, slopes = self._angles.to(like), self._slopes.to(like)
        return angles[index], angles[index + 1], slopes[index], slopes[index + 1]

    def _coefficients(self, t: Tensor) -> Coefficients:
        angle, slope = self._angle(t)
        # The sine of the complement, so that a table that reaches sigma = 0 gives exactly 0 there.
        alpha, sigma = angle.sin(), (math.pi / 2 - angle).sin()
        return Coefficients(alpha, sigma, slope * sigma, -slope * alpha)

    def _time(self, log_snr: Tensor) -> Tensor:
        target = (log_snr / 2).exp().atan()
        angles = self._angles.to(log_snr)
        cells = len(angles) - 1
        index = (torch.searchsorted(angles, target.contiguous()) - 1).clamp(0, cells - 1)
        y0, y1, m0, m1 = self._knots(index, log_snr)
        c, d = 3 * (y1 - y0) - 2 * m0 - m1, 2 * (y0 - y1) + m0 + m1
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(54):
            middle = (low + high) / 2
            below = y0 + middle * (m0 + middle * (c + middle * d)) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        time = (index + (low + high) / 2) / cells
        return time.masked_fill(target <= angles[0], 0.0).masked_fill(target >= angles[-1], 1.0)

    def config(self) -> dict[str, Any]:
        return {"name": "Discrete", "alphas_cumprod": list(self.alphas_cumprod)}


def _monotone_slopes(steps: Tensor) -> Tensor:
    """Fritsch-Carlson slopes, in units of one cell, for knots whose values differ by `steps` > 0."""
    inner = 2.0 * steps[:-1] * steps[1:] / (steps[:-1] + steps[1:])
    if len(steps) == 1:
        return torch.cat([steps, steps])
    # One-sided three-point slopes at the ends, kept between 0 and 3 secants.
    first = ((3 * steps[0] - steps[1]) / 2).clamp(min=torch.zeros(()), max=3 * steps[0])
    last = ((3 * steps[-1] - steps[-2]) / 2).clamp(min=torch.zeros(()), max=3 * steps[-1])
    return torch.cat([first[None], inner, last[None]])


@dataclass(frozen=True)
class Shifted(Path):
    """Another path on the SD3/FLUX clock: its noise level 1 - t is read as k(1 - t) / (1 + (k - 1)(1 - t)).

    Source: Esser et al.: Scaling rectified flow transformers (2024), https://arxiv.org/abs/2403.03206, eq. 23
    """

    base: Path
    shift: float

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise OptionError(
                f"shift is {self.shift}; expected a positive number, such as 3 (1 changes nothing)"
            )

    def _inner(self, t: Tensor) -> Tensor:
        return t / (t + self.shift * (1.0 - t))

    def _coefficients(self, t: Tensor) -> Coefficients:
        inner = self.base._coefficients(self._inner(t))
        speed = self.shift / (t + self.shift * (1.0 - t)).square()
        return Coefficients(inner.alpha, inner.sigma, inner.dalpha * speed, inner.dsigma * speed)

    def _log_snr(self, t: Tensor) -> Tensor:
        return self.base._log_snr(self._inner(t))

    def _time(self, log_snr: Tensor) -> Tensor:
        inner = self.base._time(log_snr).clamp(0.0, 1.0)
        return self.shift * inner / (1.0 + (self.shift - 1.0) * inner)

    def _langevin(self, t: Tensor) -> Tensor:
        return self.base._langevin(self._inner(t)) * self.shift / (t + self.shift * (1.0 - t)).square()

    def config(self) -> dict[str, Any]:
        return {"name": "Shifted", "base": self.base.config(), "shift": self.shift}


@dataclass(frozen=True)
class Affine(Path):
    """Any two functions alpha(t), sigma(t) of a tensor; derivatives by forward-mode differentiation.

    The SNR must rise with t. The inverse of log_snr is found by bisection. Not saved to JSON: a function is code.
    """

    alpha: Callable[[Tensor], Any]
    sigma: Callable[[Tensor], Any]

    def _coefficients(self, t: Tensor) -> Coefficients:
        values, slopes = [], []
        for function in (self.alpha, self.sigma):
            # A constant may come back as a plain number: adding 0 t makes it a tensor that depends on t.
            value, slope = torch.func.jvp(lambda s, f=function: f(s) + 0.0 * s, (t,), (torch.ones_like(t),))
            values.append(value)
            slopes.append(slope)
        return Coefficients(*values, *slopes)

    def config(self) -> dict[str, Any]:
        raise OptionError("an Affine path is made of functions and cannot be saved; expected a named path")


_NAMED: dict[str, type[Path]] = {
    cls.__name__: cls for cls in (Rectified, Cosine, VP, SubVP, VE, EDM, Discrete, Shifted)
}


def named(name: str | Path, **options: Any) -> Path:
    """A path by name ("rectified", "cosine", "vp", "subvp", "ve", "edm", …) with its options; a Path as it is."""
    if isinstance(name, Path):
        return name
    known = {key.lower(): cls for key, cls in _NAMED.items() if cls not in (Discrete, Shifted)}
    key = str(name).lower().replace("-", "").replace("_", "")
    if key not in known:
        raise one_of("path", name, known)
    allowed = {f.name for f in fields(known[key])}  # type: ignore[arg-type]
    for option in options:
        if option not in allowed:
            raise one_of(f"option of path {key!r}", option, allowed)
    return known[key](**options)


def from_config(config: dict[str, Any]) -> Path:
    """The path that `Path.config` described."""
    options = dict(config)
    name = options.pop("name", None)
    if name not in _NAMED:
        raise one_of("path", name, _NAMED)
    if "base" in options:
        options["base"] = from_config(options["base"])
    return _NAMED[name](**options)
