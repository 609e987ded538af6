"""`fluvial distill`: a run in many steps becomes one in few."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fluvial import solvers, training
from fluvial.cli.app import app
from fluvial.cli.common import MODEL, console, data_for, described, interruptible, on_device, one_model, say, trained_on
from fluvial.distill import METHODS
from fluvial.distill.command import SOLVER, check, regress
from fluvial.errors import NonFiniteError, OptionError, one_of
from fluvial.guidance import CFG
from fluvial.systems import stage_source
from fluvial.systems.latent_run import is_latents
from fluvial.training import Source
from fluvial.training.checkpoints import CONFIG
from fluvial.training.pairs import MANIFEST

# What each method takes beside what all of them do.
OPTIONS = {
    "consistency": ("--guidance", "--solver", "--distance"),
    "consistency-training": ("--distance",),
    "improved": ("--distance",),
    "easy": ("--distance",),
    "continuous": ("--guidance", "--no-teacher"),
    "mean-flow": ("--guidance", "--distance", "--no-teacher"),
    "shortcut": ("--guidance", "--no-teacher"),
    "progressive": ("--guidance", "--distance"),
    "pairs": ("--guidance", "--solver", "--distance", "-n"),
}
_MADE = ("--guidance", "--solver", "-n")  # they say how pairs are made, and those that are given are made already
_SHEETS = 250


@app.command()
def distill(
    run: Annotated[str, typer.Argument(help=f"The teacher, in any notation. {MODEL}")],
    out: Annotated[Path, typer.Option(help="The run folder to write; an existing one is resumed.")],
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "consistency",
    data: Annotated[str | None, typer.Option(help="Default: what the run was trained on.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Pairs of the run, in place of data.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 5000,
    batch_size: Annotated[int, typer.Option(help="Samples per training step.")] = 128,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    guidance: Annotated[
        str | None,
        typer.Option(help="The teacher's scale, then built in: 2; or 1..4, then to be chosen when sampling."),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(help=f"Of the teacher's ODE: {', '.join(solvers.names())}. Default heun; {SOLVER} for pairs."),
    ] = None,
    distance: Annotated[str | None, typer.Option(help="mse, pseudo_huber, lpips. Default: the method's own.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="How many pairs method pairs makes. Default 50000.")] = None,
    no_teacher: Annotated[
        bool, typer.Option("--no-teacher", help="Learn from the data; the teacher's weights are the start alone.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    weights: Annotated[str, typer.Option(help="The teacher's: ema or raw.")] = "ema",
) -> None:
    """Distill a run into a flow map, which samples in 1 to 4 steps. The same command resumes."""
    if method not in METHODS:
        raise one_of("method", method, METHODS)
    given = {"--guidance": guidance, "--solver": solver, "--distance": distance, "-n": n}
    _require_taken(method, given | {"--no-teacher": no_teacher or None}, pairs)
    scale = None if guidance is None else _scale(guidance)
    own_pairs = method == "pairs" and pairs is None
    if own_pairs and isinstance(scale, tuple):
        raise OptionError(f"--guidance is {guidance}, and pairs are made under one; expected a scale, such as 2")
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "sheet_every": _SHEETS, "out": out}
    options |= {name: value for name, value in (("lr", lr), ("solver", solver), ("distance", distance)) if value}
    options |= {"taught": False} if no_teacher else {}
    check(method, out, {"steps": steps, **options})
    loaded = on_device(one_model(run, weights))
    try:
        with interruptible():
            if own_pairs:
                if data is not None:
                    raise OptionError(
                        f"--data is {data}, and method pairs learns from pairs; expected --pairs, or none"
                    )
                options |= {} if n is None else {"n": n}
                regress(
                    loaded, steps=steps, guidance=CFG(scale) if isinstance(scale, float) else None, say=say, **options
                )
            else:
                options |= {} if scale is None else {"guidance": scale}
                source = stage_source(loaded, _source(run, loaded.shape, data, pairs))
                METHODS[method](loaded, source, steps, **options)
    except NonFiniteError:
        # How it went is what now wants to be seen.
        say(f"How it went until then: {_report(out)}")
        raise
    if training.is_main_process():
        console.print(f"{out}: {steps} steps done. Report: {_report(out)}", soft_wrap=True)


def _require_taken(method: str, given: Mapping[str, Any], pairs: Path | None) -> None:
    """Refuses options that this method would ignore."""
    for name, value in given.items():
        made = method == "pairs" and pairs is not None and name in _MADE
        if value is None or (name in OPTIONS[method] and not made):
            continue
        reason = "with --pairs" if made else ""
        known = [other for other in OPTIONS[method] if not (made and other in _MADE)]
        raise OptionError(f"method {method} {reason} takes no {name}; expected {' or '.join(known)}".replace("  ", " "))


def _scale(text: str) -> float | tuple[float, float]:
    """2, or the ends of 1..4."""
    try:
        scales = [float(part) for part in text.split("..")]
    except ValueError:
        scales = []
    if len(scales) == 2 and scales[0] < scales[1]:
        return scales[0], scales[1]
    if len(scales) != 1:
        raise OptionError(f"--guidance is {text!r}; expected a scale such as 2, or two that rise, such as 1..4")
    return scales[0]


def _source(run: str, shape: tuple[int, ...] | None, data: str | None, pairs: Path | None) -> Source:
    """The data or pairs that are named, or those that the run was trained on."""
    if data is not None and pairs is not None:
        raise OptionError(f"--data {data} and --pairs {pairs} are given; expected one of them")
    if pairs is not None:
        if is_latents(pairs):
            raise OptionError(f"--pairs {pairs} is a folder of latents, which are data; expected --data {pairs}")
        return training.open_pairs(pairs)
    if data is not None:
        return data_for(run, shape, data)
    known = (described(run).get("training") or {}).get("data", {})
    if "noise" in known.get("conditions", ()):
        name = known["name"]
        # Pairs are called by the folder as it was written then; they may have moved together with their run.
        for folder in (Path(run).resolve().parent / Path(name).name, Path(name)):
            if (folder / MANIFEST).is_file():
                return training.open_pairs(folder)
        raise OptionError(
            f"{run} was trained on pairs, {name}, which are not beside it; expected --pairs, their folder"
        )
    return trained_on(run, shape)


def _report(out: Path) -> Path:
    """The pages of the run, and of those that progressive distillation made before it; the last one there is."""
    from fluvial.show.run_report import write

    before = sorted(out.parent.glob(f"{out.name}-steps-*"), key=lambda folder: -int(folder.name.rpartition("-")[2]))
    runs = [folder for folder in (*before, out) if (folder / CONFIG).is_file()]
    return [write(folder) for folder in runs][-1]
