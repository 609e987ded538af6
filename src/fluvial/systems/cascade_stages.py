"""A cascade's stages before they are one: the model for a stage's data, and the data for a stage's model."""

from __future__ import annotations

from typing import Any

import torch

from fluvial.convention import Normalisation
from fluvial.errors import OptionError
from fluvial.model import Model
from fluvial.systems.cascade_network import Upsampler, upsampler
from fluvial.systems.upsampling import StageSource
from fluvial.training import Source, model_for, open_source


def stage_model(
    source: StageSource, path: Any = "rectified", prediction: Any = "velocity", width: int | None = None, seed: int = 0
) -> Model:
    """A fresh model for the data of a stage: a U-Net for the first one, an `Upsampler` for those above.

    Args:
        source: the stage's data.
        path, prediction: as for `training.model_for`.
        width: of the network; default 32.
        seed: of its weights.
    """
    if source.low is None:
        return model_for(source, path, prediction, width=width, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = upsampler(
            source.shape[0], source.side, source.low, source.num_classes, width or 32, augmentation=source.augmentation
        )
    return model_for(source, path, prediction, network)


def stage_source(model: Model, source: Any, seed: int = 0) -> Source:
    """The data that a stage's model wants: those given, smaller where it is smaller, with lower images where it has.

    What a stage is straightened or distilled on. Data that already are what the model wants come back as they are.

    Args:
        model: any stage of a cascade, trained, converted or distilled; or any model of images.
        source: images, of the model's size or larger.
        seed: of the corruptions.

    Raises:
        OptionError: for images that are smaller than the model's.
    """
    source, network, shape = open_source(source), model.network, model.shape
    low = network.low if isinstance(network, Upsampler) and "low" not in source.conditions else None
    if shape is None or len(shape) != 3 or (low is None and source.shape == shape):
        return source
    if "low" in source.conditions or source.shape[0] != shape[0]:
        raise OptionError(f"{source.name} has samples {source.shape}, and the model {shape}; expected its own data")
    augmentation = network.augmentation if isinstance(network, Upsampler) else None
    own = None if model.normalisation == Normalisation() else model.normalisation
    return StageSource(source, shape[1:], low, augmentation=augmentation, seed=seed, normalisation=own)
