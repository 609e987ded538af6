"""Feature networks: the space in which distances between images are taken.

A distance on features is a statement about those features: the network, how images are brought to its size and range.
So a feature network here is `Features`: a callable from samples in the data's own units to vectors, with a description
that is written beside every figure. `of` makes one from what a user names.

| name         | is                                                                                             |
|---|---|
| "classifier" | `train_classifier` on the real data themselves, 64 features: no download, any kind of data     |
| "pixels"     | the numbers of a sample as they are                                                            |
| "inception"  | InceptionV3's 2048 pooled features, as in published FID                                        |
| "dinov2"     | DINOv2's class token, which agrees better with what people see                                 |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluvial.errors import DataError, OptionError, ShapeError, one_of
from fluvial.measure.classifier import Classifier, train_classifier
from fluvial.measure.distances import Floor, require_finite

NAMES = ("classifier", "pixels", "inception", "dinov2")
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINO_SIZE = 224


@dataclass(frozen=True)
class Features:
    """A feature network: samples (N, ...) in the data's own units -> features (N, F) float32, where the samples are.

    Attributes:
        description: one line to put beside every figure: the network, the size and range its images are brought to.
        compute: of one batch.
        batch_size: the most samples that are given to `compute` at once.
        classifier: what it was made from, where that was one.
    """

    description: str
    compute: Callable[[Tensor], Tensor]
    batch_size: int = 256
    classifier: Classifier | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The features (N, F) of x (N, ...).

        Raises:
            ShapeError: no samples, samples of a shape that the network does not take.
            OptionError: NaN or infinity.
        """
        if x.ndim < 2 or len(x) == 0:
            raise ShapeError(f"samples have shape {tuple(x.shape)}; expected (N, ...) with one or more")
        require_finite(x, "samples")
        return torch.cat(
            [self.compute(part).flatten(1).to(x.device, torch.float32) for part in x.split(self.batch_size)]
        )


def module_features(
    module: nn.Module,
    description: str,
    batch_size: int = 256,
    size: int | tuple[int, int] | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
) -> Features:
    """The output of any module as features, flattened to (N, F).

    Args:
        module: samples, as `preprocess` leaves them -> a tensor, batch first. It is put in eval mode, and runs where
            its parameters are, in their dtype.
        description: what it is, and what `preprocess` does; the size is added to it.
        batch_size: samples at once.
        size: images (N, C, H, W) are brought to this height and width first: bicubic, with antialiasing. A number
            means a square.
        preprocess: a batch (B, ...) in the data's own units, of that size -> what the module takes.

    Raises:
        OptionError: a batch_size or size below 1.
    """
    side = (size, size) if isinstance(size, int) else size
    if batch_size < 1 or (side is not None and min(side) < 1):
        raise OptionError(f"batch_size is {batch_size} and size is {size}; expected whole numbers from 1")
    module.eval()
    if side is not None:
        description = f"{description}; images resized to {side[0]}x{side[1]} (bicubic, antialiased)"

    def compute(x: Tensor) -> Tensor:
        parameter = next(module.parameters(), None)
        if parameter is not None:
            x = x.to(parameter.device)
        if side is not None:
            x = _resized(x, side)
        if preprocess is not None:
            x = preprocess(x)
        return module(x if parameter is None or not x.is_floating_point() else x.to(parameter.dtype))

    return Features(description, compute, batch_size)


def pixels() -> Features:
    """The numbers of each sample themselves, in the data's own units."""
    return Features("the numbers themselves", lambda x: x.flatten(1))


def inception(low: float = 0.0, high: float = 1.0, batch_size: int = 64) -> Features:
    """The 2048 pooled features of InceptionV3, by torch-fidelity: with `frechet` on them, the FID of the literature.

    Images are clamped to [low, high], mapped to whole numbers 0 … 255 and given as such; torch-fidelity resizes them to
    299x299 as the first implementation did (bilinear, without antialiasing). One channel is repeated to three.

    Args:
        low, high: the data's range, which becomes 0 and 255.
        batch_size: images at once.

    Raises:
        DataError: without the torch-fidelity package, or where its weights cannot be had (it downloads them once).
        OptionError: a range that is empty.

    Source: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter: GANs trained by a two time-scale update rule (2017),
    https://arxiv.org/abs/1706.08500; https://github.com/toshas/torch-fidelity
    """
    _check_range(low, high)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-not-found]
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise DataError(f"inception features need torch-fidelity: pip install torch-fidelity ({error})") from error
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except (OSError, RuntimeError) as error:
        raise DataError(f"the weights of InceptionV3 cannot be loaded: {_first_line(error)}") from error

    def preprocess(x: Tensor) -> Tensor:
        return (_three_channels(x, low, high) * 255.0).round().to(torch.uint8)

    description = (
        f"InceptionV3 (torch-fidelity), 2048 pooled features; images clamped to {low:g} to {high:g}, as uint8, resized "
        "to 299x299 (bilinear as in TensorFlow 1)"
    )
    return module_features(_First(network), description, batch_size, preprocess=preprocess)


