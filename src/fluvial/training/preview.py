"""The sample sheet of a training run: the averaged weights, always from the same noise, so that sheets compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluvial import __version__, sampling, sheets
from fluvial.model import Model
from fluvial.training.checkpoints import model_hash
from fluvial.training.source import COUPLED, Rows, Source

SOLVER, STEPS = "heun", 10  # 19 network calls
_POINTS, _IMAGES, _LARGE = 2000, 64, 16


def draw(model: Model, source: Source, first: Rows, seed: int, step: int, path: Path) -> None:
    """Samples the model, classes in turn, and writes the sheet with how it was made. Latents are decoded.

    Args:
        model: with averaged weights.
        source: of the training data.
        first: some of its rows, whose conditions are used where they are not classes.
        seed: of the noise.
        step: of the run.
        path: the PNG.
    """
    if len(source.shape) > 3:
        return  # there is no sheet of films
    others = [name for name in source.conditions if name not in ("label", *COUPLED)]
    # A class in turn would not be that of a row's other conditions.
    classes = source.num_classes if "label" in source.conditions and not others else None
    decoder = source.autoencoder
    shape = source.shape if decoder is None else _pictured(decoder, source.shape)
    count, columns = _size(shape, classes)
    count = min([count, *(len(first[name]) for name in others)])
    cond = {name: first[name][:count] for name in source.conditions if name not in COUPLED}
    if classes:
        cond["label"] = torch.arange(count) % classes
    solver, budgets = _how(model)
    rows, steps = [], budgets[-1]
    for steps in budgets:
        rows.append(sampling.sample(model, (count, *source.shape), solver=solver, steps=steps, seed=seed, cond=cond))
    info = {
        "fluvial": __version__,
        "model": model_hash(model),
        "weights": "ema",
        "step": step,
        "solver": solver,
        "grid": "uniform",
        "steps": steps if len(budgets) == 1 else budgets,
        "nfe": sampling.nfe(model, solver, steps) if len(budgets) == 1 else budgets,
        "seed": seed,
        "label": "0, 1, 2, … in turn" if classes else None,
    }
    units = model.normalisation
    if decoder is not None:
        rows, units = [_decoded(decoder, z, shape) for z in rows], decoder.normalisation
        info["autoencoder"] = decoder.hash
    pictures = [sheets.sheet(x, columns=columns, normalisation=units) for x in rows]
    titles = [f"{steps} step{'s' if steps != 1 else ''}" for steps in budgets]
    sheets.save(pictures[0] if len(rows) == 1 else sheets.beside(pictures, titles), path, info)


def _pictured(decoder: Any, latents: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of pictures of such latents: its own, unless the latents are of other sides, as a cascade's stages."""
    if decoder.shape is not None and decoder.latent_shape(decoder.shape) == latents:
        return decoder.shape
    return (decoder.channels, *(side * decoder.factor for side in latents[1:]))


def _decoded(decoder: Any, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The pictures, made where the latents are: the decoder may be kept on a slower device."""
    home = decoder.device
    decoder.to(latents.device)
    try:
        return decoder.decode(latents, shape)
    finally:
        decoder.to(home)


def _how(model: Model) -> tuple[str, list[int | tuple[int, ...]]]:
    """The solver and its steps: few for a model whose few steps are what matters, each number a sheet of its own."""
    if model.jumps:
        return "jump", [1, 2, 4]
    if model.segments is not None:
        return "euler", [tuple(1 if straight else 8 for straight in model.segments.straight)]
    return (SOLVER, [STEPS]) if model.independent else ("euler", [2])


def _size(shape: tuple[int, ...], classes: int | None) -> tuple[int, int | None]:
    """How many samples, and in how many columns: a class each, where they fit."""
    if len(shape) == 1:
        return _POINTS, None
    count = _IMAGES if max(shape[1:]) <= 64 else _LARGE
    if classes and 2 <= classes <= 16:
        return classes * max(1, count // classes), classes
    return count, None
