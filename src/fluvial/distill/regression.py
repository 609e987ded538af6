"""Regression on pairs: the end of the teacher's own trajectory is the student's target.

    min E distance(D(x_t, t), data),    x_t on the trajectory that leads from the noise to the data

At t = 0, where x is the noise, that is one-step distillation, as for rectified flows after k rounds; with the states
that pairs keep on their way, several steps are learned too. There is no target that moves: nothing can diverge.

Sources: Luhman, Luhman: Knowledge distillation in iterative generative models for improved sampling speed (2021),
https://arxiv.org/abs/2101.02388; Liu, Gong, Liu: Flow straight and fast (2022), https://arxiv.org/abs/2209.03003
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluvial.distill.core import Asked, Distillation, uniform
from fluvial.errors import OptionError, ShapeError
from fluvial.flow_maps import FlowMap
from fluvial.model import Model
from fluvial.objectives import Given


@dataclass(frozen=True, kw_only=True)
class Regression(Distillation):
    """The loss of a student that is told where every trajectory ends.

    Args:
        starts: the times it learns to leave from: 0, and those that the pairs have states at.
        first: the share of the samples that leave from 0.
    """

    target: str = "data"
    coupling: Any = "pairs"
    starts: tuple[float, ...] = (0.0,)
    first: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.first <= 1.0:
            raise OptionError(f"first is {self.first}; expected a share of the samples, from 0 to 1")

    def _place(self, u: Tensor) -> Tensor:
        """Which start (B,) each sample has."""
        others = len(self.starts) - 1
        if not others:
            return torch.zeros_like(u, dtype=torch.long)
        return (1.0 + (u - self.first) / (1.0 - self.first) * others).floor().clamp(min=0.0).long()

    def draw_times(self, model: Model, index: Tensor, seed: int) -> Tensor:
        u = uniform(index, seed)
        return torch.tensor(self.starts, dtype=torch.float64, device=index.device)[self._place(u)]

    def ask(self, own: FlowMap, given: Given) -> Asked:
        count = 0 if given.states is None else given.states.shape[1]
        if count != len(self.starts) - 1:
            raise ShapeError(
                f"the pairs have states at {count} times; expected them at {len(self.starts) - 1}: {self.starts[1:]}"
            )
        ends = [given.noise] if given.states is None else [given.noise, *given.states.to(given.data).unbind(1)]
        starts = torch.tensor(self.starts[1:], dtype=torch.float64, device=given.t.device)
        place = torch.bucketize(given.t.contiguous(), starts, right=True)
        x = torch.stack(ends, 1)[torch.arange(len(place), device=place.device), place]
        return Asked(x, given.t, None, given.data)

    def described(self) -> dict[str, Any]:
        return {**super().described(), "starts": list(self.starts), "first": self.first}
