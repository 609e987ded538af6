"""What `check_convention` tries: schedules, clocks, predictions and ranges of the data, as the field has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fluvial import paths, predictions
from fluvial.convention import Clock, Convention, Normalisation
from fluvial.interop.conventions import (
    Foreign,
    SigmaClock,
    cosine_table,
    foreign,
    in_words,
    linear_table,
    scaled_linear_table,
)
from fluvial.model import Converted, Model
from fluvial.paths import Path
from fluvial.predictions import Prediction

_ANY: tuple[Prediction, ...] = tuple(
    predictions.named(name) for name in ("data", "noise", "velocity", "flow", "v", "score")
)


@dataclass(frozen=True)
class Notation:
    """What decides the network's two inputs: the path, the clock and the input scaling; and what it may put out.

    Attributes:
        schedule, time: the path and the clock in words.
        convention: path, clock and input scaling; its prediction is the first of `outputs`.
        outputs: the predictions that are tried on the one output.
        data: the only range of the data to try, where it is given; else None.
        time_first, learned_variance: as in `Foreign`.
    """

    schedule: str
    time: str
    convention: Convention
    outputs: tuple[Prediction, ...]
    data: Normalisation | None = None
    time_first: bool = False
    learned_variance: bool = False


def everything() -> list[Notation]:
    """Every schedule and clock that is tried when no candidates are named.

    Two that no data can tell apart are one here: DDPM's table and VP in continuous time with the same betas.
    """
    steps, up, down = Clock.steps(1000), None, Clock.noise_level(1.0)
    linear, scaled = paths.Discrete(linear_table()), paths.Discrete(scaled_linear_table())
    nichol, level = paths.Discrete(cosine_table()), paths.EDM()
    ve, rectified, cosine = paths.VE(), paths.Rectified(), paths.Cosine()
    rows: list[tuple[str, Path, str, Any]] = [
        ("linear betas, a table of 1000", linear, "steps 0 … 999 from the data", steps),
        ("linear betas, a table of 1000", linear, "0 … 999 from the noise", Clock(999.0)),
        ("linear betas, a table of 1000", linear, "u from data 0 to noise 1", down),
        ("linear betas, a table of 1000", linear, "t from noise 0 to data 1", up),
        ("scaled-linear betas, a table of 1000", scaled, "steps 0 … 999 from the data", steps),
        ("cosine table of 1000", nichol, "steps 0 … 999 from the data", steps),
        ("cosine path", cosine, "u from data 0 to noise 1", down),
        ("cosine path", cosine, "t from noise 0 to data 1", up),
        ("sub-VP", paths.SubVP(), "999 u from the data", Clock.noise_level(999.0)),
        ("data + sigma noise", level, "sigma", SigmaClock(level)),
        ("data + sigma noise", level, "log(sigma)", SigmaClock(level, 1.0)),
        ("data + sigma noise", level, "log(sigma)/4", SigmaClock(level, 0.25)),
        ("data + sigma noise, sigma .01 … 50", ve, "u from data 0 to noise 1", down),
        ("rectified", rectified, "t from noise 0 to data 1", up),
        ("rectified", rectified, "u from data 0 to noise 1", down),
        ("rectified", rectified, "1000 u from the data", Clock.noise_level(1000.0)),
        ("rectified", rectified, "1000 t from the noise", Clock(1000.0)),
    ]
    found = [Notation(words, time, Convention(path, _ANY[0], clock), _ANY) for words, path, time, clock in rows]
    return found + [_edm_inner(level, sigma_data) for sigma_data in (0.5, 1.0)]


def _edm_inner(path: Path, sigma_data: float) -> Notation:
    f = predictions.EDM(sigma_data)
    words = f"data + sigma noise, the input divided by √(sigma² + {sigma_data:g}²)"
    return Notation(words, "log(sigma)/4", Convention(path, f), (f,))


def named(candidates: Sequence[str | Foreign | Convention]) -> list[Notation]:
    """The candidates that were asked for, each with the one prediction of its convention."""
    found = []
    for candidate in candidates:
        one = foreign(candidate)
        words = one.name if isinstance(candidate, (str, Foreign)) else in_words(one.convention)
        found.append(_stated(one.convention, words, one))
    return found


def stated(model: Model) -> Notation:
    """What the model itself says: its own convention, or its source's where it was converted."""
    convention = model.source.convention if isinstance(model, Converted) else model.convention
    return _stated(convention, "as the model states")


def _stated(convention: Convention, words: str, one: Foreign | None = None) -> Notation:
    own = convention.normalisation
    return Notation(
        words,
        "its own",
        convention,
        (convention.prediction,),
        None if own == Normalisation() and one is not None else own,
        one is not None and one.time_first,
        one is not None and one.learned_variance,
    )


def ranges(data: Tensor) -> dict[str, Normalisation]:
    """The ranges that the data (N, …) may have been brought to, in words; those that coincide once."""
    exact = data.double()
    low, high, mean, std = float(exact.min()), float(exact.max()), float(exact.mean()), float(exact.std())
    middle, half = (low + high) / 2, (high - low) / 2
    tried = {
        "[0, 1]": (low, 2 * half),
        "[-1, 1]": (middle, half),
        "[-.5, .5]": (middle, 2 * half),
        "standardised": (mean, std),
        "as given": (0.0, 1.0),
    }
    found: dict[str, Normalisation] = {}
    for words, (shift, scale) in tried.items():
        alike = [n for n in found.values() if abs(n.shift[0] - shift) + abs(n.scale[0] - scale) < 0.01 * std]
        if not alike:
            found[words] = Normalisation((shift,), (scale,), low, high, mean, std)
    return found
