"""Improved consistency training (iCT): no teacher, no moving average, levels that double, a robust distance.

    t from the levels of a grid, as often as a lognormal density of sigma falls between them;
    w = 1 / (sigma_t - sigma_s),    distance pseudo-Huber with c = 0.00054 √d,    sigma = (1 - t)/t

Source: Song, Dhariwal: Improved techniques for training consistency models (2023), https://arxiv.org/abs/2310.14189
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluvial.distill.consistency import OnLevels, require_levels
from fluvial.distill.core import uniform
from fluvial.model import Model


@dataclass(frozen=True, kw_only=True)
class ImprovedConsistencyTraining(OnLevels):
    """Consistency training with the source's schedule, density and weight.

    Args:
        first, last: the steps of the grid at the beginning and at the end; they double in between, at even times.
        over: the training steps that the doublings are spread over.
        mean, std: of log sigma. The source's -1.1 and 2 are for data of standard deviation 1/2.
    """

    first: int = 10
    last: int = 1280
    over: int = 5000
    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_levels(self.first, self.last, self.over)

    def count(self) -> int:
        stages = int(math.log2(self.last // self.first)) + 1
        every = max(1, self.over // stages)
        return min(self.first * 2 ** (self.step // every), self.last)

    def draw_times(self, model: Model, index: Tensor, seed: int) -> Tensor:
        u = uniform(index, seed)
        z = (self._sigmas()[:-1].log() - self.mean) / self.std
        below = torch.special.ndtr(z)  # falls from the first level to the last
        share = (below[:1] - below) / (below[0] - below[-1])
        place = torch.searchsorted(share[1:].contiguous().to(u.device), u.contiguous(), right=True)
        return self.levels.to(index.device)[place]

    def after(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        place, sigmas = self.place(t), self._sigmas().to(t.device)
        s = self.levels.to(t.device)[place + 1]
        return s, 1.0 / (sigmas[place] - sigmas[place + 1])

    def _sigmas(self) -> Tensor:
        """sigma at each level; the first, which is pure noise, counts as the 80 that the grid begins from."""
        sigmas = (1.0 - self.levels) / self.levels
        return torch.cat([torch.tensor([80.0], dtype=torch.float64), sigmas[1:]])

    def described(self) -> dict[str, Any]:
        levels = {"levels": [self.first, self.last], "over": self.over, "log_sigma": [self.mean, self.std]}
        return {**super().described(), **levels}
