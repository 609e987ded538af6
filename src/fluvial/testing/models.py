"""The contract of a model: of a network together with its convention, trained or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluvial import sampling
from fluvial.errors import OptionError, PathTimeError
from fluvial.model import Model, convert, fill_null
from fluvial.paths import EDM, VP, Rectified
from fluvial.testing.oracle import normal
from fluvial.testing.report import Fault, Figure, Report, label, run, share

_TIMES = (0.02, 0.3, 0.55, 0.98)
_NAMES = ("data", "noise", "velocity", "v")


def check_model(model: Model, shape: tuple[int, ...] | None = None, cond: Mapping[str, Tensor] | None = None) -> Report:
    """Checks a model: shapes and types, times, the pair, conversion, batch, conditions, counted calls, sampling.

    It is about the contract and not about quality: an untrained network passes. The network is taken as it is, in the
    mode it is in: with dropout or batch norm at work it fails, as samples of it would.

    Args:
        model: any model.
        shape: one sample's shape; default the model's own.
        cond: conditions by name, batch first, for two samples or more; without it the null condition is asked.

    Returns:
        What was measured.

    Raises:
        OptionError: without a shape.
        ContractError: at the first check that fails.
    """
    shape = model.shape if shape is None else tuple(shape)
    if shape is None:
        raise OptionError("the model does not know its samples' shape; expected shape=, such as shape=(3, 32, 32)")
    count = min((len(value) for value in (cond or {}).values()), default=3)
    if count < 2:
        raise OptionError(f"cond has {count} sample; expected two or more, batch first")
    with torch.no_grad():
        return run(label(model), _CHECKS, _Subject(model, shape, dict(cond or {}), count))


class _Subject(NamedTuple):
    """A model with what it is asked about."""

    model: Model
    shape: tuple[int, ...]
    cond: dict[str, Tensor]
    count: int

    def state(self, t: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """States (B, *shape) of about the size they have at time t."""
        c = self.model.path(t)
        x = normal(self.count, *self.shape, dtype=dtype)
        return (x * math.hypot(c.alpha, c.sigma)).to(self.model.device)

    @property
    def tolerance(self) -> float:
        """What rounding may do: of float32, or of the network's own narrower type."""
        types = {p.dtype for p in self.model.parameters() if p.dtype.is_floating_point}
        return max([2e-4, *(20.0 * torch.finfo(dtype).eps for dtype in types if dtype != torch.float64)])

    @property
    def start(self) -> float:
        """The earliest time at which the state says everything: 0, or soon after, where the prediction does not."""
        try:
            self.model.queries([0.0])
            _ = self.model(self.state(0.0), 0.0, **self.cond).velocity
        except PathTimeError:
            return 0.01
        return 0.0


def shapes(on: _Subject) -> Iterator[Figure]:
    """Whatever is asked for is a tensor like x."""
    x = on.state(0.5)
    estimate = on.model(x, 0.5, **on.cond)
    for name in _NAMES:
        value = getattr(estimate, name)
        if value.shape != x.shape or value.dtype != x.dtype or value.device != x.device:
            raise Fault(
                f"{name} is {value.dtype} of shape {tuple(value.shape)} on {value.device} for x {x.dtype} of shape "
                f"{tuple(x.shape)} on {x.device}; expected a tensor like x"
            )
    yield Figure(f"samples of shape {on.shape} in the batch", on.count, least=1)


def finite(on: _Subject) -> Iterator[Figure]:
    """No nan or inf inside; at the two ends finite numbers, or a PathTimeError for what does not exist there."""
    path = on.model.path
    for t in (1e-3, *_TIMES, 0.999):
        estimate = on.model(on.state(t), t, **on.cond)
        for name in _NAMES:
            bad = int((~getattr(estimate, name).isfinite()).sum())
            yield Figure(f"count of non-finite numbers in {name} at t = {t:g}", bad, 0, 0)
    # At sigma = 0 a sampler does not ask.
    for t in (0.0, 1.0) if path(1.0).sigma > 0.0 else (0.0,):
        for name in _NAMES:
            try:
                value = getattr(on.model(on.state(t), t, **on.cond), name)
            except PathTimeError:
                continue
            yield Figure(f"count of non-finite numbers in {name} at t = {t:g}", int((~value.isfinite()).sum()), 0, 0)


