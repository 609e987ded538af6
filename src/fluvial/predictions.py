"""Predictions: what a network may output, and the one 2x2 solve that turns any of them into all others.

Everything a diffusion or flow network was ever trained to output is a linear functional of the two ends of the path,

    out = p * data + q * noise,        while the state is        x = alpha * data + sigma * noise,

so the two equations together determine the pair (data, noise), and the pair determines everything else:

    data = (q x - sigma out) / D,    noise = (alpha out - p x) / D,    D = alpha q - sigma p.

| prediction   | p            | q               |
|---|---|---|
| data         | 1            | 0               |
| noise        | 0            | 1               |
| velocity     | alpha'       | sigma'          |
| flow         | -alpha'      | -sigma'         |
| v (Salimans) | -sigma       | alpha           |
| score        | 0            | -1/sigma        |
| EDM's F      | sigma/(sd n) | -alpha sd/n     |    n² = sigma² + alpha² sd², sd the data's standard deviation

Where one end is absent from the state the other still is there: at sigma = 0 data is x / alpha, and at alpha = 0
noise is x / sigma, whatever was predicted. What was predicted is never solved for but kept as it came. The solve is
lazy: only what is asked for is computed, and only asking for what cannot be known is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluvial.errors import DependenceError, OptionError, PathTimeError, one_of
from fluvial.paths import Coefficients, Path


class Prediction:
    """A linear functional of the pair: `weights` gives (p, q) at a time's coefficients, as floats or tensors."""

    name: str

    def weights(self, c: Coefficients) -> tuple[Any, Any]:
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """A JSON-able description from which `from_config` makes the same prediction again."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]

    def clock(self, c: Coefficients) -> Any | None:
        """The time the network is trained with, where the prediction's own convention fixes it (EDM); else None."""
        return None

    def scale_input(self, c: Coefficients) -> Any | None:
        """The factor on x before the network, where the prediction's own convention fixes it (EDM); else None."""
        return None


@dataclass(frozen=True)
class Data(Prediction):
    """The data: E[data | x], also written x̂, D or "sample"."""

    name = "data"

    def weights(self, c: Coefficients) -> tuple[Any, Any]:
        return 1.0, 0.0


@dataclass(frozen=True)
class Noise(Prediction):
    """The noise: E[noise | x], also written epsilon."""

    name = "noise"

    def weights(self, c: Coefficients) -> tuple[Any, Any]:
        return 0.0, 1.0


@dataclass(frozen=True)
class Velocity(Prediction):
    """dx/dt along the path: alpha' data + sigma' noise (data - noise on the rectified path)."""

    name = "velocity"

    def weights(self, c: Coefficients) -> tuple[Any, Any]:
        return c.dalpha, c.dsigma


@dataclass(frozen=True)
class Flow(Prediction):
    """The velocity towards the noise: -(alpha' data + sigma' noise), noise - data on the rectified path.

    What SD3, FLUX and most released flow networks put out, as their time counts the noise: d x / d(1 - t).

    Source: Esser et al.: Scaling rectified flow transformers (2024), https://arxiv.org/abs/2403.03206
    """

    name = "flow"

    def weights(self, c: Coefficients) -> tuple[Any, Any]:
        return -c.dalpha, -c.dsigma


@dataclass(frozen=True)
class V(Prediction):
    """v = alpha noise - sigma data.

    Source: Salimans, Ho: Progressive distillation (2022), https://arxiv.org/abs/2202.00512
    """

    name = "v"

    def weights(self, c: Coefficients) -> tuple[Any, Any]:
        return -c.sigma, c.alpha


@dataclass(frozen=True)
class Score(Prediction):
    """The score, grad log p_t(x) = -E[noise | x] / sigma (Tweedie; for Gaussian noise independent of the data)."""

    name = "score"

    def weights(self, c: Coefficients) -> tuple[Any, Any]:
        if isinstance(c.sigma, float):
            return 0.0, -1.0 / c.sigma if c.sigma else -math.inf
        return 0.0, -1.0 / c.sigma


_LAST_CLOCK = 2.5  # log(sigma/alpha)/4 where one end is a 22,000th of the other; EDM's own range is -1.55 to 1.1


