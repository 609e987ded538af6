"""Fluvial: one library for every diffusion and flow model.

Time runs from noise (t = 0) to data (t = 1); a path mixes x = alpha(t) * data + sigma(t) * noise. Read in the order
paths, predictions, model, solvers, sampling.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives; a module is imported when one of its names is first used.
_NAMES = {
    "Model": "model",
    "convert": "model",
    "FlowMap": "flow_maps",
    "sample": "sampling",
    "encode": "sampling",
    "decode": "sampling",
    "Trajectory": "sampling",
    "Objective": "objectives",
    "train": "training",
    "Run": "training",
    "load": "interop",
    "save": "training",
    "from_callable": "interop",
    "from_diffusers": "interop",
    "from_edm": "interop",
    "to_diffusers": "interop",
    "from_pretrained": "interop",
    "push_to_hub": "interop",
    "as_denoiser": "interop",
    "as_velocity": "interop",
    "check_convention": "interop",
    "certify": "interop",
    "FluvialError": "errors",
}
_MODULES = (
    "captured",
    "couplings",
    "distill",
    "errors",
    "exact",
    "fitting",
    "flow_maps",
    "grids",
    "guidance",
    "interop",
    "likelihood",
    "mcmc",
    "measure",
    "model",
    "networks",
    "objectives",
    "paths",
    "predictions",
    "random",
    "sampling",
    "sheets",
    "solvers",
    "straighten",
    "systems",
    "testing",
    "training",
)

__all__ = ["__version__", *_MODULES, *_NAMES]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from fluvial import couplings as couplings


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"fluvial.{_NAMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fluvial.{name}")
    else:
        raise AttributeError(f"module 'fluvial' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
