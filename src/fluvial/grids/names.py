"""Grids and densities by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fluvial.errors import OptionError, one_of
from fluvial.grids.base import Density, Grid
from fluvial.grids.closed import Beta, Cosine, Exponential, Flow, Karras, LogSNR, Shifted, Uniform
from fluvial.grids.densities import ExponentialDensity, LogitNormal, LogNormal, UShaped

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
    "exponential": ExponentialDensity,
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
