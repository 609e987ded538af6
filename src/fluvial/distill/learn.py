"""From a model and a method to a student: what every distillation does before and after the training itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fluvial import inputs
from fluvial.convention import Normalisation
from fluvial.distill.core import Distillation
from fluvial.distill.scaled import Scaled
from fluvial.errors import OptionError
from fluvial.flow_maps import FlowMap
from fluvial.guidance import CFG
from fluvial.model import Model, convert
from fluvial.networks import MLP, UNet
from fluvial.training import Run, open_source, train
from fluvial.training.students import reread, trainable

Guidance = float | Sequence[float] | Callable[[Model], Model] | None


def learn(
    model: Model,
    source: Any,
    method: type[Distillation],
    steps: int,
    options: Mapping[str, Any],
    *,
    taught: bool = True,
    guidance: Guidance = None,
    student: Model | None = None,
    **training: Any,
) -> Run:
    """Trains a student of the model by a method.

    Args:
        model: the teacher, in any notation.
        source: the data, or pairs.
        method: what is minimised; `options` are its own.
        steps: training steps.
        taught: whether the teacher's ODE is followed, rather than the straight lines of the data.
        guidance: what the teacher is followed under: an object such as `fl.guidance.CFG(2.0)`, a scale, or two: then
            each sample has a scale between them, which the student is told, cond={"guidance": (B,)}.
        student: a model to start from in place of the teacher, such as one of another architecture. It starts as what
            it is; where the method needs it, its network takes r, the time to lead to: network(x, t, r=…, **cond).
        training: as for `fl.train`.

    Raises:
        OptionError: for arguments that do not fit, before the first step. Otherwise as `fl.train`.
    """
    source = open_source(source)
    guidance, scales = _guidance(guidance)
    if guidance is not None and not taught:
        raise OptionError("guidance is the teacher's, and this method follows none; expected one that does, or None")
    paired = "noise" in source.conditions
    if not (model.independent or paired):
        raise OptionError(
            "the model's noise is not independent of its data (trained on pairs, by optimal transport or reflow): what "
            "it was trained on are not mixtures of data and fresh noise; expected a source of its own pairs, made by "
            "make_pairs"
        )
    own = begun(model, method, scales, student)
    if model.normalisation == Normalisation() and taught:
        # The teacher's units are the data's own: the student must not standardise what it is taught.
        n = source.normalisation
        own = own.under(normalisation=Normalisation(low=n.low, high=n.high, mean=n.mean or 0.0, std=n.std))
    teacher = inputs.guided(convert(model, path=method.path), guidance) if taught else None
    if isinstance(model.network, nn.Module):
        model.network.eval()
    rules = {"scales": scales, "coupling": "pairs" if paired else "independent", **options}
    objective = method(teacher=teacher, **rules)
    flow_map = FlowMap(convert(own, path=method.path, prediction="velocity"), method.kind)
    defaults: dict[str, Any] = {"lr": 5e-4, "schedule": "cosine"}
    if paired:
        defaults["drop_cond"] = 0.0  # the pairs themselves hold what was made without conditions
    return train(flow_map, source, objective, steps=steps, **{**defaults, **training})


def begun(model: Model, method: type[Distillation], scales: Any, student: Model | None) -> Model:
    """The model that is trained, in its own notation: a copy, told what it must be told."""
    own = reread(model) if student is None else student
    wanted = (["r"] if method.kind == "average" else []) + (["guidance"] if scales else [])
    # A network that the user brings along takes what it needs by itself.
    ours = student is None or isinstance(student.network, UNet | MLP)
    if wanted and not ours:
        _require_taken(own.network, wanted)
    own = trainable(own, wanted if ours else (), method.blur if ours else 0.0).under(grid=None, segments=None)
    return own.under(null={**(own.null or {}), "guidance": 1.0}) if scales else own


def _require_taken(network: Any, wanted: Sequence[str]) -> None:
    takes = inspect.signature(network.forward if isinstance(network, nn.Module) else network).parameters.values()
    named = {parameter.name for parameter in takes}
    lacking = [name for name in wanted if name not in named]
    if lacking and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        raise OptionError(
            f"the student's {type(network).__name__} does not take {lacking[0]!r}, which this method tells it; "
            f"expected network(x, t, {lacking[0]}=…, **cond)"
        )


def _guidance(given: Guidance) -> tuple[Callable[[Model], Model] | None, tuple[float, float] | None]:
    """The guidance of the teacher, and the scales that it is drawn from."""
    if given is None or callable(given):
        return given, None
    if isinstance(given, int | float):
        return CFG(float(given)), None
    low, high = (float(scale) for scale in given) if len(given) == 2 else (0.0, 0.0)
    if not low < high:
        raise OptionError(f"guidance is {given!r}; expected a scale, or two that rise, (low, high)")
    return Scaled(), (low, high)
