"""Which convention does this network follow? Ask it to denoise real data under each, and see which works.

Under a candidate (schedule, clock, prediction, range of the data) the network's output implies an estimate of the
data. Its error is measured at levels of noise that are the same for all candidates, r = alpha std(data)/sigma being
what counts and not the time, and relative to the best constant estimate,

    error(r) = max(1, r²) E|D - data|² / Var(data),

of the data where noise prevails and of the noise where data do: 1 for a network that knows nothing, above for one
that is misread. The geometric mean over the levels ranks the candidates.

A network that normalises its input first does not see the input's scale or offset. Then some candidates give it the
same picture, and no data can tell them apart: this is tested too, and said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fluvial import random
from fluvial.convention import Convention, Normalisation
from fluvial.errors import DataError, OptionError, ShapeError
from fluvial.flow_maps import FlowMap
from fluvial.interop import candidates as known
from fluvial.interop.callables import Called
from fluvial.interop.candidates import Notation
from fluvial.interop.check_report import Candidate, ConventionReport
from fluvial.interop.conventions import Foreign
from fluvial.model import Model, fill_null
from fluvial.paths import Coefficients, Discrete
from fluvial.predictions import combine, solve, spread

_LEVELS = torch.linspace(-4.0, 5.0, 8, dtype=torch.float64)  # log r²
_FIRST = 64  # samples for all candidates; then all samples for the best twelve, or fewer that come near the best
_KEPT, _NEAR = 12, 3.0
_BLIND = 0.01  # a change of the output below one per cent


@dataclass(frozen=True)
class _Cell:
    """A notation and a range of the data: one input for the network, under which every prediction is tried."""

    notation: Notation
    data: str
    normalisation: Normalisation
    network: Callable[..., Tensor]


@dataclass(frozen=True)
class _Batch:
    """n samples of the data in their own units, as many noises, and the conditions."""

    data: Tensor
    noise: Tensor
    cond: dict[str, Tensor]
    std: float

    def first(self, n: int) -> _Batch:
        return _Batch(self.data[:n], self.noise[:n], {k: v[:n] for k, v in self.cond.items()}, self.std)


@torch.no_grad()
def check_convention(
    model_or_callable: Model | Callable[..., Tensor],
    data: Tensor,
    *,
    cond: Mapping[str, Tensor] | None = None,
    candidates: Sequence[str | Foreign | Convention] | None = None,
    n: int = 256,
    seed: int = 0,
) -> ConventionReport:
    """Which prediction, schedule, clock and range of the data a network follows, found by denoising real data.

    Args:
        model_or_callable: net(x, t, **cond), or a model, whose own statement is then one candidate more.
        data: (N, …), a few hundred real samples, in any units: the range is one of the things to be found.
        cond: the samples' conditions, (N, …) each.
        candidates: names or objects as for `from_callable`; None for all that are known, some 500.
        n: noisy samples for the best candidates; a quarter of the default is enough to sort out the others.
        seed: of the noise.

    Returns:
        a report, ranked. "Cannot be told" are candidates whose error is within a tenth of the best.

    Raises:
        OptionError: when the network can be called under no candidate, or is a flow map.
        DataError, ShapeError: for data that are constant, not finite or no batch; for conditions that do not fit.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < len(_LEVELS):
        raise OptionError(f"n is {n!r}; expected a whole number, {len(_LEVELS)} or more")
    model = model_or_callable if isinstance(model_or_callable, Model) else None
    if isinstance(model, FlowMap):
        raise OptionError("the model is a flow map and does not denoise; expected the model that it was made from")
    net = model.network if model is not None else model_or_callable
    if not callable(net):
        raise OptionError(f"the network is {type(net).__name__}; expected a callable net(x, t, **cond), or a model")
    batch = _batch(net, model, data, cond, n, seed)
    cells, own = _cells(net, model, data, candidates)
    training = isinstance(net, nn.Module) and net.training
    if isinstance(net, nn.Module):
        net.eval()
    try:
        ranked = _race(cells, batch)
        blind = _blind(ranked[0], batch)
        loss = _loss(ranked[0], batch, seed)
    finally:
        if isinstance(net, nn.Module):
            net.train(training)
    stated = next((c for c in ranked if own is not None and c.schedule == own.notation.schedule), None)
    return ConventionReport(tuple(ranked), blind, loss, stated, n, seed)


