"""What a path is: alpha, sigma, their derivatives, log_snr and its inverse, and the noising SDE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fluvial.errors import OptionError, PathTimeError

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
        return self._existing(t, (2.0 * self._langevin(exact) / self._coefficients(exact).alpha).sqrt(), "diffusion")

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
            raise PathTimeError(f"the {what} of {self} does not exist at t = {t}; expected a time inside (0, 1)")
        return number


def _floating(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def _exact(t: float) -> Tensor:
    if not 0.0 <= t <= 1.0:
        raise PathTimeError(f"t is {t}; expected a time in [0, 1], where 0 is noise and 1 is data")
    return torch.tensor(float(t), dtype=torch.float64)


@dataclass(frozen=True)
class Shifted(Path):
    """Another path on the SD3/FLUX clock: its noise level 1 - t is read as k(1 - t) / (1 + (k - 1)(1 - t)).

    Source: Esser et al.: Scaling rectified flow transformers (2024), https://arxiv.org/abs/2403.03206, eq. 23
    """

    base: Path
    shift: float

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise OptionError(f"shift is {self.shift}; expected a positive number, such as 3 (1 changes nothing)")

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
