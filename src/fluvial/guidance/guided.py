"""What all guidances are made of: the guided model, the contrasting call, and the geometry of a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fluvial.errors import OptionError, PathTimeError
from fluvial.model import Converted, Model, fill_null
from fluvial.predictions import Query, combine, solve, spread


class Guidance(Protocol):
    """Makes a guided model of a model; `guide` turns its query at time t into the guided one."""

    def __call__(self, model: Model) -> Model: ...
    def guide(self, query: Query, t: float | Tensor, null: Mapping[str, Any] | None) -> Query: ...


class Guided(Model):
    """A model under guidance; made by `CFG` and its relatives."""

    def __init__(self, source: Model, guidance: Guidance) -> None:
        self.source, self.guidance = source, guidance
        self.network, self.convention, self.jumps = source.network, source.convention, source.jumps

    def under(self, **changes: Any) -> Guided:
        source = self.source.under(**changes)
        return self._replace(source=source, convention=source.convention)

    def with_network(self, network: Callable[..., Tensor]) -> Guided:
        return self._replace(source=self.source.with_network(network), network=network)

    def query(self, t: float | Tensor) -> Query:
        return self.guidance.guide(self.source.query(t), t, self.null)

    def query_to(self, t: float | Tensor, r: float | Tensor | None = None) -> Query:
        return self.guidance.guide(self.source.query_to(t, r), t, self.null)

    def queries(self, times: Sequence[float]) -> list[Query]:
        return [self.guidance.guide(query, t, self.null) for query, t in zip(self.source.queries(times), times)]


def around(model: Model, guidance: Guidance) -> Model:
    """The guided model. A converted one is guided at its source: the pair, which guidance acts on, is the same."""
    if isinstance(model, Converted):
        return model._replace(source=around(model.source.under(null=model.null), guidance))
    return Guided(model, guidance)


# Calls.


@dataclass(frozen=True)
class _Contrast:
    """Calls without and with the condition, and mixes the outputs; without a mix, calls with the condition alone."""

    call: Callable[[Tensor, Mapping[str, Any]], Tensor]
    null: Mapping[str, Any]
    batched: bool
    mix: Callable[[Tensor, Tensor, Tensor], Tensor] | None

    def __call__(self, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
        if not any(name in cond for name in self.null):
            raise OptionError(
                f"guidance needs a condition to strengthen; expected cond with {' or '.join(map(repr, self.null))}"
            )
        if self.mix is None:
            return self.call(x, cond)
        nothing = {**cond, **fill_null(self.null, x)}
        if not self.batched:
            return self.mix(x, self.call(x, nothing), self.call(x, cond))
        filled = {**fill_null(self.null, x, skip=cond), **cond}
        both = {name: torch.cat([nothing[name], filled[name]]) for name in nothing}
        with_null, with_cond = self.call(torch.cat([x, x]), both).chunk(2)
        return self.mix(x, with_null, with_cond)


def contrast(query: Query, null: Mapping[str, Any] | None, batched: bool, mix: Any) -> Query:
    """The query that calls twice and returns mix(x, null output, conditional output); with mix None, calls once."""
    # With a time for each sample, a doubled batch would need everything about them doubled too.
    batched = batched and isinstance(query.c.alpha, float)
    return query._replace(call=_Contrast(query.call, null or {}, batched, mix))


def times(factor: Any, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """A call that asks no network: factor * x."""
    return x * spread(factor, x)


# Quantities.


class Reading(NamedTuple):
    """A linear functional of the pair as it is read off an output: on_x * x + on_out * out.

    Zero where the output does not determine it: what looks at directions in it then sees none.
    """

    on_x: Any
    on_out: Any
    known: bool | Tensor

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        return combine(self.on_x, x, self.on_out, out)


def reading(query: Query, weights: tuple[Any, Any]) -> Reading:
    """weights[0] * data + weights[1] * noise, from the output of this query."""
    try:
        on_x, on_out = solve(query.state, query.weights, weights, "estimate")
    except PathTimeError:
        return Reading(0.0, 0.0, False)
    if not isinstance(on_x, Tensor):
        return Reading(on_x, on_out, True)
    known = on_x.isfinite() & on_out.isfinite()
    return Reading(on_x.where(known, 0.0), on_out.where(known, 0.0), known)


def noise_to_data(query: Query) -> Any:
    """sigma/alpha of the query's time, which every path shares; infinite for pure noise."""
    alpha, sigma = query.c.alpha, query.c.sigma
    return math.inf if isinstance(alpha, float) and alpha == 0.0 else sigma / alpha


def choose(mask: bool | Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """yes (B, …) where the mask, a bool or (B,), is true, else no."""
    if isinstance(mask, Tensor):
        return torch.where(mask.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)
    return yes if mask else no


# A sample as one vector.


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample, (B,), in float32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).reshape(len(a), -1).sum(1)


def norm(a: Tensor) -> Tensor:
    """|a| of each sample, (B,): above zero, so that it may be divided by."""
    squared = _inner(a, a)
    return squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()


def along(a: Tensor, direction: Tensor) -> Tensor:
    """The part of a along the direction, per sample, like a; zero where there is no direction."""
    return direction * spread(_inner(a, direction) / norm(direction).square(), a)


def _centred(a: Tensor) -> Tensor:
    return a - a.mean(dim=tuple(range(1, a.ndim)), keepdim=True) if a.ndim > 1 else torch.zeros_like(a)


def rescaled(out: Tensor, cond: Tensor, data_out: Tensor, data_cond: Tensor, share: float) -> Tensor:
    """The output whose data estimate is data_out * (1 + share * (std(data_cond) / std(data_out) - 1)).

    A change of the data estimate by its output is (std_cond - std_out) / (on_out std_out) * data_out, and

        (std_cond - std_out) / on_out = -<out - cond, data_cond + data_out> / (std_cond + std_out),   centred,

    is written without the difference, because near the data both on_out and the difference vanish.
    """
    centred_out, centred_cond = _centred(data_out), _centred(data_cond)
    std_out, std_cond = norm(centred_out), norm(centred_cond)
    change = -_inner(_centred(out - cond), centred_cond + centred_out) / ((std_cond + std_out) * std_out)
    return out + data_out * spread(share * change, out)


# Options.


def check(name: str, value: object, valid: bool, expected: str) -> None:
    """Raises the error for an option that is not valid."""
    if not valid:
        raise OptionError(f"{name} is {value!r}; expected {expected}")


def check_scale(scale: object, batched: object = True) -> None:
    """The two options that all of them share."""
    check("scale", scale, is_number(scale), "a finite number: 0 null, 1 conditional, above 1 guided")
    check("batched", batched, isinstance(batched, bool), "True (one call, doubled batch) or False (two calls)")


def check_null(model: Model) -> None:
    """Raises for a model that nothing can be left out of."""
    if not model.null:
        raise OptionError(
            "guidance asked of a model without a null condition; expected one trained with dropped conditions, "
            'such as fl.Model(..., null={"label": num_classes})'
        )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_interval(value: Any) -> bool:
    """Whether this is (low, high) with 0 <= low < high; high may be infinite."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not is_number(value[0]):
        return False
    return (is_number(value[1]) or value[1] == math.inf) and 0 <= value[0] < value[1]