def _batch(net: Any, model: Model | None, data: Tensor, cond: Any, n: int, seed: int) -> _Batch:
    if not isinstance(data, Tensor) or data.ndim < 2 or len(data) < 2:
        given = f"shape {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise ShapeError(f"data has {given}; expected a tensor (N, …) of at least two samples")
    parameter = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    double = (data if parameter is None else parameter).dtype == torch.float64
    data = data.to(None if parameter is None else parameter.device, torch.float64 if double else torch.float32)
    std = float(data.double().std())
    if not 0.0 < std < math.inf:
        raise DataError(f"the data have a standard deviation of {std}; expected finite data that are not constant")
    cond = dict(cond or {})
    for name, value in cond.items():
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != len(data):
            raise ShapeError(
                f"condition {name!r} does not fit; expected a tensor with {len(data)} entries, batch first"
            )
    index = torch.arange(n) * len(data) // n
    # Shuffled, so that every level of noise and every part of the batch sees all kinds of samples.
    index = index[random.uniform(n, (1,), seed, stream=random.DATA)[:, 0].argsort()]
    chosen = data[index.to(data.device)]
    given = {name: value[index.to(value.device)].to(data.device) for name, value in cond.items()}
    if model is not None and model.null:
        given = {**fill_null(model.null, chosen, skip=given), **given}
    noise = random.normal(n, tuple(data.shape[1:]), seed, dtype=data.dtype, device=data.device)
    return _Batch(chosen, noise, given, std)


def _cells(net: Any, model: Model | None, data: Tensor, candidates: Any) -> tuple[list[_Cell], _Cell | None]:
    notations = known.everything() if candidates is None else known.named(candidates)
    ranges = known.ranges(data)
    cells = []
    for notation in notations:
        call = net
        if notation.time_first or notation.learned_variance:
            call = Called(net, notation.time_first, learned_variance=notation.learned_variance)
        tried = ranges.items() if notation.data is None else [("as it states", notation.data)]
        cells += [_Cell(notation, words, normalisation, call) for words, normalisation in tried]
    if model is None:
        return cells, None
    notation = known.stated(model)
    own = _Cell(notation, "as the model states", notation.data or Normalisation(), net)
    return [*cells, own], own


class _Refused(Exception):
    """The network fails on this input: a foreign one may in any way, under a clock that is not its own."""


def _race(cells: list[_Cell], batch: _Batch) -> list[Candidate]:
    """All cells on a few samples, then the best of them on all; ranked."""
    few = batch.first(min(_FIRST, len(batch.data)))
    screened: list[tuple[_Cell, list[Candidate]]] = []
    refusals: list[str] = []
    for cell in cells:
        try:
            screened.append((cell, _scores(cell, few)))
        except _Refused as refused:
            refusals.append(str(refused))
    if not screened:
        raise OptionError(
            f"the network cannot be called under any candidate ({refusals[0]}); expected net(x, t, **cond) -> a tensor "
            "like x, with t (B,), and its conditions in cond"
        )
    screened.sort(key=lambda entry: min(c.error for c in entry[1]))
    least = min(c.error for c in screened[0][1])
    near = [entry for entry in screened[:_KEPT] if min(c.error for c in entry[1]) <= _NEAR * least]
    if len(batch.data) > len(few.data):
        final = [c for cell, _ in near for c in _scores(cell, batch)]
    else:
        final = [c for _, found in near for c in found]
    best = min(c.error for c in final)
    ranked = [replace(c, ratio=c.error / best) for c in final]
    ranked += [replace(c, ratio=c.error / least) for _, found in screened[len(near) :] for c in found]
    return sorted(ranked, key=lambda c: c.ratio)


