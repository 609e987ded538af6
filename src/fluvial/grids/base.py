"""What a grid and a density are, and the noise levels they are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Beyond these a log-SNR grid would spend its steps where nothing happens: noise over data of 90, and of .002.
LOG_SNR_MIN, LOG_SNR_MAX = -9.0, 12.4


class Clocked(Protocol):
    """What is needed of a path here: its log-SNR at a time, and the time of a log-SNR (floats or tensors)."""

    def log_snr(self, t: Any) -> Any: ...

    def time(self, log_snr: Any) -> Any: ...


class Grid(Protocol):
    """Where a sampler's N steps begin and end.

    A grid whose number of steps is its own (`Split`) also has an attribute `count`: it is taken where the user names
    none, and `times` raises an OptionError for any other.
    """

    def times(self, path: Clocked, steps: int) -> list[float]:
        """N + 1 rising times from 0 to 1, the last of them the landing on the data."""
        ...


class Density(Protocol):
    """How often each time is trained on."""

    def quantile(self, u: Tensor, path: Clocked) -> Tensor:
        """The time on `path` below which a share u of the training times lies; u in (0, 1), any shape."""
        ...


@dataclass(frozen=True)
class Segment:
    """The stretch of a path from `start` to `end`, on a clock of its own from 0 to 1: the path a grid in it sees."""

    path: Clocked
    start: float
    end: float

    def log_snr(self, t: Any) -> Any:
        return self.path.log_snr(self.start + (self.end - self.start) * t)

    def time(self, log_snr: Any) -> Any:
        share = (self.path.time(log_snr) - self.start) / (self.end - self.start)
        return share.clamp(0.0, 1.0) if isinstance(share, Tensor) else min(max(share, 0.0), 1.0)


def lands(path: Clocked) -> bool:
    """Whether the end of this path is the landing on the data, and not the end of a segment before it."""
    return not isinstance(path, Segment) or (path.end == 1.0 and lands(path.path))


def shares(path: Clocked, steps: int) -> list[float]:
    """How far along its range each of N noise levels lies: the last at its end, before the landing.

    In a segment that ends before the data there is no landing: its end is the level after the last of these.
    """
    gaps = max(steps - 1, 1) if lands(path) else steps
    return [k / gaps for k in range(steps)]


def at_levels(path: Clocked, log_snrs: list[float]) -> list[float]:
    """The times of these N log-SNRs, the first moved to 0, and the landing at 1 after them."""
    last_level = math.nextafter(1.0, 0.0)
    inner = path.time(torch.tensor(log_snrs[1:], dtype=torch.float64)).tolist() if log_snrs[1:] else []
    return [0.0, *(min(t, last_level) for t in inner), 1.0]
