"""`fluvial evaluate`: runs against the data, at several numbers of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from fluvial import grids, interop, solvers
from fluvial.cli.app import app
from fluvial.cli.common import MODEL, console, data_for, on_device, say, says_its_data, trained_on
from fluvial.errors import OptionError, one_of
from fluvial.measure.features import NAMES
from fluvial.systems import StageSource
from fluvial.training import Source
from fluvial.training.checkpoints import CONFIG


@app.command()
def evaluate(
    runs: Annotated[list[str], typer.Argument(help=f"Models or systems, each: {MODEL}", metavar="RUN [RUN …]")],
    steps: Annotated[str, typer.Option(help="Numbers of steps: 1,2,8. 1+9: a budget for each segment.")] = "1,2,4,8,64",
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("compare"),
    solver: Annotated[
        str | None, typer.Option(help=f"{', '.join(solvers.names())}. Default euler; jump for flow maps.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("-O", "--option", metavar="NAME=VALUE", help="An option of the solver.")
    ] = None,
    grid: Annotated[str | None, typer.Option(help=f"{', '.join(grids.names())}. Default uniform.")] = None,
    data: Annotated[str | None, typer.Option(help="Default: what the first run was trained on.")] = None,
    n: Annotated[int, typer.Option("-n", help="Samples of each seed.")] = 1000,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
    scale: Annotated[float | None, typer.Option("--guidance", help="Guidance scale; 1 is none.")] = None,
    label: Annotated[int | None, typer.Option(help="The class; default: all of them in turn.")] = None,
    features: Annotated[
        str | None, typer.Option(help=f"{', '.join(NAMES)}. Default: classifier, for images with labels.")
    ] = None,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
) -> None:
    """Measure runs against real data at several numbers of steps: figures with their floors, sheets, and a page.

    Every figure is a mean over seeds, from the same noises in all runs; evaluation.json says how each was made.
    """
    from fluvial.show import evaluate as job
    from fluvial.show import evaluate_report, settings

    if (out / CONFIG).exists():
        raise OptionError(f"--out {out} is a run folder; expected another one, for the evaluation")
    if features is not None and features not in NAMES:
        raise one_of("features", features, NAMES)
    asked = _steps(steps)
    chosen = settings.solver(solver or "euler", option or ()) if solver or option else None
    if grid is not None and grid not in grids.names():
        raise one_of("grid", grid, grids.names())
    names = _names(runs)
    models: dict[str, Any] = {name: on_device(interop.load(run, weights=weights)) for name, run in zip(names, runs)}
    source = _source(data, runs, next(iter(models.values())))
    with console.status("sampling") as status:
        found = job.evaluate(
            models,
            source,
            steps=asked,
            solver=chosen,
            grid=grid,
            n=n,
            seeds=seeds,
            guidance=scale,
            label=label,
            features=features,
            say=lambda line: status.update(escape(line)),
        )
    for name, run in zip(names, runs):
        found.runs[name] |= {"folder": str(run), "weights": weights}
    report = evaluate_report.write(out, found, source.normalisation)
    _print(found)
    say(escape(f"{found.finding}. Report: {report}"))


def _steps(text: str) -> tuple[int | tuple[int, ...], ...]:
    """The numbers of steps of "1,2,8" or, with budgets for segments, "8,1+9"."""
    found: list[int | tuple[int, ...]] = []
    for part in text.split(","):
        counts = part.strip().split("+")
        if not all(count.isdecimal() and int(count) for count in counts):
            raise OptionError(
                f"steps are {text!r}; expected whole numbers from 1 such as 1,2,8, or budgets for segments such as 1+9"
            )
        found.append(int(counts[0]) if len(counts) == 1 else tuple(map(int, counts)))
    return tuple(dict.fromkeys(found))


def _print(found: Any) -> None:
    """The figures that fit a terminal; the rest is in the report. Nothing is cut off where it is narrow."""
    names = [name for name in found.measured if name not in ("energy_distance", "density", "coverage")]
    header, rows = found.table(names, bars=False)
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in [header, *rows]:
        say(escape("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))])))
    reference = f"{escape(found.reference.run)} at {found.reference.steps} steps"
    ratio = f"as a multiple of that of {reference}"
    if math.isnan(found.ratio(found.reference, found.main)):
        ratio = f"left out, since {reference} cannot be told from real data"
    say(f"Over floor: less what real data measure against real data. x reference: {ratio}.")


def _names(runs: Sequence[str]) -> list[str]:
    """What the runs are called: the folders' names, or their paths where two of those are the same."""
    for names in ([Path(run).resolve().name for run in runs], list(runs)):
        if len(set(names)) == len(runs):
            return names
    raise OptionError(f"a run is given twice among {', '.join(runs)}; expected each once")


def _source(data: str | None, runs: Sequence[str], model: Any) -> Source:
    """The data that are named, or those of the first run that says what it was trained on; in the model's size."""
    if data is None:
        source = trained_on(next(filter(says_its_data, runs), runs[0]), model.shape)
    else:
        source = data_for(runs[0], model.shape, data)
    if model.shape is None or len(model.shape) != 3 or source.shape == model.shape:
        return source
    return StageSource(source, model.shape[1:], normalisation=model.normalisation)