def _scores(cell: _Cell, batch: _Batch) -> list[Candidate]:
    """The error of every prediction of one cell."""
    convention, data = cell.notation.convention, cell.normalisation.apply(batch.data)
    std = batch.std / float(torch.tensor(cell.normalisation.scale, dtype=torch.float64).mean())
    level = torch.arange(len(data), device=data.device) % len(_LEVELS)
    t = convention.path.time(_LEVELS.to(data.device)[level] - 2.0 * math.log(std))
    t = _on_steps(convention, t)
    c = convention.path(t)
    x = spread(c.alpha, data) * data + spread(c.sigma, data) * batch.noise
    out, network = _ask(cell, x, t, c, batch.cond)
    weight = (c.alpha * std / c.sigma).square().clamp(min=1.0) / std**2
    found = []
    for prediction in cell.notation.outputs:
        on_x, on_out = solve(c, prediction.weights(c), (1.0, 0.0), "data")
        estimate = combine(on_x, x, on_out, out)
        error = weight * (estimate - data).double().square().flatten(1).mean(1)
        levels = torch.stack([error[level == k].mean() for k in range(len(_LEVELS))])
        levels = levels.nan_to_num(nan=math.inf).clamp(1e-12, 1e12)
        own = replace(convention, prediction=prediction, normalisation=cell.normalisation)
        found.append(
            Candidate(
                prediction.name,
                cell.notation.schedule,
                cell.notation.time,
                cell.data,
                float(levels.log().mean().exp()),
                math.inf,
                tuple(levels.tolist()),
                own,
                network,
            )
        )
    return found


def _on_steps(convention: Convention, t: Tensor) -> Tensor:
    """The times of a table at its very steps, the only ones that some networks know."""
    if not isinstance(convention.path, Discrete):
        return t
    cells = len(convention.path.alphas_cumprod) - 1
    return (t * cells).round() / cells


def _ask(cell: _Cell, x: Tensor, t: Tensor, c: Coefficients, cond: Any) -> tuple[Tensor, Callable[..., Tensor]]:
    """The network's output, and the network as it could be called: some know whole steps only."""
    convention = cell.notation.convention
    clock, scale_input = convention.clock, convention.scale_input
    time = clock(t) if clock else convention.prediction.clock(c)
    scale = scale_input(t) if scale_input else convention.prediction.scale_input(c)
    time = (t if time is None else time).to(x.dtype)
    x = x if scale is None else spread(scale, x) * x
    attempts = [cell.network]
    if not isinstance(cell.network, Called) and isinstance(convention.path, Discrete) and float(time.max()) > 1.0:
        attempts.append(Called(cell.network, whole=True))
    reason = ""
    for network in attempts:
        try:
            out = network(x, time, **cond)
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        if isinstance(out, Tensor) and out.ndim > 1 and out.shape == (len(x), 2 * x.shape[1], *x.shape[2:]):
            return out[:, : x.shape[1]].to(x.dtype), Called(network, learned_variance=True)
        if isinstance(out, Tensor) and out.shape == x.shape:
            return out.to(x.dtype), network
        given = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        reason = reason or f"it returned {given} for x of shape {tuple(x.shape)}"
    raise _Refused(reason)


def _blind(best: Candidate, batch: _Batch) -> tuple[str, ...]:
    """Of its state, this one's scale and offset, and its time, what the output does not change with."""
    model, few = best.model(), batch.first(min(_FIRST, len(batch.data)))
    t = _on_steps(
        model.convention, torch.linspace(0.3, 0.7, len(few.data), dtype=torch.float64, device=few.data.device)
    )
    c = model.path(t)
    data = model.normalisation.apply(few.data)
    x = spread(c.alpha, data) * data + spread(c.sigma, data) * few.noise
    out = model.predict(x, t, **few.cond)
    other = t.flip(0)
    changed: Iterable[tuple[str, Tensor]] = (
        ("state", model.predict(x.roll(1, 0), t, **few.cond)),
        ("scale", model.predict(2.0 * x, t, **few.cond)),
        ("offset", model.predict(x + x.std(), t, **few.cond)),
        ("time", model.predict(x, other, **few.cond)),
    )
    if model.convention.scale_input or model.prediction.scale_input(c) is not None:
        # A changed time changes the input too.
        changed = tuple(changed)[:3]
    size = float(out.double().square().mean().sqrt())
    return tuple(name for name, o in changed if float((o - out).double().square().mean().sqrt()) <= _BLIND * size)


def _loss(best: Candidate, batch: _Batch, seed: int) -> float:
    """E|out - (p data + q noise)|² at uniform times, per element."""
    model, data = best.model(), best.convention.normalisation.apply(batch.data)
    t = random.uniform(len(data), (1,), seed, stream=random.TIME, dtype=torch.float64, device=data.device)[:, 0]
    t = _on_steps(model.convention, t)
    c = model.path(t)
    x = spread(c.alpha, data) * data + spread(c.sigma, data) * batch.noise
    p, q = model.prediction.weights(c)
    error = model.predict(x, t, **batch.cond) - (spread(p, x) * data + spread(q, x) * batch.noise)
    return float(error.double().square().mean())
