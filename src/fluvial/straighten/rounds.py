"""Rounds of reflow, from a model to a straight one: pairs, training, and again with what came out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fluvial import measure
from fluvial.errors import OptionError
from fluvial.model import Model, convert
from fluvial.objectives import Objective
from fluvial.straighten.online import Online
from fluvial.straighten.reflow import chosen, reflow_run, student_of
from fluvial.training import Run, make_pairs
from fluvial.training.runs import RunFolder
from fluvial.training.settings import Settings, whole


def rounds(
    model: Model,
    n: int = 50_000,
    rounds: int = 1,
    *,
    out: str | os.PathLike[str],
    segments: Sequence[float] | int | None = None,
    straighten: Sequence[bool] | str | None = None,
    solver: str = "vabm",
    solver_steps: int = 24,
    guidance: Callable[[Model], Model] | None = None,
    data: Any = None,
    share: float = 0.25,
    online: bool = False,
    steps: int = 5000,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], object] = lambda line: None,
    **training: Any,
) -> Run:
    """`make_pairs` and `reflow`, `rounds` times: each round's student is the next one's teacher.

    Everything can be interrupted, and the same call goes on. The last run is in `out`; beside it lie the pairs of round
    k, in `out`-pairs-k, and the runs before, in `out`-round-k.

    Args:
        model: the teacher, in any notation.
        n: pairs of each round.
        segments: [0, …, 1]; or a number of segments, whose ends are then chosen so that each has an equal share of the
            curvature of the model's trajectories (`measure.straightness(…).split`).
        straighten: as for `reflow`.
        solver, solver_steps: of the teacher's ODE, followed on the rectified path.
        guidance: what the first teacher is sampled under; its student has it built in.
        data: real data; a `share` of every batch are backward pairs made of them (`data` in `make_pairs`).
        online: make the pairs while training, with nothing stored.
        steps, seed, training: of each round's training, as for `reflow`.
        say: is told what is being done.

    Raises:
        OptionError: for arguments that do not fit, before any work. Otherwise as `make_pairs` and `fl.train`.
    """
    whole("rounds", rounds, 1)
    whole("n", n, 1)
    if online and data is not None:
        raise OptionError("online pairs do not mix with real data; expected stored ones, online=False")
    folder = Path(out)
    _check(model, folder, steps, seed, share, training)
    if isinstance(segments, int):
        classes = (model.null or {}).get("label")
        cond = {"label": torch.arange(min(n, 512)) % classes} if isinstance(classes, int) else None
        segments = measure.straightness(model, min(n, 512), seed=seed, cond=cond, guidance=guidance).split(segments)
        say(f"segments that share the curvature evenly: {', '.join(f'{t:.3f}' for t in segments)}")
    chosen(segments, straighten)
    run = None
    for k in range(1, rounds + 1):
        last = k == rounds
        teacher = convert(model if run is None else run.ema, path="rectified")
        made = {"solver": solver, "steps": solver_steps, "guidance": guidance if run is None else None}
        made |= {"states": list(segments[1:-1]) if segments is not None else None, "seed": seed + k - 1}
        real = None
        if online:
            pairs = Online(teacher, **made)
        else:
            beside = folder.with_name(f"{folder.name}-pairs-{k}")
            say(f"round {k} of {rounds}: {n:,} pairs in {beside}")
            pairs = make_pairs(teacher, n, out=beside, progress=progress, **made)
            if data is not None:
                beside = folder.with_name(f"{folder.name}-real-pairs-{k}")
                say(f"round {k} of {rounds}: pairs of the real data in {beside}")
                real = make_pairs(teacher, data=data, out=beside, progress=progress, **made)
        here = folder if last else folder.with_name(f"{folder.name}-round-{k}")
        say(f"round {k} of {rounds}: training in {here}")
        run = reflow_run(
            teacher, pairs, steps, segments, straighten, guidance=made["guidance"], real=real, share=share, out=here,
            seed=seed, progress=progress, **training,
        )  # fmt: skip
    assert run is not None
    return run


def _check(model: Model, folder: Path, steps: int, seed: int, share: float, training: Mapping[str, Any]) -> None:
    """Refuses, before the pairs are made, what the training would refuse after it."""
    student_of(model)
    RunFolder(folder).config()
    Objective(times=training.get("times"), distance=training.get("distance", "mse"))
    if not 0.0 < share < 1.0:
        raise OptionError(f"share is {share}; expected a number between 0 and 1, of real pairs in every batch")
    settings = {field.name for field in fields(Settings)} & set(training)
    Settings(steps, seed=seed, **{name: training[name] for name in settings})
