"""Paths: how data and noise mix.

    x = alpha(t) * data + sigma(t) * noise,        log_snr(t) = log(alpha² / sigma²),  rising with t

Time runs from noise (t = 0) to data (t = 1); u = 1 - t is the time to data. A path gives the two coefficients and
their derivatives in closed form, the log-SNR and its inverse, and the forward (noising) Itô SDE with this marginal,

    dx = f x du + g dW,    f = -alpha'/alpha,    g² = 2 sigma w / alpha,    w = alpha' sigma - alpha sigma'

(w is the Wronskian of the two coefficients, positive wherever the SNR rises). What a network predicts, and which
clock it counts on, are not decided here: see `predictions` and `model`.

A float t is evaluated in float64 and gives Python floats; it must lie in [0, 1], and asking for something that does
not exist at that end raises. A tensor t of any shape gives tensors of its dtype (at least float32), unchecked: an
impossible end gives inf or nan there, without a host synchronisation.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fluvial.errors import OptionError, one_of
from fluvial.paths.base import Coefficients, Path, Shifted
from fluvial.paths.closed import EDM, VE, VP, Cosine, Rectified, SubVP
from fluvial.paths.derived import Affine, Discrete

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Affine",
    "Coefficients",
    "Cosine",
    "Discrete",
    "Path",
    "Rectified",
    "Shifted",
    "SubVP",
    "from_config",
    "named",
]

_NAMED: dict[str, type[Path]] = {
    cls.__name__: cls for cls in (Rectified, Cosine, VP, SubVP, VE, EDM, Discrete, Shifted)
}


def named(name: str | Path, **options: Any) -> Path:
    """A path by name ("rectified", "cosine", "vp", "subvp", "ve", "edm", …) with its options; a Path as it is."""
    if isinstance(name, Path):
        if options:
            raise OptionError(f"{name} has its options already; give {', '.join(options)} when making it")
        return name
    known = {key.lower(): cls for key, cls in _NAMED.items() if cls not in (Discrete, Shifted)}
    key = str(name).lower().replace("-", "").replace("_", "")
    if key not in known:
        raise one_of("path", name, known)
    allowed = {f.name for f in fields(known[key])}  # type: ignore[arg-type]
    for option in options:
        if option not in allowed:
            raise one_of(f"option of path {key!r}", option, allowed)
    return known[key](**options)


def from_config(config: dict[str, Any]) -> Path:
    """The path that `Path.config` described."""
    options = dict(config)
    name = options.pop("name", None)
    if name not in _NAMED:
        raise one_of("path", name, _NAMED)
    if "base" in options:
        options["base"] = from_config(options["base"])
    return _NAMED[name](**options)
