"""A diffusers pipeline, or one network of it, as a model."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from torch import nn

from fluvial.errors import FluvialError, OptionError, RunError
from fluvial.flow_maps import FlowMap
from fluvial.grids import Fitted
from fluvial.interop.diffusers_networks import BoundaryNetwork, adapted, known_network
from fluvial.interop.diffusers_schedule import Schedule, read_schedule, shift_of, shifted
from fluvial.model import Model, Normalisation

NETWORKS = ("unet", "transformer")
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
        source: a pipeline; a network (`UNet2DModel`, `SD3Transformer2DModel`, …), with its scheduler; or a pipeline's
            folder or hub name, of which only safetensors files are read.
        scheduler: a diffusers scheduler or its config; default the pipeline's. What it samples with does not matter.
        mu: the logarithm of the shift that a scheduler with use_dynamic_shifting would be given for the image's size.

    Returns:
        The model; of a consistency scheduler, a `FlowMap`.

    Raises:
        OptionError: for a network, scheduler or setting that is not known here.
        RunError: for a folder that holds no pipeline.
    """
    if isinstance(source, str | os.PathLike):
        source = _opened(source)
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


def _opened(source: str | os.PathLike[str]) -> Any:
    """The network, the scheduler's config and the autoencoder's, of a pipeline's folder; nothing else is read."""
    import diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    local = os.path.isdir(source)
    if local and not os.path.isfile(os.path.join(source, "model_index.json")):
        raise RunError(f"{source} has no model_index.json; expected a folder that a diffusers pipeline was saved in")
    try:
        index: Any = DiffusionPipeline.load_config(source, local_files_only=local)
        name = next((name for name in NETWORKS if _class_in(index, name) is not None), None)
        if name is None:
            raise RunError(f"{source} has no unet or transformer of diffusers'; expected a pipeline with one")
        known_network(kind := str(_class_in(index, name)))
        options: dict[str, Any] = {"local_files_only": local}
        network, info = getattr(diffusers, kind).from_pretrained(
            source, subfolder=name, use_safetensors=True, output_loading_info=True, **options
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"its file of weights lacks {', '.join(missing[:3])}")
        found: dict[str, Any] = {name: network}
        if _class_in(index, "scheduler") is not None:
            found["scheduler"] = _config(source, "scheduler", options)
        if _class_in(index, "vae") is not None:
            found["vae"] = SimpleNamespace(config=_config(source, "vae", options))
    except FluvialError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise RunError(f"{source} cannot be opened as a diffusers pipeline: {' '.join(str(error).split())}") from error
    return SimpleNamespace(**found)


def _config(source: str | os.PathLike[str], part: str, options: dict[str, Any]) -> Any:
    """The configuration of a scheduler or a network in a pipeline's folder."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    # Any class of each kind: they differ in the name of the file.
    return (DDIMScheduler if part == "scheduler" else AutoencoderKL).load_config(source, subfolder=part, **options)


def _class_in(index: dict[str, Any], part: str) -> str | None:
    """The class that a pipeline's index names for a part, if it is diffusers' own."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list | tuple) and len(entry) == 2 and entry[0] == "diffusers" else None


def _network_of(pipe: Any) -> nn.Module:
    for name in NETWORKS:
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
