"""The contract of a path."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fluvial import paths
from fluvial.errors import OptionError, PathTimeError
from fluvial.model import convert
from fluvial.paths import Path
from fluvial.testing.oracle import normal, plane
from fluvial.testing.report import Fault, Figure, Report, apart, label, run, share

_WHOLE = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)
# Not at round times, where the knots of a table would be.
_INSIDE = torch.linspace(0.00317, 0.99683, 101, dtype=torch.float64)


def check_path(path: Path) -> Report:
    """Checks a path: its coefficients, derivatives, log-SNR and inverse, its SDE, and conversion from and to it.

    Args:
        path: a `fl.paths.Path`.

    Returns:
        What was measured.

    Raises:
        ContractError: at the first check that fails.
    """
    return run(label(path), _CHECKS, path)


def coefficients(path: Path) -> Iterator[Figure]:
    """Finite and >= 0 everywhere; noise is there at 0, data at 1."""
    if not isinstance(path, Path):
        raise Fault(f"a {type(path).__name__} was given; expected a subclass of fl.paths.Path")
    alpha, sigma = path(_WHOLE)[:2]
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if not bool(value.isfinite().all()):
            bad = float(_WHOLE[~value.isfinite()][0])
            raise Fault(f"{name} is not finite at t = {bad:g}; expected finite numbers on [0, 1]")
        yield Figure(f"smallest {name}", float(value.min()), least=0.0)
    yield Figure("sigma at t = 0", path(0.0).sigma, least=1e-12)
    yield Figure("alpha at t = 1", path(1.0).alpha, least=1e-12)
    yield Figure("smallest alpha inside", float(alpha[1:-1].min()), least=1e-12)
    yield Figure("smallest sigma inside", float(sigma[1:-1].min()), least=1e-12)


def derivatives(path: Path) -> Iterator[Figure]:
    """alpha' and sigma' are the slopes of alpha and sigma, by differences of fourth order."""
    c = path(_INSIDE)
    room = torch.minimum(_INSIDE, 1.0 - _INSIDE)
    for k, name in enumerate(("alpha", "sigma")):
        # One step suits one path and place, another another; a right derivative agrees with one of them.
        errors = []
        for size in (0.1, 0.03, 1e-2, 1e-3, 1e-4, 1e-5):
            h = size * room
            near, far = (path(_INSIDE + m * h)[k] - path(_INSIDE - m * h)[k] for m in (1.0, 2.0))
            slope = (8.0 * near - far) / (12.0 * h)
            errors.append((slope - c[k + 2]).abs() / torch.maximum(c[k + 2].abs(), c[k].abs()))
        error = torch.stack(errors).amin(0).nan_to_num(nan=math.inf)
        worst = int(error.argmax())
        yield Figure(f"relative error of {name}' (at t = {float(_INSIDE[worst]):.3g})", float(error[worst]), 1e-6)


def ends(path: Path) -> Iterator[Figure]:
    """What vanishes at an end is exactly 0 there, not merely small: the landing on the data hangs on it."""
    for name, t in (("alpha", 0.0), ("sigma", 1.0)):
        value = getattr(path(t), name)
        if 0.0 < value < 1e-8:
            raise Fault(f"{name}({t:g}) is {value:.3g}; expected exactly 0, or a level above 1e-8")
        for dtype in (torch.float32, torch.float64):
            tensor = float(getattr(path(torch.tensor([t], dtype=dtype)), name))
            if (tensor == 0.0) != (value == 0.0):
                raise Fault(
                    f"{name}({t:g}) is {value:.3g} for a float and {tensor:.3g} for a {dtype} tensor; "
                    "expected exactly 0 in both, or in neither"
                )
        yield Figure(f"{name} at t = {t:g}", value, least=0.0)
    for t in (-0.01, 1.01, math.nan):
        try:
            path(t)
        except PathTimeError:
            continue
        raise Fault(f"a float t of {t:g} was accepted; expected a PathTimeError outside [0, 1]")


def log_snr(path: Path) -> Iterator[Figure]:
    """log(alpha²/sigma²), which rises strictly; and so alpha' sigma - alpha sigma' > 0."""
    level = path.log_snr(_WHOLE)
    steps = level.diff()
    worst = int(steps.nan_to_num(nan=-math.inf).argmin())
    yield Figure(f"smallest rise of log_snr (at t = {float(_WHOLE[worst]):.3g})", float(steps[worst]), least=1e-12)
    c = path(_INSIDE)
    expected = 2.0 * (c.alpha.log() - c.sigma.log())
    yield Figure("error of log_snr against log(alpha²/sigma²)", apart(path.log_snr(_INSIDE), expected), 1e-9)
    yield Figure("smallest alpha' sigma - alpha sigma'", float(c.wronskian.min()), least=1e-300)
    for t in (0.0, 1.0):
        alpha, sigma = path(t)[:2]
        end = -math.inf if alpha == 0.0 else math.inf if sigma == 0.0 else 2.0 * math.log(alpha / sigma)
        yield Figure(f"error of log_snr({t:g})", apart(path.log_snr(t), end), 1e-9)


def inverse(path: Path) -> Iterator[Figure]:
    """time(log_snr(t)) = t, and the nearer end outside the range."""
    yield Figure("error of time(log_snr(t))", apart(path.time(path.log_snr(_WHOLE)), _WHOLE), 1e-9)
    floats = [path.time(path.log_snr(t)) - t for t in (0.0, 0.1, 0.5, 0.9, 1.0)]
    yield Figure("error of time(log_snr(t)), floats", max(map(abs, floats)), 1e-9)
    low, high = path.log_snr(0.0), path.log_snr(1.0)
    beyond = [path.time(low - 1.0), path.time(-math.inf), 1.0 - path.time(high + 1.0), 1.0 - path.time(math.inf)]
    yield Figure("distance of time from the nearer end, outside", max(map(abs, beyond)), 1e-9)


def floats_and_tensors(path: Path) -> Iterator[Figure]:
    """A float t, a tensor of any shape and a table give the same numbers; float32 gives them to its own precision."""
    few = _INSIDE[::10]
    c, row, levels = path(few), path.table(few.tolist()), path.log_snr(few)
    for k, name in enumerate(c._fields):
        values = [path(t)[k] for t in few.tolist()]
        if not all(isinstance(v, float) for v in (*values, *(r[k] for r in row))):
            raise Fault(f"{name} of a float t is a {type(values[0]).__name__}; expected a Python float")
        yield Figure(f"{name}: floats against tensors", apart(values, c[k], 1e-3), 1e-11)
        yield Figure(f"{name}: table against floats", apart([r[k] for r in row], values, 1e-3), 1e-11)
    yield Figure("log_snr: floats against tensors", apart([path.log_snr(t) for t in few.tolist()], levels), 1e-11)
    yield Figure(
        "time: floats against tensors", apart([path.time(l) for l in levels.tolist()], path.time(levels)), 1e-11
    )
    for shape in ((), (1,), (2, 3, 4)):
        t = torch.full(shape, 0.37, dtype=torch.float64)
        given = t.clone()
        outputs = (*path(t), path.log_snr(t), path.time(path.log_snr(t)), path.drift(t), path.diffusion(t))
        if any(not isinstance(value, Tensor) or value.shape != t.shape for value in outputs):
            raise Fault(f"a tensor t of shape {shape} gives other shapes; expected tensors of t's shape")
        if not torch.equal(t, given):
            raise Fault("a tensor t was changed in place; expected it as it was")
    yield from _single_precision(path)


def _single_precision(path: Path) -> Iterator[Figure]:
    t = _INSIDE.float()
    for name, single, exact in zip(("alpha", "sigma", "alpha'", "sigma'"), path(t), path(t.double())):
        if single.dtype != torch.float32:
            raise Fault(f"{name} of a float32 t is {single.dtype}; expected torch.float32")
        # Where a slope jumps (a table's second derivative does), rounding of t shows more.
        yield Figure(f"{name}: float32 against float64", apart(single, exact, 1e-2), 5e-3 if "'" in name else 5e-4)
    middle = t[20:-20]
    yield Figure("time(log_snr(t)): float32", apart(path.time(path.log_snr(middle)), middle), 1e-4)


def sde(path: Path) -> Iterator[Figure]:
    """f = -alpha'/alpha, g² = 2 sigma w/alpha, and the Langevin strength w sigma, w = alpha' sigma - alpha sigma'."""
    c = path(_INSIDE)
    given = {
        "drift": (path.drift, -c.dalpha / c.alpha),
        "diffusion": (path.diffusion, (2.0 * c.sigma * c.wronskian / c.alpha).sqrt()),
        "langevin": (path.langevin, c.wronskian * c.sigma),
    }
    for name, (function, expected) in given.items():
        yield Figure(f"error of {name}", apart(function(_INSIDE), expected), 1e-9)
        floats = [function(t) for t in _INSIDE.tolist()]
        yield Figure(f"{name}: floats against tensors", apart(floats, function(_INSIDE)), 1e-11)


