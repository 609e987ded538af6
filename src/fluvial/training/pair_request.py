"""What pairs are asked for, checked before anything is made of it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fluvial import inputs, sampling, solvers
from fluvial.errors import OptionError, ShapeError
from fluvial.model import Model
from fluvial.solvers import Dopri5, Solver
from fluvial.training.pair_recipe import Recipe
from fluvial.training.settings import whole
from fluvial.training.source import COUPLED, Source

# A solver's node nearer than this to a time that is asked for becomes it.
NEAR = 1e-9

Steps = int | Sequence[int]
Conditions = Mapping[str, Tensor] | str | None


def recipe(
    model: Model,
    n: int,
    *,
    solver: str | Solver,
    steps: Steps | None,
    times: Any,
    states: Sequence[float] | None,
    cond: Conditions,
    drop_cond: float,
    guidance: Callable[[Model], Model] | None,
    seed: int,
    first: int = 0,
    source: Source | None = None,
) -> Recipe:
    """What `make_pairs` was asked for, checked. The network is put in eval mode: its dropout would be no function."""
    solver = solvers.named(solver)
    if solver.stochastic:
        raise OptionError(
            f"solver {solver.name} is stochastic: its data are no function of the noise and make no pairs; expected an "
            "ODE solver, such as heun"
        )
    if model.jumps:
        raise OptionError("the model is a flow map, which has no ODE to follow; expected the model it was made from")
    whole("seed", seed, 0)
    inputs.checked_seed(seed)
    if not 0.0 <= drop_cond <= 1.0:
        raise OptionError(f"drop_cond is {drop_cond}; expected a share from 0 to 1")
    guided = inputs.guided(model, guidance)
    nodes = model.times(times, steps, 1 if isinstance(solver, Dopri5) else sampling.DEFAULT_STEPS)
    if nodes[-1] != 1.0:
        raise OptionError(f"times end at {nodes[-1]:g}; expected an end at 1, where the data are")
    nodes, captured = _with_states(nodes, states, model)
    if source is not None and model.path(nodes[-2]).alpha == 0.0 and not isinstance(solver, Dopri5):
        raise OptionError(
            "one step leads from the data straight to pure noise, which keeps nothing of them; expected 2"
        )
    given, classes = _conditions(model, cond, n, source)
    made = Recipe(guided, model, guidance, solver, nodes, captured, seed, first, given, classes, drop_cond, source)
    _check_shape(model, source)
    nameless = [name for name in made.conditions if name not in (model.null or {})]
    if nameless and drop_cond > 0:
        raise OptionError(
            f"drop_cond is {drop_cond}, and the model has no null condition for {nameless[0]!r}; expected drop_cond=0"
        )
    if isinstance(model.network, nn.Module):
        model.network.eval()
    return made


def _with_states(
    nodes: list[float], states: Sequence[float] | None, model: Model
) -> tuple[list[float], tuple[float, ...]]:
    """The solver's nodes with these times among them, and the times as they then are."""
    try:
        asked = [float(t) for t in ([] if states is None else states)]
    except (TypeError, ValueError):
        raise OptionError(f"states is {states!r}; expected a list of rising times, such as [0.5]") from None
    if any(b - a <= NEAR for a, b in pairwise(asked)) or not all(nodes[0] - NEAR <= t <= 1.0 for t in asked):
        raise OptionError(f"states is {asked}; expected times that rise strictly, from {nodes[0]:g} to 1")
    # The ends, and the joints of a model in segments, are times with a meaning of their own.
    fixed = [nodes[0], 1.0, *([] if model.segments is None else model.segments.nodes(model.path))]
    captured = []
    for t in asked:
        t = next((end for end in fixed if abs(end - t) <= NEAR), t)
        nodes = [node for node in nodes if abs(node - t) > NEAR]
        insort(nodes, t)
        captured.append(t)
    return nodes, tuple(captured)


def _conditions(
    model: Model, cond: Conditions, n: int, source: Source | None
) -> tuple[Mapping[str, Tensor], int | None]:
    """The user's conditions, checked, or the number of classes to take in turn."""
    if source is not None:
        if cond is not None:
            raise OptionError("cond is given together with data; expected the data's own conditions alone")
        return {}, None
    if cond is None or cond == "all":
        classes = (model.null or {}).get("label")
        if isinstance(classes, int):
            return {}, classes
        if cond == "all":
            raise OptionError('cond is "all", and the model has no classes; expected None, or tensors by name')
        return {}, None
    if not isinstance(cond, Mapping):
        raise OptionError(f'cond is {cond!r}; expected None, "all", or tensors by name, such as {{"label": (n,) long}}')
    for name in cond:
        if name in ("data", *COUPLED):
            raise OptionError(f"a condition is called {name!r}, as a part of the pairs is; expected another name")
    return inputs.conditions(model, cond, torch.empty(n)), None


def _check_shape(model: Model, source: Source | None) -> None:
    if source is None:
        if model.shape is None:
            raise ShapeError("the model does not know its samples' shape; expected model.under(shape=(…))")
    elif model.shape is not None and model.shape != source.shape:
        raise ShapeError(
            f"the model is for samples {model.shape}, and {source.name} has {source.shape}; expected the same"
        )
