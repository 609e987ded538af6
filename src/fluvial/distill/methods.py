"""The methods, each as a function with the defaults that hold for it.

All take a teacher in any notation, and the data; all return a flow map with averaged weights, and leave the teacher as
it is. What they share is passed on to `learn`: guidance, student, out, seed, batch_size, lr, and whatever `fl.train`
takes. The published densities of noise levels are for data of standard deviation 1/2; they move with the data's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from fluvial import grids
from fluvial.convention import Normalisation
from fluvial.distill.consistency import ConsistencyDistillation, ConsistencyTraining
from fluvial.distill.continuous import ContinuousConsistency
from fluvial.distill.easy import EasyConsistencyTuning
from fluvial.distill.improved import ImprovedConsistencyTraining
from fluvial.distill.learn import learn
from fluvial.distill.mean_flow import Adaptive, MeanFlow
from fluvial.distill.progressive import Halving
from fluvial.distill.regression import Regression
from fluvial.distill.shortcut import Shortcut
from fluvial.errors import OptionError
from fluvial.flow_maps import FlowMap
from fluvial.grids import level_of
from fluvial.model import Model
from fluvial.objectives import PseudoHuber
from fluvial.training import open_source
from fluvial.training.pairs_at import PairsAt
from fluvial.training.trainer import path_std

# Eighths, and two levels near the noise: a teacher that predicts the noise knows the data there to 1/alpha only, and
# would not find its way to 1/8 in one step.
LEVELS = (0.0, 0.02, 0.05, *(k / 8 for k in range(1, 9)))


def consistency(
    model: Model,
    source: Any,
    steps: int = 5000,
    *,
    solver: Any = "heun",
    grid: Any = None,
    grid_steps: int | None = None,
    judge: str = "own",
    distance: Any = "mse",
    **rest: Any,
) -> FlowMap:
    """Consistency distillation: see `ConsistencyDistillation`; `rest` as for `learn`.

    Args:
        grid, grid_steps: the levels; default: `LEVELS`, and "uniform" where only their number is given.

    The source's grid, 18 levels with rho = 7, and its judge, a moving average, follow the teacher more closely; what is
    known at the data then takes longer to reach the noise: grid="karras", grid_steps=18, judge="average".
    """
    if grid is None:
        grid = LEVELS if grid_steps is None else "uniform"
    listed = isinstance(grid, Sequence | Tensor) and not isinstance(grid, str)
    count = grid_steps or (len(grid) - 1 if listed else 8)
    options = {"solver": solver, "grid": grid, "steps": count, "judge": judge, "distance": distance}
    return _flow_map(model, source, ConsistencyDistillation, steps, options, **rest)


def consistency_training(
    model: Model, source: Any, steps: int = 5000, *, first: int = 2, last: int = 150, distance: Any = "mse", **rest: Any
) -> FlowMap:
    """Consistency training, from the model's weights but without its ODE: see `ConsistencyTraining`."""
    options = {"first": first, "last": last, "distance": distance, "over": steps}
    return _flow_map(model, source, ConsistencyTraining, steps, options, taught=False, **rest)


def improved_consistency(
    model: Model,
    source: Any,
    steps: int = 5000,
    *,
    first: int = 10,
    last: int = 1280,
    distance: Any = None,
    **rest: Any,
) -> FlowMap:
    """Improved consistency training (iCT), from the model's weights: see `ImprovedConsistencyTraining`."""
    source = open_source(source)
    options: dict[str, Any] = {
        "first": first,
        "last": last,
        "over": steps,
        "distance": distance or PseudoHuber(0.00054),
    }
    options["mean"] = -1.1 + _louder(model, source)
    return _flow_map(model, source, ImprovedConsistencyTraining, steps, options, taught=False, **rest)


def easy_consistency(
    model: Model, source: Any, steps: int = 5000, *, q: float = 2.0, stages: int = 8, distance: Any = None, **rest: Any
) -> FlowMap:
    """Easy consistency tuning (ECT): see `EasyConsistencyTuning`."""
    source = open_source(source)
    options: dict[str, Any] = {"q": q, "stages": stages, "over": steps, "distance": distance or PseudoHuber(1e-3)}
    options["times"] = grids.LogNormal(-1.1 + _louder(model, source), 2.0)
    return _flow_map(model, source, EasyConsistencyTuning, steps, options, taught=False, **rest)


