"""Do samples of one class spread as the data do, or crowd around its centre?

A Langevin-corrected sampler with a large gamma pulls samples towards the centres of the modes wherever the
score is over-estimated near the data (MATH section 4). Distances to the whole data set hardly see it; the
variance within a class, as a ratio to the data's, does: 1 is right, below 1 is over-concentrated, 0 is
collapsed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fluvial.errors import OptionError, ShapeError
from fluvial.measure.distances import rows


@dataclass(frozen=True)
class Spread:
    """Variance within classes, per dimension, in squared units of the samples.

    Attributes:
        overall: pooled over the classes that have two samples or more.
        per_class: by label; NaN for a class with a single sample.
        ratio: overall, to the reference's at the same mix of classes; None without a reference.
        ratio_per_class: to the same class of the reference.
        counts: samples by label. A label that no sample has is in none of these.
    """

    overall: float
    per_class: dict[int, float]
    ratio: float | None
    ratio_per_class: dict[int, float] | None
    counts: dict[int, int]


def within_class_spread(
    x: Tensor, labels: Tensor, reference: Tensor | None = None, reference_labels: Tensor | None = None
) -> Spread:
    """Variance of the samples about the mean of their class, per dimension.

        spread_c = Σ_{i in c} |x_i - mean_c|² / (D (n_c - 1))
        overall = Σ_c (n_c - 1) spread_c / Σ_c (n_c - 1)

    The overall ratio divides by the reference's spread_c under the same weights n_c - 1, so that another mix
    of classes does not pass for another spread.

    Args:
        x: (N, ...) samples, flattened to (N, D).
        labels: (N,) integers.
        reference: (M, ...) real data of the same width, with its labels (M,).

    Raises:
        ShapeError: labels that do not go with their samples; other widths; no class with two samples; a class
            of x that the reference has fewer than two samples of.
        OptionError: NaN or infinity; labels that are not integers; reference and its labels not given
            together.
    """
    if (reference is None) != (reference_labels is None):
        raise OptionError("reference and reference_labels go together; only one of them was given")
    spread, counts = _by_class(rows(x, "x"), labels, "labels")
    weight = {label: counts[label] - 1 for label in counts if counts[label] > 1}
    if not weight:
        raise ShapeError(f"x has one sample in each of {len(counts)} classes; a spread needs two in some class")
    freedom = sum(weight.values())
    overall = sum(weight[c] * spread[c] for c in weight) / freedom
    if reference is None or reference_labels is None:
        return Spread(overall, spread, None, None, counts)
    if reference[0].numel() != x[0].numel():
        widths = f"{x[0].numel()} and {reference[0].numel()}"
        raise ShapeError(f"x and reference have {widths} numbers per sample; expected the same width")
    real, real_counts = _by_class(rows(reference, "reference"), reference_labels, "reference_labels")
    for label in weight:
        if real_counts.get(label, 0) < 2:
            found = real_counts.get(label, 0)
            raise ShapeError(f"reference has {found} samples of class {label}; expected 2 or more, as x has")
    expected = sum(weight[c] * real[c] for c in weight) / freedom
    return Spread(overall, spread, _ratio(overall, expected), {c: _ratio(spread[c], real[c]) for c in weight}, counts)


def within_mode_spread(x: Tensor, means: Tensor, reference: Tensor | None = None) -> Spread:
    """`within_class_spread` for samples without labels: each belongs to the nearest of the known means.

    The variance is about the mean of the samples that fell to a mode, so a mode that is displaced but not
    narrowed has its full spread. Samples that overlap with another mode are cut off at the border, in the
    reference alike: compare with a reference, not with the mode's own variance, unless the modes are far
    apart.

    Args:
        x: (N, ...) samples, flattened to (N, D).
        means: (K, ...) the centres of the modes, flattened alike; a label is an index into them.
        reference: (M, ...) real data.

    Raises:
        ShapeError, OptionError: as `within_class_spread`.
    """
    nearest = _nearest(x, means, "x")
    if reference is None:
        return within_class_spread(x, nearest)
    return within_class_spread(x, nearest, reference, _nearest(reference, means, "reference"))


def _nearest(x: Tensor, means: Tensor, name: str) -> Tensor:
    points, centres = rows(x, name), rows(means, "means")
    if points.shape[1] != centres.shape[1]:
        widths = f"{points.shape[1]} and {centres.shape[1]}"
        raise ShapeError(f"{name} and means have {widths} numbers per sample; expected the same width")
    return torch.cdist(points, centres).argmin(dim=1)


def _by_class(x: Tensor, labels: Tensor, name: str) -> tuple[dict[int, float], dict[int, int]]:
    """Spread and count of each class of x (N, D)."""
    if labels.shape != x.shape[:1]:
        raise ShapeError(f"{name} has shape {tuple(labels.shape)}; expected ({len(x)},), one label per sample")
    if labels.is_floating_point() or labels.is_complex():
        raise OptionError(f"{name} is {labels.dtype}; expected integers")
    labels = labels.cpu()
    spread, counts = {}, {}
    for label in labels.unique().tolist():
        members = x[labels == label]
        counts[label] = len(members)
        spread[label] = float(members.var(dim=0).mean()) if len(members) > 1 else math.nan
    return spread, counts


def _ratio(value: float, reference: float) -> float:
    if reference > 0.0:
        return value / reference
    return math.inf if value > 0.0 else math.nan
