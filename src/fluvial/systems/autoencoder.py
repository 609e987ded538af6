"""Autoencoders: images to latents and back, what the latents cost in bits, and how far the images come back.

    z ~ Normal(mean(x), std(x)²)      x' = decode(z)      rate = KL(Normal(mean, std²) || Normal(0, I)) / (ln 2 dims)

An autoencoder here knows the units of its images: they go in and come out in the data's own.

Sources: Kingma, Welling: Auto-encoding variational Bayes (2013), https://arxiv.org/abs/1312.6114; Rombach, Blattmann,
Lorenz, Esser, Ommer: High-resolution image synthesis with latent diffusion models (2021),
https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluvial.errors import FluvialError, OptionError, RunError, ShapeError, one_of
from fluvial.model import Normalisation
from fluvial.systems.autoencoder_networks import KNOWN, kl_to_normal, padded, pool, tiny_network
from fluvial.training import atomic, building
from fluvial.training import load as load_run
from fluvial.training.checkpoints import CONFIG
from fluvial.training.pairs import described

# Beside diffusers' files: what those do not say.
OURS, WEIGHTS, CLASS = "fluvial.json", "diffusion_pytorch_model.safetensors", "_class_name"

# uint8 images, as every source here gives them: 0 … 1.
UNIT = Normalisation((0.5,), (0.5,), 0.0, 1.0)

_PIECE = 2**18  # numbers of images that go through the network at a time


class Posterior(NamedTuple):
    """What the encoder says of images: latents z ~ Normal(mean, std²), (B, c, h, w) each; std is 0 where it is sure."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The latents of this unit-variance noise: mean + std noise."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """The KL to Normal(0, I) of each sample (B,), in nats."""
        return kl_to_normal(self.mean, self.std)