def moments(path: Path) -> Iterator[Figure]:
    """The noising SDE has the path as its moments: dm/du = f m, dV/du = 2 f V + g², from t = 0.95 to 0.05."""
    steps = 2000
    t = torch.linspace(0.95, 0.05, 2 * steps + 1, dtype=torch.float64)
    f, g2 = path.drift(t).tolist(), path.diffusion(t).square().tolist()
    c, h = path(t), 0.9 / steps
    mean, variance = float(c.alpha[0]), float(c.sigma[0]) ** 2
    slope = lambda k, m, v: (f[k] * m, 2.0 * f[k] * v + g2[k])  # noqa: E731
    for k in range(0, 2 * steps, 2):
        a = slope(k, mean, variance)
        b = slope(k + 1, mean + h / 2 * a[0], variance + h / 2 * a[1])
        d = slope(k + 1, mean + h / 2 * b[0], variance + h / 2 * b[1])
        e = slope(k + 2, mean + h * d[0], variance + h * d[1])
        mean, variance = (
            now + h / 6 * (a[i] + 2.0 * b[i] + 2.0 * d[i] + e[i]) for i, now in enumerate((mean, variance))
        )
    alpha, sigma = float(c.alpha[-1]), float(c.sigma[-1])
    yield Figure("relative error of the mean", abs(mean / alpha - 1.0), 1e-6)
    yield Figure("relative error of the variance", abs(variance / sigma**2 - 1.0), 1e-6)


