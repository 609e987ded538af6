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
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluvial import __version__
from fluvial.errors import OptionError, RunError
from fluvial.systems.autoencoder import Autoencoder, load_autoencoder
from fluvial.systems.base import INDEX
from fluvial.systems.latent import PART, Latent
from fluvial.systems.latent_source import DRAWS, Latents, latents, stored
from fluvial.training import atomic
from fluvial.training.pairs import MANIFEST, Shards, read_manifest
from fluvial.training.settings import whole

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
    with _first_process():
        _begin_folder(folder, autoencoder)
        z = latents(autoencoder, source, folder / CACHE, **options)
    return z, folder / MODEL


def _first_process() -> AbstractContextManager[Any]:
    """Of several processes the first one encodes, and the others then read."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return nullcontext()
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available()).main_process_first()


def _begin_folder(folder: Path, autoencoder: Autoencoder) -> None:
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


def open_latents(
    folder: str | os.PathLike[str],
    autoencoder: Autoencoder | str | os.PathLike[str] | None = None,
    *,
    draws: int | None = None,
    seed: int | None = None,
) -> Latents:
    """The latents that `latents` wrote into a folder, as a source: the images they are of are not needed.

        z = open_latents("runs/a/latents")
        student = fl.distill.consistency(fl.load("runs/a/model"), z, out="runs/a/student")

    Args:
        folder: with all its shards.
        autoencoder: whose latents they are, or its folder. Default: the folder `autoencoder` beside them.
        draws, seed: as for `latents`. Default: as they were first made.

    Raises:
        RunError: for a folder of something else, or one that lacks shards; where the autoencoder is not there, or is
            another one than theirs.
        OptionError: for draws below 0.
    """
    folder = Path(folder)
    manifest = latents_manifest(folder)
    shards = Shards(manifest["n"], manifest["shard_size"])
    missing = sum(not shards.complete(folder, k) for k in range(len(shards)))
    if missing:
        raise RunError(
            f"{folder} lacks {missing} of its {len(shards)} shards; expected all: systems.latents(…), or fluvial train "
            "… --latent …, as it was begun, makes only those"
        )
    draws = int(manifest.get("draws", DRAWS)) if draws is None else draws
    whole("draws", draws, 0)
    found = _autoencoder_of(folder, manifest, autoencoder)
    return stored(found, manifest, folder, draws, int(manifest.get("seed", 0)) if seed is None else seed)


def is_latents(folder: str | os.PathLike[str]) -> bool:
    """Whether `latents` wrote this folder."""
    file = Path(folder).expanduser() / MANIFEST
    return file.is_file() and atomic.read_json(file).get("kind") == "latents"


def latents_manifest(folder: Path) -> dict[str, Any]:
    """What a folder of latents says of them.

    Raises:
        RunError: for a folder of something else.
    """
    if not is_latents(folder):
        what = "is no folder of latents" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {what}; expected one that systems.latents wrote, or fluvial train … --latent")
    manifest = read_manifest(folder) or {}
    wanted = ("autoencoder", "source", "shape", "num_classes", "class_names")
    lacking = [name for name in wanted if name not in manifest]
    if lacking:
        raise RunError(f"{folder / MANIFEST} lacks {', '.join(lacking)}; expected what Fluvial wrote there")
    return manifest


def _autoencoder_of(folder: Path, manifest: dict[str, Any], given: Any) -> Autoencoder:
    place = given if given is not None else folder.absolute().parent / PART
    if given is None and not place.is_dir():
        raise RunError(
            f"{folder} has no autoencoder beside it ({place}); expected one there, such as autoencoder.save({PART!r}) "
            "writes, or open_latents(…, autoencoder)"
        )
    found = place if isinstance(place, Autoencoder) else load_autoencoder(place)
    if found.hash != manifest["autoencoder"]:
        where = "the one that is given" if isinstance(place, Autoencoder) else str(place)
        raise RunError(
            f"{folder} holds latents of autoencoder {manifest['autoencoder']}, and {where} is {found.hash}; expected "
            "that one"
        )
    shape = tuple(manifest["shape"])
    image = found.shape or (found.channels, *(side * found.factor for side in shape[1:]))
    if found.latent_shape(image) != shape:
        raise RunError(
            f"{folder} holds latents {shape}, and those of the autoencoder's images {image} are "
            f"{found.latent_shape(image)}; expected the autoencoder that they were made with"
        )
    return found if found.shape else Autoencoder(found.network, found.normalisation, image)


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