def dinov2(name: str = "facebook/dinov2-base", low: float = 0.0, high: float = 1.0, batch_size: int = 64) -> Features:
    """The class token of a DINOv2 vision transformer, by transformers.

    Images are clamped to [low, high], mapped to 0 … 1, resized to 224x224 (bicubic, antialiased) and standardised by
    the mean and std of ImageNet. One channel is repeated to three.

    Args:
        name: of a model on the Hugging Face hub, or a folder that holds one.
        low, high: the data's range.
        batch_size: images at once.

    Raises:
        DataError: without the transformers package, or where the model cannot be had.
        OptionError: a range that is empty.

    Source: Oquab et al.: DINOv2: learning robust visual features without supervision (2023),
    https://arxiv.org/abs/2304.07193; Stein et al.: Exposing flaws of generative model evaluation metrics (2023),
    https://arxiv.org/abs/2306.04675
    """
    _check_range(low, high)
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise DataError(f"dinov2 features need transformers: pip install transformers ({error})") from error
    try:
        network = AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(f"{name} cannot be loaded: {_first_line(error)}") from error
    mean, std = (torch.tensor(values)[:, None, None] for values in _IMAGENET)

    def preprocess(x: Tensor) -> Tensor:
        # Resized within 0 … 1: bicubic overshoots at edges.
        unit = _resized(_three_channels(x, low, high), (_DINO_SIZE, _DINO_SIZE)).clamp(0.0, 1.0)
        return (unit - mean.to(unit)) / std.to(unit)

    description = (
        f"DINOv2 ({name}), class token of {network.config.hidden_size} numbers; images clamped to {low:g} to {high:g}, "
        f"resized to {_DINO_SIZE}x{_DINO_SIZE} (bicubic, antialiased), standardised by ImageNet's mean and std"
    )
    return module_features(_ClassToken(network), description, batch_size, preprocess=preprocess)


def of(
    given: str | nn.Module | Classifier | Features | None,
    data: Tensor,
    labels: Tensor | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Features:
    """The feature network that is meant, for real data (N, ...) with their labels (N,), where there are some.

    Args:
        given: one of `NAMES`; a module, which takes samples as they are; a `Classifier` of these data; `Features`; or
            None: the classifier for images and series with labels of two classes or more, the numbers themselves for
            all else.
        data, labels: what a classifier is trained on.
        low, high: the data's range, for networks that need one; default: that of `data`.

    Raises:
        OptionError: an unknown name; "classifier" without labels of two classes.
        ShapeError: "inception" or "dinov2" for what are no images.
        DataError: a package or weights that are not there.
    """
    if isinstance(given, Features):
        return given
    if isinstance(given, Classifier):
        return _classifier(given)
    if isinstance(given, nn.Module):
        return module_features(given, f"{type(given).__name__}, a module of the user's own")
    classes = 0 if labels is None else len(labels.unique())
    if given is None:
        given = "classifier" if classes > 1 and data.ndim > 2 else "pixels"
    if given not in NAMES:
        raise one_of("features", given, NAMES)
    if given == "pixels":
        return pixels()
    if given == "classifier":
        if labels is None or classes < 2:
            raise OptionError(
                f"features are 'classifier' for data of {classes} classes; expected 2 or more, or 'pixels'"
            )
        return _classifier(train_classifier(data, labels))
    if data.ndim != 4:
        raise ShapeError(f"features are {given!r} for data of shape {tuple(data.shape)}; expected images (N, C, H, W)")
    low, high = float(data.min()) if low is None else low, float(data.max()) if high is None else high
    return inception(low, high) if given == "inception" else dinov2(low=low, high=high)


def excess(value: float, floor: Floor) -> float:
    """How far a distance is above what real data measure against real data; below 0 within the noise."""
    return value - floor.mean


def excess_ratio(value: float, reference: float, floor: Floor) -> float:
    """The excess of a distance over the floor, as a multiple of a reference's.

    NaN where the reference has none to tell: within two std of the floor it cannot be told from real data, and nothing
    is a multiple of it.
    """
    base = excess(reference, floor)
    return excess(value, floor) / base if base > 2.0 * floor.std else math.nan


class _First(nn.Module):
    """The first of the outputs of a network that returns several."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


class _ClassToken(nn.Module):
    """The first token of a vision transformer's last layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Any = self.network(pixel_values=x)
        return out.last_hidden_state[:, 0]


def _classifier(classifier: Classifier) -> Features:
    return Features(classifier.description, classifier.features, classifier=classifier)


def _three_channels(x: Tensor, low: float, high: float) -> Tensor:
    """Images (N, 1 or 3, H, W) from low … high -> (N, 3, H, W) in 0 … 1."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ShapeError(f"samples have shape {tuple(x.shape)}; expected images of 1 or 3 channels, (N, C, H, W)")
    return ((x.float().clamp(low, high) - low) / (high - low)).expand(-1, 3, -1, -1)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.ndim != 4:
        raise ShapeError(f"samples have shape {tuple(x.shape)}; expected images (N, C, H, W), which have a size")
    return x if x.shape[2:] == size else F.interpolate(x.float(), size=size, mode="bicubic", antialias=True)


def _check_range(low: float, high: float) -> None:
    if not low < high:
        raise OptionError(f"the range is {low:g} to {high:g}; expected low below high")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
