"""`fluvial pairs`: noise and the data a run makes of it, stored for straightening and distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluvial import grids, model, paths, sampling, training
from fluvial.cli.app import app
from fluvial.cli.common import MODEL, data_for, interruptible, on_device, one_model
from fluvial.guidance import CFG
from fluvial.show import settings

_SOLVER = sampling.DEFAULT_SOLVER


@app.command()
def pairs(
    run: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option(help="The folder to write; an existing one is gone on with.")],
    n: Annotated[int | None, typer.Option("-n", help="How many pairs; with --data all of them by default.")] = None,
    solver: Annotated[str, typer.Option(help="An ODE solver: fluvial info --solvers lists them.")] = _SOLVER,
    option: Annotated[
        list[str] | None, typer.Option("-O", "--option", metavar="NAME=VALUE", help="An option of the solver.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help=f"Solver steps. Default {sampling.DEFAULT_STEPS}.")] = None,
    grid: Annotated[str | None, typer.Option(help=f"{', '.join(grids.names())}. Default uniform.")] = None,
    states: Annotated[str | None, typer.Option(help="Times at which to keep the state too: 0.25,0.5.")] = None,
    data: Annotated[str | None, typer.Option(help="Real data to encode to noise: digits, a folder, …")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise and the dropped conditions.")] = 0,
    scale: Annotated[float | None, typer.Option("--guidance", help="Guidance scale; 1 is none.")] = None,
    path: Annotated[str | None, typer.Option(help="Integrate in another notation; states are then on it.")] = None,
    drop_cond: Annotated[float, typer.Option(help="Share of pairs made under the null condition.")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Pairs at a time.")] = 256,
    shard_size: Annotated[int | None, typer.Option(help="Pairs in a file. Default: 64 MiB at most.")] = None,
    store_noise: Annotated[bool, typer.Option("--store-noise", help="Store the noise, not only its seed.")] = False,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
) -> None:
    """Make pairs of noise and data with a run, or go on with a folder of them: the same command resumes exactly."""
    loaded = one_model(run, weights)
    if path is not None:
        loaded = model.convert(loaded, path=paths.named(path))
    with interruptible():
        training.make_pairs(
            on_device(loaded),
            n,
            data=None if data is None else data_for(run, loaded.shape, data),
            solver=settings.solver(solver, option or []),
            steps=steps,
            times=grid,
            states=None if states is None else settings.times(states),
            out=out,
            seed=seed,
            drop_cond=drop_cond,
            guidance=None if scale is None else CFG(scale),
            batch_size=batch_size,
            shard_size=shard_size,
            store_noise=store_noise,
        )
