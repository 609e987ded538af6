"""MeanFlow: the average velocity from t to r, learned from its own derivative.

    u = v + (r - t) du/dt,    du/dt = v du/dx + du/dt along the trajectory, r fixed;    X(x, t -> r) = x + (r - t) u

follows from X being the same wherever on a trajectory it starts. v is data - noise, or the teacher's velocity. At r = t
it is the loss of a flow, which a part of the samples keep.

Source: Geng, Deng, Bai, Kolter, He: Mean flows for one-step generative modeling (2025),
https://arxiv.org/abs/2505.13447, algorithm 1 (whose time runs from data to noise)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fluvial import grids
from fluvial.distill.core import CHOICE, END, Asked, Distillation, mixed, uniform
from fluvial.distill.derivatives import along
from fluvial.errors import OptionError
from fluvial.flow_maps import FlowMap
from fluvial.model import Model
from fluvial.objectives import Given, mean_square
from fluvial.predictions import spread


@dataclass(frozen=True)
class Adaptive:
    """e / (e + c)^p, e the mean squared error and the divisor without gradient: p = 1 makes all samples count alike.

    The source's e is the sum over a sample's dimensions: its c is this one times their number.

    Source: as for `MeanFlow`, eq. 22
    """

    c: float = 1e-3
    p: float = 1.0

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise OptionError(f"c is {self.c}; expected a positive number, such as 1e-3")

    def __call__(self, error: Tensor) -> Tensor:
        e = mean_square(error)
        return e / (e.detach() + self.c) ** self.p


@dataclass(frozen=True, kw_only=True)
class MeanFlow(Distillation):
    """The loss of an average velocity.

    Args:
        times: the density that both t and r are drawn from; the lesser of them is t.
        share: of the samples that have r apart from t.
    """

    kind: ClassVar[str] = "average"
    blur: ClassVar[float] = 0.01
    target: str = "velocity"
    times: Any = field(default_factory=lambda: grids.LogitNormal(0.4, 1.0))
    distance: str | Callable[[Tensor], Tensor] = Adaptive()
    share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.share <= 1.0:
            raise OptionError(f"share is {self.share}; expected a part of the samples, above 0 and up to 1")

    def draw_times(self, model: Model, index: Tensor, seed: int) -> Tensor:
        density = grids.density(self.times)
        draws = (uniform(index, seed, number) for number in (0, END, CHOICE))
        first, second, choice = draws
        t, other = density.quantile(first, model.path), density.quantile(second, model.path)
        return torch.where(choice < self.share, torch.minimum(t, other), t)

    def ends(self, own: FlowMap, given: Given) -> Tensor:
        """r (B,) of the samples, their t being given."""
        density = grids.density(self.times)
        first, second = (density.quantile(self.draw(given, number), own.path) for number in (0, END))
        apart = torch.maximum(torch.maximum(first, second), given.t)
        return torch.where(self.draw(given, CHOICE) < self.share, apart, given.t)

    def ask(self, own: FlowMap, given: Given) -> Asked:
        x, r = mixed(given), self.ends(own, given)
        v = self.velocity(given, x)
        _, slope = along(
            lambda x, t: own.on_the_way(x, t, r, **given.cond).velocity, (x, given.t), (v, torch.ones_like(given.t))
        )
        return Asked(x, given.t, r, v + spread(r - given.t, x) * slope, arrival=r - given.t)

    def described(self) -> dict[str, Any]:
        return {**super().described(), "share": self.share}
