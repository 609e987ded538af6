"""Guidance whose scale is a condition: what a student that is told its scale learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fluvial.guidance.guided import around, check_null
from fluvial.model import Model, fill_null
from fluvial.predictions import Query, spread


@dataclass(frozen=True)
class Scaled:
    """Classifier-free guidance by the scale (B,) that is given as the condition "guidance".

        out = null + scale * (cond - null)

    Source: Meng et al.: On distillation of guided diffusion models (2023), https://arxiv.org/abs/2210.03142
    """

    def __call__(self, model: Model) -> Model:
        check_null(model)
        return around(model, self)

    def guide(self, query: Query, t: float | Tensor, null: Mapping[str, Any] | None) -> Query:
        return query._replace(call=_Call(query.call, null or {}))


@dataclass(frozen=True)
class _Call:
    call: Callable[[Tensor, Mapping[str, Any]], Tensor]
    null: Mapping[str, Any]

    def __call__(self, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
        scale, cond = cond["guidance"], {name: value for name, value in cond.items() if name != "guidance"}
        nothing = self.call(x, {**cond, **fill_null(self.null, x)})
        return nothing + spread(scale, x) * (self.call(x, cond) - nothing)
