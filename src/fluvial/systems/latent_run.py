"""Latent models as runs: a folder that is a system from its first state on, and what diffusers makes of it.

RUN/system.json      so that fl.load(RUN) and `fluvial sample RUN` give images
RUN/autoencoder/     the autoencoder, a folder of diffusers'
RUN/latents/         those of the data
RUN/model/           the run of the latent model, as every other
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluvial import __version__
from fluvial.errors import OptionError, RunError
from fluvial.systems.autoencoder import Autoencoder
from fluvial.systems.base import INDEX
from fluvial.systems.latent import PART, Latent
from fluvial.systems.latent_source import Latents, latents
from fluvial.training import atomic

CACHE, MODEL = "latents", "model"


def begin_latent_run(
    autoencoder: Autoencoder, source: Any, out: str | os.PathLike[str], **options: Any
) -> tuple[Latents, Path]:
    """Begins a run on the latents of a source, or goes on with it: returns the latents and the model's own run folder.

        z, folder = begin_latent_run(autoencoder, "digits", "runs/a")
        fl.train(fl.training.model_for(z), z, steps=5000, out=folder)
        system = fl.load("runs/a")

    Args:
        autoencoder: whose latents.
        source: the images.
        out: the folder.
        options: as for `latents`.

    Raises:
        RunError: for a folder that holds something else, or a run on another autoencoder's latents. Otherwise as
            `latents`.
    """
    from fluvial.training.data import open_source

    folder, source = Path(out), open_source(source)
    autoencoder = autoencoder.for_data(source)
    if (folder / INDEX).is_file():
        known = atomic.read_json(folder / INDEX).get("settings", {}).get(PART)
        if known != autoencoder.hash:
            raise RunError(
                f"{folder} is a run on latents of autoencoder {known}, and this is {autoencoder.hash}; expected that "
                "one, or another folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
        raise RunError(f"{folder} holds something else; expected a new folder, or one of a run on latents")
    with atomic.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / INDEX).is_file():
            autoencoder.save(folder / PART)
        index = {"fluvial": __version__, "system": Latent.kind, "models": [MODEL], "settings": {PART: autoencoder.hash}}
        atomic.replace(folder / INDEX, lambda file: file.write_text(json.dumps(index, indent=2) + "\n", "utf-8"))
    return latents(autoencoder, source, folder / CACHE, **options), folder / MODEL


def diffusers_pipe(system: Latent) -> Any:
    """A `diffusers.LDMPipeline` around the system's autoencoder, for `fl.to_diffusers` to put the model into.

        fl.to_diffusers(system.models["model"], folder, pipe=fl.systems.diffusers_pipe(system))

    The standardisation is written into the autoencoder, see `standardising_vae`, so that what is written draws the
    images of `system` exactly; they come out as (x + 1)/2 of x in [-1, 1], clamped.

    Raises:
        OptionError: for a path that this pipeline has no scheduler for: `LDMPipeline` runs those with
            alpha² + sigma² = 1. The parts of a rectified flow go out alone: `fl.to_diffusers(model, folder)` and
            `standardising_vae(system).save_pretrained(folder)`. For images that the autoencoder crops.
    """
    import diffusers

    model = getattr(system.model, "source", system.model)
    if any(abs(c.alpha**2 + c.sigma**2 - 1.0) > 1e-9 for c in model.path.table([k / 8 for k in range(9)])):
        raise OptionError(
            f"the model was trained on {model.path}, and diffusers' LDMPipeline runs paths with alpha² + sigma² = 1; "
            "expected such a one, or the parts alone: fl.to_diffusers(model, …) and standardising_vae(system)"
        )
    shape, factor = system.shape, system.autoencoder.factor
    if shape is not None and (shape[1] % factor or shape[2] % factor):
        raise OptionError(f"images {shape} are padded to multiples of {factor}, and a pipeline would draw the padding")
    library: Any = diffusers
    # A pipeline has to have a network: this one's place is what it is for.
    place = library.UNet2DModel(
        4, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=8
    )
    return library.LDMPipeline(standardising_vae(system), place, library.DDIMScheduler())


@torch.no_grad()
def standardising_vae(system: Latent) -> Any:
    """A copy of the system's `AutoencoderKL` whose latents are the model's path units, so that no pipeline need scale.

        decode'(x) = decode(mean + std x),        encode'(image) = (encode(image) - mean)/std

    Both are linear in each channel, and so are the first layer of the decoder and the last of the encoder, which take
    them over exactly: the 1x1 convolutions `post_quant_conv` and `quant_conv`.

    Raises:
        OptionError: for an autoencoder without these layers.
    """
    network = copy.deepcopy(system.autoencoder.network).cpu()
    post, quant = getattr(network, "post_quant_conv", None), getattr(network, "quant_conv", None)
    if post is None or quant is None:
        raise OptionError(
            f"the autoencoder is a {type(network).__name__} without 1x1 convolutions at its latents; expected an "
            "AutoencoderKL with them, or autoencoder.save(folder), and the standardisation done by hand"
        )
    n, channels = system.model.normalisation, system.autoencoder.latent_channels
    mean, std = (_all(values, channels) for values in (n.shift, n.scale))
    weight = post.weight.double()
    post.bias.copy_(post.bias.double() + torch.einsum("oihw,i->o", weight, mean))
    post.weight.copy_(weight * std[None, :, None, None])
    halves = quant.weight.double() / std.repeat(2)[:, None, None, None]
    halves[channels:] = quant.weight.double()[channels:]
    quant.weight.copy_(halves)
    bias = quant.bias.double()
    # The other half is the logarithm of the variance.
    quant.bias.copy_(torch.cat([(bias[:channels] - mean) / std, bias[channels:] - 2.0 * std.log()]))
    network.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
    return network


def _all(values: tuple[float, ...], channels: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).expand(channels).clone()
