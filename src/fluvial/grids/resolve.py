"""From what a user gives to a grid, a density or a list of times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from fluvial.errors import OptionError, one_of
from fluvial.grids.base import Clocked, Density, Grid
from fluvial.grids.closed import Beta, Cosine, Exponential, Flow, Karras, LogSNR, Shifted, Uniform
from fluvial.grids.densities import LogitNormal, LogNormal, UShaped

_GRIDS: dict[str, type] = {
    "uniform": Uniform,
    "flow": Flow,
    "karras": Karras,
    "exponential": Exponential,
    "log_snr": LogSNR,
    "shifted": Shifted,
    "cosine": Cosine,
    "beta": Beta,
}
_DENSITIES: dict[str, type] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "u_shaped": UShaped,
    "log_normal": LogNormal,
}
FITTED = "fitted"


def names() -> list[str]:
    """The names `times` takes; "fitted" is the grid that a model carries."""
    return [*_GRIDS, FITTED]


def named(name: str, fitted: Grid | None = None) -> Grid:
    """A sampling grid by name; `fitted` is what "fitted" names."""
    if name == FITTED:
        if fitted is None:
            raise OptionError(
                'times is "fitted" and the model has no grid of its own; '
                "expected model.under(grid=fl.fitting.fit_grid(model))"
            )
        return fitted
    if name not in _GRIDS:
        raise one_of("grid", name, names())
    return _GRIDS[name]()


def density(times: Any) -> Density:
    """A training density by name; an object with `quantile` as it is; None is uniform."""
    if hasattr(times, "quantile") and not isinstance(times, Tensor):
        return times
    if times is None:
        return Uniform()
    if not isinstance(times, str) or times not in _DENSITIES:
        raise one_of("density of training times", times, _DENSITIES)
    return _DENSITIES[times]()


def resolve(
    times: Any, path: Clocked, steps: int | None, default_steps: int, fitted: Grid | None = None
) -> list[float]:
    """The times a sampler visits, from what the user gave: None, a grid, its name, a list or a 1-D tensor.

    Args:
        times: what the user gave; None is "uniform".
        path: the path whose times they are.
        steps: how many; None is the grid's own `count`, or the list's, or else `default_steps`.
        default_steps: the sampler's.
        fitted: the model's own grid, which the name "fitted" stands for.

    Raises:
        OptionError: steps below 1, times that do not rise within [0, 1], or times and steps that disagree.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise OptionError(f"steps is {steps!r}; expected a whole number, 1 or more")
    if times is None or isinstance(times, str):
        times = named("uniform" if times is None else times, fitted)
    if hasattr(times, "times"):
        count = getattr(times, "count", default_steps) if steps is None else steps
        values = list(times.times(path, count))
        if any(later <= earlier for earlier, later in pairwise(values)):
            raise OptionError(f"{times} puts two of {count} steps at one time; expected fewer steps or a milder grid")
        return values
    values = _listed(times)
    if steps is not None and steps != len(values) - 1:
        raise OptionError(f"steps is {steps} but times has {len(values)} entries, which is {len(values) - 1} steps")
    return values


def _listed(times: Any) -> list[float]:
    """The user's own times, checked."""
    try:
        values = [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]
    except (TypeError, ValueError):
        raise OptionError(
            f"times is a {type(times).__name__} that is no list of numbers; expected a grid such as fl.grids.Karras(), "
            "its name, or a list or 1-D tensor of rising times"
        ) from None
    if len(values) < 2 or not all(0.0 <= t <= 1.0 for t in values):
        raise OptionError(f"times is {_short(values)}; expected at least two numbers in [0, 1] (0 noise, 1 data)")
    if any(later <= earlier for earlier, later in pairwise(values)):
        raise OptionError(f"times is {_short(values)}; expected numbers that rise strictly, from noise to data")
    return values


def _short(values: Sequence[float]) -> str:
    shown = ", ".join(f"{t:g}" for t in values[:6])
    return f"[{shown}{', …' if len(values) > 6 else ''}]"
