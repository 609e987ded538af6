"""Paths made from something else: a trained table, or any two functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fluvial.errors import OptionError
from fluvial.paths.base import Coefficients, Path


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

    def __repr__(self) -> str:
        entries = self.alphas_cumprod
        return f"Discrete({len(entries)} alphas_cumprod, {entries[0]:.6g} … {entries[-1]:.6g})"

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
class Affine(Path):
    """Any two functions alpha(t), sigma(t) of a tensor; derivatives by automatic differentiation.

    The SNR must rise with t. The inverse of log_snr is found by bisection. Not saved to JSON: a function is code.
    """

    alpha: Callable[[Tensor], Any]
    sigma: Callable[[Tensor], Any]

    def _coefficients(self, t: Tensor) -> Coefficients:
        slopes = []
        with torch.enable_grad():
            s = t.detach().requires_grad_()
            for function in (self.alpha, self.sigma):
                # A constant may come back as a plain number: adding 0 t makes it a tensor that depends on t.
                slopes.append(torch.autograd.grad((function(s) + 0.0 * s).sum(), s)[0])
        values = [function(t) + 0.0 * t for function in (self.alpha, self.sigma)]
        return Coefficients(*values, *slopes)

    def config(self) -> dict[str, Any]:
        raise OptionError("an Affine path is made of functions and cannot be saved; expected a named path")