@dataclass(frozen=True)
class EDM(Prediction):
    """EDM's preconditioned network F: data = c_skip x + c_out F(c_in x, log(sigma)/4), sigma being sigma/alpha here.

    Written for any path, n² = sigma² + alpha² sigma_data²; on EDM's own (alpha = 1) these are Table 1's formulas.

    Source: Karras, Aittala, Aila, Laine: Elucidating the design space (2022), https://arxiv.org/abs/2206.00364
    """

    sigma_data: float = 0.5
    name = "edm"

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise OptionError(f"sigma_data is {self.sigma_data}; expected the data's standard deviation, above 0")

    def _norm(self, c: Coefficients) -> Any:
        return (c.sigma * c.sigma + (c.alpha * self.sigma_data) ** 2) ** 0.5

    def weights(self, c: Coefficients) -> tuple[Any, Any]:
        n = self._norm(c)
        return c.sigma / (self.sigma_data * n), -c.alpha * self.sigma_data / n

    def clock(self, c: Coefficients) -> Any:
        # A network cannot read an infinite time: at the ends it is told the last one that it may have seen.
        if isinstance(c.sigma, float):
            if c.sigma == 0.0 or c.alpha == 0.0:
                return -_LAST_CLOCK if c.sigma == 0.0 else _LAST_CLOCK
            return max(-_LAST_CLOCK, min(_LAST_CLOCK, math.log(c.sigma / c.alpha) / 4))
        return ((c.sigma / c.alpha).log() / 4).clamp(-_LAST_CLOCK, _LAST_CLOCK)

    def scale_input(self, c: Coefficients) -> Any:
        return 1.0 / self._norm(c)


_NAMED: dict[str, type[Prediction]] = {cls.name: cls for cls in (Data, Noise, Velocity, Flow, V, Score, EDM)}


def named(prediction: str | Prediction) -> Prediction:
    """A prediction by name ("data", "noise", "velocity", "flow", "v", "score", "edm"); an object as it is."""
    if isinstance(prediction, Prediction):
        return prediction
    if prediction not in _NAMED:
        raise one_of("prediction", prediction, _NAMED)
    return _NAMED[prediction]()


def from_config(config: dict[str, Any]) -> Prediction:
    """The prediction that `Prediction.config` described."""
    options = dict(config)
    name = options.pop("name", None)
    if name not in _NAMED:
        raise one_of("prediction", name, _NAMED)
    return _NAMED[name](**options)


def solve(c: Coefficients, given: tuple[Any, Any], wanted: tuple[Any, Any], what: str) -> tuple[Any, Any]:
    """The 2x2 solve: (on_x, on_out) with  wanted = on_x * x + on_out * out.

    Given x = alpha data + sigma noise and out = p data + q noise, and wanted = p' data + q' noise, Cramer's rule is

        wanted = [(p' q - q' p) x + (q' alpha - p' sigma) out] / D,        D = alpha q - sigma p.

    Args:
        c: the coefficients at this time: floats, or tensors of any shape (then nothing is checked).
        given: (p, q) of what is known.
        wanted: (p', q') of what is asked for.
        what: its name, for the error.

    Raises:
        PathTimeError: floats only, when x and out do not determine what is asked for.
    """
    (p, q), (wp, wq) = given, wanted
    if not isinstance(c.alpha, float):
        return _solve_batched(c, given, wanted)
    if (p, q) == (wp, wq):
        return 0.0, 1.0
    if math.isfinite(wp) and math.isfinite(wq):
        if c.sigma == 0.0 and wq == 0.0:
            return wp / c.alpha, 0.0
        if c.alpha == 0.0 and wp == 0.0:
            return wq / c.sigma, 0.0
        determinant = c.alpha * q - c.sigma * p
        if math.isfinite(determinant) and determinant != 0.0:
            return (wp * q - wq * p) / determinant, (wq * c.alpha - wp * c.sigma) / determinant
    end = "noise" if c.alpha < c.sigma else "data"
    raise PathTimeError(
        f"the {what} does not exist at this time (alpha = {c.alpha:g}, sigma = {c.sigma:g}, the {end} end): "
        "what the network predicts does not determine it there; expected a time inside the path"
    )


def _solve_batched(c: Coefficients, given: tuple[Any, Any], wanted: tuple[Any, Any]) -> tuple[Any, Any]:
    """The same for tensors, with the same exact ends, and inf or nan where the answer does not exist."""
    (p, q), (wp, wq) = given, wanted
    determinant = c.alpha * q - c.sigma * p
    on_x, on_out = (wp * q - wq * p) / determinant, (wq * c.alpha - wp * c.sigma) / determinant
    zero = torch.zeros_like(determinant)
    only_data, only_noise = (c.sigma == 0) & (wq + zero == 0), (c.alpha == 0) & (wp + zero == 0)
    on_x = torch.where(only_data, wp / c.alpha, torch.where(only_noise, wq / c.sigma, on_x))
    return on_x, torch.where(only_data | only_noise, zero, on_out)


