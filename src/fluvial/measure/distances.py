"""Distances between two sets of samples, in float64 on the CPU.

Every one is an estimate from finite sets and is above zero for two sets of the same law: `real_floor` says
how far. Sets are (N, ...) and (M, ...); all but the first axis is flattened.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fluvial import random
from fluvial.errors import OptionError, ShapeError

# Beside the streams of fluvial.random, so that no direction is also a sample of the data that it measures.
DIRECTION, FLOOR, CLASSIFY = 128, 129, 130

_CHUNK_BYTES = 64 * 2**20


def rows(x: Tensor, name: str, least: int = 1) -> Tensor:
    """x as a finite float64 matrix (N, D) on the CPU, with N at least `least`; errors call it by its name."""
    if x.ndim == 0 or len(x) < least:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; expected {least} or more samples along the first axis")
    # CPU before float64, which not every device has.
    matrix = x.detach().cpu().double().flatten(1) if x.ndim > 1 else x.detach().cpu().double()[:, None]
    if matrix.shape[1] == 0:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; expected one or more numbers in each sample")
    require_finite(matrix, name)
    return matrix


def require_finite(x: Tensor, name: str) -> None:
    """Raises, with the count, if any sample of x (N, ...) holds NaN or infinity."""
    finite = x.isfinite()
    if not finite.all():
        bad = int((~finite).flatten(1).any(dim=1).sum())
        raise OptionError(f"{name} has NaN or infinity in {bad} of {len(x)} samples; expected finite numbers")


def _pair(a: Tensor, b: Tensor, names: tuple[str, str], least: int = 1) -> tuple[Tensor, Tensor]:
    first, second = rows(a, names[0], least), rows(b, names[1], least)
    if first.shape[1] != second.shape[1]:
        widths = f"{first.shape[1]} and {second.shape[1]}"
        raise ShapeError(f"{names[0]} and {names[1]} have {widths} numbers per sample; expected the same width")
    return first, second


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians fitted to two sets of features, as in FID.

        |mean_a - mean_b|² + tr(A + B - 2 (A B)^{1/2}),   A, B the unbiased covariances

    With A = R'R and B = S'S, R and S the triangular factors of the centred features, A B has the nonzero
    eigenvalues of (R S')(R S')', so the trace of its root is the sum of the singular values of R S'. Nothing
    is squared and no matrix root is taken: sets with fewer rows than columns are exact too, and equal sets
    are at 0 to rounding.

    Args:
        features_a, features_b: (N, D) and (M, D), two rows or more.

    Returns:
        The distance in squared units of the features; symmetric, never negative. It is biased upwards, by
        about 1/N: compare at equal counts, and with `real_floor`.

    Raises:
        ShapeError: fewer than two rows, or other widths.
        OptionError: NaN or infinity.

    Source: Dowson, Landau: The Fréchet distance between multivariate normal distributions (1982),
    https://doi.org/10.1016/0047-259X(82)90077-X; Heusel et al.: GANs trained by a two time-scale update rule
    (2017), https://arxiv.org/abs/1706.08500
    """
    a, b = _pair(features_a, features_b, ("features_a", "features_b"), least=2)
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    root_a, root_b = _covariance_factor(a - mean_a), _covariance_factor(b - mean_b)
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2.0 * overlap
    return max(0.0, float((mean_a - mean_b).square().sum() + spread))


