"""A small classifier, trained on the spot on the user's own data, to judge samples by.

It answers two questions: is a sample recognised as the class that was asked for, and how far are samples from
data in a space where distances mean something (`features`, for `frechet`). It needs no download and suits
data that a network trained on photographs has never seen; but a figure belongs to the one classifier it was
measured with, so it is reported beside `Classifier.description`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluvial import random
from fluvial.errors import OptionError, ShapeError
from fluvial.measure.distances import CLASSIFY, require_finite

FEATURES = 64
_TRAIN_BATCH, _PREDICT_BATCH = 64, 1024
_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Classifier:
    """A trained classifier. Samples come in the units of its training data, shaped (N, *shape).

    Attributes:
        accuracy: share of the held-out real data that it recognises.
        description: one line to put beside every figure: architecture, features, counts, accuracy, seed.
        shape: of one sample.
        body: standardised samples -> features before `scale`. head: those -> logits.
        mean, std: of the training data, by channel for images and by dimension for points.
        scale: gives the features a mean variance of 1 over the training data, so that distances by
            classifiers of different seeds are of one size: samples all equal to the mean of the data's
            features are at 64.
    """

    accuracy: float
    description: str
    shape: tuple[int, ...]
    body: nn.Module
    head: nn.Module
    mean: Tensor
    std: Tensor
    scale: float

    def features(self, x: Tensor) -> Tensor:
        """The layer before the logits, (N, 64) float32: linear, without an activation."""
        return self._batched(x, lambda hidden: hidden * self.scale)

    def probabilities(self, x: Tensor) -> Tensor:
        """Of each class, (N, classes) float32."""
        return self._batched(x, lambda hidden: self.head(hidden).softmax(dim=1))

    def predict(self, x: Tensor) -> Tensor:
        """The likeliest class, (N,) long."""
        return self.probabilities(x).argmax(dim=1)

    @torch.no_grad()
    def _batched(self, x: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
        if tuple(x.shape[1:]) != self.shape or len(x) == 0:
            expected = ", ".join(["N", *map(str, self.shape)])
            raise ShapeError(f"samples have shape {tuple(x.shape)}; the classifier was trained on ({expected})")
        # Without this a diverged sample would silently count as class 0.
        require_finite(x, "samples")
        parts = [part.to(self.mean.device, torch.float32) for part in x.split(_PREDICT_BATCH)]
        return torch.cat([finish(self.body((part - self.mean) / self.std)) for part in parts]).to(x.device)


def share_recognised(classifier: Classifier, samples: Tensor, labels: Tensor) -> float:
    """The share of samples (N, ...) that the classifier takes for the class (N,) asked for, from 0 to 1.

    A perfect sampler reaches about `classifier.accuracy`; one that avoids the data's difficult cases exceeds
    it.

    Raises:
        ShapeError: samples of another shape than the training data's; labels that do not go with them.
        OptionError: NaN or infinity.
    """
    if labels.shape != samples.shape[:1]:
        raise ShapeError(f"labels have shape {tuple(labels.shape)}; expected ({len(samples)},), one per sample")
    return float((classifier.predict(samples) == labels.to(samples.device)).double().mean())


def train_classifier(
    data: Tensor, labels: Tensor, *, seed: int = 0, epochs: int = 15, holdout: float = 0.2
) -> Classifier:
    """A classifier of the data: convolutions for images (N, C, H, W), an MLP for samples of any other shape.

    It trains and predicts where the data is. Same seed, same classifier (on a CPU, at an equal number of
    threads); the global random state is left as it was. Images are moved by up to a pixel each way in
    training, their borders repeated: on 8x8 digits that makes the features several times more sensitive to
    blur and noise.

    Args:
        data: (N, ...) in any range: it is standardised, and the standardisation is part of the classifier.
        labels: (N,) integers 0 … K-1.
        seed: of the split, the initial weights, the order and the shifts.
        epochs: passes over the training part, by AdamW; the learning rate rises and falls once over all of
            them.
        holdout: share of each class that is kept out of training, for `accuracy`.

    Raises:
        ShapeError: labels that do not go with the data.
        OptionError: labels that are not integers from 0, or of one class only, or of a class with a single
            sample; NaN or infinity; epochs below 1; holdout outside (0, 1).
    """
    _check(data, labels, epochs, holdout)
    trained_on, held_out = (part.to(data.device) for part in _split(labels.cpu(), holdout, seed))
    labels = labels.to(data.device, torch.int64)
    known = data.detach()[trained_on].float()
    image, classes = data.ndim == 4, int(labels.max()) + 1
    axes = (0, 2, 3) if image else (0,)
    mean, std = known.mean(dim=axes, keepdim=True), known.std(dim=axes, keepdim=True)
    std = torch.where(std > 0.0, std, 1.0)

    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: torch.manual_seed would reseed accelerators too, which are not restored.
        torch.default_generator.manual_seed(seed)
        body, name = _convolutions(*data.shape[1:]) if image else _layers(math.prod(data.shape[1:]))
        head = nn.Linear(FEATURES, classes)
    network = nn.Sequential(body, head).to(data.device)
    _fit(network, (known - mean) / std, labels[trained_on], epochs, seed)

    raw = Classifier(0.0, "", tuple(data.shape[1:]), body, head, mean, std, scale=1.0)
    accuracy = share_recognised(raw, data[held_out], labels[held_out])
    scale = float(raw.features(data[trained_on]).var(dim=0).mean().rsqrt())
    description = (
        f"{name} on {'x'.join(map(str, raw.shape))}, {FEATURES} features, {classes} classes, seed {seed}: "
        f"trained on {len(trained_on)}, recognises {accuracy:.1%} of {len(held_out)} held out"
    )
    return Classifier(accuracy, description, raw.shape, body, head, mean, std, scale)


def _check(data: Tensor, labels: Tensor, epochs: int, holdout: float) -> None:
    if data.ndim < 2 or labels.shape != data.shape[:1]:
        shapes = f"{tuple(data.shape)} and {tuple(labels.shape)}"
        raise ShapeError(f"data and labels have shapes {shapes}; expected (N, ...) and (N,)")
    require_finite(data, "data")
    if labels.is_floating_point() or labels.is_complex():
        raise OptionError(f"labels are {labels.dtype}; expected integers 0 … K-1")
    if len(labels) == 0 or int(labels.min()) < 0:
        found = f"go down to {int(labels.min())}" if len(labels) else "are empty"
        raise OptionError(f"labels {found}; expected integers 0 … K-1, of two classes or more")
    present, counts = labels.unique(return_counts=True)
    if len(present) < 2:
        raise OptionError(f"labels are all {int(present[0])}; expected two classes or more")
    if int(counts.min()) < 2:
        raise OptionError(
            f"class {int(present[counts.argmin()])} has one sample; expected two or more, to hold one out"
        )
    if epochs < 1:
        raise OptionError(f"epochs is {epochs}; expected 1 or more")
    if not 0.0 < holdout < 1.0:
        raise OptionError(f"holdout is {holdout}; expected a share between 0 and 1")


def _split(labels: Tensor, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out: the same share of each class, one sample at least in both."""
    order = random.permutation(len(labels), seed, stream=CLASSIFY)
    trained_on, held_out = [], []
    for label in labels.unique():
        members = order[labels[order] == label]
        count = min(max(1, round(holdout * len(members))), len(members) - 1)
        held_out.append(members[:count])
        trained_on.append(members[count:])
    return torch.cat(trained_on), torch.cat(held_out)