def spread(coefficient: Any, x: Tensor) -> Any:
    """A float as it is; a (B,) tensor shaped to multiply x (B, …), in x's dtype."""
    if isinstance(coefficient, Tensor):
        return coefficient.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return coefficient


def combine(on_x: Any, x: Tensor, on_out: Any, out: Tensor) -> Tensor:
    """on_x * x + on_out * out with float or (B,) coefficients; zeros and ones cost nothing."""
    if isinstance(on_x, Tensor) or isinstance(on_out, Tensor):
        return spread(on_x, x) * x + spread(on_out, x) * out
    if on_x == 0.0:
        return out if on_out == 1.0 else out * on_out
    if on_out == 0.0:
        return x if on_x == 1.0 else x * on_x
    return torch.add(x if on_x == 1.0 else x * on_x, out, alpha=on_out)


class Estimate:
    """The pair (data, noise) estimated at a state x, and everything that follows from it. Computed when asked for.

    Attributes:
        x: the state (B, …); its time is where the model was asked.
        data, noise, velocity, v, score: tensors like x, whichever of them was predicted.

    Raises:
        PathTimeError: at a float time where what is asked for does not exist (`score` at sigma = 0, say).
        DependenceError: for `score`, when the noise is not known to be Gaussian and independent of the data.
    """

    def __init__(self, query: Query, x: Tensor, cond: Mapping[str, Any]) -> None:
        self.x, self._query, self._cond = x, query, cond
        # The network is called here and now, but for a model that must be able to refuse its score before the call.
        if query.independent:
            _ = self._out

    @cached_property
    def _out(self) -> Tensor:
        return self._query.call(self.x, self._cond)

    def predict(self, prediction: Prediction) -> Tensor:
        """What a network of this prediction would have put out."""
        q = self._query
        if isinstance(prediction, Score) and not q.independent:
            raise DependenceError(
                "score asked of a model whose noise is not independent of its data (trained on pairs, by optimal "
                "transport or reflow), or of a flow map: Tweedie's formula does not hold; use an ODE solver, or call "
                "model.assume_independent() if you know better"
            )
        if prediction == q.prediction:
            return self._out
        return self._want(prediction.weights(q.c), prediction.name)

    def _want(self, weights: tuple[Any, Any], what: str) -> Tensor:
        on_x, on_out = solve(self._query.state, self._query.weights, weights, what)
        return combine(on_x, self.x, on_out, self._out)

    @property
    def data(self) -> Tensor:
        """E[data | x]."""
        return self.predict(Data())

    @property
    def noise(self) -> Tensor:
        """E[noise | x]."""
        return self.predict(Noise())

    @property
    def velocity(self) -> Tensor:
        """dx/dt of the probability-flow ODE: alpha' data + sigma' noise."""
        return self.predict(Velocity())

    @property
    def v(self) -> Tensor:
        """alpha noise - sigma data (Salimans)."""
        return self.predict(V())

    @property
    def score(self) -> Tensor:
        """grad log p_t(x) = -noise / sigma."""
        return self.predict(Score())

    def at(self, s: Any) -> Tensor:
        """The same pair mixed at time s: alpha(s) data + sigma(s) noise, the natural Euler (DDIM) step."""
        c = self._query.path(s)
        if isinstance(s, Tensor):
            return spread(c.alpha, self.x) * self.data + spread(c.sigma, self.x) * self.noise
        return self._want((c.alpha, c.sigma), "state")


class Query(NamedTuple):
    """A model asked at one time: how to call it, and what its output means. Made by `Model.query`.

    `path` and `c` are the path and its coefficients at this time; x = state.alpha data + state.sigma noise and
    out = weights[0] data + weights[1] noise are the two equations; `call(x, cond)` gives out. Coefficients are floats
    (a float time) or float64 tensors (B,). `prediction` names out where it is one of the named predictions on this
    very path.
    """

    path: Path
    c: Coefficients
    state: Coefficients
    weights: tuple[Any, Any]
    call: Callable[[Tensor, Mapping[str, Any]], Tensor]
    prediction: Prediction | None
    independent: bool
