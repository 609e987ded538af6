"""Shortcut models: one long step learned from two short ones.

    u(x, t, t + 2d) = [u(x, t, t + d) + u(x', t + d, t + 2d)] / 2,    x' = x + d u(x, t, t + d)

with d from 1/2 down to the shortest, whose two steps are the velocity's own. The other samples learn that: u(x, t, t)
is data - noise, or the teacher's velocity.

Source: Frans, Hafner, Levine, Abbeel: One step diffusion via shortcut models (2024), https://arxiv.org/abs/2410.12557
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fluvial.distill.core import CHOICE, LEVEL, Asked, Distillation, mixed, uniform
from fluvial.errors import OptionError
from fluvial.flow_maps import FlowMap
from fluvial.model import Model
from fluvial.objectives import Given
from fluvial.predictions import spread


@dataclass(frozen=True, kw_only=True)
class Shortcut(Distillation):
    """The loss of shortcut models.

    Args:
        steps: the most that the student is to be sampled with, a power of 2: the shortest step is 1/steps.
        share: of the samples that learn from two steps.
    """

    kind: ClassVar[str] = "average"
    target: str = "velocity"
    steps: int = 128
    share: float = 0.25
    judge: str = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2 or self.steps & (self.steps - 1):
            raise OptionError(f"steps is {self.steps}; expected a power of 2, such as 128")
        if not 0.0 < self.share < 1.0:
            raise OptionError(f"share is {self.share}; expected a part of the samples, between 0 and 1")

    def _length(self, choice: Tensor, level: Tensor) -> Tensor:
        """2d (B,) from uniform numbers: 1, 1/2, … 2/steps; 0 for those that learn the velocity."""
        levels = self.steps.bit_length() - 1
        return torch.where(choice < self.share, 2.0 ** -(level * levels).floor(), 0.0)

    def draw_times(self, model: Model, index: Tensor, seed: int) -> Tensor:
        u, choice, level = (uniform(index, seed, number) for number in (0, CHOICE, LEVEL))
        length = self._length(choice, level)
        return torch.where(length > 0, (u / length).floor() * length, u)

    def ask(self, own: FlowMap, given: Given) -> Asked:
        x, t = mixed(given), given.t
        length = self._length(self.draw(given, CHOICE), self.draw(given, LEVEL))
        target = self.velocity(given, x)
        rows = (length > 0).nonzero()[:, 0]
        if len(rows):
            cond = {name: value[rows] for name, value in given.cond.items()}
            target[rows] = self._two_steps(self.judge_of(own), x[rows], t[rows], length[rows] / 2, cond)
        return Asked(x, t, t + length, target, arrival=length)

    def _two_steps(self, judge: FlowMap, x: Tensor, t: Tensor, half: Tensor, cond: dict[str, Tensor]) -> Tensor:
        # The shortest steps are those of the velocity itself.
        ahead = torch.where(half > 1.5 / self.steps, half, 0.0)
        first = judge.on_the_way(x, t, t + ahead, **cond).velocity
        middle = x + spread(half, x) * first
        second = judge.on_the_way(middle, t + half, t + half + ahead, **cond).velocity
        return (first + second) / 2

    def described(self) -> dict[str, Any]:
        return {**super().described(), "steps_at_most": self.steps, "share": self.share}