def _convolutions(channels: int, height: int, width: int) -> tuple[nn.Module, str]:
    """Standardised images -> features, halving the side until it is below 8."""
    layers = [*_convolution(channels, 32), *_convolution(32, 64)]
    widths = [32, 64]
    while min(height, width) >= 8:
        layers += [nn.AvgPool2d(2), *_convolution(64, 64)]
        widths.append(64)
        height, width = height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(64 * height * width, FEATURES)]
    return nn.Sequential(*layers), f"convolutions {'-'.join(map(str, widths))}"


def _convolution(before: int, after: int) -> list[nn.Module]:
    # GroupNorm: what a sample is taken for must not depend on the others of its batch.
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.GroupNorm(8, after), nn.SiLU()]


def _layers(width: int) -> tuple[nn.Module, str]:
    """Standardised points of any shape -> features."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (width, 128):
        layers += [nn.Linear(before, 128), nn.LayerNorm(128), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(128, FEATURES)), "MLP 128-128"


def _fit(network: nn.Module, data: Tensor, target: Tensor, epochs: int, seed: int) -> None:
    """Trains the network in place by cross-entropy, and freezes it."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE)
    steps = epochs * math.ceil(len(data) / _TRAIN_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        # Draw 0 was the split; the order and the shifts of an epoch take one draw each.
        order = random.permutation(len(data), seed, draw=2 * epoch + 1, stream=CLASSIFY)
        for batch in order.split(_TRAIN_BATCH):
            x = data[batch.to(data.device)]
            if x.ndim == 4:
                x = _shifted(x, random.uniform(batch, (2,), seed, draw=2 * epoch + 2, stream=CLASSIFY))
            loss = F.cross_entropy(network(x), target[batch.to(data.device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.requires_grad_(False)


def _shifted(images: Tensor, u: Tensor) -> Tensor:
    """Each image (B, C, H, W) moved by -1, 0 or 1 pixels down and across, by u (B, 2) in (0, 1)."""
    count, _, height, width = images.shape
    start = (3 * u).long().to(images.device)  # (B, 2)
    row = start[:, :1] + torch.arange(height, device=images.device)  # (B, H)
    column = start[:, 1:] + torch.arange(width, device=images.device)  # (B, W)
    sample = torch.arange(count, device=images.device)[:, None, None]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate").movedim(1, -1)
    return padded[sample, row[:, :, None], column[:, None, :]].movedim(-1, 1)
