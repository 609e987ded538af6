"""What the commands share: how they speak and are interrupted, what they open, and which classes a sheet shows."""

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
from fluvial.errors import FluvialError, OptionError
from fluvial.interop import folders
from fluvial.model import Model
from fluvial.systems import Latents, System, open_latents
from fluvial.systems.base import INDEX
from fluvial.systems.latent_run import CACHE, is_latents
from fluvial.training import Source, atomic
from fluvial.training.checkpoints import read_config

console = Console()

_LATENTS = "latents of "  # what `systems.Latents` are called: latents of IMAGES by autoencoder HASH

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


def on_device(loaded: Any) -> Any:
    """The model, system or part of one, on the accelerator where there is one."""
    device = torch.accelerator.current_accelerator()
    if device is not None and torch.accelerator.is_available():
        loaded.to(device)
    return loaded


def described(run: str | Path) -> dict[str, Any]:
    """The config of a run; nothing of models of elsewhere, which do not say what they were trained on."""
    folder = Path(run)
    ours = folder.is_dir() and folders.layout(folder).kind == folders.MODEL
    return read_config(folder) if ours else {}


def open_data(name: str, image_size: int | tuple[int, int] | None = None) -> Source:
    """Data as commands name them: what `training.open_source` opens, or a folder of latents."""
    if not is_latents(name):
        return training.open_source(name, image_size=image_size)
    if image_size is not None:
        raise OptionError(f"--image-size is {image_size}, and {name} is a folder of latents; expected none with it")
    return open_latents(Path(name).expanduser())


def data_for(run: str | Path, shape: tuple[int, ...] | None, name: str) -> Source:
    """The data of this name for the model of a run: images in its size, or the latents that it is of."""
    # Folders and hub data have no size of their own but that of their first image.
    images = name.startswith("hf:") or (Path(name).expanduser().is_dir() and not is_latents(name))
    sides = shape[1:] if shape and images else ()
    source = open_data(name, (sides[0], sides[1]) if len(sides) == 2 else None)
    known = _latents_of(run)
    if known is not None and isinstance(source, Latents) and source.autoencoder.hash != known.rpartition(" ")[2]:
        raise OptionError(f"{run} was trained on {known}, and {name} holds {source.name}; expected that autoencoder's")
    return source


def trained_on(run: str | Path, shape: tuple[int, ...] | None) -> Source:
    """The data that the run says it was trained on; latents are looked for beside it, as latent runs have them."""
    known = _latents_of(run)
    if known is not None:
        folder = Path(run).resolve().parent / CACHE
        if not is_latents(folder):
            raise OptionError(
                f"{run} was trained on {known}, and {folder} has none; expected --data, a folder of these latents with "
                "their autoencoder beside it"
            )
        source = open_latents(folder)
        if source.name != known:
            raise OptionError(f"{run} was trained on {known}, and {folder} holds {source.name}; expected --data")
        return source
    name = _data(run).get("name")
    if name is None:
        raise OptionError(f"{run} does not say what it was trained on; expected --data, such as --data digits")
    try:
        return data_for(run, shape, name)
    except FluvialError as error:
        raise OptionError(
            f"the data of the training, {name}, could not be opened ({error}); expected --data"
        ) from error


def says_its_data(run: str | Path) -> bool:
    """Whether a run, or a system's folder, says what it was trained on."""
    return "name" in _data(run)


def _data(run: str | Path) -> dict[str, Any]:
    """What the config of a run says of its data; of a system's folder what its last part says, images for latents."""
    folder = Path(run)
    if not (folder / INDEX).is_file():
        return (described(run).get("training") or {}).get("data", {})
    for part in reversed(atomic.read_json(folder / INDEX).get("models", [])):
        found = _data(folder / part)
        if found:
            return {**found, "name": _images_of(str(found["name"]))}
    return {}


def _latents_of(run: str | Path) -> str | None:
    """The name of the latents that a run was trained on, which ends with their autoencoder's hash."""
    name = str(_data(run).get("name"))
    return None if _images_of(name) == name else name


def _images_of(name: str) -> str:
    """Of the name of latents, that of the images they are of; other names as they are."""
    images, by, _ = name.removeprefix(_LATENTS).rpartition(" by autoencoder ")
    return images if by and name.startswith(_LATENTS) else name


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
