"""A grid fitted to a model: noise levels as numbers, for any path and any number of steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from fluvial.errors import OptionError
from fluvial.grids.base import Clocked, at_levels, lands


@dataclass(frozen=True)
class Fitted:
    """Noise levels tau = alpha/(alpha + sigma) at equal shares of the steps, joined by straight lines.

    tau is 0 at pure noise and 1 at the data on every path (it is the rectified path's time), so the grid means the same
    in every notation: N steps visit the levels tau(k/N), k = 0 … N - 1, and then land. Where a path does not reach
    so far at one of its ends, the steps are spread evenly over the shares that it has. Made by `fluvial.fitting`.

    Args:
        levels: tau at the shares 0, 1/K, …, 1: rising numbers from 0 or more to 1.
        nfe: network evaluations per trajectory that the fit took.
        n: trajectories that it was fitted on.
        made: how it was made, in words.
    """

    levels: Sequence[float]
    nfe: int = 0
    n: int = 0
    made: str = ""

    def __post_init__(self) -> None:
        levels = tuple(float(level) for level in self.levels)
        if len(levels) < 2 or not all(a < b for a, b in pairwise(levels)) or levels[0] < 0.0 or levels[-1] != 1.0:
            raise OptionError(
                f"levels has {len(levels)} entries from {levels[:1]} to {levels[-1:]}; expected at least two that rise "
                "strictly from 0 or more to 1"
            )
        object.__setattr__(self, "levels", levels)

    def times(self, path: Clocked, steps: int) -> list[float]:
        knots = len(self.levels) - 1
        low, high = self._position(level_of(path, 0.0)), self._position(level_of(path, 1.0))
        if lands(path):
            # A first level less than half a step above the path's own start would be a step for nothing.
            start = 0.0 if low < 0.5 * knots / steps else low
            gap = min((knots - start) / steps, (high - start) / max(steps - 1, 1))
        else:
            start, gap = low, (high - low) / steps
        levels = [self._level(start + gap * k) for k in range(steps)]
        return at_levels(path, [log_snr_of(level) for level in levels])

    def _level(self, position: float) -> float:
        """tau at a position counted in knots."""
        cell = min(int(position), len(self.levels) - 2)
        below, above = self.levels[cell : cell + 2]
        return below + (above - below) * (position - cell)

    def _position(self, level: float) -> float:
        """The position of a level: the inverse of `_level`."""
        level = min(max(level, self.levels[0]), 1.0)
        cell = min(bisect_right(self.levels, level) - 1, len(self.levels) - 2)
        below, above = self.levels[cell : cell + 2]
        return cell + (level - below) / (above - below)

    def config(self) -> dict[str, Any]:
        """A JSON-able description from which `from_config` makes the same grid again."""
        return {**asdict(self), "levels": list(self.levels)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Fitted:
        """The grid that `config` described."""
        return cls(**config)


def level_of(path: Clocked, t: float) -> float:
    """tau = alpha/(alpha + sigma) at a time of the path: the logistic function of log_snr/2."""
    half = path.log_snr(t) / 2
    return 1.0 / (1.0 + math.exp(-half)) if half > -700.0 else 0.0


def log_snr_of(level: float) -> float:
    """The log-SNR of a level tau: the inverse of the logistic function, doubled."""
    return 2.0 * (math.log(level) - math.log1p(-level)) if 0.0 < level < 1.0 else math.copysign(math.inf, level - 0.5)
