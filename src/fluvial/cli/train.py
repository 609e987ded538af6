"""Commands on runs: the quickstart, training, conversion, and what is in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fluvial import interop, paths, predictions, solvers, training
from fluvial.cli.app import app
from fluvial.cli.common import MODEL, console, interruptible, open_data, print_table, say
from fluvial.errors import OptionError
from fluvial.interop.opening import save_converted
from fluvial.show import settings

_BUDGETS = (1, 2, 4, 8, 16, 32, 64)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("quickstart"),
    steps: Annotated[int | None, typer.Option(help="Training steps (default 1000).")] = None,
) -> None:
    """Train on real handwritten digits and report on flow and diffusion, in about five minutes. No download."""
    from fluvial.show import quickstart as job

    _require_steps(steps)
    with interruptible():
        report = job.run(out, say, job.STEPS if steps is None else steps)
    console.print(f"Open [bold]{report}[/bold] in a browser.", soft_wrap=True)


@app.command()
def train(
    data: Annotated[str, typer.Argument(help="digits, moons, a folder of images or of latents, file.npz, hf:name, …")],
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
    latent: Annotated[
        Path | None, typer.Option(help="An autoencoder's folder: train on its latents; the run samples images.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Of a cascade's stage: make images this small, by area.")] = None,
    below: Annotated[
        str | None, typer.Option("--from", help="The run of the stage below: learn to make its images larger.")
    ] = None,
    stage: Annotated[
        int | None, typer.Option(help="Of a cascade: 1 is the base, 2 the one --from it, …: checked, if given.")
    ] = None,
    augmentation: Annotated[
        str | None, typer.Option(help="With --from: log-SNR of lower images, 0..8 by default; or none.")
    ] = None,
) -> None:
    """Train a model, or go on with an interrupted run: the same command resumes exactly."""
    from fluvial.cli import autoencoder, cascade
    from fluvial.objectives import Objective
    from fluvial.show.run_report import write

    source, folder = open_data(data, image_size), out
    if latent is not None and below is not None:
        raise OptionError(f"--latent {latent} and --from {below} are given; expected one of them")
    source = cascade.stage_data(source, size, below, augmentation, seed, stage)
    if latent is not None:
        source, folder = autoencoder.begin(latent, source, out)
    net = cascade.model_for(source, path, prediction)
    objective = Objective(target=net.prediction, times=times, weight=weight, coupling=coupling)
    options: dict[str, Any] = {} if lr is None else {"lr": lr}
    options |= {"seed": seed, "drop_cond": drop_cond, "precision": precision}
    with interruptible():
        run = training.train(net, source, objective, steps=steps, batch_size=batch_size, out=folder, **options)
    if training.is_main_process():
        for name, reason in source.skipped:
            console.print(f"skipped {name}: {reason}", soft_wrap=True)
        console.print(f"{run.folder}: {steps} steps done. Report: {write(folder)}", soft_wrap=True)
        if latent is not None:
            console.print(f"Images from its latents: {autoencoder.finish(out)}", soft_wrap=True)


@app.command()
def convert(
    run: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    path: Annotated[str | None, typer.Option(help="rectified, cosine, vp, subvp, ve, edm.")] = None,
    prediction: Annotated[str | None, typer.Option(help="velocity, data, noise, v, score, edm.")] = None,
) -> None:
    """Write a model in another notation, around the same weights, without training."""
    if path is None and prediction is None:
        raise OptionError("nothing to convert to; expected --path or --prediction (or both)")
    if out.resolve() == Path(run).resolve():
        raise OptionError(f"--out is the run itself ({out}); expected another folder")
    # A wrong name is known before the run is read.
    paths.named(path or "rectified")
    predictions.named(prediction or "velocity")
    converted = save_converted(run, out, path, prediction)
    for part in getattr(converted, "models", {"": converted}).values():
        console.print(f"{out}: {part.path}, predicting {part.prediction.name}", soft_wrap=True)


@app.command()
def info(
    run: Annotated[str | None, typer.Argument(help=f"{MODEL} Or pairs, latents, an autoencoder, a CLIP.")] = None,
    solver_facts: Annotated[bool, typer.Option("--solvers", help="The solvers, and which to take.")] = False,
) -> None:
    """Say what a model is (the convention in words, the network, the training), or what else is in a folder."""
    if run is None and not solver_facts:
        raise OptionError("nothing to say something of; expected a run folder, or --solvers")
    if run is not None:
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in interop.describe(run).items():
            table.add_row(f"[bold]{name}[/bold]", escape(str(value)))
        console.print(table)
    if solver_facts:
        rows = [[f.name, f.kind, f.order, f.calls, f.memory or "", f.needs, f.summary] for f in solvers.table()]
        print_table(["solver", "kind", "order", "calls", "memory", "needs", "is"], rows)
        advice = [(nfe, *solvers.recommended(nfe)) for nfe in _BUDGETS]
        rows = [[nfe, settings.spelled(solver), grid] for nfe, solver, grid in advice]
        print_table(["NFE", "--solver", "--grid"], rows, title="Which to take, on any path")


def _require_steps(steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise OptionError(f"--steps is {steps}; expected 1 or more")
