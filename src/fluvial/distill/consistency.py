"""Consistency models: one network call from any state to the data, the same along a whole trajectory.

    min E w distance(D(x_t, t), D°(x_s, s)),    s the time after t,    D(x, 1) = x

D° is the same student without gradients, or its moving average. In distillation x_s is where the teacher's ODE leads
from x_t in one step; in training, without a teacher, it is the same data with the same noise at s, which is right on
average and in the limit of small steps.

Source: Song, Dhariwal, Chen, Sutskever: Consistency models (2023), https://arxiv.org/abs/2303.01469
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from fluvial import grids, solvers
from fluvial.distill.core import Asked, Distillation, mixed, uniform
from fluvial.distill.teacher_steps import TeacherSteps
from fluvial.errors import OptionError
from fluvial.flow_maps import FlowMap
from fluvial.model import Model
from fluvial.objectives import Given
from fluvial.paths import Rectified


@dataclass(frozen=True, kw_only=True)
class Consistency(Distillation):
    """What consistency models share: the student at t against its judge at `after(t)`."""

    target: str = "data"

    def after(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The time s (B,) after each t (B,), float64, and the weight (B,) of the pair; None is 1."""
        raise NotImplementedError

    def moved(self, given: Given, x: Tensor, s: Tensor) -> Tensor:
        """The state (B, …) at s that belongs to x."""
        return mixed(given, s)

    def ask(self, own: FlowMap, given: Given) -> Asked:
        x = mixed(given)
        s, weight = self.after(given.t)
        target = self.judge_of(own).on_the_way(self.moved(given, x, s), s, **given.cond).data
        return Asked(x, given.t, None, target, weight)


def require_levels(first: int, last: int, over: int) -> None:
    """Refuses a schedule of levels that does not rise."""
    if not 1 <= first <= last or over < 1:
        raise OptionError(
            f"levels go from {first} to {last} over {over} training steps; expected 1 <= first <= last, and 1 or more"
        )


@lru_cache(64)
def _levels(grid: Any, steps: int) -> Tensor:
    return torch.tensor(grids.resolve(grid, Rectified(), steps, steps), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class OnLevels(Consistency):
    """Consistency between neighbours of a grid of `count()` steps, each as often as the others.

    Args:
        grid: an object from `fl.grids`, or its name.
    """

    grid: Any = "karras"

    def count(self) -> int:
        """How many steps the grid has now."""
        raise NotImplementedError

    @property
    def levels(self) -> Tensor:
        """The times of the grid, float64."""
        listed = isinstance(self.grid, list | Tensor)
        return _levels(tuple(float(t) for t in self.grid) if listed else self.grid, self.count())

    def draw_times(self, model: Model, index: Tensor, seed: int) -> Tensor:
        u = uniform(index, seed)
        return self.levels.to(index.device)[(u * self.count()).long()]

    def place(self, t: Tensor) -> Tensor:
        """Which step (B,) of the grid each time lies in."""
        return torch.bucketize(t.contiguous(), self.levels.to(t.device)[1:-1], right=True)

    def after(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.levels.to(t.device)[self.place(t) + 1], None

    def described(self) -> dict[str, Any]:
        grid = grids.named(self.grid) if isinstance(self.grid, str) else self.grid
        return {**super().described(), "grid": grid}


@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation(OnLevels):
    """The student along the teacher's trajectories, between the levels of one grid (algorithm 2 of the source).

    What is wrong near the data is in the target of every earlier time, so the error is weighed as that of the velocity
    u = (D - x)/(1 - t), by 1/(1 - t)²: each time's network output counts alike. With a weight of 1 those near the data
    hardly count, and drift (the source's lambda(t) leaves it open).

    Args:
        teacher: whose ODE it is; needed.
        steps: how many steps the grid has.
        solver: that makes the teacher's step.
    """

    steps: int = 18
    solver: Any = "heun"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None:
            raise OptionError("there is no teacher; expected the model to distill")
        _ = self.follow

    def count(self) -> int:
        return self.steps

    @cached_property
    def follow(self) -> TeacherSteps:
        """The teacher's steps along the grid."""
        assert self.teacher is not None
        return TeacherSteps(self.teacher, self.solver, self.levels.tolist())

    def after(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().after(t)[0], (1.0 - t).pow(-2)

    def moved(self, given: Given, x: Tensor, s: Tensor) -> Tensor:
        return self.follow(x, self.place(given.t), given.cond)

    def described(self) -> dict[str, Any]:
        return {**super().described(), "grid_steps": self.steps, "solver": solvers.named(self.solver)}


@dataclass(frozen=True, kw_only=True)
class ConsistencyTraining(OnLevels):
    """The student along straight lines between data and noise, on a grid that becomes finer (algorithm 3).

        steps(k) = ⌈√(k/K ((s1 + 1)² - s0²) + s0²) - 1⌉,    k = 0 … K,    and s0 at least

    Args:
        first, last: s0 and s1, the steps of the grid at the beginning and at the end.
        over: K, the training steps after which it is finest.
    """

    first: int = 2
    last: int = 150
    over: int = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_levels(self.first, self.last, self.over)

    def count(self) -> int:
        share = min(self.step / self.over, 1.0)
        return max(self.first, math.ceil(math.sqrt(share * ((self.last + 1) ** 2 - self.first**2) + self.first**2) - 1))

    def described(self) -> dict[str, Any]:
        return {**super().described(), "levels": [self.first, self.last], "over": self.over}
