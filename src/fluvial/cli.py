"""The command line: parses, calls the library, prints. Errors are one line and exit code 2; --debug shows the rest."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fluvial import __version__, grids, model, paths, predictions, sampling, sheets, solvers, training
from fluvial.errors import FluvialError, OptionError
from fluvial.show import settings
from fluvial.training import atomic

app = typer.Typer(
    help="Fluvial: load, convert, sample, train and measure any diffusion or flow model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console()
_SOLVER = sampling.DEFAULT_SOLVER
_BUDGETS = (1, 2, 4, 8, 16, 32, 64)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options of every command."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("quickstart"),
    steps: Annotated[int | None, typer.Option(help="Training steps (default 1000).")] = None,
) -> None:
    """Train on real handwritten digits and report on flow and diffusion, in about five minutes. No download."""
    from fluvial.show import quickstart as job

    _require_steps(steps)
    with _interruptible():
        report = job.run(out, _say, job.STEPS if steps is None else steps)
    console.print(f"Open [bold]{report}[/bold] in a browser.", soft_wrap=True)


@app.command()
def train(
    data: Annotated[str, typer.Argument(help="digits, moons, a folder of images, file.npz, hf:name, …")],
    out: Annotated[Path, typer.Option(help="The run folder; an existing one is resumed.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Samples per step, over all processes.")] = 128,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    path: Annotated[str, typer.Option(help="rectified, cosine, vp, subvp, ve, edm.")] = "rectified",
    prediction: Annotated[str, typer.Option(help="velocity, data, noise, v, score, edm.")] = "velocity",
    times: Annotated[
        str, typer.Option(help="Training times: uniform, logit_normal, u_shaped, log_normal.")
    ] = "uniform",
    weight: Annotated[str, typer.Option(help="uniform, noise, min_snr, truncated_snr, edm, sigmoid.")] = "uniform",
    coupling: Annotated[str, typer.Option(help="independent or ot.")] = "independent",
    drop_cond: Annotated[float, typer.Option(help="Share of conditions hidden in training, for guidance.")] = 0.1,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16.")] = "auto",
    image_size: Annotated[int | None, typer.Option(help="Resize and crop images to this.")] = None,
) -> None:
    """Train a model, or go on with an interrupted run: the same command resumes exactly."""
    from fluvial.objectives import Objective
    from fluvial.show.run_report import write

    source = training.open_source(data, image_size=image_size)
    net = training.model_for(source, path=path, prediction=prediction)
    objective = Objective(target=net.prediction, times=times, weight=weight, coupling=coupling)
    options: dict[str, Any] = {} if lr is None else {"lr": lr}
    options |= {"seed": seed, "drop_cond": drop_cond, "precision": precision}
    with _interruptible():
        run = training.train(net, source, objective, steps=steps, batch_size=batch_size, out=out, **options)
    if training.is_main_process():
        for name, reason in source.skipped:
            console.print(f"skipped {name}: {reason}", soft_wrap=True)
        console.print(f"{run.folder}: {steps} steps done. Report: {write(out)}", soft_wrap=True)


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[OPTION=VALUES]", help="More for --compare.")] = None,
    n: Annotated[int, typer.Option("-n", help="How many samples.")] = 64,
    solver: Annotated[str | None, typer.Option(help=f"{', '.join(solvers.names())}. Default {_SOLVER}.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("-O", "--option", metavar="NAME=VALUE", help="An option of the solver.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help=f"Solver steps. Default {sampling.DEFAULT_STEPS}.")] = None,
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
    """Sample a run: a PNG sheet, and the numbers on request. Every file says how it was made.

    With --compare, a grid of sheets from the same noises: --compare solver=euler,heun steps=4,8.
    """
    if n < 1:
        raise OptionError(f"-n is {n}; expected 1 or more samples")
    short = {"gamma": gamma, "eta": eta, "kappa": kappa}
    options = [*(option or ()), *(f"{name}={value}" for name, value in short.items() if value is not None)]
    if times is not None and grid is not None:
        raise OptionError(f"--times {times} and --grid {grid} are given; expected one of them")
    nodes = grid if times is None else settings.times(times)
    chosen = settings.solver(solver or _SOLVER, options)
    setting = settings.Setting(
        chosen, steps, times=nodes, guidance=scale, path=None if path is None else paths.named(path)
    )
    axes = {}
    if compared:
        count = times if steps is None else steps
        given = {"solver": solver or options or None, "grid": nodes, "guidance": scale, "path": path}
        axes = _axes([*compared, *(more or ())], given | {"steps": count, "nfe": count})
    if compared and npz is not None:
        raise OptionError("--npz cannot go with --compare; expected --json, for the figures")
    for name, value in {"--data": data, "--json": json_file, "argument": more and " ".join(more)}.items():
        if value is not None and not compared:
            raise OptionError(f"{name} {value} is of no use without --compare")
    loaded = training.load(run, weights=weights)
    start = settings.Start(n, seed, _labels(loaded, n, label), noise)
    made: dict[str, Any] = {"fluvial": __version__, "run": str(run), "model": training.model_hash(run, weights)}
    made |= {"weights": weights, "label": label}
    if compared:
        _compare(loaded, setting, axes, start, data, made, out or Path("compare.png"), json_file)
    else:
        _sample(loaded, setting, start, made, out or Path("samples.png"), npz)


@app.command()
def convert(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    path: Annotated[str | None, typer.Option(help="rectified, cosine, vp, subvp, ve, edm.")] = None,
    prediction: Annotated[str | None, typer.Option(help="velocity, data, noise, v, score, edm.")] = None,
) -> None:
    """Write a run in another notation, around the same weights, without training."""
    if path is None and prediction is None:
        raise OptionError("nothing to convert to; expected --path or --prediction (or both)")
    if out.resolve() == run.resolve():
        raise OptionError(f"--out is the run itself ({out}); expected another folder")
    # A wrong name is known before the run is read.
    paths.named(path or "rectified")
    predictions.named(prediction or "velocity")
    converted = training.convert_run(run, out, path, prediction)
    console.print(f"{out}: {converted.path}, predicting {converted.prediction.name}", soft_wrap=True)


@app.command()
def info(
    run: Annotated[Path | None, typer.Argument(help="A run folder.")] = None,
    solver_facts: Annotated[bool, typer.Option("--solvers", help="The solvers, and which to take.")] = False,
) -> None:
    """Say what is in a run folder (the convention in words, the network, the training), or what solvers there are."""
    if run is None and not solver_facts:
        raise OptionError("nothing to say something of; expected a run folder, or --solvers")
    if run is not None:
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in training.describe(run).items():
            table.add_row(f"[bold]{name}[/bold]", str(value))
        console.print(table)
    if solver_facts:
        rows = [[f.name, f.kind, f.order, f.calls, f.memory or "", f.needs, f.summary] for f in solvers.table()]
        _print_table(["solver", "kind", "order", "calls", "memory", "needs", "is"], rows)
        advice = [(nfe, *solvers.recommended(nfe)) for nfe in _BUDGETS]
        rows = [[nfe, settings.spelled(solver), grid] for nfe, solver, grid in advice]
        _print_table(["NFE", "--solver", "--grid"], rows, title="Which to take, on any path")


def _print_table(header: list[str], rows: list[list[Any]], title: str | None = None) -> None:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(header, start=1):
        table.add_column(name, no_wrap=number < len(header))
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


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
    _say(f"{start.n} samples, {drawn.nfe} NFE each: {out}")
    if npz is not None:
        _save_npz(npz, drawn.x, start.cond, info)
        _say(f"and their numbers: {npz}")


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
    _print_table(*found.table())
    for name, said in found.said.items():
        _say(f"{compare.SHORT[name]}: {said}.")
    _say(f"{found.finding}. {out}")


def _labels(loaded: model.Model, n: int, label: int | None) -> dict[str, torch.Tensor]:
    classes = (loaded.null or {}).get("label")
    if classes is None:
        if label is not None:
            raise OptionError(f"--label is {label}, but this model has no classes")
        return {}
    if label is not None and not 0 <= label < classes:
        raise OptionError(f"--label is {label}; expected 0 to {classes - 1}")
    return {"label": torch.arange(n) % classes if label is None else torch.full((n,), label)}


def _save_npz(path: Path, x: torch.Tensor, cond: Mapping[str, torch.Tensor], info: dict[str, Any]) -> None:
    import numpy

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.npz")
    arrays: dict[str, Any] = {"samples": x.cpu().numpy(), "info": numpy.array(json.dumps(info))}
    arrays |= {name: value.numpy() for name, value in cond.items()}
    numpy.savez_compressed(temporary, **arrays)
    os.replace(temporary, path)


def _require_steps(steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise OptionError(f"--steps is {steps}; expected 1 or more")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; an error is one line on standard error and exit code 2, an interruption 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        code = app([a for a in arguments if a != "--debug"], prog_name="fluvial", standalone_mode=False)
    except FluvialError as error:
        _fail(error, str(error), 2, debug)
    except Exception as error:
        # The parser's own errors, of a class that moves between its versions, all have this.
        if hasattr(error, "format_message"):
            _fail(error, error.format_message(), 2, debug)  # type: ignore[attr-defined]
        _fail(error, f"{type(error).__name__}: {error}; --debug shows where", 1, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception, message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        raise error
    Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True, highlight=False)
    sys.exit(code)


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ends a command that was interrupted, and saved, with what it has to say."""
    try:
        yield
    except training.RunInterrupted as stop:
        console.print(escape(str(stop)), soft_wrap=True)
        raise typer.Exit(130) from stop


if __name__ == "__main__":
    main()
