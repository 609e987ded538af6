"""Latents of images, cached: what a latent model is trained on.

    manifest.json                whose latents of what they are; written first
    shard-000000.safetensors …   "data" the posterior's mean, "std" its deviation, and the conditions of each image
    measured.json                mean and deviation per channel, over all of them

What is encoded once is trained on many times, so the posterior is kept, not a sample of it: row k is drawn from it when
it is read, with noise that is a function of the seed and k. An epoch holds every image `draws` times, each time as
another sample. A folder can be made in pieces: shards are whole or not there, and the same bytes however often the work
was stopped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluvial import __version__, random
from fluvial.errors import DataError, OptionError, RunError
from fluvial.model import Normalisation
from fluvial.systems.autoencoder import Autoencoder
from fluvial.training import atomic, open_source
from fluvial.training.interrupts import Interrupts, RunInterrupted
from fluvial.training.pairs import MANIFEST, Shards, read_manifest, read_shard, require_same, write_shard
from fluvial.training.settings import whole
from fluvial.training.source import Rows, Source, join

MEASURED, DRAWS = "measured.json", 16

_SHARD_BYTES = 1 << 26

# How they were first asked to be read, which the shards do not depend on.
READ = ("draws", "seed")

# What a manifest of pairs has too, and `read_manifest` asks for.
_NO_PAIRS: dict[str, Any] = {"states": [], "noise": "none", "path": None}


class Standardised(Normalisation):
    """The units of latents: mean and deviation per channel, and whose latents they are.

    Attributes:
        autoencoder: its hash. It goes with the model in memory, and is none of the numbers that are saved with it.
    """

    autoencoder: str | None = None

    def of(self, autoencoder: str) -> Standardised:
        """The same of this autoencoder."""
        object.__setattr__(self, "autoencoder", autoencoder)
        return self


class Latents(Source):
    """The latents of images under an autoencoder; made by `latents`.

    As a source it gives "data" (n, c, h, w), float32, as the decoder wants them, and the images' conditions. Row k is
    image k mod `images`, turned round in the second half of these where there are flips, and draw k // `images`.

    Attributes:
        autoencoder: whose latents they are.
        images: how many images were encoded, with their mirror images.
        draws: how many samples of each posterior there are; 0: the mean alone.
        normalisation: `Standardised`: with it the latents of a model have mean 0 and deviation 1 in every channel.
    """

    waits = False

    def __init__(
        self, autoencoder: Autoencoder, manifest: Mapping[str, Any], load: Callable[[int], Rows], draws: int, seed: int,
        measured: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.autoencoder, self.images, self.draws, self.seed = autoencoder, manifest["n"], draws, seed
        self.name = f"latents of {manifest['source']} by autoencoder {manifest['autoencoder']}"
        self.size, self.shape = self.images * max(draws, 1), tuple(manifest["shape"])
        self.conditions = tuple(manifest["conditions"])
        self.num_classes, self.skipped = manifest["num_classes"], []
        names = manifest["class_names"]
        self.class_names = None if names is None else tuple(names)
        self.shards, self._load, self._loaded = Shards(self.images, manifest["shard_size"]), load, dict[int, Rows]()
        self.moments = measured or self._measure()
        self.measured, self.normalisation = self.images, self._standardised()

    def batch(self, indices: Tensor) -> Rows:
        indices = indices.to(torch.int64)
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= len(self)):
            raise IndexError(f"latents {int(indices.min())} to {int(indices.max())} are asked of {len(self)}")
        rows = self._at(indices % self.images)
        std = rows.pop("std", None)
        if self.draws and std is not None:
            noise = random.normal(indices, self.shape, self.seed, stream=random.DATA)
            rows["data"] = rows["data"] + std * noise
        return rows

    def posterior(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (n, c, h, w) of images by number."""
        rows = self._at(indices.to(torch.int64))
        return rows["data"], rows.get("std", torch.zeros_like(rows["data"]))

    def _at(self, images: Tensor) -> Rows:
        shard = images // self.shards.size
        order = torch.argsort(shard, stable=True)
        which, counts = torch.unique_consecutive(shard[order], return_counts=True)
        local = (images % self.shards.size)[order].split(counts.tolist())
        parts = [{name: v[at] for name, v in self._shard(k).items()} for k, at in zip(which.tolist(), local)]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return {name: values[back] for name, values in join(parts).items()}

    def _shard(self, k: int) -> Rows:
        if k not in self._loaded:
            self._loaded[k] = self._load(k)
        return self._loaded[k]

    def _measure(self) -> dict[str, Any]:
        """Per channel the mean, the variance of the means and the mean of the variances, in float64; and the range."""
        shards = [self._shard(k) for k in range(len(self.shards))]
        axes, each = (0, 2, 3), self.images * math.prod(self.shape[1:])
        mean = sum((s["data"].double().sum(axes) for s in shards), torch.zeros(self.shape[0]).double()) / each
        spread, drawn = torch.zeros_like(mean), torch.zeros_like(mean)
        for s in shards:
            spread += (s["data"].double() - mean[:, None, None]).square().sum(axes) / each
            drawn += s["std"].double().square().sum(axes) / each if "std" in s else 0.0
        low, high = min(float(s["data"].min()) for s in shards), max(float(s["data"].max()) for s in shards)
        return {"mean": mean.tolist(), "var": spread.tolist(), "drawn": drawn.tolist(), "low": low, "high": high}

    def _standardised(self) -> Standardised:
        """z = mean + std noise has the variance Var(mean) + E std²."""
        m = self.moments
        stds = [math.sqrt(v + d * bool(self.draws)) or 1.0 for v, d in zip(m["var"], m["drawn"])]
        # A single std for all channels is not measured: in path units every channel's is 1.
        n = Standardised(tuple(m["mean"]), tuple(stds), m["low"], m["high"])
        return n.of(self.autoencoder.hash)

    def __repr__(self) -> str:
        return f"Latents({self.name}, {self.images} of shape {self.shape}, {self.draws} draws each)"


