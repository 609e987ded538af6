"""What the commands share: how they speak, how they are interrupted, and which classes a sheet shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fluvial import interop, training
from fluvial.errors import OptionError
from fluvial.interop import folders
from fluvial.model import Model
from fluvial.systems import System
from fluvial.training.checkpoints import read_config

console = Console()

MODEL = "A run folder, a folder of a diffusers pipeline or network, or a name on the hub: owner/name[@revision]."


def say(line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False)


def print_table(header: list[str], rows: list[list[Any]], title: str | None = None) -> None:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(header, start=1):
        table.add_column(name, no_wrap=number < len(header))
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def one_model(run: str | Path, weights: str = "ema") -> Model:
    """The model of a run, or of elsewhere; of a system the parts are named that would do."""
    loaded = interop.load(run, weights=weights)
    if isinstance(loaded, System):
        parts = ", ".join(str(Path(run) / name) for name in loaded.models)
        raise OptionError(f"{run} is a system ({loaded.kind}); expected one model: {parts}")
    return loaded


def described(run: str | Path) -> dict[str, Any]:
    """The config of a run; nothing of models of elsewhere, which do not say what they were trained on."""
    folder = Path(run)
    ours = folder.is_dir() and folders.layout(folder).kind == folders.MODEL
    return read_config(folder) if ours else {}


def labels(loaded: Model, n: int, label: int | None) -> dict[str, torch.Tensor]:
    classes = (loaded.null or {}).get("label")
    if classes is None:
        if label is not None:
            raise OptionError(f"--label is {label}, but this model has no classes")
        return {}
    if label is not None and not 0 <= label < classes:
        raise OptionError(f"--label is {label}; expected 0 to {classes - 1}")
    return {"label": torch.arange(n) % classes if label is None else torch.full((n,), label)}


@contextmanager
def interruptible() -> Iterator[None]:
    """Ends a command that was interrupted, and saved, with what it has to say."""
    try:
        yield
    except training.RunInterrupted as stop:
        console.print(escape(str(stop)), soft_wrap=True)
        raise typer.Exit(130) from stop
