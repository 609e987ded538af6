"""Progressive distillation: a student whose one step is two of its teacher's, again and again.

    min E |u(x, t) - (x'' - x)/(t'' - t)|²,    x -> x' -> x''  two natural Euler steps of the teacher

on the grid t = 0, 1/N, …, with t'' - t = 1/N. The student then is the teacher of the next, with N/2 steps.

Source: Salimans, Ho: Progressive distillation for fast sampling of diffusion models (2022),
https://arxiv.org/abs/2202.00512, algorithm 2 (whose teacher steps are DDIM: the same, on any path)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fluvial.distill.core import Asked, Distillation, mixed, uniform
from fluvial.errors import OptionError
from fluvial.flow_maps import FlowMap
from fluvial.model import Model
from fluvial.objectives import Given


@dataclass(frozen=True, kw_only=True)
class Halving(Distillation):
    """The loss of one round.

    Args:
        teacher: of this round, which is right in 2 `steps`; needed.
        steps: N, of the student.
    """

    kind: ClassVar[str] = "euler"
    target: str = "velocity"
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None:
            raise OptionError("there is no teacher; expected the model to distill")
        if self.steps < 1:
            raise OptionError(f"steps is {self.steps}; expected a whole number, 1 or more")

    def draw_times(self, model: Model, index: Tensor, seed: int) -> Tensor:
        u = uniform(index, seed)
        return (u * self.steps).floor() / self.steps

    def ask(self, own: FlowMap, given: Given) -> Asked:
        assert self.teacher is not None
        x, t, length = mixed(given), given.t, 1.0 / self.steps
        middle = self.teacher(x, t, **given.cond).at(t + length / 2)
        end = self.teacher(middle, t + length / 2, **given.cond).at(t + length)
        return Asked(x, t, None, (end - x) / length, arrival=torch.full_like(t, length))

    def described(self) -> dict[str, Any]:
        return {**super().described(), "steps_of_student": self.steps}
