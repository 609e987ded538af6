"""Does this model keep the convention that it states? A certificate of measured figures, each with its bound.

Round trips: what the network put out, read as any other prediction and back, and the state seen on another path
and back, is the same but for rounding. The range of noise: the log-SNR that the network was trained on, and what
sampling from pure noise to clean data asks of it outside. And on real data the laws that every exact estimate
D = E[data | x] obeys, whatever the data are:

    E D = E data,        E <D - m, data - m> = E |D - m|²,  that is a slope of 1 of the data on D (m the mean).

A wrong prediction, clock, schedule or range of the data breaks them. In much noise D is moreover close to the best
linear estimate, m + r²/(1 + r²) (x/alpha - m) with r² = alpha² Var(data)/sigma², which is the posterior mean of the
one Gaussian with the data's mean and variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fluvial import paths, predictions, random
from fluvial.convention import Convention
from fluvial.errors import DataError, FluvialError, OptionError, ShapeError
from fluvial.exact import EmpiricalModel, ExactModel
from fluvial.flow_maps import FlowMap
from fluvial.interop.callables import own_path
from fluvial.interop.conventions import in_words
from fluvial.model import Converted, Model, convert
from fluvial.predictions import combine, solve
from fluvial.testing import Figure

_LEVELS = {"much noise": -3.0, "as much noise as data": 0.0, "little noise": 3.0}  # log r²
_ROUND_TRIP, _SLOPE, _MEAN, _GAUSSIAN = 1e-3, 0.15, 0.15, 0.1
_FEW = 32  # samples for the round trips, which hold for each of them
_OUTPUT = 0.01  # the error of a trained network's own output, as a share of its power
# Signal left at the noise end, as a share of the noise, that is seen in the brightness of samples.
_LEFT_OVER = 0.02


@dataclass(frozen=True)
class Certificate:
    """What `certify` measured; prints as a table.

    Attributes:
        convention: what the model states, in words.
        log_snr: the range that the network was trained on, from noise to data; infinite where it is the whole path.
        figures: what was measured, with bounds.
        warnings: sentences.
    """

    convention: str
    log_snr: tuple[float, float]
    figures: tuple[Figure, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every figure keeps its bounds. Warnings do not count."""
        return not self.failed

    @property
    def failed(self) -> tuple[Figure, ...]:
        """The figures out of their bounds."""
        return tuple(f for f in self.figures if not f.least <= f.found <= f.most)

    def config(self) -> dict[str, Any]:
        """A JSON-able account; infinite ends of the range are None."""
        low, high = self.log_snr
        return {
            "ok": self.ok,
            "convention": self.convention,
            "log_snr": [low if math.isfinite(low) else None, high if math.isfinite(high) else None],
            "figures": [
                {"what": f.what, "found": f.found if math.isfinite(f.found) else None, "expected": _expected(f)}
                for f in self.figures
            ],
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        low, high = self.log_snr
        verdict = "keeps its convention" if self.ok else f"fails in {len(self.failed)} of {len(self.figures)} figures"
        lines = [("measured", "found", "expected")]
        lines += [(f.what, f"{f.found:.3g}", _expected(f) + (" !" if f in self.failed else "")) for f in self.figures]
        widths = [max(len(line[k]) for line in lines) for k in range(3)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        head = [f"{verdict}: {self.convention}", f"trained on log-SNR {low:.3g} … {high:.3g}"]
        return "\n".join([*head, *table, *(f"warning: {text}" for text in self.warnings)])


def _expected(figure: Figure) -> str:
    if math.isfinite(figure.least) and math.isfinite(figure.most):
        return f"{figure.least:g} to {figure.most:g}"
    return figure.bounds


@torch.no_grad()
def certify(
    model: Model, data: Tensor | None = None, *, cond: Mapping[str, Tensor] | None = None, n: int = 512, seed: int = 0
) -> Certificate:
    """Measures whether a model keeps the convention that it states.

    Args:
        model: any model but a flow map; one that was converted is measured as it is seen.
        data: (N, …), real samples in the data's own units, a few hundred. An exact model of `fl.exact` brings its own;
            without data only round trips and ranges are measured, and the model must know its shape.
        cond: the samples' conditions, (N, …) each.
        n: noisy samples at each level of noise.
        seed: of the noise.

    Raises:
        OptionError: for a flow map; without data, for a model that does not know its shape.
        DataError, ShapeError: for data that are constant, not finite or no batch; for conditions that do not fit.
    """
    if isinstance(model, FlowMap):
        raise OptionError("the model is a flow map and does not denoise; expected the model that it was made from")
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise OptionError(f"n is {n!r}; expected a whole number, 2 or more")
    data = _own_data(model, n, seed) if data is None else data
    chosen, given = _chosen(model, data, cond, n)
    training = isinstance(model.network, nn.Module) and model.network.training
    if isinstance(model.network, nn.Module):
        model.network.eval()
    try:
        few = {name: value[:_FEW] for name, value in given.items()}
        figures = list(_round_trips(model, chosen[:_FEW], few, seed))
        if data is not None:
            figures += _laws(model, chosen, given, seed)
    finally:
        if isinstance(model.network, nn.Module):
            model.network.train(training)
    low, high = _range(model)
    return Certificate(in_words(model.convention), (low, high), tuple(figures), tuple(_warnings(model, low, high)))


def _own_data(model: Model, n: int, seed: int) -> Tensor | None:
    source = model.source if isinstance(model, Converted) else model
    if isinstance(source, ExactModel):
        return source.mixture.sample(n, seed)
    return source.empirical.points if isinstance(source, EmpiricalModel) else None


def _chosen(model: Model, data: Tensor | None, cond: Any, n: int) -> tuple[Tensor, dict[str, Tensor]]:
    """n samples in path units with their conditions; of noise, where there are no data."""
    parameters = model.parameters()
    dtype = torch.float64 if parameters and parameters[0].dtype == torch.float64 else torch.float32
    if data is None:
        if model.shape is None:
            raise OptionError("the model does not know its shape; expected data, or a model made with shape=(…)")
        return random.normal(min(n, 64), model.shape, 0, stream=random.DATA, dtype=dtype, device=model.device), {}
    if not isinstance(data, Tensor) or data.ndim < 2 or len(data) < 2:
        given = f"shape {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise ShapeError(f"data has {given}; expected a tensor (N, …) of at least two samples")
    std = float(data.double().std())
    if not 0.0 < std < math.inf:
        raise DataError(f"the data have a standard deviation of {std}; expected finite data that are not constant")
    index = torch.arange(n) * len(data) // n
    taken = {}
    for name, value in (cond or {}).items():
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != len(data):
            raise ShapeError(
                f"condition {name!r} does not fit; expected a tensor with {len(data)} entries, batch first"
            )
        taken[name] = value[index.to(value.device)].to(model.device)
    return model.normalisation.apply(data[index.to(data.device)].to(model.device, dtype)), taken


def _at(model: Model, data: Tensor, level: float, seed: int, draw: int) -> tuple[Tensor, float, float]:
    """A state at this log r², the time, and the r² that there is: the nearest that the path has."""
    std = float(data.double().std())
    t = model.path.time(level - 2.0 * math.log(std))
    c = model.path(t)
    noise = random.normal(len(data), tuple(data.shape[1:]), seed, draw=draw, dtype=data.dtype, device=data.device)
    return c.alpha * data + c.sigma * noise, t, (c.alpha * std / c.sigma) ** 2 if c.sigma else math.inf


def _round_trips(model: Model, data: Tensor, cond: dict[str, Tensor], seed: int) -> Iterator[Figure]:
    worst = dict.fromkeys(("data", "noise", "velocity", "flow", "v", "edm"), 0.0)
    for draw, level in enumerate(_LEVELS.values()):
        x, t, _ = _at(model, data, level, seed, draw)
        query = model.query(t)
        out = query.call(x, cond)
        for name in worst:
            weights = predictions.named(name).weights(query.c)
            there = combine(*_mixed(solve(query.state, query.weights, weights, name), x, out))
            back = combine(*_mixed(solve(query.state, weights, query.weights, name), x, there))
            worst[name] = max(worst[name], _apart(back, out))
    for name, found in worst.items():
        yield Figure(f"round trip as {name}", found, _ROUND_TRIP)
    yield Figure("round trip on other paths", _other_paths(model, data, cond, seed), _ROUND_TRIP)


def _mixed(on: tuple[Any, Any], x: Tensor, out: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
    return on[0], x, on[1], out


def _other_paths(model: Model, data: Tensor, cond: dict[str, Tensor], seed: int) -> float:
    """The data estimate at a state, against that of the model seen on another path, at the state seen there."""
    worst = 0.0
    for draw, level in enumerate(_LEVELS.values()):
        x, t, _ = _at(model, data, level, seed, draw)
        here, estimate = model.path(t), model(x, t, **cond).data
        for path in (paths.Rectified(), paths.VP(), paths.EDM(1e-4, 1e4)):
            there = path.time(model.path.log_snr(t))
            other = path(there)
            factor = math.hypot(other.alpha, other.sigma) / math.hypot(here.alpha, here.sigma)
            worst = max(worst, _apart(convert(model, path)(x * factor, there, **cond).data, estimate))
    return worst


def _apart(a: Tensor, b: Tensor) -> float:
    found = float((a - b).double().abs().max() / b.double().abs().max().clamp(min=1e-12))
    return found if math.isfinite(found) else math.inf


def _laws(model: Model, data: Tensor, cond: dict[str, Tensor], seed: int) -> Iterator[Figure]:
    """The laws at each level. Every bound is as wide as n samples leave room for."""
    exact, root = data.double(), math.sqrt(len(data))
    mean, variance = exact.mean(0), float(exact.var())
    for draw, (words, level) in enumerate(_LEVELS.items()):
        x, t, r2 = _at(model, data, level, seed, draw)
        estimate = model(x, t, **cond).data.double()
        errors = (estimate - exact).square().flatten(1).mean(1) / variance
        relative = max(1.0, r2) * errors
        yield Figure(f"denoising error, {words}", float(relative.mean()), 1.0 + 3.0 * float(relative.std()) / root)
        bias = float((estimate.mean(0) - mean).square().mean().sqrt()) / math.sqrt(variance)
        yield Figure(f"bias of the mean, {words}", bias, _MEAN + 2.0 * math.sqrt(float(errors.mean())) / root)
        slope, doubt = _slope(exact - mean, estimate - estimate.mean(0))
        yield Figure(f"slope of data on estimate, {words}", slope, 1.0 + _SLOPE + doubt, 1.0 - _SLOPE - doubt)
    # Under a condition the estimate in much noise is the condition's own mean, which nobody knows.
    if not cond:
        yield _gaussian(model, data, seed)


def _slope(data: Tensor, estimate: Tensor) -> tuple[float, float]:
    """The slope of the data on the estimate, both without their means, and four times its standard error."""
    explained = estimate.square().flatten(1).mean(1)
    size = float(explained.mean())
    if not 0.0 < size < math.inf:
        return math.inf, 0.0
    product = (data * estimate).flatten(1).mean(1)
    slope = float(product.mean()) / size
    return slope, 4.0 * float((product - slope * explained).std()) / (size * math.sqrt(len(data)))


def _gaussian(model: Model, data: Tensor, seed: int) -> Figure:
    """At r² = e^-6, or the noisiest there is: the distance of D from the posterior mean of the one fitted Gaussian."""
    x, t, r2 = _at(model, data, -6.0, seed, len(_LEVELS))
    alpha, mean, variance = model.path(t).alpha, data.double().mean(0), float(data.double().var())
    linear = mean + (r2 / (1.0 + r2) * (x.double() / alpha - mean) if alpha else 0.0)
    found = float((model(x, t).data.double() - linear).square().mean()) / variance
    # A network that predicts the noise has its error here 1/r² times as large in the data.
    query = model.query(t)
    _, on_out = solve(query.state, query.weights, (1.0, 0.0), "data")
    power = float(combine(0.0, x, on_out, query.call(x, {})).double().square().mean()) / variance
    return Figure("distance from the fitted Gaussian in much noise", found, max(_GAUSSIAN, 8.0 * r2, _OUTPUT * power))


def _range(model: Model) -> tuple[float, float]:
    """The log-SNR that the network was trained on: of its own path, whatever it is seen on."""
    own = own_path(model)
    return own.log_snr(0.0), own.log_snr(1.0)


def _warnings(model: Model, low: float, high: float) -> Iterator[str]:
    left = math.exp(low / 2)
    if left > _LEFT_OVER:
        yield (
            f"at its noisiest (log-SNR {low:.3g}) the state still has {100 * left:.2g} % of data: samples that start "
            "from pure noise are off in their mean; a zero terminal SNR mends that"
        )
    if math.isfinite(low) and isinstance(model, Converted) and model.path.log_snr(0.0) < low - 1e-6:
        yield f"seen on {_short(model)} it is asked below log-SNR {low:.3g}, where its data estimate there is kept"
    if isinstance(model, Converted) and model.path.log_snr(1.0) > high + 1e-6:
        yield f"seen on {_short(model)} it is asked above log-SNR {high:.3g}, where its data estimate there is kept"
    if math.exp(-high / 2) > _LEFT_OVER:
        yield f"at its cleanest (log-SNR {high:.3g}) the state still has {100 * math.exp(-high / 2):.2g} % of noise"
    if not model.independent:
        yield "its noise depends on its data: it has no score, and the laws hold only for its own pairs"
    try:
        _ = Convention.config(model.convention)
    except FluvialError as error:
        yield f"it cannot be saved as it is: {error}"


def _short(model: Model) -> str:
    return type(model.path).__name__
