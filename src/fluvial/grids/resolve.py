"""From what a user gives to a list of times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from fluvial.errors import OptionError
from fluvial.grids.base import Clocked, Grid
from fluvial.grids.names import named
from fluvial.grids.segments import Segments
from fluvial.grids.split import Split


def resolve(
    times: Any,
    path: Clocked,
    steps: int | Sequence[int] | None,
    default_steps: int,
    fitted: Grid | None = None,
    segments: Segments | None = None,
) -> list[float]:
    """The times a sampler visits, from what the user gave: None, a grid, its name, a list or a 1-D tensor.

    Args:
        times: what the user gave; None is "uniform".
        path: the path whose times they are.
        steps: how many, or how many in each of the model's segments; None is the grid's own `count`, or the list's, or
            else `default_steps`.
        default_steps: the sampler's.
        fitted: the model's own grid, which the name "fitted" stands for.
        segments: the model's segments. A grid is then laid into each of them; a list is taken as it is.

    Raises:
        OptionError: steps below 1, times that do not rise within [0, 1], or times and steps that disagree.
    """
    each = tuple(steps) if isinstance(steps, (tuple, list)) else None
    if each is not None and segments is None:
        raise OptionError(
            f"steps is {steps!r}, a number for each segment, and the model has none; expected one number, or "
            f"times=fl.grids.Split([0, …, 1], {list(each)})"
        )
    if each is None and steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise OptionError(f"steps is {steps!r}; expected a whole number, 1 or more")
    if times is None or isinstance(times, str):
        times = named("uniform" if times is None else times, fitted)
    if hasattr(times, "times"):
        if segments is not None and not hasattr(times, "count"):
            if each is None:
                count = max(default_steps, len(segments.straight)) if steps is None else steps
                each = Split.shared(segments.levels, count).steps  # type: ignore[arg-type]
            times = Split(segments.nodes(path), each, [times] * len(each))
        elif each is not None:
            raise OptionError(f"steps is {steps!r} and {times} has its own; expected one of them")
        count = getattr(times, "count", default_steps) if steps is None or each is not None else steps
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
