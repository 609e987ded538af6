"""`fluvial straighten`: reflow as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fluvial import solvers, training
from fluvial.cli.app import app
from fluvial.cli.common import MODEL, console, data_for, interruptible, on_device, one_model, say
from fluvial.errors import OptionError
from fluvial.guidance import CFG


@app.command()
def straighten(
    run: Annotated[str, typer.Argument(help=f"A model in any notation. {MODEL}")],
    out: Annotated[Path, typer.Option(help="The run folder to write; its pairs are put beside it.")],
    rounds: Annotated[int, typer.Option(help="Rounds of pairs and training.")] = 1,
    n: Annotated[int, typer.Option("-n", help="Pairs of each round.")] = 50_000,
    steps: Annotated[int, typer.Option(help="Training steps of each round.")] = 5000,
    batch_size: Annotated[int, typer.Option(help="Samples per training step.")] = 128,
    segments: Annotated[
        str | None,
        typer.Option(help="0,0.5,1: straighten piece by piece; or auto:2, chosen by the curvature."),
    ] = None,
    which: Annotated[
        str | None,
        typer.Option("--straighten", help="first (the noise side), second, all, or 1,0: yes or no for each."),
    ] = None,
    solver: Annotated[str, typer.Option(help=f"Of the pairs: {', '.join(solvers.names())}.")] = "vabm",
    solver_steps: Annotated[int, typer.Option(help="Solver steps of the pairs.")] = 24,
    scale: Annotated[float | None, typer.Option("--guidance", help="Of the pairs; the result has it built in.")] = None,
    data: Annotated[str | None, typer.Option(help="Real data to mix in, as backward pairs.")] = None,
    share: Annotated[float, typer.Option(help="Their share of every batch.")] = 0.25,
    online: Annotated[bool, typer.Option("--online", help="Make the pairs while training; store none.")] = False,
    times: Annotated[
        str, typer.Option(help="Training times: u_shaped, uniform, exponential, logit_normal.")
    ] = "u_shaped",
    distance: Annotated[str, typer.Option(help="mse, pseudo_huber, lpips.")] = "mse",
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    weights: Annotated[str, typer.Option(help="The teacher's: ema or raw.")] = "ema",
) -> None:
    """Straighten a run by reflow, whole or piece by piece: few steps then do. The same command resumes."""
    from fluvial.show.run_report import write
    from fluvial.straighten import rounds as straightened

    options: dict[str, Any] = {} if lr is None else {"lr": lr}
    loaded = on_device(one_model(run, weights))
    with interruptible():
        made = straightened(
            loaded, n, rounds, out=out, segments=_segments(segments), straighten=_which(which), solver=solver,
            solver_steps=solver_steps, guidance=None if scale is None else CFG(scale),
            data=None if data is None else data_for(run, loaded.shape, data), share=share, online=online, steps=steps,
            batch_size=batch_size, times=times, distance=distance, seed=seed, say=say, **options,
        )  # fmt: skip
    if training.is_main_process():
        console.print(f"{made.folder}: {made.step} steps done. Report: {write(out)}", soft_wrap=True)


def _segments(text: str | None) -> list[float] | int | None:
    """0,0.5,1 or auto:2."""
    if text is None:
        return None
    try:
        if text.startswith("auto"):
            return int(text.removeprefix("auto").removeprefix(":") or 2)
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--segments is {text!r}; expected times such as 0,0.5,1, or auto:2") from None


def _which(text: str | None) -> list[bool] | str | None:
    """A name, or 1,0."""
    if text is not None and set(text) <= set("01,"):
        return [part == "1" for part in text.split(",")]
    return text
