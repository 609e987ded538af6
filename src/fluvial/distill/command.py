"""What `fluvial distill` does around a method: pairs where the method needs them, and checks before any long work."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fluvial.distill.methods import regression
from fluvial.errors import RunError
from fluvial.flow_maps import FlowMap
from fluvial.model import Model, convert
from fluvial.objectives import Objective
from fluvial.training import make_pairs
from fluvial.training.runs import RunFolder
from fluvial.training.settings import Settings, whole
from fluvial.training.students import reread, trainable

SOLVER, STEPS, STATES = "vabm", 24, (0.25, 0.5, 0.75)

# Those whose last run begins after hours of other work, and what their objective is called in its config.
_LATE = {"pairs": "Regression", "progressive": "Halving"}


def regress(
    model: Model,
    n: int = 50_000,
    steps: int = 5000,
    *,
    out: str | os.PathLike[str],
    solver: Any = SOLVER,
    guidance: Callable[[Model], Model] | None = None,
    distance: Any = "mse",
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], object] = lambda line: None,
    **training: Any,
) -> FlowMap:
    """`make_pairs` and `regression`: a student of the pairs that the model itself makes.

    Both can be interrupted, and the same call goes on. The pairs are in `out`-pairs, with the states at the rectified
    times .25, .5 and .75, so that the student can make one step or a few.

    Args:
        model: the teacher, in any notation.
        n: how many pairs.
        steps: training steps.
        solver: of the teacher's ODE, in 24 steps on the rectified path.
        guidance: what the teacher is sampled under; the student has it built in.
        distance, seed, training: as for `regression` and `fl.train`.
        say: is told what is being done.

    Raises:
        OptionError, RunError: for arguments that do not fit, before any work. Otherwise as `make_pairs` and `fl.train`.
    """
    whole("n", n, 1)
    check("pairs", out, {"steps": steps, "seed": seed, **training})
    trainable(reread(model))
    _try_distance(model, distance)
    folder = Path(out)
    beside = folder.with_name(f"{folder.name}-pairs")
    teacher = convert(model, path="rectified")
    if torch.accelerator.is_available():
        teacher.to(torch.accelerator.current_accelerator())
    say(f"{n:,} pairs in {beside}")
    pairs = make_pairs(
        teacher, n, solver=solver, steps=STEPS, states=STATES, guidance=guidance, out=beside, seed=seed,
        progress=progress,
    )  # fmt: skip
    say(f"training in {folder}")
    return regression(teacher, pairs, steps, distance=distance, out=folder, seed=seed, progress=progress, **training)


def check(method: str, out: str | os.PathLike[str], training: Mapping[str, Any]) -> None:
    """Refuses at once what the training would refuse, for some methods only after long work.

    Args:
        method: its name.
        out: the run folder to write, or to go on with.
        training: steps, seed and what else `fl.train` takes.

    Raises:
        OptionError: for a setting that cannot be used.
        RunError: for a folder of something else.
    """
    known = {field.name for field in fields(Settings)} & set(training)
    Settings(**{name: training[name] for name in known})
    config, wanted = RunFolder(out).config(), _LATE.get(method)
    if config is None or wanted is None:
        return
    found = config["training"]["objective"].get("method")
    if found != wanted:
        raise RunError(f"{out} is a run of another kind ({found or 'no distillation'}); expected another folder")


def _try_distance(model: Model, distance: Any) -> None:
    """A distance that looks at images, or needs a package, is refused now."""
    sample = torch.zeros(1, *(model.shape or (1,)))
    Objective(distance=distance).measured(sample, lambda: sample, sample)
