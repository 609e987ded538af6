"""A diffusers pipeline, or one network of it, as a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fluvial.errors import FluvialError, OptionError, RunError
from fluvial.flow_maps import FlowMap
from fluvial.grids import Fitted
from fluvial.interop import folders, hub
from fluvial.interop.diffusers_networks import BoundaryNetwork, adapted
from fluvial.interop.diffusers_schedule import Schedule, read_schedule, shift_of, shifted
from fluvial.model import Model, Normalisation
from fluvial.training import building

_KNOTS = 200


def from_diffusers(source: Any, scheduler: Any = None, *, mu: float | None = None) -> Model:
    """A diffusers pipeline, or a network with its scheduler, as a model; the network is shared, not copied.

        model = fl.interop.diffusers.from_diffusers("folder-or-hub-id")
        images = fl.sample(model, 16, solver="dpmpp_2m", times=sampling_times(pipe.scheduler, 25))

    The scheduler's configuration gives the path, the prediction and the clock; see `diffusers_schedule`. The conditions
    are diffusers' own, by name; see `diffusers_networks`. Where the pipeline has an autoencoder, the model's own units
    are the latents that it decodes: path units = (latent - shift_factor) * scaling_factor. Where a flow scheduler
    shifts its sampling clock, the model carries that as its grid, `times="fitted"`: the network's own clock has none.

    Args:
        source: a pipeline; a network (`UNet2DModel`, `SD3Transformer2DModel`, …), with its scheduler; or the folder or
            hub name, "owner/name[@revision]", of either. Of those only JSON and safetensors are read.
        scheduler: a diffusers scheduler or its config; default the pipeline's. What it samples with does not matter.
        mu: the logarithm of the shift that a scheduler with use_dynamic_shifting would be given for the image's size.

    Returns:
        The model; of a consistency scheduler, a `FlowMap`.

    Raises:
        OptionError: for a network, scheduler or setting that is not known here.
        RunError: for a folder or a name of something else, or one that cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        source = opened(hub.local(source))
    network = source if isinstance(source, nn.Module) else _network_of(source)
    scheduler = getattr(source, "scheduler", None) if scheduler is None else scheduler
    if scheduler is None:
        raise OptionError("scheduler is missing; expected the one the network was trained with, or its config")
    schedule = read_schedule(scheduler)
    if mu is not None and schedule.family != "flow":
        raise OptionError(f"mu is {mu} and the scheduler is no flow scheduler; expected none")
    called = adapted(network, schedule.sign)
    if schedule.family == "consistency":
        boundary = BoundaryNetwork(called, dict(schedule.settings))
        return FlowMap(schedule.model(boundary).under(shape=called.sample_shape()), "consistency")
    model = schedule.model(called)
    return model.under(
        shape=called.sample_shape(), normalisation=_latents(getattr(source, "vae", None)), grid=_grid(schedule, mu)
    )


def opened(folder: Path, weights: bool = True) -> Any:
    """The network, the scheduler's config and the autoencoder's, of a folder of diffusers'; nothing else is read.

    Args:
        folder: of a pipeline, or of one network.
        weights: whether to read them; without them the network has no memory, and only its convention is of use.

    Raises:
        OptionError, RunError: for a folder of something else, or one that cannot be read, or is not to be.
    """
    import diffusers

    found = folders.layout(folder)
    folders.require_known(found)
    kind = getattr(diffusers, found.network_class)
    network: Any
    try:
        parts: dict[str, Any] = {"scheduler": folders.scheduler_config(found)}
        if (vae := folders.vae_config(found)) is not None:
            parts["vae"] = SimpleNamespace(config=vae)
        config = folders.network_config(found)
        make: Callable[[], nn.Module] = lambda: kind.from_config(config)  # noqa: E731
        if not weights:
            with torch.device("meta"):
                return SimpleNamespace(**parts, **{found.part: make()})
        _require_room(
            building.empty(make, shapes := folders.weight_shapes(found), found.network), shapes, found.network
        )
        network, info = kind.from_pretrained(
            found.network, use_safetensors=True, output_loading_info=True, local_files_only=True
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"its file of weights lacks {', '.join(missing[:3])}")
    except FluvialError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise RunError(f"{folder} cannot be opened as diffusers': {' '.join(str(error).split())}") from error
    return SimpleNamespace(**parts, **{found.part: network})


def _require_room(network: nn.Module, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Refuses a config of more numbers than the weights have; older files call some of them by other names."""
    asked = sum(tensor.numel() for tensor in building.weights_of(network).values())
    if asked > (held := folders.count(shapes)):
        raise RunError(
            f"{folder} has weights of {held:,} numbers, and its config describes a {type(network).__name__} of "
            f"{asked:,}; expected the config of these weights"
        )


def _network_of(pipe: Any) -> nn.Module:
    for name in folders.NETWORKS:
        if isinstance(network := getattr(pipe, name, None), nn.Module):
            return network
    raise OptionError(f"a {type(pipe).__name__} has no unet or transformer; expected a pipeline with one, or a network")


def _latents(vae: Any) -> Normalisation:
    """The scaling of a pipeline's latents, (latent - shift_factor) * scaling_factor."""
    config = getattr(vae, "config", {})
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    return Normalisation((float(shift),), (1.0 / float(scale),))


def _grid(schedule: Schedule, mu: float | None) -> Fitted | None:
    """The shifted clock of a flow scheduler as a grid; None where nothing is shifted, or by a shift not known yet."""
    settings = schedule.settings
    if schedule.family != "flow" or (mu is None and settings.get("use_dynamic_shifting")):
        return None
    shift = shift_of(settings, mu)
    if shift == 1.0:
        return None
    levels = [1.0 - shifted(1.0 - k / _KNOTS, shift) for k in range(_KNOTS + 1)]
    return Fitted(levels, made=f"the sampling shift {shift:g} of a {settings['_class_name']}")
