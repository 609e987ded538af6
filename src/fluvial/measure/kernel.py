"""Kernel distances between two sets of samples: the squared maximum mean discrepancy (MMD), without bias.

    MMD²(a, b) = E k(a, a') + E k(b, b') - 2 E k(a, b)

The means within a set run over pairs of different samples (the U-statistic), so that the estimate from any finite sets
is right in expectation: zero for equal laws, sometimes below. What is left to a floor is its spread. In float64 on the
CPU; kernels are held for at most 64 MB at a time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fluvial import random
from fluvial.errors import OptionError, ShapeError
from fluvial.measure.distances import rows

Kernel = Callable[[Tensor, Tensor], Tensor]

# Beside the streams of measure.distances.
SUBSET = 136

_CHUNK_BYTES = 64 * 2**20
_MEDIAN_OF = 2000


def mmd(a: Tensor, b: Tensor, bandwidth: float | None = None) -> float:
    """Unbiased squared MMD with the Gaussian kernel k(x, y) = exp(-|x - y|² / (2 bandwidth²)). No units.

    With a bandwidth, a kernel that sees every difference of two laws; most clearly those about a bandwidth in size.

    Args:
        a, b: (N, ...) and (M, ...), flattened to the same width D, two samples or more.
        bandwidth: in the units of the samples. None: the median distance of the pooled sets (`median_distance`), which
            is then another one for every two sets; give a number where several distances are compared.

    Returns:
        An estimate of a number from 0 to 2; below 0 about as often as above for sets of one law.

    Raises:
        ShapeError: fewer than two samples, or other widths.
        OptionError: NaN or infinity; a bandwidth that is not above 0; none given where more than half of the pooled
            pairs are at distance 0.

    Source: Gretton, Borgwardt, Rasch, Schölkopf, Smola: A kernel two-sample test (2012), equation 3,
    https://jmlr.org/papers/v13/gretton12a.html
    """
    first, second = _pair(a, b, ("a", "b"))
    if bandwidth is None:
        bandwidth = median_distance(torch.cat([first, second]))
        if bandwidth == 0.0:
            raise OptionError(
                "the median distance of the pooled samples is 0; expected a bandwidth, such as mmd(…, 1.0)"
            )
    if not 0.0 < bandwidth < math.inf:
        raise OptionError(f"bandwidth is {bandwidth}; expected a number above 0, in the units of the samples")
    # Distances come from matrix products; centred, they lose the fewest digits.
    centre = torch.cat([first, second]).mean(dim=0)
    return _unbiased((first - centre) / bandwidth, (second - centre) / bandwidth, _gaussian)


def median_distance(x: Tensor) -> float:
    """The median distance between two different samples of x (N, ...), in their units: the usual bandwidth for `mmd`.

    Of more than 2,000 samples every so-manyth is looked at.

    Raises:
        ShapeError: fewer than two samples.
        OptionError: NaN or infinity.
    """
    points = rows(x, "x", least=2)
    points = points[:: math.ceil(len(points) / _MEDIAN_OF)]
    return float(torch.nn.functional.pdist(points).median())


@dataclass(frozen=True)
class Kid:
    """A kernel Inception distance: mean and std over `subsets` random subsets of `size` rows on each side.

    A set with fewer rows than `size` is taken whole. Two subsets share rows, so `std` is not the error of `mean`; it is
    NaN for a single subset.
    """

    mean: float
    std: float
    size: int
    subsets: int


def kid(features_a: Tensor, features_b: Tensor, subsets: int = 50, size: int = 1000, seed: int = 0) -> Kid:
    """Kernel Inception distance: unbiased squared MMD of features, with the kernel k(x, y) = (x·y / D + 1)³.

    It compares moments up to the third, has no bandwidth, and unlike `frechet` no bias: figures from different
    counts of samples can be compared.

    Args:
        features_a, features_b: (N, D) and (M, D), two rows or more.
        subsets: how many random pairs of subsets are averaged. Where neither set has more than `size` rows there is
            only one, the sets themselves.
        size: rows in a subset, drawn without repetition; a smaller set is taken whole.
        seed: of the subsets.

    Raises:
        ShapeError: fewer than two rows, or other widths.
        OptionError: NaN or infinity; subsets below 1; size below 2.

    Source: Bińkowski, Sutherland, Arbel, Gretton: Demystifying MMD GANs (2018), section 4,
    https://arxiv.org/abs/1801.01401
    """
    a, b = _pair(features_a, features_b, ("features_a", "features_b"))
    if subsets < 1 or size < 2:
        raise OptionError(f"subsets is {subsets} and size is {size}; expected subsets from 1, and rows from 2 in each")
    size = min(size, max(len(a), len(b)))
    if max(len(a), len(b)) == size:
        return Kid(_unbiased(a, b, _cubic), math.nan, size, 1)
    found = []
    for k in range(subsets):
        pick_a = random.permutation(len(a), seed, draw=2 * k, stream=SUBSET)[:size]
        pick_b = random.permutation(len(b), seed, draw=2 * k + 1, stream=SUBSET)[:size]
        found.append(_unbiased(a[pick_a], b[pick_b], _cubic))
    return Kid(statistics.fmean(found), statistics.stdev(found) if subsets > 1 else math.nan, size, subsets)


def _pair(a: Tensor, b: Tensor, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    first, second = (rows(x, name, least=2) for x, name in zip((a, b), names))
    if first.shape[1] != second.shape[1]:
        widths = f"{first.shape[1]} and {second.shape[1]}"
        raise ShapeError(f"{names[0]} and {names[1]} have {widths} numbers per sample; expected the same width")
    return first, second


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|²/2) of x (n, D) and y (m, D), in units of the bandwidth: (n, m)."""
    squared = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2.0 * x @ y.T
    return squared.clamp_(min=0.0).mul_(-0.5).exp_()


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _unbiased(a: Tensor, b: Tensor, kernel: Kernel) -> float:
    """The U-statistic of MMD² for a (N, D) and b (M, D)."""
    return _mean(a, a, kernel, True) + _mean(b, b, kernel, True) - 2.0 * _mean(a, b, kernel, False)


def _mean(a: Tensor, b: Tensor, kernel: Kernel, one_set: bool) -> float:
    """The mean kernel over all pairs; of one set, over those of different samples."""
    chunk = max(1, _CHUNK_BYTES // (8 * len(b)))
    total = 0.0
    for start in range(0, len(a), chunk):
        values = kernel(a[start : start + chunk], b)
        total += float(values.sum())
        if one_set:
            total -= float(values.diagonal(start).sum())
    return total / (len(a) * (len(b) - one_set))