def conversion(path: Path) -> Iterator[Figure]:
    """An exact model on this path, seen from Rectified, and the other way round, is the exact model there."""
    straight, gm = paths.Rectified(), plane()
    low, high = max(path.log_snr(0.0), -8.0), min(path.log_snr(1.0), 8.0)
    for source, target in ((path, straight), (straight, path)):
        exact, seen = gm.model(target), convert(gm.model(source), path=target)
        errors = []
        for level in torch.linspace(low, high, 9, dtype=torch.float64)[1:-1].tolist():
            t = target.time(level)
            c = target(t)
            x = c.alpha * gm.sample(16, dtype=torch.float64) + c.sigma * normal(16, 2)
            for name in ("data", "noise", "velocity"):
                expected = getattr(exact(x, t), name)
                errors.append(share(getattr(seen(x, t), name) - expected, expected))
        yield Figure(f"{type(source).__name__} seen from {type(target).__name__}", max(errors), 1e-9)


def config(path: Path) -> Iterator[Figure]:
    """Where it can be saved, the path made from its description is the same path."""
    try:
        again = paths.from_config(json.loads(json.dumps(path.config())))
    except (OptionError, TypeError):
        return  # made of functions, or a class of the user's own
    if again != path:
        raise Fault(f"its config makes {label(again)}; expected an equal path")
    yield Figure("change of alpha by saving", apart(again(_INSIDE).alpha, path(_INSIDE).alpha), 0.0)


_CHECKS = (
    coefficients, derivatives, ends, log_snr, inverse, floats_and_tensors, sde, moments, conversion, config,
)  # fmt: skip