def latents(
    autoencoder: Autoencoder,
    source: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    flips: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int = 64,
    shard_size: int | None = None,
    progress: bool = True,
) -> Latents:
    """The latents of all images of a source, as a source: encoded once, and kept.

        z = fl.systems.latents(autoencoder, "digits", out="latents/a")
        run = fl.train(fl.training.model_for(z), z, steps=5000, out="runs/a")
        system = fl.systems.Latent(z.autoencoder, run.ema)

    Run again on the same folder, only the shards that are not there are made.

    Args:
        autoencoder: it encodes; one of elsewhere takes over the units and the shape of these images.
        source: a `Source`, or what `open_source` takes, of images that can be read by number.
        out: the folder. None: they are kept in memory.
        flips: encode every image turned left to right too.
        draws: how many samples of an image's posterior a model meets before it meets the first again; 0: the mean.
        seed: of these.
        batch_size: images at a time; the last digits depend on it, so it belongs to the folder.
        shard_size: images in a file; default: as many as make 64 MiB, in whole batches.
        progress: show a bar.

    Raises:
        OptionError, ShapeError, DataError: for arguments that do not fit, before anything is written.
        RunError: for a folder under other settings, or of something else; for a damaged shard; for a full disk.
        RunInterrupted: a KeyboardInterrupt, after Ctrl-C or SIGTERM: complete shards are kept.
    """
    source = open_source(source)
    if source.size is None:
        raise DataError(f"{source.name} is a stream: its images have no numbers; expected data that can be read by row")
    for name, value, least in (("draws", draws, 0), ("batch_size", batch_size, 1), ("shard_size", shard_size, 1)):
        if value is not None:
            whole(name, value, least)
    if len(source.shape) != 3:
        raise OptionError(f"{source.name} has samples {source.shape}; expected images (C, H, W) for an autoencoder")
    autoencoder = autoencoder.for_data(source)
    shape = autoencoder.latent_shape(source.shape)
    fit = max(1, _SHARD_BYTES // (8 * math.prod(shape)) // batch_size) * batch_size
    n = source.size * (2 if flips else 1)
    manifest = {
        "fluvial": __version__, "kind": "latents", "autoencoder": autoencoder.hash, "source": source.name, "n": n,
        "flips": flips, "shape": list(shape), "conditions": list(source.conditions),
        "num_classes": source.num_classes, "class_names": None if source.class_names is None else [*source.class_names],
        "batch_size": batch_size, "shard_size": shard_size or fit, "draws": draws, "seed": seed, **_NO_PAIRS,
    }  # fmt: skip
    maker = _Maker(autoencoder, source, manifest, None if out is None else Path(out))
    if out is None:
        kept = {k: maker.rows(k) for k in maker.tracked(range(len(maker.shards)), progress)}
        return Latents(autoencoder, manifest, kept.__getitem__, draws, seed)
    return _in_folder(maker, Path(out), draws, seed, progress)


def _in_folder(maker: _Maker, folder: Path, draws: int, seed: int, progress: bool) -> Latents:
    before = read_manifest(folder)
    if before is not None:
        if before.get("kind") != "latents":
            raise RunError(f"{folder} is a set of pairs; expected a folder of latents, or a new one")
        if before["n"] != maker.manifest["n"]:
            raise RunError(
                f"{folder} is of {before['n']} images, and these are {maker.manifest['n']}; expected another"
            )
        require_same(folder, before, {name: value for name, value in maker.manifest.items() if name not in READ})
    with atomic.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic.sweep(folder)
        if before is None:
            atomic.write_json(folder / MANIFEST, maker.manifest)
    maker.write(progress)
    found = stored(maker.autoencoder, maker.manifest, folder, draws, seed)
    if not (folder / MEASURED).is_file():
        with atomic.writing(folder):
            atomic.write_json(folder / MEASURED, found.moments)
    return found


def stored(autoencoder: Autoencoder, manifest: Mapping[str, Any], folder: Path, draws: int, seed: int) -> Latents:
    """The latents of a folder that has all its shards."""
    measured = atomic.read_json(folder / MEASURED) if (folder / MEASURED).is_file() else None
    shards = Shards(manifest["n"], manifest["shard_size"])
    return Latents(autoencoder, manifest, lambda k: read_shard(shards.file(folder, k)), draws, seed, measured)


class _Maker:
    """Encodes a source shard by shard, in batches that are cut in one fixed way."""

    def __init__(
        self, autoencoder: Autoencoder, source: Source, manifest: Mapping[str, Any], folder: Path | None
    ) -> None:
        self.autoencoder, self.source, self.manifest, self.folder = autoencoder, source, manifest, folder
        self.shards = Shards(manifest["n"], manifest["shard_size"])

    @torch.no_grad()
    def rows(self, k: int) -> Rows:
        """The latents of a shard; of an autoencoder without a posterior, no deviations."""
        numbers, parts = self.shards.rows(k), []
        for begin in range(numbers.start, numbers.stop, self.manifest["batch_size"]):
            index = torch.arange(begin, min(begin + self.manifest["batch_size"], numbers.stop))
            rows = self.source.batch(index % len(self.source))
            images = rows.pop("data")
            turned = (index >= len(self.source))[:, None, None, None]
            posterior = self.autoencoder.encode(torch.where(turned, images.flip(-1), images))
            if not bool(posterior.mean.isfinite().all() and posterior.std.isfinite().all()):
                raise RunError(
                    f"the autoencoder's latents of images {begin} to {int(index[-1])} are not finite; expected another"
                )
            std = {"std": posterior.std} if bool((posterior.std > 0).any()) else {}
            parts.append({"data": posterior.mean, **std, **rows})
        return join(parts)

    def write(self, progress: bool) -> None:
        """Makes the shards that are not there."""
        assert self.folder is not None
        todo = [k for k in range(len(self.shards)) if not self.shards.complete(self.folder, k)]
        with Interrupts() as interrupts:
            for count, k in enumerate(self.tracked(todo, progress), 1):
                write_shard(self.shards.file(self.folder, k), self.rows(k))
                if interrupts.asked is not None and count < len(todo):
                    there = len(self.shards) - len(todo) + count
                    raise RunInterrupted(
                        f"interrupted with {there} of {len(self.shards)} shards in {self.folder}; the same command "
                        "goes on from there",
                        None,
                    )

    def tracked(self, todo: Any, progress: bool) -> Any:
        if not progress or not len(todo):
            return todo
        from rich.progress import track

        return track(todo, description="encoding")