def continuous_consistency(
    model: Model,
    source: Any,
    steps: int = 5000,
    *,
    taught: bool = True,
    warmup: int | None = None,
    lr: float = 1e-4,
    **rest: Any,
) -> FlowMap:
    """Continuous-time consistency, sCD (or sCT, with taught=False): see `ContinuousConsistency`.

    warmup: default: a fifth of the steps. The tangent being normalised, a step is as large as the learning rate however
    small the error: at 5e-4 the gap between adjacent times does not close.
    """
    source = open_source(source)
    options: dict[str, Any] = {"warmup": steps // 5 if warmup is None else warmup}
    options["times"] = grids.LogNormal(-1.0 + _louder(model, source), 1.4)
    return _flow_map(model, source, ContinuousConsistency, steps, options, taught=taught, lr=lr, **rest)


def mean_flow(
    model: Model,
    source: Any,
    steps: int = 5000,
    *,
    taught: bool = True,
    share: float = 0.75,
    times: Any = "uniform",
    distance: Any = None,
    lr: float = 2e-4,
    **rest: Any,
) -> FlowMap:
    """MeanFlow, along the model's velocity (or the data's, with taught=False): see `MeanFlow`.

    The source's share of 0.25, its times and its distance are for a network that must learn the velocity too. This one
    knows it, and where a teacher's velocity leaves no error the source's distance would look nowhere else: it is kept
    for the data's own (`Adaptive`).
    """
    options = {"share": share, "times": times, "distance": distance or ("mse" if taught else Adaptive())}
    return _flow_map(model, source, MeanFlow, steps, options, taught=taught, lr=lr, **rest)


def shortcut(
    model: Model,
    source: Any,
    steps: int = 5000,
    *,
    taught: bool = True,
    most: int = 128,
    share: float = 0.25,
    judge: str = "average",
    **rest: Any,
) -> FlowMap:
    """A shortcut model of the model's velocity (or of the data's, with taught=False): see `Shortcut`."""
    options = {"steps": most, "share": share, "judge": judge}
    return _flow_map(model, source, Shortcut, steps, options, taught=taught, **rest)


def progressive(
    model: Model,
    source: Any,
    steps: int = 5000,
    *,
    halvings: Sequence[int] = (16, 8, 4, 2, 1),
    distance: Any = "mse",
    out: Any = None,
    guidance: Any = None,
    **rest: Any,
) -> FlowMap:
    """Progressive distillation: see `Halving`. The last student is in `out`, the one of n steps in `out`-steps-n.

    Args:
        steps: training steps, shared evenly by the rounds.
        halvings: the steps of each round's student, each half of the one before.
    """
    if not halvings or any(2 * later != one for one, later in pairwise(halvings)) or halvings[-1] < 1:
        raise OptionError(f"halvings is {tuple(halvings)}; expected each the half of the one before, such as 4, 2, 1")
    if steps < len(halvings):
        raise OptionError(f"steps is {steps} for {len(halvings)} rounds; expected {len(halvings)} or more")
    source, student = open_source(source), None
    begun = rest.pop("student", None)
    for k, count in enumerate(halvings):
        last = k == len(halvings) - 1
        folder = out if out is None or last else Path(out).with_name(f"{Path(out).name}-steps-{count}")
        part = steps // len(halvings) + (steps % len(halvings) if last else 0)
        teacher = model if student is None else student.inner
        rules: dict[str, Any] = {"steps": count, "distance": distance}
        if k and isinstance(guidance, Sequence):
            rules["scales"] = tuple(guidance)  # the teacher is told its scale by now
        beginning = {"guidance": guidance, "student": begun} if k == 0 else {}
        student = _flow_map(teacher, source, Halving, part, rules, out=folder, **beginning, **rest)
    assert student is not None
    return student


def regression(
    model: Model, pairs: Any, steps: int = 5000, *, first: float = 0.5, distance: Any = "mse", **rest: Any
) -> FlowMap:
    """Regression on the model's own pairs, from the noise and from the states that they have: see `Regression`.

    Args:
        pairs: what `make_pairs` gave, with states=[0.25, 0.5, 0.75] for students of several steps.
        first: the share of samples that start from the noise.
    """
    times = tuple(sorted(level_of(pairs.path, t) for t in pairs.times or ()))
    options = {"starts": (0.0, *times), "first": first, "distance": distance}
    return _flow_map(model, PairsAt(pairs, times), Regression, steps, options, taught=False, **rest)


def _louder(model: Model, source: Any) -> float:
    """log(std / 0.5): how much more noise these data bear than those of the sources."""
    known = model.normalisation if model.normalisation != Normalisation() else source.normalisation
    return math.log(2.0 * path_std(known, source.shape))


def _flow_map(*arguments: Any, **options: Any) -> FlowMap:
    made = learn(*arguments, **options).ema
    assert isinstance(made, FlowMap)
    return made


METHODS = {
    "consistency": consistency,
    "consistency-training": consistency_training,
    "improved": improved_consistency,
    "easy": easy_consistency,
    "continuous": continuous_consistency,
    "mean-flow": mean_flow,
    "shortcut": shortcut,
    "progressive": progressive,
    "pairs": regression,
}
