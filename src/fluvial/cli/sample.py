"""`fluvial sample`: a sheet of samples, or a grid of sheets that compares settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fluvial import __version__, grids, interop, model, paths, sampling, sheets, solvers, training
from fluvial.cli import system_sample
from fluvial.cli.app import app
from fluvial.cli.common import MODEL, console, labels, on_device, print_table, say
from fluvial.errors import OptionError
from fluvial.show import settings
from fluvial.systems import System
from fluvial.training import atomic

_SOLVER = sampling.DEFAULT_SOLVER


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help=MODEL)],
    more: Annotated[list[str] | None, typer.Argument(metavar="[OPTION=VALUES]", help="More for --compare.")] = None,
    n: Annotated[int, typer.Option("-n", help="How many samples.")] = 64,
    solver: Annotated[
        str | None, typer.Option(help=f"{', '.join(solvers.names())}. Default {_SOLVER}; jump for flow maps.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("-O", "--option", metavar="NAME=VALUE", help="An option of the solver.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help=f"Solver steps. Default {sampling.DEFAULT_STEPS}; 1 for flow maps.")
    ] = None,
    grid: Annotated[str | None, typer.Option(help=f"{', '.join(grids.names())}. Default uniform.")] = None,
    times: Annotated[str | None, typer.Option(help="The times themselves, rising in [0, 1]: 0,0.5,1.")] = None,
    noise: Annotated[str, typer.Option(help="Of the steps: independent, or brownian (the same at any steps).")] = (
        "independent"
    ),
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    label: Annotated[int | None, typer.Option(help="The class; default: all of them in turn.")] = None,
    scale: Annotated[float | None, typer.Option("--guidance", help="Guidance scale; 1 is none.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Short for -O gamma=, as of the langevin solver.")] = None,
    eta: Annotated[float | None, typer.Option(help="Short for -O eta=, as of the ddim solver.")] = None,
    kappa: Annotated[float | None, typer.Option(help="Short for -O kappa=, as of the euler_maruyama solver.")] = None,
    path: Annotated[str | None, typer.Option(help="Sample in another notation.")] = None,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
    out: Annotated[Path | None, typer.Option(help="The sheet to write. Default samples.png, or compare.png.")] = None,
    npz: Annotated[Path | None, typer.Option(help="Also write the numbers here.")] = None,
    compared: Annotated[
        list[str] | None,
        typer.Option(
            "--compare", metavar="OPTION=VALUES", help=f"A grid over one or two of {', '.join(settings.READ)}."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="With --compare: real data to measure against.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="With --compare: the figures, as JSON.")] = None,
) -> None:
    """Sample a model: a PNG sheet, and the numbers on request. Every file says how it was made.

    With --compare, a grid of sheets from the same noises: --compare solver=euler,heun steps=4,8.
    """
    short = {"gamma": gamma, "eta": eta, "kappa": kappa}
    options = [*(option or ()), *(f"{name}={value}" for name, value in short.items() if value is not None)]
    if times is not None and grid is not None:
        raise OptionError(f"--times {times} and --grid {grid} are given; expected one of them")
    nodes = grid if times is None else settings.times(times)
    loaded = on_device(interop.load(run, weights=weights))
    others = {"--data": data, "--json": json_file, "argument": more and " ".join(more)}
    _require_use(n, loaded, bool(compared), npz, others)
    if isinstance(loaded, System):
        asked = {"solver": solver, "options": options, "steps": steps, "times": nodes, "guidance": scale, "path": path}
        drawn = system_sample.draw(loaded, n, seed, label, {**asked, "noise": noise}, run, out or Path("samples.png"))
        return None if npz is None else _save_npz(npz, *drawn)
    chosen = settings.solver(solver or ("jump" if loaded.jumps else _SOLVER), options)
    setting = settings.Setting(
        chosen,
        1 if loaded.jumps and steps is None and nodes is None else steps,
        times=nodes,
        guidance=scale,
        path=None if path is None else paths.named(path),
    )
    axes = {}
    if compared:
        count = times if steps is None else steps
        given = {"solver": solver or options or None, "grid": nodes, "guidance": scale, "path": path}
        axes = _axes([*compared, *(more or ())], given | {"steps": count, "nfe": count})
    start = settings.Start(n, seed, labels(loaded, n, label), noise)
    made: dict[str, Any] = {"fluvial": __version__, "run": run, "model": training.model_hash(loaded)}
    made |= {"weights": weights, "label": label}
    if compared:
        _compare(loaded, setting, axes, start, data, made, out or Path("compare.png"), json_file)
    else:
        _sample(loaded, setting, start, made, out or Path("samples.png"), npz)


def _require_use(n: int, loaded: Any, compared: bool, npz: Path | None, others: Mapping[str, Any]) -> None:
    """Refuses options that go with --compare only, or not with it, and less than one sample."""
    if n < 1:
        raise OptionError(f"-n is {n}; expected 1 or more samples")
    if compared and isinstance(loaded, System):
        raise OptionError("--compare is for single models; expected one of the system's own folders")
    if compared and npz is not None:
        raise OptionError("--npz cannot go with --compare; expected --json, for the figures")
    for name, value in others.items():
        if value is not None and not compared:
            raise OptionError(f"{name} {value} is of no use without --compare")


def _axes(texts: list[str], given: dict[str, Any]) -> settings.Axes:
    axes = settings.axes(texts)
    for name in axes:
        if given[name] is not None:
            raise OptionError(f"{name} is compared, and given by an option too; expected one of them")
    return axes


def _sample(
    loaded: model.Model,
    setting: settings.Setting,
    start: settings.Start,
    info: dict[str, Any],
    out: Path,
    npz: Path | None,
) -> None:
    setting = setting.fitted(loaded)
    drawn = settings.draw(loaded, setting, start, progress=True)
    info |= {**setting.record(loaded), "nfe": drawn.nfe, "seed": start.seed, "noise": start.noise}
    columns = 10 if start.cond and info["label"] is None and start.n % 10 == 0 else None
    # A run that ends before the data is in other units than they are.
    whole = not isinstance(setting.times, list) or setting.times[-1] == 1.0
    picture = sheets.sheet(drawn.x, columns=columns, normalisation=loaded.normalisation if whole else None)
    sheets.save(picture, out, info)
    say(f"{start.n} samples, {drawn.nfe} NFE each: {out}")
    if npz is not None:
        _save_npz(npz, drawn.x, start.cond, info)
        say(f"and their numbers: {npz}")


def _compare(
    loaded: model.Model,
    setting: settings.Setting,
    axes: settings.Axes,
    start: settings.Start,
    data: str | None,
    info: dict[str, Any],
    out: Path,
    json_file: Path | None,
) -> None:
    from fluvial.show import compare, compare_sheet

    source = None if data is None else training.open_source(data)
    with console.status("sampling") as status:
        found = compare.compare(loaded, setting, axes, start, source, status.update)
    info |= found.record()
    sheets.save(compare_sheet.draw(found), out, info)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(json_file, info)
    print_table(*found.table())
    for name, said in found.said.items():
        say(f"{compare.SHORT[name]}: {said}.")
    say(f"{found.finding}. {out}")


def _save_npz(path: Path, x: torch.Tensor, cond: Mapping[str, torch.Tensor], info: dict[str, Any]) -> None:
    import numpy

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.npz")
    arrays: dict[str, Any] = {"samples": x.cpu().numpy(), "info": numpy.array(json.dumps(info))}
    arrays |= {name: value.numpy() for name, value in cond.items()}
    numpy.savez_compressed(temporary, **arrays)
    os.replace(temporary, path)