class Autoencoder:
    """A network that encodes and decodes, with the units and the shape of its images. Its weights are frozen.

    Args:
        network: `diffusers.AutoencoderKL` or `AutoencoderTiny`; it is used as it is, and put in eval mode.
        normalisation: the data's units: applied to images it gives the [-1, 1] that the network wants. Default: images
            from 0 to 1.
        shape: of one image (C, H, W), where it is known: decoded images are cropped to it.

    Raises:
        OptionError: for another network.
        ShapeError: for a shape of other channels than the network's.
    """

    def __init__(
        self, network: nn.Module, normalisation: Normalisation = UNIT, shape: tuple[int, ...] | None = None
    ) -> None:
        if type(network).__name__ not in KNOWN:
            raise one_of("autoencoder", type(network).__name__, KNOWN)
        self.network: Any = network.eval().requires_grad_(False)
        self.normalisation, self.shape = normalisation, None if shape is None else tuple(shape)
        config: Any = self.network.config
        blocks = config[
            "encoder_block_out_channels" if "encoder_block_out_channels" in config else "block_out_channels"
        ]
        self.channels, self.latent_channels = int(config["in_channels"]), int(config["latent_channels"])
        self.factor = 2 ** (len(blocks) - 1)
        if self.shape is not None:
            self._require_image(self.shape)

    def for_data(self, source: Any) -> Autoencoder:
        """The same network for the images of a source: their shape and their units, where it has none of its own.

        Raises:
            ShapeError: for images of another shape, or of other channels.
        """
        if self.shape is None:
            return Autoencoder(self.network, source.normalisation, source.shape)
        if self.shape != source.shape:
            raise ShapeError(f"the autoencoder is for images {self.shape}, and {source.name} has {source.shape}")
        return self

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: Any) -> Autoencoder:
        """Moves the network in place."""
        self.network.to(device)
        return self

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The shape (c, h, w) of the latents of images (C, H, W): sides are divided by `factor` and rounded up.

        Raises:
            ShapeError: for what are not images of its channels.
        """
        self._require_image(shape)
        return self.latent_channels, -(-shape[1] // self.factor), -(-shape[2] // self.factor)

    def encode(self, images: Tensor) -> Posterior:
        """The posterior of images (B, C, H, W) in the data's own units.

        Sides that the factor does not divide are padded by repeating the border.

        Raises:
            ShapeError: for images of other channels, or of another shape where it has one.
        """
        self._require_image(tuple(images.shape[1:]))
        if self.shape is not None and tuple(images.shape[1:]) != self.shape:
            raise ShapeError(
                f"images have shape {tuple(images.shape)}; expected (B, {', '.join(map(str, self.shape))})"
            )
        x = padded(self.normalisation.apply(self._in(images)), self.factor)
        means, stds = zip(*(self._posterior(part) for part in self._pieces(x, x[0].numel())))
        return Posterior(torch.cat(means).to(images.device), torch.cat(stds).to(images.device))

    def decode(self, latents: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The images (B, C, H, W) of latents (B, c, h, w), in the data's own units.

        Args:
            latents: as `encode` gives them, not standardised.
            shape: (C, H, W) to crop to; default the autoencoder's own, where it has one.

        Raises:
            ShapeError: for latents that are not those of such images.
        """
        shape = shape or self.shape
        expected = None if shape is None else self.latent_shape(shape)
        wrong = latents.ndim != 4 or latents.shape[1] != self.latent_channels
        if wrong or (expected is not None and tuple(latents.shape[1:]) != expected):
            sides = f"{self.latent_channels}, h, w" if expected is None else ", ".join(map(str, expected))
            raise ShapeError(f"latents have shape {tuple(latents.shape)}; expected (B, {sides})")
        z = self._in(latents)
        pieces = self._pieces(z, self.channels * self.factor**2 * z.shape[2] * z.shape[3])
        x = torch.cat([self.network.decode(part).sample for part in pieces])
        if shape is not None:
            x = x[..., : shape[1], : shape[2]]
        return self.normalisation.invert(x.float()).to(latents.device)

    def rate(self, images: Tensor) -> Tensor:
        """What the latents of images (B, C, H, W) cost (B,), in bits per dimension of the image.

        The KL of the posterior against Normal(0, I): what it takes to send a sample of it to somebody who knows the
        prior alone.

        Raises:
            OptionError: for an autoencoder without a posterior: what it says exactly would take endless bits.
        """
        posterior = self.encode(images)
        if not bool((posterior.std > 0).all()):
            raise OptionError("the autoencoder has no posterior, and its latents no rate; expected an AutoencoderKL")
        return posterior.kl() / (math.log(2.0) * math.prod(images.shape[1:]))

    def distortion(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """How far images (B, C, H, W) come back: the root mean square error (B,), in the data's own units.

        Args:
            images: in the data's own units.
            noise: of the latents (B, c, h, w), unit variance; None decodes the mean.
        """
        posterior = self.encode(images)
        latents = posterior.mean if noise is None else posterior.sample(noise)
        back = self.decode(latents, tuple(images.shape[1:]))
        return (back - images).flatten(1).square().mean(1).sqrt()

    @functools.cached_property
    def hash(self) -> str:
        """Twelve hexadecimal digits that name these weights for these units of images: whose latents are whose."""
        units = [self.normalisation.shift, self.normalisation.scale]
        digest = hashlib.sha256(json.dumps([type(self.network).__name__, self.factor, units]).encode())
        for name, value in sorted(building.weights_of(self.network).items()):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:12]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes a folder of diffusers', which `from_pretrained` of its class loads, whole or not at all.

        `fluvial.json` beside it keeps the units and the shape of the images. One that is there is replaced.

        Raises:
            RunError: for a folder that holds something else, or a disk that is full.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / OURS).is_file())):
            raise RunError(f"{folder} holds something else; expected a new folder, or one of an autoencoder")

        def write(unfinished: Path) -> None:
            config = {k: v for k, v in self.network.config.items() if not k.startswith("_")}
            config = {CLASS: type(self.network).__name__, **config}
            (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            atomic.write_tensors(unfinished / WEIGHTS, building.weights_of(self.network))
            ours = {"normalisation": described(self.normalisation), "shape": self.shape, "hash": self.hash}
            (unfinished / OURS).write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")

        with atomic.writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            atomic.replace_folder(folder, write)
        return folder

    def _posterior(self, x: Tensor) -> Posterior:
        encoded = self.network.encode(x)
        if not hasattr(encoded, "latent_dist"):
            return Posterior(encoded.latents.float(), torch.zeros_like(encoded.latents, dtype=torch.float32))
        return Posterior(encoded.latent_dist.mean.float(), encoded.latent_dist.std.float())

    def _in(self, x: Tensor) -> Tensor:
        return x.to(self.device, next(self.network.parameters()).dtype)

    def _pieces(self, x: Tensor, numbers: int) -> tuple[Tensor, ...]:
        return x.split(max(1, _PIECE // numbers))

    def _require_image(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3 or shape[0] != self.channels:
            raise ShapeError(f"images have shape {tuple(shape)}; expected ({self.channels}, height, width)")

    def __repr__(self) -> str:
        what = f"{self.latent_channels} channels at 1/{self.factor}"
        return f"Autoencoder({type(self.network).__name__}, {what}, {self.hash})"


def load_autoencoder(folder: str | os.PathLike[str], weights: str = "ema") -> Autoencoder:
    """The autoencoder in a folder: a run of `train_autoencoder`, what `Autoencoder.save` wrote, or diffusers' own.

    Args:
        folder: it, or that of a pipeline with a folder `vae`.
        weights: of a run: "ema" or "raw".

    Raises:
        RunError: for a folder of something else, damaged files, pickles.
    """
    folder = Path(folder)
    folder = folder / "vae" if (folder / "vae" / CONFIG).is_file() and not (folder / CONFIG).is_file() else folder
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder} has no {CONFIG}; expected a folder of an autoencoder")
    config = atomic.read_json(folder / CONFIG)
    if "convention" in config:
        model = load_run(folder, weights=weights)
        network = getattr(model.network, "autoencoder", None)
        if network is None:
            raise RunError(f"{folder} holds a model; expected an autoencoder, as fluvial train-autoencoder writes it")
        return Autoencoder(network, model.normalisation, model.shape)
    if config.get(CLASS) not in KNOWN:
        raise RunError(f"{folder / CONFIG} is of a {config.get(CLASS)!r}; expected {' or '.join(KNOWN)}")
    network = _of_diffusers(folder, config)
    if not (folder / OURS).is_file():
        return Autoencoder(network)
    ours = atomic.read_json(folder / OURS)
    try:
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in ours["normalisation"].items()}
        shape = None if ours["shape"] is None else tuple(ours["shape"])
        return Autoencoder(network, Normalisation(**plain), shape)
    except (KeyError, TypeError, AttributeError, ShapeError) as error:
        raise RunError(f"{folder / OURS} cannot be read ({error}); expected what Fluvial wrote there") from error


def _of_diffusers(folder: Path, config: dict[str, Any]) -> Any:
    import diffusers

    kind, file = getattr(diffusers, config[CLASS]), folder / WEIGHTS
    tensors, _ = atomic.read_tensors(file)
    tensors = {_renamed(name): value.float() for name, value in tensors.items()}
    # The class of the tiny ones keeps one setting under a name that it does not take.
    names = [name for name in config if not name.startswith("_")]
    unknown = {"block_out_channels"} if config[CLASS] == "AutoencoderTiny" else set()
    config = {name: config[name] for name in names if name not in unknown}
    make: Callable[[], Any] = lambda: _pooled(kind.from_config(config), tensors)  # noqa: E731
    try:
        # Before anything of its size is allocated: a damaged config may describe anything.
        building.require_fit(building.empty(make, tensors, file), {k: tuple(v.shape) for k, v in tensors.items()}, file)
        network = make()
    except FluvialError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise RunError(f"{folder} cannot be opened as diffusers': {' '.join(str(error).split())}") from error
    building.fill(network, tensors, file)
    return network


def _renamed(name: str) -> str:
    """A weight of an attention as diffusers calls it now."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _pooled(network: Any, tensors: dict[str, Tensor]) -> Any:
    """With the pools that these weights are for, in a tiny autoencoder."""
    places: dict[str, list[int]] = {"encoder": [], "decoder": []}
    for name in tensors:
        if name.endswith(".pool.0.weight"):
            part, _, place, *_ = name.split(".")
            places[part].append(int(place))
    return pool(network, sorted(places["encoder"]), sorted(places["decoder"])) if any(places.values()) else network


def tiny_autoencoder(
    encoder: str | os.PathLike[str],
    decoder: str | os.PathLike[str],
    normalisation: Normalisation = UNIT,
    shape: tuple[int, ...] | None = None,
) -> Autoencoder:
    """The autoencoder of two files of a tiny one, such as taef2_encoder.safetensors; see `tiny_network`."""
    return Autoencoder(tiny_network(encoder, decoder), normalisation, shape)