def in_place(on: _Subject) -> Iterator[Figure]:
    """The state and the conditions are as they were after a call."""
    x = on.state(0.4)
    given = {"x": x, **on.cond}
    before = {name: value.clone() for name, value in given.items()}
    _ = on.model(x, 0.4, **on.cond).velocity
    for name, value in given.items():
        yield Figure(f"count of numbers in {name} changed in place", int((value != before[name]).sum()), 0, 0)


def repeats(on: _Subject) -> Iterator[Figure]:
    """Two calls with the same arguments agree: no dropout, no state."""
    x = on.state(0.4)
    one, two = (on.model.predict(x, 0.4, **on.cond) for _ in range(2))
    found = share(one - two, one)
    _by_mode(on.model, found > on.tolerance, f"two calls at one state differ by {found:.3g} of their size")
    yield Figure("difference of two calls", found, on.tolerance)


def batch(on: _Subject) -> Iterator[Figure]:
    """A sample alone is the sample in a batch, at one time for all and at a time for each."""
    for what, t in (("one t", torch.full((on.count,), 0.4)), ("a t for each", torch.linspace(0.2, 0.8, on.count))):
        x, t = on.state(0.4), t.to(on.model.device)
        whole = on.model.predict(x, t, **on.cond)
        for i in range(on.count):
            own = {name: value[i : i + 1] for name, value in on.cond.items()}
            alone = on.model.predict(x[i : i + 1], t[i : i + 1], **own)
            found = share(alone - whole[i : i + 1], whole)
            said = f"sample {i} alone and in a batch of {on.count} ({what}) differ by {found:.3g} of their size"
            _by_mode(on.model, found > on.tolerance, said)
            yield Figure(f"sample {i} alone against in a batch, {what}", found, on.tolerance)


def dtypes(on: _Subject) -> Iterator[Figure]:
    """A float64 state gives float64, and what float32 gives; the network then has its time in float64."""
    for t in (0.3, torch.full((on.count,), 0.3, dtype=torch.float64, device=on.model.device)):
        x = on.state(0.3)
        single = on.model(x, t, **on.cond).data
        try:
            double = on.model(x.double(), t, **on.cond).data
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise Fault(
                f"for a float64 x, whose t is float64 too, the network raises {said!r}; expected it to cast t itself"
            ) from error
        if double.dtype != torch.float64:
            raise Fault(f"data is {double.dtype} for a float64 x; expected torch.float64")
        yield Figure(f"float32 against float64, {_kind(t)} t", share(single - double, double), on.tolerance)


def times(on: _Subject) -> Iterator[Figure]:
    """A float t, a tensor () and a tensor (B,) give the same."""
    for t in _TIMES:
        # In float64, as below: near the data float32 shows its own rounding.
        x = on.state(t, torch.float64)
        expected = on.model(x, t, **on.cond)
        for kind, given in (
            ("()", torch.tensor(t, dtype=torch.float64)),
            ("(B,)", torch.full((on.count,), t).double()),
        ):
            found = on.model(x, given.to(on.model.device), **on.cond)
            errors = [share(getattr(found, n) - getattr(expected, n), getattr(expected, n)) for n in _NAMES]
            yield Figure(f"a tensor t {kind} against a float, t = {t:g}", max(errors), on.tolerance)


def pair(on: _Subject) -> Iterator[Figure]:
    """alpha data + sigma noise is x, and the other quantities are their own combinations of the pair."""
    path = on.model.path
    for t in _TIMES:
        # The algebra then leaves next to no rounding, whatever the network's own precision.
        x, c = on.state(t, torch.float64), path(t)
        estimate = on.model(x, t, **on.cond)
        data, noise = estimate.data, estimate.noise
        later = path(0.5 + t / 4)
        combinations = {
            "x": (x, c.alpha, c.sigma),
            "velocity": (estimate.velocity, c.dalpha, c.dsigma),
            "v": (estimate.v, -c.sigma, c.alpha),
            "at(s)": (estimate.at(0.5 + t / 4), later.alpha, later.sigma),
        }
        for name, (found, on_data, on_noise) in combinations.items():
            whole = torch.cat([on_data * data, on_noise * noise])
            error = share(on_data * data + on_noise * noise - found, whole)
            yield Figure(f"{name} against its combination of the pair, t = {t:g}", error, 1e-8)
        weights = on.model.prediction.weights(c)
        whole = torch.cat([weights[0] * data, weights[1] * noise])
        error = share(weights[0] * data + weights[1] * noise - estimate.predict(on.model.prediction), whole)
        yield Figure(f"{on.model.prediction.name} against its combination of the pair, t = {t:g}", error, 1e-8)


