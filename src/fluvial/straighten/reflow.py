"""Reflow: fine-tuning a model on its own (noise, data) pairs, so that its trajectories become straight.

    min E |v(x, t) - (data - noise)|²,    x = t data + (1 - t) noise,    data = ODE(noise)

The pairs are joined by straight lines that cross less than those of independent noise and data; the velocity that
minimises the loss has straighter trajectories, the same marginals, and no greater convex transport cost. One Euler step
of a perfectly straight model is exact.

The student starts as the model itself, seen on the rectified path: a VP, EDM or DDPM network need not be trained anew.
One that predicts the noise is read as v, see `reread`.

Sources: Liu, Gong, Liu: Flow straight and fast (2022), https://arxiv.org/abs/2209.03003; Lee, Lin, Fanti: Improving
the training of rectified flows (2024), https://arxiv.org/abs/2405.20320 (time density, distances, real data).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from fluvial import inputs
from fluvial.errors import OptionError, one_of
from fluvial.grids import Segments
from fluvial.model import Model, convert
from fluvial.objectives import Objective
from fluvial.straighten.piecewise import Piecewise
from fluvial.training import Mixed, Run, train
from fluvial.training.pairs_at import PairsAt
from fluvial.training.students import reread, trainable

WHICH = ("first", "second", "all")


def reflow(
    model: Model,
    pairs: Any,
    steps: int = 5000,
    segments: Sequence[float] | None = None,
    straighten: Sequence[bool] | str | None = None,
    *,
    student: Model | None = None,
    guidance: Callable[[Model], Model] | None = None,
    real: Any = None,
    share: float = 0.25,
    times: Any = "u_shaped",
    distance: Any = "mse",
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    batch_size: int = 128,
    lr: float = 5e-4,
    schedule: str = "cosine",
    **training: Any,
) -> Model:
    """A straightened copy of the model: a rectified velocity with averaged weights. `model` stays as it is.

    Args:
        model: the teacher, in any notation: its weights are where the student starts.
        pairs: what `make_pairs` gave, `open_pairs` opened, or an `Online` source. They should be the model's own.
        steps: training steps.
        segments: [0, …, 1], rectified times: straighten piece by piece. The pairs need states at the inner ones.
        straighten: for each segment whether to straighten it, or "first" (the noise side), "second", "all" (default).
        student: a model to train in place of the copy: of another architecture, or for a teacher without weights. It
            starts as exactly what it is.
        guidance: what the pairs were made under, for the teacher of segments that are kept. The student has it built
            in: sample it without.
        real: backward pairs, made of real data: a `share` of every batch keeps the student at what the data are.
        times: the density of training times: an object from `fl.grids`, "uniform", "u_shaped", "exponential", …; with
            segments, within each straightened one.
        distance: "mse", "pseudo_huber", "lpips", or a function, as for `Objective`.
        out: the run folder.
        seed, batch_size, lr, schedule, training: as for `fl.train`; drop_cond is 0, as the pairs themselves hold what
            was made without conditions.

    The noise of pairs depends on their data: the student's score, and SDE solvers, are refused.

    Raises:
        OptionError: for arguments that do not fit, before the first step. Otherwise as `fl.train`.
    """
    return reflow_run(
        model, pairs, steps, segments, straighten, student=student, guidance=guidance, real=real, share=share,
        times=times, distance=distance, out=out, seed=seed, batch_size=batch_size, lr=lr, schedule=schedule, **training,
    ).ema  # fmt: skip


def reflow_run(
    model: Model,
    pairs: Any,
    steps: int,
    segments: Sequence[float] | None = None,
    straighten: Sequence[bool] | str | None = None,
    *,
    student: Model | None = None,
    guidance: Callable[[Model], Model] | None = None,
    real: Any = None,
    share: float = 0.25,
    times: Any = "u_shaped",
    distance: Any = "mse",
    **training: Any,
) -> Run:
    """As `reflow`, and returns the whole `Run`."""
    pieces = chosen(segments, straighten)
    own = reread(model) if student is None else student
    student = student_of(own).under(segments=pieces)
    inner = () if pieces is None else pieces.levels[1:-1]
    source = PairsAt(pairs, inner)
    if real is not None:
        source = Mixed(source, PairsAt(real, inner), share)
    if pieces is None:
        objective = Objective(target="velocity", times=times, coupling="pairs", distance=distance)
    else:
        _require_guidance(pairs, guidance, pieces)
        teacher = inputs.guided(convert(model, path="rectified"), guidance)
        objective = Piecewise(target="velocity", times=times, distance=distance, segments=pieces, teacher=teacher)
    return train(student, source, objective, steps=steps, **{"drop_cond": 0.0, **training})


def student_of(model: Model) -> Model:
    """A copy of the model as a velocity on the rectified path, whose noise depends on its data; see `trainable`."""
    return convert(trainable(model), path="rectified", prediction="velocity").under(independent=False, grid=None)


def chosen(segments: Sequence[float] | None, straighten: Sequence[bool] | str | None) -> Segments | None:
    """The segments and which of them to straighten."""
    if segments is None:
        if straighten is not None:
            raise OptionError(f"straighten is {straighten!r} without segments; expected segments=[0, 0.5, 1] with it")
        return None
    count = len(segments) - 1
    if straighten is None or straighten == "all":
        straighten = [True] * count
    elif isinstance(straighten, str):
        if straighten not in WHICH:
            raise one_of("segment to straighten", straighten, WHICH)
        place = WHICH.index(straighten)
        if place >= count:
            raise OptionError(
                f"straighten is {straighten!r} and there are {count} segments; expected one that is there"
            )
        straighten = [k == place for k in range(count)]
    pieces = Segments(segments, straighten)
    if not any(pieces.straight):
        raise OptionError("no segment is to be straightened; expected one at least")
    return pieces


def _require_guidance(pairs: Any, guidance: Callable[[Model], Model] | None, pieces: Segments) -> None:
    made_under = (getattr(pairs, "manifest", None) or {}).get("guidance")
    if made_under is not None and guidance is None and not all(pieces.straight):
        raise OptionError(
            f"the pairs were made under {made_under}, and segments that are kept would follow the model without it; "
            "expected guidance= as the pairs were made"
        )
