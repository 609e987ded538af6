"""Easy consistency tuning (ECT): a trained model becomes a consistency model as its two times draw together.

    sigma_s = sigma_t (1 - n(sigma_t)/q^(k+1))⁺,    n(sigma) = 1 + 8/(1 + exp(sigma)),    w = 1/(sigma_t - sigma_s)

At k = 0 most pairs end on the data: that is the loss of a diffusion model, where the weights come from. Every stage the
gap is divided by q.

Source: Geng, Pokle, Luo, Lin, Kolter: Consistency models made easy (2024), https://arxiv.org/abs/2406.14548
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fluvial import grids
from fluvial.distill.consistency import Consistency


@dataclass(frozen=True, kw_only=True)
class EasyConsistencyTuning(Consistency):
    """Consistency training with continuous times and a gap that shrinks.

    Args:
        q: what the gap is divided by at each stage.
        stages: how many there are.
        over: the training steps that they are spread over.
        k, b: of n(sigma) = 1 + k/(1 + exp(b sigma)).
        times: the density of t; the source's lognormal sigma is for data of standard deviation 1/2.
    """

    times: Any = field(default_factory=lambda: grids.LogNormal(-1.1, 2.0))
    q: float = 2.0
    stages: int = 8
    over: int = 5000
    k: float = 8.0
    b: float = 1.0

    def after(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        stage = min(self.step * self.stages // max(self.over, 1), self.stages - 1)
        sigma = (1.0 - t) / t
        factor = 1.0 + self.k * torch.sigmoid(-self.b * sigma)
        later = sigma * (1.0 - factor / self.q ** (stage + 1)).clamp(min=0.0)
        return 1.0 / (1.0 + later), 1.0 / (sigma - later)

    def described(self) -> dict[str, Any]:
        return {**super().described(), "q": self.q, "stages": self.stages, "over": self.over, "n": [self.k, self.b]}
