"""Systems read back from their folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fluvial import training
from fluvial.errors import RunError
from fluvial.systems.base import INDEX, System
from fluvial.systems.cascade import Cascade
from fluvial.systems.latent import Latent
from fluvial.systems.unclip import UnCLIP
from fluvial.training import atomic

KINDS: dict[str, type[System]] = {"cascade": Cascade, "latent": Latent, "unclip": UnCLIP}


def load(folder: str | os.PathLike[str]) -> Any:
    """The system that `fl.save` wrote into a folder, on the CPU and ready to sample.

    Raises:
        RunError: for a folder that holds no system, or parts that cannot be read.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise RunError(f"{folder} has no {INDEX}; expected a folder of a system, as fl.save writes it")
    index = atomic.read_json(folder / INDEX)
    kind, names, settings = (index.get(key) for key in ("system", "models", "settings"))
    if kind not in KINDS:
        raise RunError(f"{folder / INDEX} is of a {kind!r}; expected {', '.join(KINDS)}")
    if not isinstance(names, list) or not isinstance(settings, dict):
        raise RunError(f"{folder / INDEX} lacks its models or settings; expected what fl.save wrote there")
    inside = [name for name in names if isinstance(name, str) and name.isidentifier()]
    if len(inside) < len(names):
        raise RunError(f"{folder / INDEX} names the models {names}; expected names of folders beside it")
    return KINDS[kind].read(folder, {name: training.load(folder / name) for name in inside}, settings)
