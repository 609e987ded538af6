"""Jumps: what a flow map is sampled by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fluvial.errors import OptionError
from fluvial.flow_maps import FlowMap
from fluvial.model import Model
from fluvial.solvers.base import Solver
from fluvial.solvers.mixing import mixed
from fluvial.solvers.rows import At, Row


@dataclass(frozen=True)
class Jump(Solver):
    """From each time to the next by the pair that the model implies on the way, in part renoised.

        x(s) = alpha_s D + sigma_s (√(1 - renoise) N + √renoise xi)

    renoise = 0 follows the flow map; renoise = 1 jumps to the data and noises them anew: the multistep sampling of
    consistency models, whose pair is right about the data alone. None takes what suits the flow map: 1 for a
    consistency model (0 where its noise is not independent of its data, and cannot be drawn anew), 0 for others. On a
    model that is no flow map renoise = 0 is natural Euler (DDIM).

    Source: Song, Dhariwal, Chen, Sutskever: Consistency models (2023), https://arxiv.org/abs/2303.01469, algorithm 1
    """

    renoise: float | None = None
    needs: ClassVar[str] = "data"

    def __post_init__(self) -> None:
        if self.renoise is not None and not 0.0 <= self.renoise <= 1.0:
            raise OptionError(f"renoise is {self.renoise}; expected a share of the noise's variance, from 0 to 1")

    @property
    def order(self) -> int:
        return 1

    @property
    def stochastic(self) -> bool:
        return bool(self.renoise)

    def step(self, at: At) -> Row:
        return mixed(at, 0.0 if at.lands else self.renoise or 0.0)

    def suited(self, model: Model) -> Jump:
        """With the renoise that suits the model, where none was chosen."""
        if self.renoise is not None:
            return self
        return Jump(1.0 if isinstance(model, FlowMap) and model.kind == "consistency" and model.independent else 0.0)
