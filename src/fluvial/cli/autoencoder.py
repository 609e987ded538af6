"""`fluvial train-autoencoder`, and what `fluvial train --latent` does beside training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fluvial import __version__, sampling, sheets, systems, training
from fluvial.cli.app import app
from fluvial.cli.common import interruptible, labels, on_device, say
from fluvial.errors import one_of
from fluvial.training import Source

_MEASURED = 512  # images behind the figures that are printed


@app.command("train-autoencoder")
def train_autoencoder(
    data: Annotated[str, typer.Argument(help="Images: digits, a folder, file.npz, hf:name, …")],
    out: Annotated[Path, typer.Option(help="The run folder; an existing one is resumed.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    kl_weight: Annotated[
        float, typer.Option(help="Of the rate: twice the square of differences, in [-1, 1], not worth a bit.")
    ] = 1e-2,
    latent_channels: Annotated[int, typer.Option(help="Channels of the latents.")] = 4,
    factor: Annotated[int, typer.Option(help="What the sides are divided by: 1, 2, 4, 8, 16.")] = 4,
    width: Annotated[int, typer.Option(help="Channels of the first level, a multiple of 8.")] = 32,
    distance: Annotated[str, typer.Option(help="mse, l1, pseudo_huber.")] = "mse",
    perceptual: Annotated[str | None, typer.Option(help="lpips: added; needs the package lpips.")] = None,
    adversarial: Annotated[float | None, typer.Option(help="Weight of a discriminator, such as 0.1.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step, over all processes.")] = 64,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16.")] = "auto",
    image_size: Annotated[int | None, typer.Option(help="Resize and crop images to this.")] = None,
) -> None:
    """Train an autoencoder of images, whose latents `train --latent` is trained on. The same command resumes."""
    if distance not in ("mse", "l1", "pseudo_huber"):
        raise one_of("distance", distance, ("mse", "l1", "pseudo_huber"))
    source = training.open_source(data, image_size=image_size)
    options: dict[str, Any] = {} if lr is None else {"lr": lr}
    options |= {"kl_weight": kl_weight, "latent_channels": latent_channels, "factor": factor, "width": width}
    options |= {"distance": distance, "perceptual": perceptual, "adversarial": adversarial, "precision": precision}
    with interruptible():
        made = systems.train_autoencoder(source, out, steps, batch_size=batch_size, seed=seed, **options)
    if training.is_main_process():
        count = _MEASURED if source.size is None else min(source.size, _MEASURED)
        images = next(training.batches(source, count, seed))["data"].to(made.device)
        rate, rmse = float(made.rate(images).mean()), float(made.distortion(images).square().mean().sqrt())
        span = 2.0 * made.normalisation.scale[0]
        shape = " x ".join(map(str, made.latent_shape(source.shape)))
        say(f"{out}: {steps} steps done. Latents {shape}: {rate:.3g} bits/dim, RMSE {rmse / span:.3g} of the range.")
        say(f"Next: fluvial train {data} --latent {out} --out RUN")


def begin(autoencoder: Path, source: Source, out: Path, shown: bool = True) -> tuple[systems.Latents, Path]:
    """The latents of the source, cached in the run, and the folder of the latent model's own run."""
    found = on_device(systems.load_autoencoder(autoencoder))
    with interruptible():
        z, folder = systems.begin_latent_run(found, source, out, progress=shown and training.is_main_process())
    if shown and training.is_main_process():
        say(f"{z.images} images as latents {' x '.join(map(str, z.shape))}, of autoencoder {z.autoencoder.hash}")
    return z, folder


def finish(out: Path) -> Path:
    """Draws what the system makes of its latents: a sheet in the run's folder."""
    system, seed = on_device(systems.load(out)), 0
    classes = (system.null or {}).get("label")
    n = 64 if not classes or classes > 16 else classes * max(1, 64 // classes)
    images = sampling.sample(system, n, seed=seed, steps=sampling.DEFAULT_STEPS, cond=labels(system, n, None))
    picture = sheets.sheet(
        images, columns=classes if classes and classes <= 16 else None, normalisation=system.normalisation
    )
    info = {"fluvial": __version__, "model": training.model_hash(system.model), "autoencoder": system.autoencoder.hash}
    info |= {"solver": sampling.DEFAULT_SOLVER, "steps": sampling.DEFAULT_STEPS, "seed": seed}
    return sheets.save(picture, out / "samples.png", info)
