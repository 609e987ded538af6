"""Conventions: everything about a network that its weights do not say.

A network is a function of a tensor and a time. Which path the tensor lies on, what comes out, which clock the time is
read from, how the input is scaled, what stands for "no condition", and how the data were normalised: without these
the weights are worth nothing, so they are one object, saved beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fluvial import paths, predictions
from fluvial.errors import OptionError, one_of
from fluvial.grids import Fitted, Segments
from fluvial.paths import Path
from fluvial.predictions import Prediction


@dataclass(frozen=True)
class Normalisation:
    """path units = (data - shift) / scale, per channel (dim 0 of a sample) or one number for all."""

    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    low: float | None = None  # measured range, in the data's own units
    high: float | None = None
    mean: float | None = None  # measured, in the data's own units
    std: float | None = None

    def apply(self, data: Tensor) -> Tensor:
        """Path units (B, …) from the data's own."""
        if self._identity:
            return data
        return (data - self._like(self.shift, data)) / self._like(self.scale, data)

    def invert(self, x: Tensor) -> Tensor:
        """The data's own units (B, …) from path units."""
        return x if self._identity else x * self._like(self.scale, x) + self._like(self.shift, x)

    @property
    def _identity(self) -> bool:
        return not any(self.shift) and all(s == 1.0 for s in self.scale)

    def _like(self, values: tuple[float, ...], x: Tensor) -> Tensor:
        return torch.tensor(values, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 2))


@dataclass(frozen=True)
class Clock:
    """The network's time as a linear function of the path's: scale * t + offset."""

    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, t: Any) -> Any:
        return self.scale * t + self.offset

    @classmethod
    def steps(cls, n: int) -> Clock:
        """n training steps counted from data to noise, 0 … n-1 (DDPM): step i at t = 1 - i/(n - 1)."""
        return cls(scale=-(n - 1.0), offset=n - 1.0)

    @classmethod
    def noise_level(cls, scale: float = 1000.0) -> Clock:
        """scale * (1 - t): the clock of SD3, FLUX and diffusers' flow-matching schedulers."""
        return cls(scale=-scale, offset=scale)

    def config(self) -> dict[str, Any]:
        """A JSON-able description."""
        return asdict(self)


@dataclass(frozen=True)
class SigmaClock:
    """The noise level as the network's time: sigma(t)/alpha(t) in some unit, or its logarithm.

        level / unit,    or where log is not 0    log * ln(level / unit),    level = sigma/alpha

    Args:
        path: the path that the level is read from.
        log: 0 for the level itself; another number for that multiple of its logarithm: 1/4 for EDM's inner network.
        unit: the level that counts as 1: 2 for the log(sigma/2) of EDM's VE networks.

    Raises:
        OptionError: for a unit that is not above 0.
    """

    path: Path
    log: float = 0.0
    unit: float = 1.0

    def __post_init__(self) -> None:
        if not self.unit > 0:
            raise OptionError(f"unit is {self.unit}; expected the noise level that counts as 1, above 0")

    def __call__(self, t: Any) -> Any:
        c = self.path(t)
        level = c.sigma / c.alpha / self.unit
        if not self.log:
            return level
        return self.log * (level.log() if isinstance(level, Tensor) else math.log(level))

    def config(self) -> dict[str, Any]:
        """A JSON-able description, told from a linear clock's by its kind."""
        return {"kind": "sigma", "path": self.path.config(), "log": self.log, "unit": self.unit}


def _clock(config: Mapping[str, Any] | None) -> Clock | SigmaClock | None:
    """The clock that its `config` described. A linear one names no kind: it was the only one, once."""
    if config is None or "kind" not in config:
        return None if config is None else Clock(**config)
    options = dict(config)
    kind = options.pop("kind")
    if kind != "sigma":
        raise one_of("kind of clock", kind, ("sigma",))
    return SigmaClock(**{**options, "path": paths.from_config(options["path"])})


@dataclass(frozen=True)
class Convention:
    """Everything about a network that its weights do not say.

    Attributes:
        path: the path its states lie on.
        prediction: what it outputs.
        clock: path time (float, or float64 tensor (B,)) -> network time. None: as it is, or as the prediction says.
        scale_input: path time -> the factor on x before the network. None: 1, or as the prediction says.
        null: the null condition by name, {"label": 10}: a number, or the tensor of one sample.
        independent: whether the noise is Gaussian and independent of the data, so that there is a score.
        normalisation: how the data were brought to path units.
        shape: one sample's shape, where it is known.
        grid: the sampling grid fitted to it, where there is one: what `times="fitted"` names.
        segments: where it was straightened piece by piece: samplers stop at the ends of these.
    """

    path: Path
    prediction: Prediction
    clock: Callable[[Any], Any] | None = None
    scale_input: Callable[[Any], Any] | None = None
    null: Mapping[str, Any] | None = None
    independent: bool = True
    normalisation: Normalisation = Normalisation()
    shape: tuple[int, ...] | None = None
    grid: Fitted | None = None
    segments: Segments | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and not isinstance(self.grid, Fitted):
            raise OptionError(f"grid is {self.grid!r}; expected None, or a fl.grids.Fitted from fl.fitting.fit_grid")

    def config(self) -> dict[str, Any]:
        """A JSON-able description, for run folders.

        Raises:
            OptionError: when the clock or input scaling is a function, or the null condition a tensor.
        """
        if self.clock is not None and not isinstance(self.clock, Clock | SigmaClock):
            raise OptionError(f"clock {self.clock!r} is a function and cannot be saved; expected a fl.model.Clock")
        if self.scale_input is not None:
            raise OptionError("scale_input is a function and cannot be saved; expected a prediction that fixes it")
        for name, value in (self.null or {}).items():
            if isinstance(value, Tensor):
                raise OptionError(f"the null condition {name!r} is a tensor and cannot be saved; expected a number")
        return {
            "path": self.path.config(),
            "prediction": self.prediction.config(),
            "clock": None if self.clock is None else self.clock.config(),
            "null": None if self.null is None else dict(self.null),
            "independent": self.independent,
            "normalisation": asdict(self.normalisation),
            "shape": None if self.shape is None else list(self.shape),
            # Only where there is one, so that a model without keeps the description, and the hash, that it had.
            **({} if self.grid is None else {"grid": self.grid.config()}),
            **({} if self.segments is None else {"segments": self.segments.config()}),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Convention:
        """The convention that `config` described."""
        normalisation: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config["normalisation"].items()
        }
        return cls(
            path=paths.from_config(config["path"]),
            prediction=predictions.from_config(config["prediction"]),
            clock=_clock(config["clock"]),
            null=config["null"],
            independent=config["independent"],
            normalisation=Normalisation(**normalisation),
            shape=None if config["shape"] is None else tuple(config["shape"]),
            grid=Fitted.from_config(config["grid"]) if "grid" in config else None,
            segments=Segments.from_config(config["segments"]) if "segments" in config else None,
        )
