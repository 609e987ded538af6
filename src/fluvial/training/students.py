"""Where a student starts: as a copy of its teacher, in the notation that the teacher has."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from fluvial import networks, predictions
from fluvial.errors import OptionError
from fluvial.flow_maps import FlowMap
from fluvial.model import Converted, Model, convert


def reread(model: Model) -> Model:
    """The model to start from: a prediction of the noise is read as v, alpha noise - sigma data.

    Near the data the two are one. In pure noise the data cannot be told from a prediction of the noise, alpha being 0:
    seen as a velocity its errors grow by 1/t, and one step from there cannot be learned. v is well determined
    everywhere, and learned anew within few steps where it differs: at high noise, where it changes little.

    Source: Salimans, Ho: Progressive distillation (2022), https://arxiv.org/abs/2202.00512, appendix D (v).
    """
    source = model.source if isinstance(model, Converted) else model
    if not isinstance(source.prediction, predictions.Noise):
        return model
    read = source.under(prediction=predictions.V())
    return convert(read, model.path).under(grid=model.grid, segments=model.segments, independent=model.independent)


def trainable(model: Model, numbers: Sequence[str] = (), blur: float = 0.0) -> Model:
    """The same model around a copy of its network, to be trained.

    Args:
        model: the teacher.
        numbers, blur: what the copy is to be told beside the time, and how its times are blurred; `fl.networks.told`.

    Raises:
        OptionError: for a model around a plain function, which has nothing to train; for one under guidance; for a flow
            map; for a network that cannot be told these numbers.
    """
    if hasattr(model.source if isinstance(model, Converted) else model, "guidance"):
        raise OptionError("the model is under guidance; expected the model itself, and guidance= for how it is sampled")
    if isinstance(model, FlowMap):
        raise OptionError("the model is a flow map already; expected the model that it was made from")
    network = model.network
    if not isinstance(network, nn.Module):
        raise OptionError(
            f"the network is a {type(network).__name__} without weights; expected an nn.Module to start from"
        )
    own = networks.told(network, numbers, blur) if numbers or blur else copy.deepcopy(network)
    return model.with_network(own.requires_grad_(True))
