"""A Brownian path for every sample, seen at any times: noise that stays the same when the number of steps changes.

W(0) = 0 and W(1) are drawn first, then the middle between two known points, again and again (Lévy's construction),

    W(m) = (W(l) + W(r))/2 + √(r - l)/2 z,        z the cell's own normal number, a function of (seed, sample, cell)

until the cell around a wanted time holds no other wanted time; there W is drawn at that very time by the bridge
between l and r, from the same z. So a run sees exactly Brownian increments, and another run with other times sees the
same path but for the last cells. It takes about three normal numbers for each time.

Source: Lévy: Processus stochastiques et mouvement brownien (1948); Li et al.: Scalable gradients for stochastic
differential equations (2020), https://arxiv.org/abs/2001.01328, for the tree of seeds
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from fluvial import random

_DEEPEST = 30


class Brownian:
    """The paths of some samples, at wanted times in [0, 1] known beforehand and asked for in rising order.

    Args:
        times: the wanted times.
        samples: which samples (n of them); see `random.normal`.
        shape: of one sample.
        seed: of the paths.
        dtype, device: of the values.
    """

    def __init__(
        self,
        times: Sequence[float],
        samples: range | Tensor,
        shape: Sequence[int],
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.times = sorted({0.0, 1.0, *times})
        self._draw = lambda cell: random.normal(samples, shape, seed, cell, random.BROWNIAN, dtype, device)
        whole = self._draw(0)
        # Values at the corners of the cells around the last wanted time: all that later times can need.
        self._known = {0.0: torch.zeros_like(whole), 1.0: whole}
        self._last = (0.0, self._known[0.0])

    def increment(self, start: float, end: float) -> Tensor:
        """(W(end) - W(start)) / √(end - start): standard normal (n, *shape)."""
        before, after = self._at(start), self._at(end)
        return (after - before).div_(math.sqrt(end - start))

    def _at(self, time: float) -> Tensor:
        if time != self._last[0]:
            self._last = (time, self._descend(time))
        return self._last[1]

    def _descend(self, time: float) -> Tensor:
        place = bisect_left(self.times, time)
        before, after = self.times[place - 1] if place else 0.0, self.times[min(place + 1, len(self.times) - 1)]
        low, high, cell, corners = 0.0, 1.0, 1, {0.0, 1.0}
        while time not in (low, high) and (low < before or high > after) and cell < 1 << _DEEPEST:
            middle = (low + high) / 2
            if middle not in self._known:
                self._known[middle] = self._bridge(low, high, middle, cell)
            low, high, cell = (low, middle, 2 * cell) if time <= middle else (middle, high, 2 * cell + 1)
            corners.add(middle)
        self._known = {corner: value for corner, value in self._known.items() if corner in corners}
        return self._known[time] if time in (low, high) else self._bridge(low, high, time, cell)

    def _bridge(self, low: float, high: float, time: float, cell: int) -> Tensor:
        share = (time - low) / (high - low)
        mean = torch.lerp(self._known[low], self._known[high], share)
        return mean.add_(self._draw(cell), alpha=math.sqrt((time - low) * (high - time) / (high - low)))