def _covariance_factor(centred: Tensor) -> Tensor:
    """R (min(N, D), D) with R'R the unbiased covariance of the centred rows (N, D)."""
    return torch.linalg.qr(centred, mode="r").R / (len(centred) - 1) ** 0.5


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0, p: float = 2.0) -> float:
    """Sliced Wasserstein distance, in the units of the samples.

        (mean over directions u of  ∫₀¹ |F_a⁻¹(q) - F_b⁻¹(q)|^p dq)^{1/p},   F the distribution of u·x

    The integral is exact for any two counts: both quantile functions are steps, constant between the merged
    breakpoints i/N and j/M. Directions are orthogonal in blocks of D (less variance than independent ones,
    and each is still uniform on the sphere), so that for a pure shift s, p = 2 and a multiple of D directions
    it is |s|/√D exactly.

    Args:
        a, b: (N, ...) and (M, ...), flattened to the same width D.
        projections: the number of directions.
        seed: of the directions; the same seed gives the same directions whatever the samples.
        p: 1 or more.

    Raises:
        ShapeError: an empty set, or other widths.
        OptionError: NaN or infinity; projections below 1; p below 1.

    Source: Bonneel, Rabin, Peyré, Pfister: Sliced and Radon Wasserstein barycenters of measures (2015),
    https://doi.org/10.1007/s10851-014-0506-3; Rowland et al.: Orthogonal estimation of Wasserstein distances
    (2019), https://arxiv.org/abs/1903.03784
    """
    first, second = _pair(a, b, ("a", "b"))
    if projections < 1:
        raise OptionError(f"projections is {projections}; expected 1 or more")
    if not 1.0 <= p < float("inf"):
        raise OptionError(f"p is {p}; expected a number from 1")
    n, m = len(first), len(second)
    # Quantiles as integers out of n*m, so that equal breakpoints of both sets are recognised as equal.
    edges = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique()
    start, width = edges[:-1], edges.diff().double() / (n * m)
    total = 0.0
    chunk = max(1, _CHUNK_BYTES // (32 * (n + m)))
    for directions in _directions(projections, first.shape[1], seed).split(chunk):
        quantile_a = (directions @ first.T).sort(dim=1).values[:, start // m]  # (directions, intervals)
        quantile_b = (directions @ second.T).sort(dim=1).values[:, start // n]
        total += float(((quantile_a - quantile_b).abs().pow(p) @ width).sum())
    return (total / projections) ** (1.0 / p)


def _directions(count: int, width: int, seed: int) -> Tensor:
    """Unit vectors (count, width), orthogonal to each other within each block of `width`."""
    block = min(count, width)
    blocks = -(-count // block)
    draws = random.normal(blocks * block, (width,), seed, stream=DIRECTION, dtype=torch.float64)
    orthogonal = torch.linalg.qr(draws.reshape(blocks, block, width).mT).Q
    return orthogonal.mT.reshape(blocks * block, width)[:count]


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Energy distance 2 E|a - b| - E|a - a'| - E|b - b'|, in the units of the samples (no square root).

    The means run over all pairs of the sets, a sample with itself included (the V-statistic): it is then a
    distance between the two empirical distributions, never negative, and 0 only for equal ones
    (to about 1e-8 of their extent over their count). Distances are held for at most 64 MB at a time.

    Args:
        a, b: (N, ...) and (M, ...), flattened to the same width D.

    Raises:
        ShapeError: an empty set, or other widths.
        OptionError: NaN or infinity.

    Source: Székely, Rizzo: Energy statistics: a class of statistics based on distances (2013),
    https://doi.org/10.1016/j.jspi.2013.03.018
    """
    first, second = _pair(a, b, ("a", "b"))
    # Distances come from matrix products, many times faster for images; centred, they lose the fewest digits.
    centre = torch.cat([first, second]).mean(dim=0)
    first, second = first - centre, second - centre
    within = _mean_distance(first, first) + _mean_distance(second, second)
    return max(0.0, 2.0 * _mean_distance(first, second) - within)


def _mean_distance(a: Tensor, b: Tensor) -> float:
    parts = a.split(max(1, _CHUNK_BYTES // (8 * len(b))))
    total = sum(float(torch.cdist(part, b, compute_mode="use_mm_for_euclid_dist").sum()) for part in parts)
    return total / (len(a) * len(b))


@dataclass(frozen=True)
class Floor:
    """A distance between real data and real data: `mean` and `std` over the repeats, at `n` samples a side.

    Unpacks as `mean, std = floor`.
    """

    mean: float
    std: float
    n: int

    def __iter__(self) -> Iterator[float]:
        return iter((self.mean, self.std))


def real_floor(
    distance: Callable[[Tensor, Tensor], float],
    real: Tensor,
    n: int,
    repeats: int = 5,
    seed: int = 0,
    labels: Tensor | None = None,
) -> Floor:
    """The distance between two disjoint random subsets of the real data: what a perfect sampler measures.

    Args:
        distance: of two sets, such as `frechet`.
        real: (N, ...) samples or features.
        n: samples in each subset. About N // 2 is the most there can be: `Floor.n` is the count that was
            used.
        repeats: random splits, two or more. Where 2 n is near N they share samples, and `std` is an
            underestimate.
        seed: of the splits.
        labels: (N,) classes of the real data. Given, both subsets have the same number of each class: the
            floor of a sampler that was asked for the classes of the data it is compared with, and much lower.

    Raises:
        ShapeError: fewer than two disjoint pairs of real samples (of one class); labels that do not go with
            them.
        OptionError: n or repeats below 2.
    """
    if n < 2 or repeats < 2:
        raise OptionError(f"n is {n} and repeats is {repeats}; expected 2 or more of each")
    classes = torch.zeros(len(real), dtype=torch.int64) if labels is None else labels.cpu()
    if classes.shape != real.shape[:1]:
        raise ShapeError(f"labels have shape {tuple(classes.shape)}; expected ({len(real)},), one per sample")
    counts = classes.unique(return_counts=True)[1]
    size = min(n, int((counts // 2).sum()))
    if size < 2:
        raise ShapeError(f"real has {len(real)} samples; expected two or more disjoint pairs of one class")
    distances = []
    for repeat in range(repeats):
        pairs = pairs_of_one_class(classes, seed, repeat)[:size].to(real.device)
        distances.append(distance(real[pairs[:, 0]], real[pairs[:, 1]]))
    return Floor(statistics.fmean(distances), statistics.stdev(distances), size)


def pairs_of_one_class(labels: Tensor, seed: int, repeat: int) -> Tensor:
    """All disjoint pairs (P, 2) of indices with equal labels, drawn and ordered at random."""
    order = random.permutation(len(labels), seed, draw=2 * repeat, stream=FLOOR)
    pairs = []
    for label in labels.unique():
        members = order[labels[order] == label]
        pairs.append(members[: len(members) // 2 * 2].reshape(-1, 2))
    joined = torch.cat(pairs)
    return joined[random.permutation(len(joined), seed, draw=2 * repeat + 1, stream=FLOOR)]
