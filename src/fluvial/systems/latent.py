"""Latent diffusion: a model of latents, and the autoencoder that they are latents of.

    images = decode(z),    z = mean + std x,    x sampled by the model, whose normalisation holds mean and std, measured

The model is one like any other: it is converted, guided, straightened and distilled as all are.

Source: Rombach, Blattmann, Lorenz, Esser, Ommer: High-resolution image synthesis with latent diffusion models (2021),
https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fluvial import sampling
from fluvial.convention import Normalisation
from fluvial.errors import OptionError, RunError, ShapeError
from fluvial.model import Model
from fluvial.sampling import Trajectory
from fluvial.systems.autoencoder import Autoencoder, load_autoencoder
from fluvial.systems.base import Start, System, options_of
from fluvial.systems.latent_source import Standardised

PART = "autoencoder"


class Latent(System):
    """Images from a model of their latents.

    Args:
        autoencoder: it decodes.
        model: of its latents: trained on what `latents` gave, whose normalisation makes what it samples raw latents.
        latents_of: the hash of the autoencoder whose latents the model is of, where that is known otherwise than by
            the model itself.

    Attributes:
        autoencoder, models: {"model": model}.
        shape, normalisation: of the images.

    Raises:
        ShapeError: for a model of latents of another shape.
        OptionError: for a model of another autoencoder's latents.
    """

    kind: ClassVar[str] = "latent"

    def __init__(self, autoencoder: Autoencoder, model: Model, latents_of: str | None = None) -> None:
        known = latents_of or getattr(model.normalisation, "autoencoder", None)
        if known is not None and known != autoencoder.hash:
            raise OptionError(
                f"the model is of the latents of autoencoder {known}, and this is {autoencoder.hash}; expected that one"
            )
        image = autoencoder.shape
        if image is not None and model.shape is not None and model.shape != autoencoder.latent_shape(image):
            raise ShapeError(
                f"the model is of latents {model.shape}, and those of images {image} are "
                f"{autoencoder.latent_shape(image)}; expected the autoencoder that it was trained with"
            )
        if model.shape is not None and model.shape[0] != autoencoder.latent_channels:
            raise ShapeError(
                f"the model is of latents {model.shape}, and the autoencoder's have {autoencoder.latent_channels} "
                "channels; expected the autoencoder that it was trained with"
            )
        self.autoencoder, self.models = autoencoder, {"model": model}
        self.normalisation = autoencoder.normalisation
        self.shape = image
        if image is None and model.shape is not None and len(model.shape) == 3:
            sides = (side * autoencoder.factor for side in model.shape[1:])
            self.shape = (autoencoder.channels, *sides)

    @property
    def model(self) -> Model:
        """The model of the latents."""
        return self.models["model"]

    def stages(self, start: Start | None = None, **options: Any) -> dict[str, Tensor]:
        """The latents (B, c, h, w), as the decoder wants them, and the images (B, C, H, W).

        Args:
            start: how many; a shape of images or of latents, (B, …); or the noise of the latents (B, c, h, w).
            options: as for `fl.sample`: cond, guidance, solver, steps, nfe, seed, … What a callback is told is of the
                latents. `init` are images, which are encoded, and changed by `strength`.
        """
        return self._stages(start, {**options, "record": False})

    def sample_with(self, start: Start | None = None, **options: Any) -> Any:
        """The images; or when `record`, a Trajectory: `x` are states of the latents, `data` the images decoded."""
        if not options.get("record"):
            return self.stages(start, **options)["image"]
        run: Trajectory = self._latents(start, options)
        with torch.set_grad_enabled(bool(options.get("differentiable"))):
            return replace(run, data=torch.stack([self._decoded(z) for z in run.data]))

    def encode(self, images: Tensor, **options: Any) -> Tensor:
        """The noise (B, c, h, w) that `fl.sample` turns back into these images, as far as decoding can.

        Options as for `fl.encode`.
        """
        with torch.no_grad():
            mean = self.autoencoder.encode(images).mean
        return sampling.encode(self.model, mean, **options_of("model", options, ("model",)))

    def to(self, device: torch.device | str) -> Self:
        self.autoencoder.to(device)
        return super().to(device)

    def with_models(self, models: Mapping[str, Model]) -> Latent:
        return Latent(self.autoencoder, models["model"])

    def write_parts(self, folder: Path) -> dict[str, Any]:
        self.autoencoder.save(folder / PART)
        return {PART: self.autoencoder.hash}

    @classmethod
    def read(cls, folder: Path, models: Mapping[str, Model], settings: Mapping[str, Any]) -> Latent:
        autoencoder = load_autoencoder(folder / PART)
        model, known = models.get("model"), settings.get(PART)
        if model is None or not isinstance(known, str):
            raise RunError(f"{folder} lacks its model or its autoencoder's hash; expected what fl.save wrote there")
        if known != autoencoder.hash:
            raise RunError(
                f"{folder}: the model is of the latents of autoencoder {known}, and {folder / PART} holds "
                f"{autoencoder.hash}; expected that one"
            )
        return cls(autoencoder, model.under(normalisation=_marked(model.normalisation, known)))

    def _stages(self, start: Start | None, options: dict[str, Any]) -> dict[str, Tensor]:
        z = self._latents(start, options)
        with torch.set_grad_enabled(bool(options.get("differentiable"))):
            return {"latent": z, "image": self._decoded(z)}

    def _latents(self, start: Start | None, options: Mapping[str, Any]) -> Any:
        own = options_of("model", options, ("model",))
        if (times := own.get("times")) is not None and self.model.times(times, own.get("steps"), 18)[-1] != 1.0:
            raise OptionError(
                "times end before 1, where the latents are not finished; expected an end at 1, or "
                "fl.sample(system.models['model'], …) for the states themselves"
            )
        if own.get("init") is not None:
            with torch.no_grad():
                own["init"] = self.autoencoder.encode(own["init"]).mean
        return sampling.sample(self.model, self._start(start), **own)

    def _start(self, start: Start | None) -> Any:
        """The shape of the latents, for one of images."""
        if self.shape is not None and isinstance(start, (tuple, list, torch.Size)) and tuple(start[1:]) == self.shape:
            return (start[0], *self.autoencoder.latent_shape(self.shape))
        return start

    def _decoded(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z, self.shape)


def _marked(n: Normalisation, autoencoder: str) -> Standardised:
    return Standardised(n.shift, n.scale, n.low, n.high, n.mean, n.std).of(autoencoder)
