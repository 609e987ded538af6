"""Flow maps: the second kind of model. Where a `Model` says how a state moves, a flow map says where it arrives.

    X(x, t -> r) = alpha_r D + sigma_r N,       (D, N) the pair that the network implies at x, asked about t and r

One call leads from the state at t to the state at r. Seen so, on any path and with any prediction,

- X(x, t -> t) = x, because a pair always mixes to the state it was read from: the boundary needs no training;
- as r goes to t the pair becomes the ODE's own, D - N its velocity on the rectified path;
- on the rectified path X = x + (r - t) u, with u = D - N the average velocity between t and r (MeanFlow, shortcut).

A network that is not told r answers for one r alone. Where that is r = 1 it is a consistency model, X(x, t -> 1) = D;
its jumps to other times mix the pair of that one, or its data with fresh noise. Where it is the next time of one grid,
the network is a few-step Euler student, as progressive distillation makes them.

Sources: Song, Dhariwal, Chen, Sutskever: Consistency models (2023), https://arxiv.org/abs/2303.01469; Geng, Deng, Bai,
Kolter, He: Mean flows for one-step generative modeling (2025), https://arxiv.org/abs/2505.13447; Frans, Hafner, Levine,
Abbeel: One step diffusion via shortcut models (2024), https://arxiv.org/abs/2410.12557.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluvial.convention import Convention
from fluvial.errors import OptionError, one_of
from fluvial.model import Converted, Model
from fluvial.paths import Path
from fluvial.predictions import Estimate, Prediction, Query, combine, solve

KINDS = ("consistency", "average", "euler")


class FlowMap(Model):
    """`flow_map(x, t, r)` is the state at r from the state x at t; `flow_map(x, t)` the estimate on the way to data.

    Args:
        model: the network and its convention, as for any model. For "average" the network is called with the end as
            well, network(x, t, r=…, **cond), r on the same clock as t.
        kind: "consistency", for a network that only knows the way to the data; "average", for any r; "euler", for the
            natural Euler steps of the one grid it was trained on.

    It is sampled by `fl.sample`, with the solver "jump" where none is named, and converted, saved and loaded as any
    model. It has no score: its pair is that of an arrival, not the mean of what might be there.
    """

    jumps = True
    inner: Model

    def __init__(self, model: Model, kind: str = "consistency") -> None:
        if kind not in KINDS:
            raise one_of("kind of flow map", kind, KINDS)
        if isinstance(model, FlowMap):
            raise OptionError("the model is a flow map already; expected the model inside it")
        self.inner, self.kind = model, kind

    @property
    def network(self) -> Callable[..., Tensor]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.network

    @property
    def convention(self) -> Convention:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.convention

    @convention.setter
    def convention(self, convention: Convention) -> None:
        self.inner.convention = convention

    def __call__(self, x: Tensor, t: float | Tensor, r: float | Tensor | None = None, **cond: Any) -> Any:
        """The state at r (B, …) from state x at t; an `Estimate` of the way to the data where no r is given.

        Args:
            x: (B, …), in path units.
            t, r: floats or (B,), in either order.
        """
        if r is None:
            return self.on_the_way(x, t, **cond)
        t, r = self._batch_time(x, t), self._batch_time(x, r)
        if isinstance(t, Tensor) or isinstance(r, Tensor):
            t, r = (torch.as_tensor(v, dtype=torch.float64, device=x.device).expand(len(x)) for v in (t, r))
        query, end = self.query_to(t, r), self.path(r)
        on_x, on_out = solve(query.state, query.weights, (end.alpha, end.sigma), "state")
        if isinstance(t, Tensor):
            # The solve is exact but for rounding, and the boundary condition is to hold to the last bit.
            on_x, on_out = (torch.where(t == r, torch.full_like(t, v), c) for v, c in ((1.0, on_x), (0.0, on_out)))
        elif t == r:
            return x.clone()
        out = query.call(x, cond)
        return combine(on_x, x, on_out, out)

    def on_the_way(self, x: Tensor, t: float | Tensor, r: float | Tensor | None = None, **cond: Any) -> Estimate:
        """The pair (data, noise) of the way from x at t to r; None is the data."""
        t = self._batch_time(x, t)
        return Estimate(self.query_to(t, None if r is None else self._batch_time(x, r)), x, cond)

    def query(self, t: float | Tensor) -> Query:
        return self.query_to(t)

    def queries(self, times: Sequence[float]) -> list[Query]:
        return [self.query_to(t) for t in times]

    def query_to(self, t: float | Tensor, r: float | Tensor | None = None) -> Query:
        """The query at t for the way to r; None is the data, also where the path stops short of them."""
        query = self.inner.query(t)._replace(independent=False)
        if self.kind != "average":
            return query
        return query._replace(call=_To(query.call, network_time(self.inner, r)))

    def under(self, **changes: Any) -> FlowMap:
        return FlowMap(self.inner.under(**changes), self.kind)

    def with_network(self, network: Callable[..., Tensor]) -> FlowMap:
        return FlowMap(self.inner.with_network(network), self.kind)

    def seen(self, path: Path, prediction: Prediction) -> FlowMap:
        return FlowMap(self.inner.seen(path, prediction), self.kind)


def network_time(model: Model, t: float | Tensor | None) -> Any:
    """The time t of the model's path on its network's own clock; None is the last one that the network knows."""
    if isinstance(model, Converted):
        source = model.source
        if t is not None and model.path != source.path:
            t = source.path.time(model.path.log_snr(t))  # pyright: ignore[reportArgumentType]
        return network_time(source, t)
    t = 1.0 if t is None else t
    convention = model.convention
    time = convention.clock(t) if convention.clock else convention.prediction.clock(model.path(t))
    return t if time is None else time


@dataclass(frozen=True)
class _To:
    """A network call that is told where to lead."""

    call: Callable[[Tensor, Mapping[str, Any]], Tensor]
    r: Any

    def __call__(self, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if isinstance(self.r, Tensor):
            r = self.r.to(device=x.device, dtype=dtype)
        else:
            r = torch.full((len(x),), self.r, dtype=dtype, device=x.device)
        return self.call(x, {**cond, "r": r})
