"""Training an autoencoder: reconstruction against rate, in the run folders and by the loop that train models.

    E distance(decode(z), x) + kl_weight KL(z | x) / dims  (+ perceptual + adversarial),   z ~ Normal(mean(x), std(x)²)

Means are over the dimensions of the image, whose units are [-1, 1]. With the squared error this is the negative ELBO of
a decoder with noise of standard deviation s, up to a factor: kl_weight = 2 s². So the weight says which differences
are not worth a bit: 1e-2 those below 0.07.

The adversarial term: a discriminator of patches learns by the hinge loss from the first step on; the autoencoder
learns from it once it has learned to reconstruct. Both are parts of one network, with one optimiser.

Sources: Rombach et al. (2021), https://arxiv.org/abs/2112.10752; Esser, Rombach, Ommer: Taming transformers (2020),
https://arxiv.org/abs/2012.09841 (adversarial term)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fluvial import __version__, random, sheets
from fluvial.errors import OptionError, RunError, ShapeError
from fluvial.model import Model
from fluvial.objectives import LPIPS, Objective
from fluvial.systems.autoencoder import Autoencoder
from fluvial.systems.autoencoder_networks import KLAutoencoder
from fluvial.training import atomic, open_source
from fluvial.training.checkpoints import CONFIG, model_hash
from fluvial.training.data import batches
from fluvial.training.precision import check
from fluvial.training.settings import Settings, whole
from fluvial.training.source import Source
from fluvial.training.trainer import adopt

_SHOWN = 16


def absolute(error: Tensor) -> Tensor:
    """The mean absolute error (B,)."""
    return error.abs().flatten(1).mean(1)


@dataclass(frozen=True)
class Reconstruction(Objective):
    """What an autoencoder minimises; see above.

    Args:
        kl_weight: of the KL in nats per dimension of the image.
        perceptual: an LPIPS that is added; its weight is its own.
        adversarial: weight of the discriminator's opinion; None without one.
        start: the step from which that counts.
        judged: whether it does at this step.
    """

    target: str = "data"
    kl_weight: float = 1e-2
    perceptual: LPIPS | None = None
    adversarial: float | None = None
    start: int = 0
    judged: bool = False

    def at(self, step: int, own: Model, average: Model) -> Self:
        return replace(self, judged=self.adversarial is not None and step >= self.start)

    def draw_times(self, model: Model, index: Tensor, seed: int) -> Tensor:
        """An autoencoder has no time: all are in the middle."""
        return torch.full((len(index),), 0.5, dtype=torch.float64, device=index.device)

    def __call__(
        self,
        model: Model,
        data: Tensor,
        cond: Any = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        seed: int | None = None,
        index: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """The loss of each image (B,); arguments as for `Objective`. Noise is that of the latents, drawn here."""
        made, kl, *opinion = self._made(model, data, random.fresh_seed() if seed is None else seed, index)
        loss = self.measured(made - data, lambda: made, data) + self.kl_weight * kl / data[0].numel()
        if self.perceptual is not None:
            loss = loss + self.perceptual.between(torch.zeros_like(data), made, data)
        if opinion:
            judged, hinge = opinion
            loss = loss + hinge - (self.adversarial or 0.0) * judged if self.judged else loss + hinge
        return loss

    def watched(self, model: Model, data: Tensor, *batch: Any) -> dict[str, float]:
        """Rate in bits per dimension, and root mean square error in the units of [-1, 1]."""
        _, _, _, seed, index, _ = batch
        with torch.no_grad():
            made, kl, *_ = self._made(model, data, seed, index)
        rate = kl.double().mean() / data[0].numel() / torch.tensor(2.0).double().log()
        return {"rate": float(rate), "rmse": float((made - data).double().square().mean().sqrt())}

    def described(self) -> dict[str, Any]:
        own = {"kl_weight": self.kl_weight, "perceptual": self.perceptual, "adversarial": self.adversarial}
        return {"distance": self.distance, **own, "start": self.start}

    @staticmethod
    def _made(model: Model, data: Tensor, seed: int, index: Tensor | None) -> tuple[Tensor, ...]:
        network: Any = model.network
        config = getattr(network, "module", network).config()  # of several processes it is wrapped
        sides = (-(-side // config["factor"]) for side in data.shape[-2:])
        index = torch.arange(len(data), device=data.device) if index is None else index
        shape = (config["latent_channels"], *sides)
        return network(data, random.normal(index, shape, seed, 0, random.TRAIN, data.dtype, data.device))


def train_autoencoder(
    source: Any,
    out: str | os.PathLike[str] | None = None,
    steps: int = 2000,
    *,
    kl_weight: float = 1e-2,
    latent_channels: int = 4,
    factor: int = 4,
    width: int = 32,
    distance: Any = "mse",
    perceptual: str | LPIPS | None = None,
    adversarial: float | None = None,
    adversarial_start: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    lr: float = 1e-3,
    warmup: int = 100,
    schedule: str = "constant",
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    ema_decay: float = 0.999,
    precision: str = "auto",
    log_every: int = 50,
    sheet_every: int | None = 500,
    checkpoint_every: int = 200,
    progress: bool = True,
) -> Autoencoder:
    """Trains an autoencoder on images; the one with averaged weights is returned.

    A run folder as `fl.train` makes them: it is resumed by the same call, exactly. Its sheets show images above their
    reconstructions, its metrics the rate and the error; at the end `vae/` in it is a folder of diffusers'.

    Args:
        source: a `Source`, or what `open_source` takes; labels are not looked at.
        out: the run folder. None: nothing is written, and nothing can be resumed.
        steps: how many in all.
        kl_weight: of the KL, in nats per dimension of the image: about twice the square of the differences, in units of
            [-1, 1], that are not worth a bit.
        latent_channels, factor: the latents of images (C, H, W) are (latent_channels, H/factor, W/factor).
        width: channels of the first level, a multiple of 8.
        distance: "mse", "l1", "pseudo_huber", or a function of the error (B, …) -> (B,).
        perceptual: "lpips", or an `fl.objectives.LPIPS` of another weight, is added; needs the package `lpips`.
        adversarial: weight of a discriminator of patches; None: there is none. 0.1 is a start.
        adversarial_start: the step from which it counts; default: a third of the steps.
        batch_size, seed, lr, warmup, schedule, weight_decay, clip, ema_decay, precision, log_every, sheet_every,
        checkpoint_every, progress: as for `fl.train`.

    Raises:
        OptionError, ShapeError, DataError: for arguments that do not fit, before the first step.
        RunError: for a folder that is no such run, or one under other settings.
        NonFiniteError, RunInterrupted: as for `fl.train`.
    """
    settings = Settings(steps, batch_size, seed, 0.0, lr, warmup, schedule, weight_decay, clip, ema_decay)
    check(precision, "auto")
    for name, value in (("log_every", log_every), ("checkpoint_every", checkpoint_every), ("sheet_every", sheet_every)):
        if value is not None:
            whole(name, value, 1)
    objective = _objective(kl_weight, distance, perceptual, adversarial, adversarial_start, steps)
    source = open_source(source)
    if len(source.shape) != 3:
        raise ShapeError(f"{source.name} has samples {source.shape}; expected images (C, H, W) for an autoencoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = KLAutoencoder(source.shape[0], factor, latent_channels, width, adversarial is not None)
    model = Model(network, "rectified", "data")
    adopt(model, source, objective, 0.0)
    folder = None if out is None else Path(out)
    loop = _loop(model, source, objective, settings, folder)
    _require_autoencoder(folder)
    loop.begin(precision, "auto", progress)
    run = loop.run(log_every, sheet_every, checkpoint_every, progress)
    trained = Autoencoder(run.ema.network.autoencoder, model.normalisation, model.shape)  # type: ignore[attr-defined]
    if folder is not None and loop.main:
        trained.save(folder / "vae")
    return trained


def _objective(
    kl_weight: float, distance: Any, perceptual: Any, adversarial: float | None, start: int | None, steps: int
) -> Reconstruction:
    for name, value in (("kl_weight", kl_weight), ("adversarial", adversarial)):
        if value is not None and not 0.0 <= value < float("inf"):
            raise OptionError(f"{name} is {value}; expected 0 or more")
    if start is not None:
        whole("adversarial_start", start, 0)
        if adversarial is None:
            raise OptionError(f"adversarial_start is {start} without adversarial; expected its weight, such as 0.1")
    if perceptual is not None and not isinstance(perceptual, LPIPS):
        if perceptual != "lpips":
            raise OptionError(f"perceptual is {perceptual!r}; expected 'lpips', a fl.objectives.LPIPS, or None")
        perceptual = LPIPS()
    start = steps // 3 if start is None else start
    return Reconstruction(
        distance=absolute if distance == "l1" else distance,
        kl_weight=kl_weight,
        perceptual=perceptual,
        adversarial=adversarial,
        start=0 if adversarial is None else start,
    )


def _require_autoencoder(folder: Path | None) -> None:
    """Refuses to resume what is another kind of run: settings would differ too, but less clearly."""
    if folder is not None and (folder / CONFIG).is_file():
        kind = atomic.read_json(folder / CONFIG).get("network", {}).get("class", "")
        if not kind.endswith(".KLAutoencoder"):
            raise RunError(f"{folder} holds another run, of a {kind or 'model'}; expected a folder for an autoencoder")


def _loop(model: Model, source: Source, objective: Reconstruction, settings: Settings, folder: Path | None) -> Any:
    from fluvial.training.loop import Loop  # slow to import

    class Reconstructing(Loop):
        """The loop of all training, whose sheets show what comes back."""

        def _sheet(self) -> None:
            self._lap()
            if self.main and self.folder is not None:
                rows = next(batches(self.source, self.settings.batch_size, self.settings.seed))
                path = self.folder.sheet(self.step)
                averaged: Any = self.ema.network
                trained = Autoencoder(averaged.autoencoder, self.model.normalisation, self.model.shape)
                with atomic.writing(path):
                    made = {"fluvial": __version__, "model": model_hash(self.ema.model(self.model)), "step": self.step}
                    sheets.save(reconstructions(trained, rows["data"][:_SHOWN].to(self.device)), path, made)
            self._lap(training=False)

    return Reconstructing(model, source, objective, settings, folder)


@torch.no_grad()
def reconstructions(autoencoder: Autoencoder, images: Tensor) -> Any:
    """A sheet of images (B, C, H, W), in rows of eight, above what comes back of each row."""
    back = autoencoder.decode(autoencoder.encode(images).mean, tuple(images.shape[1:]))
    columns = min(8, len(images))
    rows, labels = [], []
    for part, returned in zip(images.split(columns), back.split(columns)):
        if len(part) == columns:
            rows += [part, returned]
            labels += ["images", "decoded"]
    return sheets.sheet(torch.cat(rows), columns=columns, labels=labels, normalisation=autoencoder.normalisation)
