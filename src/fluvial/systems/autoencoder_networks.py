"""The networks of autoencoders: diffusers' own, one that is trained here, and the tiny ones of single files.

All are called as diffusers calls them: encode(images in [-1, 1]), decode(latents). Where the encoder has a posterior,
its `latent_dist` is read, else its `latents`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluvial.errors import OptionError, RunError
from fluvial.training import atomic
from fluvial.training.building import fill

KNOWN = ("AutoencoderKL", "AutoencoderTiny")

_MULTIPLIERS = (1, 2, 2, 4, 4)


def kl_network(channels: int, factor: int, latent_channels: int, width: int) -> Any:
    """A fresh `diffusers.AutoencoderKL`: as many levels as halve the sides to 1/factor.

    Raises:
        OptionError: for a factor that is no power of two up to 16, or a width that 8 does not divide.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # slow to import

    if factor not in (1, 2, 4, 8, 16):
        raise OptionError(f"factor is {factor}; expected 1, 2, 4, 8 or 16: what the sides are divided by")
    if width < 8 or width % 8:
        raise OptionError(f"width is {width}; expected a multiple of 8 (the groups of its normalisation)")
    if latent_channels < 1 or channels < 1:
        raise OptionError(f"latent_channels is {latent_channels}, channels is {channels}; expected numbers from 1")
    levels = factor.bit_length()
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * levels,  # type: ignore[arg-type]
        block_out_channels=tuple(width * m for m in _MULTIPLIERS[:levels]),  # type: ignore[arg-type]
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        scaling_factor=1.0,
    )


class Patches(nn.Module):
    """A discriminator of overlapping patches: images (B, C, H, W) -> a number for each patch, high where it is real.

    Source: Isola, Zhu, Zhou, Efros: Image-to-image translation with conditional adversarial networks (2016),
    https://arxiv.org/abs/1611.07004
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class KLAutoencoder(nn.Module):
    """What is trained: an autoencoder and, on request, its discriminator.

    Args: as for `kl_network`, and whether there is a discriminator.
    """

    def __init__(self, channels: int, factor: int, latent_channels: int, width: int, adversarial: bool = False) -> None:
        super().__init__()
        self._config = {
            "channels": channels,
            "factor": factor,
            "latent_channels": latent_channels,
            "width": width,
            "adversarial": adversarial,
        }
        self.autoencoder = kl_network(channels, factor, latent_channels, width)
        self.discriminator = Patches(channels, width) if adversarial else None

    def forward(self, x: Tensor, noise: Tensor, **cond: Tensor) -> tuple[Tensor, ...]:
        """Reconstructions of images (B, C, H, W) in [-1, 1] under this noise of the latents, and what training needs.

        Returns:
            The reconstruction (B, C, H, W); the KL (B,) in nats; and with a discriminator what it says of the
            reconstruction, without gradients of its own weights (B,), and its hinge loss (B,).
        """
        if noise.ndim != x.ndim:
            raise OptionError(
                "the network is an autoencoder and predicts nothing; expected fl.systems.load_autoencoder(folder)"
            )
        height, width = x.shape[-2:]
        posterior = self.autoencoder.encode(padded(x, self._config["factor"])).latent_dist
        made = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample[..., :height, :width]
        kl = kl_to_normal(posterior.mean.float(), posterior.std.float())
        if self.discriminator is None:
            return made, kl
        frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        judged = torch.func.functional_call(self.discriminator, frozen, (made,))
        real, fake = self.discriminator(x), self.discriminator(made.detach())
        hinge = 0.5 * (F.relu(1.0 - real) + F.relu(1.0 + fake))
        return made, kl, judged.flatten(1).mean(1), hinge.flatten(1).mean(1)

    def config(self) -> dict[str, Any]:
        """What `from_config` builds the same architecture from: JSON-able."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> KLAutoencoder:
        """The architecture that `config` described, with fresh weights."""
        return cls(**config)


def kl_to_normal(mean: Tensor, std: Tensor) -> Tensor:
    """KL(Normal(mean, std²) || Normal(0, I)) of each sample (B,), in nats: ½ Σ (mean² + std² - 1 - log std²)."""
    return 0.5 * (mean.square() + std.square() - 1.0 - 2.0 * std.log()).flatten(1).sum(1)


def padded(x: Tensor, factor: int) -> Tensor:
    """Images (B, C, H, W) whose sides the factor divides: the border repeated below and on the right."""
    below, right = -x.shape[-2] % factor, -x.shape[-1] % factor
    return F.pad(x, (0, right, 0, below), mode="replicate") if below or right else x


# The tiny autoencoders.


class Pooled(nn.Module):
    """A block of a tiny autoencoder that first sees the whole image: block(x + pool(x))."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.block = block
        self.pool = nn.Sequential(
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.GroupNorm(4, 4 * width),
            nn.ReLU(),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.pool(x))


def pool(network: Any, encoder: list[int], decoder: list[int]) -> Any:
    """Puts `Pooled` in place of these blocks of a `diffusers.AutoencoderTiny`, in place."""
    for layers, places in ((network.encoder.layers, encoder), (network.decoder.layers, decoder)):
        for place in places:
            layers[place] = Pooled(layers[place], layers[place].conv[0].in_channels)
    return network


def tiny_network(encoder: str | os.PathLike[str], decoder: str | os.PathLike[str]) -> Any:
    """`diffusers.AutoencoderTiny` of the weights of a tiny autoencoder in two safetensors files (taesd, taef1, taef2).

    Some of them, such as taef2, have blocks that pool over the image, which diffusers' class lacks: those are put in.
    Weights are brought to float32.

    Source: https://github.com/madebyollin/taesd (MIT)

    Raises:
        RunError: for files of something else.
    """
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    tensors: dict[str, Tensor] = {}
    pools: dict[str, list[int]] = {}
    # Their decoder has its clamp as layer 0, diffusers' before the layers.
    for part, file, shift in (("encoder", Path(encoder), 0), ("decoder", Path(decoder), 1)):
        own = atomic.read_tensors(file)[0]
        if not all(name.partition(".")[0].isdigit() for name in own):
            raise RunError(f"{file} holds other weights; expected those of a tiny autoencoder, named by their layers")
        places = [int(name.partition(".")[0]) - shift for name in own if name.endswith(".pool.0.weight")]
        pools[part] = sorted(places)
        for name, value in own.items():
            number, _, rest = name.partition(".")
            place = int(number) - shift
            inner = f"block.{rest}" if place in places and not rest.startswith("pool.") else rest
            tensors[f"{part}.layers.{place}.{inner}"] = value.float()
    last = tensors.get("encoder.layers.14.bias")
    if last is None:
        raise RunError(f"{encoder} has no layer 14; expected the encoder of a tiny autoencoder of 1/8 the size")
    network = pool(AutoencoderTiny(latent_channels=len(last)), pools["encoder"], pools["decoder"])
    fill(network, tensors, Path(encoder))
    return network
