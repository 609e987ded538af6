"""What fits into a cascade: models that chain, levels and times by stage."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from fluvial.errors import OptionError, ShapeError, one_of
from fluvial.model import Model
from fluvial.networks import MLP, UNet
from fluvial.systems.cascade_network import Upsampler
from fluvial.systems.upsampling import CLEAN, Augmentation, rises


def require_chain(models: Mapping[str, Model]) -> None:
    """Refuses models that do not fit on each other; says which and why."""
    if len(models) < 2:
        raise OptionError(f"there are {len(models)} models; expected a base and one above it at least")
    for name, model in models.items():
        if not isinstance(model, Model):
            raise OptionError(f"{name} is a {type(model).__name__}; expected a fl.Model")
        if model.shape is None or len(model.shape) != 3:
            raise ShapeError(f"{name} is of samples {model.shape}; expected images (C, H, W): model.under(shape=…)")
        _require_place(name, model, first=name == "base")
    for (below, lower), (name, upper) in pairwise(models.items()):
        a, b = lower.shape, upper.shape
        assert a is not None
        assert b is not None
        if a[0] != b[0]:
            raise ShapeError(f"{below} has {a[0]} channels, and {name} has {b[0]}; expected the same")
        if not rises(a[1:], b[1:]):
            raise ShapeError(f"{below} makes images {a}, and {name} {b}; expected each stage to be larger")
        if isinstance(upper.network, Upsampler) and upper.network.low != a[1:]:
            raise ShapeError(
                f"{name} was made for lower images of {upper.network.low}, and {below} makes {a[1:]}; expected the same"
            )


def _require_place(name: str, model: Model, first: bool) -> None:
    network = model.network
    call = network.forward if isinstance(network, nn.Module) else network
    parameters = inspect.signature(call).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if first and "low" in parameters:
        raise OptionError(f"{name} starts from a lower image; expected a model that starts from noise alone")
    if first or "low" in parameters:
        return
    if isinstance(network, UNet | MLP) or not open_ended:
        raise OptionError(
            f"{name}'s {type(network).__name__} takes no lower image; expected network(x, t, low=, level=, **cond), "
            "such as fl.systems.Upsampler"
        )


def augmentations(
    models: Mapping[str, Model], given: Mapping[str, Augmentation | None]
) -> dict[str, Augmentation | None]:
    """What each upper stage was trained under: as given, or as its network says."""
    upper, found = list(models)[1:], {}
    for name in given:
        if name not in upper:
            raise one_of("upper stage", name, upper)
    for name in upper:
        network = models[name].network
        if name in given:
            found[name] = given[name]
        elif isinstance(network, Upsampler):
            found[name] = network.augmentation
        else:
            raise OptionError(
                f"{name}'s network does not say what it was trained under; expected augmentations={{{name!r}: "
                "fl.systems.Augmentation(…)}, or None for clean lower images"
            )
    return found


def of_stage(given: Any, name: str, names: Sequence[str], what: str) -> Any:
    """A setting of one stage, given for all or by their names."""
    if not isinstance(given, Mapping):
        return given
    for other in given:
        if other not in names:
            raise one_of(f"stage of {what}", other, names)
    return given.get(name)


def stop(t: Any) -> float:
    """A time at which a stage can be stopped."""
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0.0 < t < 1.0:
        raise OptionError(f"truncated is {t}; expected a time between 0 and 1, of the stage below")
    return float(t)


def require_landing(name: str, times: Any) -> None:
    """Refuses times of a lower stage that end before the data: its state would be taken for an image."""
    if isinstance(times, Sequence | Tensor) and not isinstance(times, str) and float(times[-1]) != 1.0:
        raise OptionError(f"{name}'s times end at {float(times[-1]):g}; expected 1, or truncated= to stop it early")


def said(augmentation: Augmentation | None) -> str:
    """The levels of an augmentation, in words."""
    if augmentation is None:
        return "clean lower images, math.inf"
    clean = f", or clean (math.inf, from {CLEAN:g} on)" if augmentation.clean else ""
    return f"{augmentation.lowest:g} to {augmentation.highest:g}{clean}"
