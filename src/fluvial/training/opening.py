"""Before the first step: what a run was launched with, and whether its folder agrees with what is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from fluvial.errors import OptionError
from fluvial.training.precision import Choice
from fluvial.training.runs import RunFolder, require_same
from fluvial.training.settings import Settings


class Asked(NamedTuple):
    """What the caller of `train` asked for."""

    settings: Settings
    precision: str
    channels_last: bool | str


def accelerator() -> Accelerator:
    """This process's part in what was launched.

    Raises:
        OptionError: for what would change the run behind its settings' back, or splits the weights.
    """
    # Without being told so, Accelerate takes several processes on processors alone for as many single ones.
    made = Accelerator(cpu=not torch.accelerator.is_available())
    kind = made.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise OptionError(f"accelerate was launched for {kind}; expected one process, or data-parallel ones (DDP)")
    for name, usual in (("mixed_precision", "no"), ("gradient_accumulation_steps", 1)):
        given = getattr(made, name)
        if given != usual:
            raise OptionError(
                f"accelerate was launched with {name} = {given}; expected {usual}: what determines a run is given to "
                "fl.train, and stored with it"
            )
    return made


def open_run(
    folder: RunFolder,
    config: dict[str, Any],
    asked: Asked,
    choose: Callable[[str, bool | str], Choice],
    writes: bool,
) -> Choice:
    """Begins a run in its folder, or makes sure that the one there is the same; returns its precision.

    Args:
        config: of the model and its training, to which the precision is added.
        choose: makes the choice of precision for a run that is new.
        writes: whether this process is the one that writes.

    Raises:
        RunError: for a folder that is no run, or one under other settings.
    """
    existing = folder.config()
    if existing is None:
        choice = choose(asked.precision, asked.channels_last)
    else:
        # What was chosen stays, on any machine: it is part of what the weights will be.
        stored = existing["training"]
        precision = stored["precision"] if asked.precision == "auto" else asked.precision
        last = stored["channels_last"] if asked.channels_last == "auto" else asked.channels_last
        choice = Choice(precision, bool(last), stored["precision_why"])
    config["training"] |= {
        "precision": choice.precision,
        "channels_last": choice.channels_last,
        "precision_why": choice.why,
    }
    if existing is not None:
        require_same(folder.path, existing, config)
        asked.settings.allow_more(existing["training"]["steps"], folder.step() or 0)
    if writes:
        if config != existing:
            folder.write_config(config)
        folder.recover()
    return choice
