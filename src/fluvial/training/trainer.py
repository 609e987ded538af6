"""Training: one loop for a laptop, a GPU and many processes, which can be killed at any moment.

    average over the batch of the objective's loss  ->  gradient, clipped  ->  AdamW  ->  moving average of the weights

Whatever is random in a step (which samples, their noise, times and dropped conditions, the network's dropout) is a
function of the seed and the step. So a resumed run needs only weights, average and optimiser to go on as if it had
never stopped, and several processes, each with its share of the batch, walk the same way as one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluvial import couplings, predictions
from fluvial.convention import Clock, Normalisation
from fluvial.errors import OptionError, ShapeError
from fluvial.model import Model
from fluvial.networks import UNet, for_data
from fluvial.objectives import Objective
from fluvial.training import precision as precisions
from fluvial.training.data import open_source
from fluvial.training.runs import Run
from fluvial.training.settings import Settings, whole
from fluvial.training.source import COUPLED, Source


def train(
    model: Model,
    source: Any,
    objective: Objective | None = None,
    steps: int = 2000,
    batch_size: int = 128,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    drop_cond: float = 0.1,
    *,
    lr: float = 1e-3,
    warmup: int = 100,
    schedule: str = "constant",
    weight_decay: float = 0.01,
    clip: float | None = 1.0,
    ema_decay: float = 0.999,
    precision: str = "auto",
    channels_last: bool | str = "auto",
    log_every: int = 50,
    sheet_every: int | None = 500,
    checkpoint_every: int = 200,
    progress: bool = True,
) -> Run:
    """Trains the model in place, on every process that it was launched on (`accelerate launch`, torchrun).

    The data's measured normalisation and shape become the model's, unless it already has its own. Run again on the
    same folder, it goes on where the last complete state was; a run that is finished returns at once, and one under
    a constant schedule may be given more steps.

    Args:
        model: a model around an nn.Module; it moves to the device that is used.
        source: a `Source`, or what `open_source` takes: "digits", a folder, a tensor, …
        objective: what is minimised; default: the error of the model's own prediction.
        steps: how many in all.
        batch_size: samples per step, over all processes together.
        out: the run folder, one that all processes see. None: nothing is written, and nothing can be resumed.
        seed: of the order of the data, their noise, times and dropped conditions, and of the network's dropout.
        drop_cond: the share of samples whose conditions are replaced by the model's null ones.
        lr, warmup, schedule: AdamW's learning rate; it rises linearly for `warmup` steps, then stays ("constant") or
            falls to 0 ("cosine").
        weight_decay: AdamW's.
        clip: the largest norm of a gradient; None does not clip.
        ema_decay: see `EMA`.
        precision: "fp32", "bf16" (autocast; weights stay float32) or "auto", which chooses for the machine.
        channels_last: the memory format of images; "auto": yes.
        log_every, sheet_every, checkpoint_every: steps between lines of metrics, sample sheets, and states.
        progress: show a bar and say what was chosen.

    Raises:
        OptionError, ShapeError, DataError: for arguments that do not fit, before the first step.
        RunError: for a folder that is no run, or one under other settings; for a disk that is full.
        NonFiniteError: when a loss or gradient is not finite; its batch and the last good state are kept.
        RunInterrupted: a KeyboardInterrupt, after Ctrl-C or SIGTERM, when the state has been saved.
    """
    from fluvial.training.loop import Loop

    settings = Settings(steps, batch_size, seed, drop_cond, lr, warmup, schedule, weight_decay, clip, ema_decay)
    precisions.check(precision, channels_last)
    whole("log_every", log_every, 1)
    whole("checkpoint_every", checkpoint_every, 1)
    if sheet_every is not None:
        whole("sheet_every", sheet_every, 1)
    source = open_source(source)
    objective = objective or default_objective(model)
    adopt(model, source, objective, drop_cond)
    loop = Loop(model, source, objective, settings, None if out is None else Path(out))
    loop.begin(precision, channels_last, progress)
    return loop.run(log_every, sheet_every, checkpoint_every, progress)


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def default_objective(model: Model) -> Objective:
    """The error of the model's own prediction; for a score, which is infinite at the data, of the noise it implies."""
    own = model.prediction
    return Objective(target="noise" if isinstance(own, predictions.Score) else own)


def adopt(model: Model, source: Source, objective: Objective, drop_cond: float) -> None:
    """Gives the model's convention what the data and the objective determine, after checking that they fit."""
    if not isinstance(model.network, nn.Module) or not model.parameters():
        raise OptionError(
            f"the network is a {type(model.network).__name__} without weights; expected an nn.Module to train"
        )
    if model.shape is not None and model.shape != source.shape:
        raise ShapeError(
            f"the model is for samples {model.shape}, and {source.name} has {source.shape}; expected the same"
        )
    paired = isinstance(couplings.named(objective.coupling), couplings.Pairs)
    if paired != ("noise" in source.conditions):
        has = "no stored noise" if paired else "stored noise"
        raise OptionError(
            f'coupling is {objective.coupling!r}, and {source.name} has {has}; expected "pairs" with a source that '
            'gives "noise" beside its data, and with no other'
        )
    always = (*COUPLED, *source.kept)
    nameless = [name for name in source.conditions if name not in (model.null or {}) and name not in always]
    if nameless and drop_cond > 0:
        raise OptionError(
            f"drop_cond is {drop_cond}, and the model has no null condition for {nameless[0]!r}; expected "
            f"fl.Model(…, null={{{nameless[0]!r}: …}}), or drop_cond=0"
        )
    model.convention = replace(
        model.convention,
        # What it was trained with before is what its weights expect.
        normalisation=source.normalisation if model.normalisation == Normalisation() else model.normalisation,
        shape=source.shape,
        independent=model.independent and objective.independent,
    )


def model_for(
    source: Any,
    path: Any = "rectified",
    prediction: Any = "velocity",
    network: nn.Module | None = None,
    width: int | None = None,
    clock: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> Model:
    """A fresh model for this data: a U-Net for images, an MLP for everything else, with classes where it has labels.

    Args:
        source: a `Source`, or what `open_source` takes.
        path: the path to train on, an object or a name.
        prediction: what the network predicts, an object or a name. "edm" takes the data's standard deviation from
            the source.
        network: one of your own; default: `networks.for_data`.
        width: of the default network.
        clock: the network's time; default: 1000 (1 - t) for our U-Nets, t itself (or what "edm" says) for all others.
        seed: of the default network's weights.
    """
    source = open_source(source)
    if network is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = for_data(source.shape, source.num_classes, width)
    if clock is None and isinstance(network, UNet):
        clock = Clock.noise_level()
    if prediction == "edm":
        prediction = predictions.EDM(sigma_data=path_std(source.normalisation, source.shape))
    null = None if source.num_classes is None else {"label": source.num_classes}
    return Model(network, path, prediction, clock, null=null, normalisation=source.normalisation, shape=source.shape)


def path_std(n: Normalisation, shape: tuple[int, ...]) -> float:
    """The data's standard deviation in path units, for samples of this shape: what is not an image is standardised."""
    return n.std / n.scale[0] if len(shape) == 3 and n.std else 1.0
