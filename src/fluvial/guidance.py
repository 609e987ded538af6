"""Guidance: a model made from a model, so that no solver ever hears of it.

One convention of scale throughout: 0 is the null (unconditional) model, 1 the conditional one, more is extrapolation,

    out = null + scale * (cond - null).

Both outputs belong to the same state and time, so mixing them mixes their pairs, in any notation.

Source: Ho, Salimans: Classifier-free diffusion guidance (2022), https://arxiv.org/abs/2207.12598 (their w is scale - 1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluvial.errors import OptionError
from fluvial.model import Model, fill_null
from fluvial.predictions import Query


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance: CFG(3.0)(model) is the guided model.

    Args:
        scale: 0 null, 1 conditional, above 1 guided.
        batched: one network call on a doubled batch; False makes two calls and needs half the memory.

    Each estimate counts as one evaluation (NFE) of twice the cost.
    """

    scale: float
    batched: bool = True

    def __call__(self, model: Model) -> Model:
        if not model.null:
            raise OptionError(
                "guidance asked of a model without a null condition; expected one trained with dropped conditions, "
                'such as fl.Model(..., null={"label": num_classes})'
            )
        return model if self.scale == 1.0 else Guided(model, self)


class Guided(Model):
    """A model under classifier-free guidance; made by `CFG`."""

    def __init__(self, source: Model, guidance: CFG) -> None:
        self.source, self.guidance = source, guidance
        self.network, self.convention = source.network, source.convention

    def under(self, **changes: Any) -> Guided:
        source = self.source.under(**changes)
        return self._replace(source=source, convention=source.convention)

    def with_network(self, network: Callable[..., Tensor]) -> Guided:
        return self._replace(source=self.source.with_network(network), network=network)

    def query(self, t: float | Tensor) -> Query:
        return self._guide(self.source.query(t))

    def queries(self, times: Sequence[float]) -> list[Query]:
        return [self._guide(query) for query in self.source.queries(times)]

    def _guide(self, query: Query) -> Query:
        # With a time for each sample, a doubled batch would need everything about them doubled too.
        batched = self.guidance.batched and isinstance(query.c.alpha, float)
        return query._replace(call=_Mixed(query.call, self.guidance.scale, batched, self.null or {}))


@dataclass(frozen=True)
class _Mixed:
    """Calls with and without the condition, and mixes the outputs."""

    call: Callable[[Tensor, Mapping[str, Any]], Tensor]
    scale: float
    batched: bool
    null: Mapping[str, Any]

    def __call__(self, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
        if not any(name in cond for name in self.null):
            raise OptionError(
                f"guidance needs a condition to strengthen; expected cond with {' or '.join(map(repr, self.null))}"
            )
        nothing = {**cond, **fill_null(self.null, x)}
        if not self.batched:
            with_null, with_cond = self.call(x, nothing), self.call(x, cond)
        else:
            filled = {**fill_null(self.null, x, skip=cond), **cond}
            both = {name: torch.cat([nothing[name], filled[name]]) for name in nothing}
            with_null, with_cond = self.call(torch.cat([x, x]), both).chunk(2)
        return torch.lerp(with_null, with_cond, self.scale)
