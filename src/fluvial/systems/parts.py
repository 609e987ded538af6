"""The parts of systems that are no models, in words: latents, autoencoders, CLIPs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from fluvial import training
from fluvial.errors import RunError
from fluvial.systems.autoencoder import CLASS, WEIGHTS, Autoencoder, load_autoencoder
from fluvial.systems.autoencoder_networks import KNOWN
from fluvial.systems.clip import CLIP
from fluvial.systems.clip import WEIGHTS as CLIP_WEIGHTS
from fluvial.systems.latent_run import is_latents, latents_manifest
from fluvial.systems.latent_source import DRAWS, MEASURED
from fluvial.training import atomic
from fluvial.training.checkpoints import CONFIG
from fluvial.training.pairs import Shards
from fluvial.training.runs import RunFolder

# As `train_clip` writes them.
SETTINGS, METRICS = "training.json", "metrics.jsonl"

# Of a run's description, what is said of an autoencoder too.
_OF_RUNS = ("network", "architecture", "data", "objective", "training", "optimiser", "precision", "written by")


def describe_part(folder: str | os.PathLike[str]) -> dict[str, str] | None:
    """What is in a folder of latents, an autoencoder or a CLIP: what each thing is called, and what it is.

    None for a folder of something else.

    Raises:
        RunError: for files that are missing or damaged.
    """
    folder = Path(folder)
    if is_latents(folder):
        return _latents(folder)
    config = atomic.read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "convention" in config:
        network = config.get("network")
        kind = network.get("class") if isinstance(network, Mapping) else None
        return _trained(folder) if str(kind).endswith(".KLAutoencoder") else None
    if config.get(CLASS) in KNOWN:
        _require_weights(folder, "an autoencoder", WEIGHTS)
        return _autoencoder(load_autoencoder(folder))
    if config.get("model_type") == "clip":
        _require_weights(folder, "a CLIP", CLIP_WEIGHTS)
        return _clip(folder)
    return None


def _require_weights(folder: Path, what: str, file: str) -> None:
    if not (folder / file).is_file():
        raise RunError(f"{folder} is of {what}, and has no {file}; expected a folder with its weights")


def _latents(folder: Path) -> dict[str, str]:
    manifest = latents_manifest(folder)
    shards, draws = Shards(manifest["n"], manifest["shard_size"]), manifest.get("draws", DRAWS)
    there = sum(shards.file(folder, k).exists() for k in range(len(shards)))
    turned = ", half of them turned left to right" if manifest.get("flips") else ""
    words = {
        "latents": f"{_sides(manifest['shape'])}, of {manifest['n']:,} images{turned}",
        "data": str(manifest["source"]),
        "autoencoder": str(manifest["autoencoder"]),
        "draws": f"{draws} of each image" if draws else "none: the mean of each image",
    }
    if (folder / MEASURED).is_file():
        measured = atomic.read_json(folder / MEASURED)
        stds = [math.sqrt(v + d * bool(draws)) for v, d in zip(measured["var"], measured["drawn"])]
        words["mean"] = f"{_numbers(measured['mean'])}, by channel"
        words["deviation"] = f"{_numbers(stds)}, by channel"
    if manifest["conditions"]:
        classes = "" if manifest["num_classes"] is None else f" ({manifest['num_classes']} classes)"
        words["conditions"] = ", ".join(manifest["conditions"]) + classes
    return words | {"shards": f"{there} of {len(shards)}", "written by": f"Fluvial {manifest.get('fluvial')}"}


def _trained(folder: Path) -> dict[str, str]:
    """A run of `train_autoencoder`."""
    words, run = training.describe(folder), RunFolder(folder)
    found = _autoencoder(load_autoencoder(folder))
    lines = run.metrics(run.step() or 0)
    if lines and "rate" in lines[-1]:
        last = f"of the batch of step {lines[-1]['step']}"
        found["rate"] = f"{lines[-1]['rate']:.3g} bits/dim, {last}"
        # It is measured in units of [-1, 1].
        found["RMSE"] = f"{lines[-1]['rmse'] / 2.0:.3g} of the range, {last}"
    return found | {name: words[name] for name in _OF_RUNS if name in words}


def _autoencoder(found: Autoencoder) -> dict[str, str]:
    n, shape = found.normalisation, found.shape
    images = f"{found.channels} channels, of any size" if shape is None else _sides(shape)
    if n.low is not None and n.high is not None:
        images += f", from {n.low:g} to {n.high:g}"
    latents = f"{found.latent_channels} channels" if shape is None else _sides(found.latent_shape(shape))
    return {
        "autoencoder": f"{found.hash}, an {type(found.network).__name__}",
        "images": images,
        "latents": f"{latents}, sides divided by {found.factor}",
    }


def _clip(folder: Path) -> dict[str, str]:
    clip = CLIP.load(folder)
    vision = clip.model.config.vision_config
    words = {
        "clip": f"{clip.hash}, a CLIP of transformers'",
        "images": f"{_sides((vision.num_channels, vision.image_size, vision.image_size))}, from {clip.low:g} to "
        f"{clip.high:g}, in patches of {vision.patch_size} x {vision.patch_size}",
        "texts": f"up to {clip.length} token ids, of {len(clip.tokenizer):,}",
        "embeddings": f"{clip.dim} numbers, of length 1",
    }
    if (folder / SETTINGS).is_file() and (folder / METRICS).is_file():
        settings = atomic.read_json(folder / SETTINGS)
        words["data"] = f"{settings['data']}, {settings['images']:,} images"
        # A line that was cut short is none.
        lines = [text for text in (folder / METRICS).read_text("utf-8").splitlines() if text.endswith("}")]
        last = json.loads(lines[-1]) if lines else {"step": 0, "loss": math.nan}
        words["training"] = f"{last['step']} of {settings['steps']} steps, last loss {last['loss']:.4g}"
    return words


def _sides(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
