"""`fluvial cascade`: runs of rising size as one model; and what `fluvial train` needs for one of its stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fluvial import interop, training
from fluvial.cli import system_sample
from fluvial.cli.app import app
from fluvial.cli.common import say
from fluvial.errors import OptionError, RunError
from fluvial.model import Model
from fluvial.systems import Augmentation, Cascade, StageSource, Upsampler, stage_model
from fluvial.systems.upsampling import USUAL


@app.command()
def cascade(
    runs: Annotated[list[str], typer.Argument(help="The stages' runs, from the smallest.", metavar="RUN RUN [RUN …]")],
    out: Annotated[Path, typer.Option(help="The folder to write, which fluvial sample takes.")],
    level: Annotated[
        str | None,
        typer.Option(help="Log-SNR that lower images are re-noised to: 4, clean, or one for each upper stage: 4,5."),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Samples of its first sheets.")] = 20,
    steps: Annotated[int | None, typer.Option(help="Solver steps of every stage of these.")] = None,
    seed: Annotated[int, typer.Option(help="Of their noise.")] = 0,
    label: Annotated[int | None, typer.Option(help="Their class; default: all of them in turn.")] = None,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
) -> None:
    """Put the runs of a cascade's stages together: one folder, and a sheet of what every stage makes."""
    if n < 1:
        raise OptionError(f"-n is {n}; expected 1 or more samples")
    for run in runs:
        if out.resolve() == Path(run).resolve():
            raise OptionError(f"--out is a stage itself ({out}); expected another folder")
    system = Cascade([interop.load(run, weights=weights) for run in runs], _levels(level, len(runs) - 1))
    training.save(system, out)  # type: ignore[arg-type]
    said = [f"{name} {'clean' if value >= 20.0 else f'at log-SNR {value:g}'}" for name, value in system.levels.items()]
    say(f"{out}: {len(runs)} stages, lower images of {', '.join(said)}")
    asked: dict[str, Any] = dict.fromkeys(("solver", "steps", "times", "guidance", "path", "options"))
    asked |= {"steps": steps, "options": [], "noise": "independent"}
    system_sample.draw(system, n, seed, label, asked, str(out), out / "samples.png")


def _levels(text: str | None, stages: int) -> Any:
    """4, or clean, or one for each upper stage."""
    if text is None:
        return None
    try:
        found = [math.inf if part == "clean" else float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--level is {text!r}; expected a log-SNR such as 4, or clean") from None
    if len(found) == 1:
        return found[0]
    if len(found) != stages:
        raise OptionError(f"--level has {len(found)} numbers for {stages} upper stages; expected one for each, or one")
    return {f"up{k}": value for k, value in enumerate(found, start=1)}


def stage_data(
    source: training.Source,
    size: int | None,
    below: str | None,
    augmentation: str | None,
    seed: int,
    stage: int | None = None,
) -> training.Source:
    """The data of the stage that `fluvial train` is asked for; those given where it is asked for none.

    Args:
        size: of the stage; None: that of the data.
        below: the run of the stage below.
        augmentation: LOWEST..HIGHEST, or none.
        stage: its number, from 1, to be checked against the stage below.
    """
    if stage is not None and (stage < 1 or (stage > 1) != (below is not None)):
        expected = "1 for a base; those above it need --from" if below is None else "2 or more with --from"
        raise OptionError(f"--stage is {stage}; expected {expected}")
    if below is None:
        if augmentation is not None:
            raise OptionError(f"--augmentation is {augmentation} without --from; expected the run of the stage below")
        return source if size is None else StageSource(source, size)
    lower = interop.load(below)
    if not isinstance(lower, Model) or lower.shape is None or len(lower.shape) != 3:
        raise RunError(f"--from {below} makes no images of a known size; expected the run of the stage below")
    if lower.shape[0] != source.shape[0]:
        raise OptionError(
            f"--from {below} makes images of {lower.shape[0]} channels, and {source.name} has {source.shape[0]}; "
            "expected the same"
        )
    if stage is not None and (stage > 2) != isinstance(lower.network, Upsampler):
        is_base = "an upper stage" if stage == 2 else "a base"
        raise OptionError(f"--stage is {stage}, and --from {below} is {is_base}; expected the run of stage {stage - 1}")
    side = source.shape[1:] if size is None else size
    return StageSource(source, side, lower.shape[1:], augmentation=_augmentation(augmentation), seed=seed)


def _augmentation(text: str | None) -> Augmentation | None:
    """0..8, or none."""
    if text is None:
        return USUAL
    if text == "none":
        return None
    try:
        low, high = (float(part) for part in text.split(".."))
    except ValueError:
        raise OptionError(f"--augmentation is {text!r}; expected log-SNR such as 0..8, or none") from None
    return Augmentation(low, high)


def model_for(source: training.Source, path: str, prediction: str) -> Model:
    """A fresh model for these data, a stage's or any other."""
    make: Any = stage_model if isinstance(source, StageSource) else training.model_for
    return make(source, path=path, prediction=prediction)
