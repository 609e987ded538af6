"""The data of a cascade: images of a smaller size, and beside them the still smaller image that a stage starts from.

    low = enlarge(alpha shrink(data) + sigma noise),    alpha² + sigma² = 1,    level = log(alpha²/sigma²)

Lower images are made by area averaging. *Conditioning augmentation* corrupts them in training to a level that the
network is told, so that it can do with what a lower stage makes. The noise is added before the image is enlarged: so a
state of the lower stage, whose reverse process is stopped at the time of that level, is exactly such an image
(truncated conditioning), and one training serves both. Enlarging is bilinear: it loses nothing of an image, and shows a
convolution no edges of blocks whose place depends on the factor.

Source: Ho, Saharia, Chan, Fleet, Norouzi, Salimans: Cascaded diffusion models for high fidelity image generation
(2021), https://arxiv.org/abs/2106.15282, section 4
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fluvial import random
from fluvial.convention import Normalisation
from fluvial.errors import DataError, OptionError, ShapeError
from fluvial.predictions import spread
from fluvial.training import Source, open_source
from fluvial.training.source import COUPLED, MEASURED, Rows, measure

# The log-SNR from which an image is clean: its noise would be less than a hundredth of a step of 8 bits.
CLEAN = 20.0

Size = int | Sequence[int]

# Numbers of what is drawn for a lower image, beside the data that are themselves drawn.
_LEVEL, _NOISE = 100, 101

# Rows that a source should have in all, and how often it should be there at least and at most.
_ROWS, _LEAST, _MOST = 1 << 20, 4, 64


@dataclass(frozen=True)
class Augmentation:
    """The levels of corruption of lower images in training: uniform in log-SNR, and a share that are clean.

    Args:
        lowest, highest: log-SNR: 0 is as much noise as image, 8 a noise of 0.018.
        clean: the share of images without any corruption, which have the level `CLEAN`.

    Raises:
        OptionError: for levels that fall, or are beyond ±`CLEAN`; for a share that is none.
    """

    lowest: float = 0.0
    highest: float = 8.0
    clean: float = 0.1

    def __post_init__(self) -> None:
        if not -CLEAN <= self.lowest <= self.highest <= CLEAN:
            raise OptionError(
                f"levels go from {self.lowest} to {self.highest}; expected log-SNR that rise, from {-CLEAN:g} to "
                f"{CLEAN:g}"
            )
        if not 0.0 <= self.clean <= 1.0:
            raise OptionError(f"clean is {self.clean}; expected a share from 0 to 1")

    @property
    def middle(self) -> float:
        """The level in the middle of the range."""
        return (self.lowest + self.highest) / 2

    def levels(self, index: Tensor, seed: int) -> Tensor:
        """The levels (B,), float64, of the samples with these numbers (B,)."""
        u = random.uniform(index, (2,), seed, _LEVEL, random.DATA, torch.float64, index.device)
        level = self.lowest + (self.highest - self.lowest) * u[:, 0]
        return torch.where(u[:, 1] < self.clean, CLEAN, level)

    def config(self) -> dict[str, float]:
        """A JSON-able description, from which `Augmentation(**config)` makes the same again."""
        return asdict(self)


USUAL = Augmentation()


def allowed(augmentation: Augmentation | None, level: float) -> bool:
    """Whether a network that was trained so knows images of this level."""
    if level >= CLEAN:
        return augmentation is None or augmentation.clean > 0.0 or augmentation.highest >= CLEAN
    near = 1e-6  # a level that was a time on the way is not what it was to the last bit
    return augmentation is not None and augmentation.lowest - near <= level <= augmentation.highest + near


def corrupt(low: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """alpha low + sigma noise (B, …) at the levels (B,) of log-SNR, alpha² + sigma² = 1; unchanged from `CLEAN` on."""
    level = level.double()
    sigma = torch.where(level >= CLEAN, 0.0, torch.sigmoid(-level).sqrt())
    alpha = torch.where(level >= CLEAN, 1.0, torch.sigmoid(level).sqrt())
    return spread(alpha, low) * low + spread(sigma, low) * noise


def noise_of(index: Tensor, shape: Sequence[int], seed: int, like: Tensor) -> Tensor:
    """The noise (B, *shape) of the lower images of the samples with these numbers (B,)."""
    return random.normal(index, shape, seed, _NOISE, random.DATA, like.dtype, like.device)


def shrink(images: Tensor, size: Size) -> Tensor:
    """Smaller images (B, C, h, w) of images (B, C, H, W) by area averaging.

    A pixel is the mean of the area that it covers, of which pixels at its edge have their share: for whole factors the
    mean of a block, for others free of aliases too. The mean of an image stays what it is.
    """
    for dim, wanted in zip((-2, -1), sides(size)):
        if images.shape[dim] != wanted:
            weights = _shares(images.shape[dim], wanted).to(images)
            images = weights @ images if dim == -2 else images @ weights.mT
    return images


@lru_cache(64)
def _shares(given: int, wanted: int) -> Tensor:
    """(wanted, given): what share of each new pixel's area every old one has."""
    edges = torch.arange(wanted + 1, dtype=torch.float64) * given / wanted
    pixels = torch.arange(given, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return overlap.clamp_(min=0.0) * wanted / given


def enlarge(images: Tensor, size: Size) -> Tensor:
    """Larger images (B, C, H, W) of images (B, C, h, w), bilinear."""
    return F.interpolate(images, sides(size), mode="bilinear", align_corners=False)


def sides(size: Size) -> tuple[int, int]:
    """Height and width.

    Raises:
        OptionError: for what is neither one number nor two.
    """
    given = (size, size) if isinstance(size, int) else tuple(size)
    if len(given) != 2 or not all(isinstance(side, int) and side >= 1 for side in given):
        raise OptionError(f"size is {size}; expected pixels from 1, one number or (height, width)")
    return given


class StageSource(Source):
    """The data of one stage of a cascade: images of its size and, but for the first stage, the lower image of each.

        base = StageSource("digits", 4)
        upper = StageSource("digits", 8, low=4)

    Beside "data", in the data's own units, an upper stage has "low" (n, C, H, W), the corrupted and enlarged lower
    image in path units, and "level" (n,), its log-SNR. They are conditions as any other: training, reflow and
    distillation need to know nothing of cascades. Training never drops them; a label is dropped as always.

    Every row comes with several corruptions: row i has image i mod n, and corruption i of (seed, i).

    Args:
        source: images, as `training.open_source` takes them.
        size: of this stage, (height, width) or one number for both.
        low: the size of the lower stage; None for the first one.
        augmentation: of the lower images; None: they are clean.
        draws: how many corruptions each image comes with. Default: as many as make a million rows, from 4 to 64; 1
            without augmentation.
        seed: of the corruptions.
        normalisation: to path units, for a model that has its own already. Default: as measured of the source's own
            images, so that all stages have the same.

    Raises:
        OptionError: for sizes that do not rise from `low` over `size` to the source's; for a source of pairs.
        DataError: for a stream. ShapeError: for what is no images.
    """

    kept = ("low", "level")

    def __init__(
        self,
        source: Any,
        size: Size,
        low: Size | None = None,
        *,
        augmentation: Augmentation | None = USUAL,
        draws: int | None = None,
        seed: int = 0,
        normalisation: Normalisation | None = None,
    ) -> None:
        source = open_source(source)
        self.side, self.low = sides(size), None if low is None else sides(low)
        _require_fit(source, self.side, self.low)
        self.source, self.seed = source, seed
        self.augmentation = None if low is None else augmentation
        if draws is not None and (isinstance(draws, bool) or draws < 1):
            raise OptionError(f"draws is {draws}; expected a whole number, 1 or more")
        several = min(max(_ROWS // len(source), _LEAST), _MOST)
        self.draws = 1 if self.augmentation is None else several if draws is None else draws
        self.waits, self.autoencoder = source.waits, source.autoencoder
        self.name, self.size = source.name, len(source) * self.draws
        self.shape = (source.shape[0], *self.side)
        self.conditions = (*(self.kept if self.low else ()), *source.conditions)
        self.num_classes, self.class_names, self.skipped = source.num_classes, source.class_names, source.skipped
        seen = source.batch(torch.arange(0, len(source), -(-len(source) // MEASURED)))["data"]
        found = measure(shrink(seen, self.side))
        self.measured = len(seen)
        self.normalisation = replace(normalisation or source.normalisation, mean=found.mean, std=found.std)

    def batch(self, indices: Tensor) -> Rows:
        rows = self.source.batch(indices % len(self.source))
        data = rows.pop("data")
        made = {"data": shrink(data, self.side)}
        if self.low is not None:
            low = self.normalisation.apply(shrink(data, self.low))
            made |= self._corrupted(low, indices)
        return {**made, **rows}

    def _corrupted(self, low: Tensor, indices: Tensor) -> Rows:
        if self.augmentation is None:
            level = torch.full((len(low),), CLEAN, dtype=torch.float64)
        else:
            level = self.augmentation.levels(indices, self.seed)
            low = corrupt(low, level, noise_of(indices, low.shape[1:], self.seed, low))
        return {"low": enlarge(low, self.side), "level": level.float()}


def _require_fit(source: Source, size: tuple[int, int], low: tuple[int, int] | None) -> None:
    if len(source.shape) != 3:
        raise ShapeError(f"a cascade is of images, and {source.name} has samples {source.shape}; expected (C, H, W)")
    if source.size is None:
        raise DataError(f"{source.name} is a stream: its rows have no numbers; expected data that can be read by row")
    paired = [name for name in (*COUPLED, *StageSource.kept) if name in source.conditions]
    if paired:
        raise OptionError(
            f"{source.name} has {paired[0]!r} beside its data; expected images that are neither pairs nor a stage's"
        )
    if any(here > there for here, there in zip(size, source.shape[1:])):
        raise OptionError(f"size is {size}, and {source.name} has images {source.shape}; expected no larger ones")
    if low is not None and not rises(low, size):
        raise OptionError(f"low is {low} for a stage of {size}; expected a smaller size")


def rises(low: Sequence[int], high: Sequence[int]) -> bool:
    """Whether the second size is larger than the first, in no side smaller."""
    return tuple(low) != tuple(high) and all(a <= b for a, b in zip(low, high))


def log_snr(alpha: float, sigma: float) -> float:
    """log(alpha²/sigma²) of numbers, `CLEAN` at most."""
    return CLEAN if sigma == 0.0 else min(2.0 * math.log(alpha / sigma), CLEAN)