def conversion(on: _Subject) -> Iterator[Figure]:
    """Seen from another path and back, the model keeps the pair; and it is the pair at equal log-SNR."""
    own = on.model.path
    for other in (VP(), EDM(), Rectified()):
        seen = convert(on.model, path=other)
        back = convert(convert(seen, prediction="data"), path=own)
        low = max(-6.0, own.log_snr(0.0), other.log_snr(0.0))
        high = min(6.0, own.log_snr(1.0), other.log_snr(1.0))
        for level in (0.9 * low + 0.1 * high, 0.5 * (low + high), 0.1 * low + 0.9 * high):
            t, s = own.time(level), other.time(level)
            c, d, x = own(t), other(s), on.state(own.time(level))
            expected = on.model(x, t, **on.cond)
            scaled = x * (math.hypot(d.alpha, d.sigma) / math.hypot(c.alpha, c.sigma))
            for what, estimate in (("seen", seen(scaled, s, **on.cond)), ("and back", back(x, t, **on.cond))):
                errors = [
                    share(getattr(estimate, n) - getattr(expected, n), getattr(expected, n)) for n in ("data", "noise")
                ]
                name = type(other).__name__
                yield Figure(f"pair {what} on {name}, log_snr {level:.3g}", max(errors), 10 * on.tolerance)


def conditions(on: _Subject) -> Iterator[Figure]:
    """What is missing is the null condition; and a condition goes with its sample."""
    x, null = on.state(0.4), on.model.null
    if null and not hasattr(on.model, "guidance"):
        given = fill_null(null, x)
        plain, filled = on.model.predict(x, 0.4), on.model.predict(x, 0.4, **given)
        yield Figure("no condition against the null condition", share(plain - filled, filled), on.tolerance)
    if on.cond:
        order = torch.arange(on.count - 1, -1, -1, device=x.device)
        turned = on.model.predict(x[order], 0.4, **{name: value[order] for name, value in on.cond.items()})
        whole = on.model.predict(x, 0.4, **on.cond)
        yield Figure("the batch in another order", share(turned - whole[order], whole), on.tolerance)


def sampled(on: _Subject) -> Iterator[Figure]:
    """One, two and three steps give finite samples of this shape, and as many calls are made as are reported."""
    start, noise = on.start, on.state(0.0) / on.model.path(0.0).sigma
    for solver in ("ddim", "heun"):
        for steps in (1, 2, 3):
            nodes = [start + (1.0 - start) * k / steps for k in range(steps)] + [1.0]
            with _counting(on.model) as (model, counter):
                run = sampling.sample(
                    model, noise, solver=solver, times=nodes, cond=on.cond or None, record=True, seed=0, check=False
                )
            if run.samples.shape != noise.shape:
                raise Fault(f"samples have shape {tuple(run.samples.shape)}; expected {tuple(noise.shape)}")
            bad = int((~run.samples.isfinite()).sum())
            yield Figure(f"count of non-finite numbers, {solver} with {steps} steps", bad, 0, 0)
            # A guided call may be several; and a closed form asks no network.
            if counter.calls and not hasattr(on.model, "guidance"):
                yield Figure(f"network calls, {solver} with {steps} steps", counter.calls, run.nfe, run.nfe)


class _Counter:
    """Counts calls of a plain callable, or as a hook of a module."""

    def __init__(self, network: Callable[..., Tensor] | None = None) -> None:
        self.network, self.calls = network, 0

    def __call__(self, *args: Any, **cond: Any) -> Any:
        self.calls += 1
        return self.network(*args, **cond) if self.network is not None else None


@contextmanager
def _counting(model: Model) -> Iterator[tuple[Model, _Counter]]:
    """The model with its network's calls counted."""
    if isinstance(model.network, nn.Module):
        counter = _Counter()
        hook = model.network.register_forward_pre_hook(counter)
        try:
            yield model, counter
        finally:
            hook.remove()
    else:
        counter = _Counter(model.network)
        yield model.with_network(counter), counter


def _by_mode(model: Model, wrong: bool, said: str) -> None:
    """A fault that a network in training mode explains."""
    if wrong and isinstance(model.network, nn.Module) and model.network.training:
        raise Fault(f"{said}, and the network is in training mode; expected model.network.eval()")


def _kind(t: float | Tensor) -> str:
    return "a tensor" if isinstance(t, Tensor) else "a float"


_CHECKS = (
    shapes, in_place, repeats, batch, finite, dtypes, times, pair, conversion, conditions, sampled,
)  # fmt: skip
