"""Continuous-time consistency models (sCM): the limit of ever smaller steps, made stable.

On the cosine path, the source's TrigFlow, with angle = (1 - t) π/2,

    x = cos(angle) data + sin(angle) noise,    F the prediction of v = dx/dangle,    D = cos(angle) x - sin(angle) F,

the student is led along the derivative of D on the trajectory. Its two parts are

    g = -cos²(angle) (F - dx/dangle) - r cos(angle) sin(angle) (x + dF/dangle),    g = cos(angle) dD/dangle at r = 1,

and the loss is |F - F° - g/(|g| + c)|², F° the same without gradients; r rises from 0 to 1 while training warms up.
dx/dangle is the teacher's v in distillation, and that of the sample's own data and noise in training.

Left out are the source's learned weight of the times, which weighs errors that the division by |g| has made alike, and
its changes of the network, which is the teacher's.

Source: Lu, Song: Simplifying, stabilizing and scaling continuous-time consistency models (2024),
https://arxiv.org/abs/2410.11081
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fluvial import grids
from fluvial.distill.core import Asked, Distillation
from fluvial.distill.derivatives import along
from fluvial.errors import OptionError
from fluvial.flow_maps import FlowMap
from fluvial.objectives import Given
from fluvial.predictions import spread


@dataclass(frozen=True, kw_only=True)
class ContinuousConsistency(Distillation):
    """The loss of sCD with a teacher, of sCT without.

    Args:
        times: the density of t; the source's lognormal tan(angle), -1 and 1.4, is for data of standard deviation 1/2.
        warmup: H, the training steps in which r rises from 0 to 1.
        c: what is added to the norm of the tangent that divides it.
    """

    path: ClassVar[str] = "cosine"
    blur: ClassVar[float] = 0.01
    target: str = "v"
    times: Any = field(default_factory=lambda: grids.LogNormal(-1.0, 1.4))
    warmup: int = 1000
    c: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.c > 0:
            raise OptionError(f"c is {self.c}; expected a positive number, such as 0.1")
        if self.warmup < 0:
            raise OptionError(f"warmup is {self.warmup}; expected training steps, 0 or more")

    def ask(self, own: FlowMap, given: Given) -> Asked:
        angle = (1.0 - given.t) * (math.pi / 2)
        cos, sin = (spread(f(angle), given.data) for f in (torch.cos, torch.sin))
        x = cos * given.data + sin * given.noise
        if self.teacher is None:
            motion = cos * given.noise - sin * given.data
        else:
            motion = self.teacher(x, given.t, **given.cond).v
        # The derivative is taken of cos sin F at once: near the ends dF/dangle alone is large.
        both = (angle.cos() * angle.sin() * (-2 / math.pi)).to(given.t.dtype)
        answer, moved = along(
            lambda x, t: own.on_the_way(x, t, **given.cond).v, (x, given.t), (cos * sin * motion, both)
        )
        rising = min(self.step / self.warmup, 1.0) if self.warmup else 1.0
        tangent = -cos.square() * (answer - motion) - rising * (cos * sin * x + moved)
        size = tangent.flatten(1).norm(dim=1) + self.c
        return Asked(x, given.t, None, answer + tangent / spread(size, tangent), arrival=size)

    def described(self) -> dict[str, Any]:
        return {**super().described(), "warmup": self.warmup, "c": self.c}
