"""`fluvial diagnose`: how straight a run's trajectories are, and how true."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fluvial import __version__, training
from fluvial.cli.app import app
from fluvial.cli.common import MODEL, console, described, labels, on_device, one_model, say
from fluvial.errors import FluvialError, OptionError
from fluvial.show import settings


@app.command()
def diagnose(
    run: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("diagnosis"),
    data: Annotated[str | None, typer.Option(help="Real data; default: those the run was trained on.")] = None,
    n: Annotated[int, typer.Option("-n", help="Trajectories for each seed.")] = 512,
    steps: Annotated[int, typer.Option(help="Steps of Heun's method.")] = 64,
    segments: Annotated[str, typer.Option(help="Times from 0 to 1 to measure between.")] = "0,0.5,1",
    seeds: Annotated[int, typer.Option(help="How many seeds, 2 or more.")] = 3,
    label: Annotated[int | None, typer.Option(help="The class; default: all of them in turn.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
) -> None:
    """Say how straight a run's trajectories are, what they cost and where they leave the path, with a report."""
    from fluvial.show import diagnose as job
    from fluvial.show import diagnose_report

    if n < 2:
        raise OptionError(f"-n is {n}; expected 2 or more trajectories")
    nodes = settings.times(segments)
    loaded = on_device(one_model(run, weights))
    source, reason = _source(run, data)
    made: dict[str, Any] = {"fluvial": __version__, "run": run, "model": training.model_hash(loaded)}
    with console.status("starting") as status:
        found = job.diagnose(
            loaded,
            source,
            n=n,
            steps=steps,
            segments=nodes,
            seeds=seeds,
            cond=labels(loaded, n, label),
            guidance=guidance,
            say=status.update,
        )
    found.made = made | {"weights": weights} | found.made
    if reason:
        found.omitted.append(reason)
    report = diagnose_report.write(out, found, Path(run).resolve().name)
    say(f"S = {found.straightness}, {found.made['nfe']} NFE each. {found.bends}.")
    for line in found.omitted:
        say(f"Left out: {line}.")
    say(f"Open {report} in a browser.")


def _source(run: str, data: str | None) -> tuple[training.Source | None, str | None]:
    """The data asked for, or those of the training, and why there are none."""
    if data is not None:
        return training.open_source(data), None
    known = described(run).get("training", {}).get("data")
    if known is None:
        return None, "the run does not say what it was trained on; --data names the data"
    sides = tuple(known["shape"][1:])
    name = known["name"]
    resized = len(sides) == 2 and (name.startswith("hf:") or Path(name).expanduser().is_dir())
    try:
        return training.open_source(name, image_size=sides if resized else None), None
    except FluvialError as error:
        return None, f"the data of the training, {name}, could not be opened ({error}); --data names others"
