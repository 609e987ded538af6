"""A model: a network together with everything it was trained under.

The convention says which path the states lie on, what the output means, which time the network counts in (`clock`)
and how its input is scaled. With it, any network at any float time or batch of times gives an `Estimate` of the pair
(data, noise), which is all that solvers, guidance and measures ever see.

Changing path means: match the log-SNR to find the other clock's time, rescale the state, keep the pair,

    t = P.time(P'.log_snr(t')),        x = x' √(alpha² + sigma²) / √(alpha'² + sigma'²).

Outside the source's log-SNR range its data estimate at the nearer end is kept and the noise recomputed from the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fluvial import grids, paths, predictions
from fluvial.convention import Clock, Convention, Normalisation
from fluvial.errors import OptionError, ShapeError
from fluvial.grids import Fitted, Segments
from fluvial.paths import Coefficients, Path
from fluvial.predictions import Data, Estimate, Noise, Prediction, Query, combine, solve, spread

__all__ = ["Clock", "Convention", "Converted", "Model", "Normalisation", "convert", "fill_null"]


class Model:
    """A network and its convention: `model(x, t, **cond)` is an `Estimate` of the pair (data, noise) at x.

    Args:
        network: any callable, network(x, t, **cond) -> tensor like x; t arrives as a (B,) tensor on the network's own
            clock, float32 (float64 if x is). An nn.Module gets x in its own dtype, and its output is cast back.
        path: the path its states lie on, an object or a name.
        prediction: what it outputs: "data", "noise", "velocity", "v", "score", "edm", or an object.
        clock, scale_input, null, independent, normalisation, shape: see `Convention`.

    The time t is a float (checked, exact) or a tensor (B,) (unchecked: an impossible end gives inf or nan). Conditions
    that are missing are filled with the null condition, where there is one. Everything is in path units.
    """

    jumps = False  # whether it leads from time to time in one call: see `flow_maps`

    def __init__(
        self,
        network: Callable[..., Tensor],
        path: Path | str,
        prediction: str | Prediction = "velocity",
        clock: Callable[[Any], Any] | None = None,
        scale_input: Callable[[Any], Any] | None = None,
        null: Mapping[str, Any] | None = None,
        independent: bool = True,
        normalisation: Normalisation | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        if not callable(network):
            raise OptionError(f"network is {type(network).__name__}; expected a callable network(x, t, **cond)")
        self.network = network
        self.convention = Convention(
            paths.named(path),
            predictions.named(prediction),
            clock,
            scale_input,
            null,
            independent,
            normalisation or Normalisation(),
            shape,
        )

    def __call__(self, x: Tensor, t: float | Tensor, **cond: Any) -> Estimate:
        """The estimate at state x (B, …) and time t (float or (B,))."""
        query = self.query(self._batch_time(x, t))
        return Estimate(query, x, cond)

    def predict(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The raw output (B, …), in the model's own prediction."""
        return self(x, t, **cond).predict(self.prediction)

    def query(self, t: float | Tensor) -> Query:
        """Everything about asking the model at time t, a float or a float64 tensor (B,), before the state is known."""
        return self._query(t, self.path(t)) if isinstance(t, Tensor) else self.queries([t])[0]

    def queries(self, times: Sequence[float]) -> list[Query]:
        """The queries at many float times, for a sampler's plan: the path is evaluated once for all of them."""
        return [self._query(t, c) for t, c in zip(times, self.path.table(times))]

    def query_to(self, t: float | Tensor, r: float | Tensor | None = None) -> Query:
        """The query at t on the way to r (None: the data), for flow maps; to other models the way is no matter."""
        return self.query(t)

    def _query(self, t: Any, c: Coefficients) -> Query:
        convention = self.convention
        clock, scale_input = convention.clock, convention.scale_input
        time = clock(t) if clock else convention.prediction.clock(c)
        scale = scale_input(t) if scale_input else convention.prediction.scale_input(c)
        call = _Call(self.network, t if time is None else time, scale, convention.null)
        prediction = convention.prediction
        return Query(convention.path, c, c, prediction.weights(c), call, prediction, convention.independent)

    def _batch_time(self, x: Tensor, t: float | Tensor) -> float | Tensor:
        if not isinstance(t, Tensor):
            return float(t)
        if t.ndim > 1 or t.numel() not in (1, len(x)):
            raise ShapeError(f"t has shape {tuple(t.shape)} for a batch of {len(x)}; expected a float or ({len(x)},)")
        # In float64, because 1 - t loses the small noise levels in float32 (and MPS has nothing better).
        exact = torch.float32 if t.device.type == "mps" else torch.float64
        return t.to(exact).expand(len(x)) if t.numel() == 1 else t.to(exact)

    def _replace(self, **attributes: Any) -> Self:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__getstate__(), **attributes)
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """What makes the model: not the plans that `fluvial.plans` keeps with it."""
        return {name: value for name, value in self.__dict__.items() if name != "_plans"}

    def seen(self, path: Path, prediction: Prediction) -> Model:
        """The same model on this path, through this prediction: what `convert` returns."""
        source = self.source if isinstance(self, Converted) else self
        converted = Converted(source, path, prediction)
        return converted.under(independent=self.independent, grid=self.grid, segments=self.segments)

    def under(self, **changes: Any) -> Self:
        """The same network under an altered convention, such as under(independent=False)."""
        return self._replace(convention=replace(self.convention, **changes))

    def with_network(self, network: Callable[..., Tensor]) -> Self:
        """The same convention around another network, such as the averaged copy of this one."""
        return self._replace(network=network)

    def assume_independent(self) -> Self:
        """The same model with the score and SDE solvers allowed: the user vouches for Gaussian independent noise."""
        return self.under(independent=True)

    @property
    def path(self) -> Path:
        return self.convention.path

    @property
    def prediction(self) -> Prediction:
        return self.convention.prediction

    @property
    def independent(self) -> bool:
        return self.convention.independent

    @property
    def null(self) -> Mapping[str, Any] | None:
        return self.convention.null

    @property
    def normalisation(self) -> Normalisation:
        return self.convention.normalisation

    @property
    def shape(self) -> tuple[int, ...] | None:
        return self.convention.shape

    @property
    def grid(self) -> Fitted | None:
        return self.convention.grid

    @property
    def segments(self) -> Segments | None:
        return self.convention.segments

    def times(self, times: Any = None, steps: int | Sequence[int] | None = None, default: int = 1) -> list[float]:
        """The times a sampler of this model visits: `grids.resolve` with the model's own grid and segments."""
        return grids.resolve(times, self.path, steps, default, self.grid, self.segments)

    def parameters(self) -> list[nn.Parameter]:
        """The network's parameters (none for a plain callable)."""
        return list(self.network.parameters()) if isinstance(self.network, nn.Module) else []

    def to(self, *args: Any, **kwargs: Any) -> Model:
        """Moves or casts the network in place, as `nn.Module.to`."""
        if isinstance(self.network, nn.Module):
            self.network.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are (the CPU for a plain callable)."""
        parameters = self.parameters()
        return parameters[0].device if parameters else torch.device("cpu")

    def __repr__(self) -> str:
        network = type(self.network).__name__
        return f"{type(self).__name__}({network}, {self.path}, prediction={self.prediction.name!r})"


class _Call:
    """One network call at a known time: scales and casts x, spreads the time, fills in the null condition."""

    def __init__(self, network: Any, time: Any, scale: Any, null: Mapping[str, Any] | None) -> None:
        self.network, self.time, self.null = network, time, null
        self.scale = None if isinstance(scale, float) and scale == 1.0 else scale
        parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
        self.dtype = parameter.dtype if parameter is not None else None

    def __call__(self, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
        time_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if isinstance(self.time, Tensor):
            time = self.time.to(time_dtype)
        else:
            time = torch.full((len(x),), self.time, dtype=time_dtype, device=x.device)
        if self.null:
            cond = {**fill_null(self.null, x, skip=cond), **cond}
        y = x if self.scale is None else x * spread(self.scale, x)
        out = self.network(y if self.dtype is None or y.dtype == self.dtype else y.to(self.dtype), time, **cond)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            given = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ShapeError(f"the network returned {given} for x of shape {tuple(x.shape)}; expected a tensor like x")
        return out if out.dtype == x.dtype else out.to(x.dtype)


def fill_null(null: Mapping[str, Any], x: Tensor, skip: Mapping[str, Any] | tuple[()] = ()) -> dict[str, Tensor]:
    """The null condition for the batch of x, of those names that `skip` lacks."""
    filled = {}
    for name, value in null.items():
        if name not in skip:
            if isinstance(value, Tensor):
                filled[name] = value.to(x.device, non_blocking=True).expand(len(x), *value.shape)
            else:
                # Filled where it is needed: a number copied to the device would make the host wait.
                filled[name] = torch.full((len(x),), value, device=x.device)
    return filled


class Converted(Model):
    """A model seen on another path or through another prediction; made by `convert`. Shares the source's network."""

    def __init__(self, source: Model, path: Path, prediction: Prediction) -> None:
        self.source, self.network = source, source.network
        # The clock and the input scaling stay the source's business.
        self.convention = replace(source.convention, path=path, prediction=prediction, clock=None, scale_input=None)

    def with_network(self, network: Callable[..., Tensor]) -> Converted:
        return self._replace(source=self.source.with_network(network), network=network)

    def query(self, t: float | Tensor) -> Query:
        if not isinstance(t, Tensor):
            return self.queries([t])[0]
        if self.path == self.source.path:
            return self.source.query(t)._replace(independent=self.independent)
        log_snr = self.path.log_snr(t)
        return self._batched(self.path(t), self.source.query(self.source.path.time(log_snr)), log_snr)

    def queries(self, times: Sequence[float]) -> list[Query]:
        if self.path == self.source.path:
            return [query._replace(independent=self.independent) for query in self.source.queries(times)]
        table = self.path.table(times)
        log_snrs = self.path.log_snr(torch.tensor(times, dtype=torch.float64))
        inner = self.source.queries(self.source.path.time(log_snrs).tolist())
        low, high = self._range()
        return [self._inside_or_not(c, q, low <= l <= high) for c, q, l in zip(table, inner, log_snrs.tolist())]

    def _range(self) -> tuple[float, float]:
        return self.source.path.log_snr(0.0), self.source.path.log_snr(1.0)

    def _inside_or_not(self, c: Coefficients, inner: Query, inside: bool) -> Query:
        norm = math.hypot(inner.c.alpha, inner.c.sigma) / math.hypot(c.alpha, c.sigma)
        call = _Rescaled(inner.call, norm)
        # Data and noise mean the same on every path; the other predictions do not.
        prediction = inner.prediction if isinstance(inner.prediction, (Data, Noise)) else None
        found = Query(self.path, c, c, inner.weights, call, prediction, self.independent)
        if inside:
            return found
        if c.sigma == 0.0:
            # The noise cannot be recomputed from a state that has none: the source's own pair stays.
            own = Coefficients(inner.c.alpha / norm, inner.c.sigma / norm, 0.0, 0.0)
            return found._replace(state=own)
        on_x, on_out = solve(inner.c, inner.weights, (1.0, 0.0), "data")
        return found._replace(call=_DataOf(call, on_x * norm, on_out), weights=(1.0, 0.0), prediction=Data())

    def _batched(self, c: Coefficients, inner: Query, log_snr: Tensor) -> Query:
        """The same for a tensor of times, each inside or outside the source's range."""
        low, high = self._range()
        inside = (log_snr >= low) & (log_snr <= high)
        norm = torch.hypot(inner.c.alpha, inner.c.sigma) / torch.hypot(c.alpha, c.sigma)
        (p, q), one, zero = inner.weights, torch.ones_like(norm), torch.zeros_like(norm)
        on_x, on_out = solve(inner.c, inner.weights, (1.0, 0.0), "data")
        # Outside, the output is turned into the data estimate; inside it stays as it is.
        call = _DataOf(
            _Rescaled(inner.call, norm),
            torch.where(inside, zero, on_x * norm),
            torch.where(inside, one, on_out + zero),
        )
        weights = (torch.where(inside, p + zero, one), torch.where(inside, q + zero, zero))
        silent = ~inside & (c.sigma == 0.0)
        alpha, sigma = (
            torch.where(silent, o / norm, n) for o, n in ((inner.c.alpha, c.alpha), (inner.c.sigma, c.sigma))
        )
        prediction = inner.prediction if isinstance(inner.prediction, Data) else None
        return Query(self.path, c, Coefficients(alpha, sigma, 0, 0), weights, call, prediction, self.independent)


@dataclass(frozen=True)
class _Rescaled:
    """Calls with the state rescaled to the source's path."""

    call: Callable[[Tensor, Mapping[str, Any]], Tensor]
    norm: Any

    def __call__(self, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return self.call(x * spread(self.norm, x), cond)


@dataclass(frozen=True)
class _DataOf:
    """Turns a call's output into the data estimate: on_x * x + on_out * out."""

    call: Callable[[Tensor, Mapping[str, Any]], Tensor]
    on_x: Any
    on_out: Any

    def __call__(self, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return combine(self.on_x, x, self.on_out, self.call(x, cond))


def convert(model: Model, path: Path | str | None = None, prediction: str | Prediction | None = None) -> Model:
    """The same model in another notation, without training: exact, differentiable, sharing the network.

    Args:
        model: any model, itself converted or not.
        path: the path to see it on (default: its own).
        prediction: what `predict` returns (default: its own).
    """
    to_path = model.path if path is None else paths.named(path)
    to_prediction = model.prediction if prediction is None else predictions.named(prediction)
    return model.seen(to_path, to_prediction)
