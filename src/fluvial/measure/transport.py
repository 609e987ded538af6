"""What a coupling of noise and data costs, and how much its straight lines cross.

An ODE's trajectories never cross, straight lines between its ends may: where they do, no velocity field can follow
them, and straightening has something left to gain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluvial import random
from fluvial.errors import OptionError, ShapeError, one_of
from fluvial.measure.distances import rows

# Beside the streams of fluvial.random and of the other measures.
_SUBSET = 131

_CHUNK_BYTES = 64 * 2**20
_COSTS: dict[str, Callable[[Tensor], Tensor]] = {"squared": torch.square, "absolute": torch.abs}


class Ends(NamedTuple):
    """Noise (n, …) and the data (n, …) that it is coupled with, in path units."""

    noise: Tensor
    data: Tensor


def transport_cost(pairs: Any, cost: str | Callable[[Tensor], Tensor] = "squared") -> float:
    """Mean over the pairs of Σ c(data - noise), the sum over dimensions, in path units.

    No reflow raises it, whatever the convex c. Of all couplings the squared cost is least for optimal transport; the
    exact model's ODE saves E|data - noise|² - E|Z_1 - Z_0|² = D (S + V) over the coupling it was trained on, with S its
    `straightness` and V that coupling's `irreducible_loss`.

    Args:
        pairs: (noise, data) in path units, each (n, …), or an object that has both; its `normalisation`, where it has
            one, brings its data to path units first.
        cost: "squared", "absolute", or a function of the differences (n, …), float64, to the cost of each entry.

    Raises:
        ShapeError: noise and data of different shapes, or none; a cost of another shape.
        OptionError: NaN or infinity; an unknown name.

    Source: Liu, Gong, Liu: Flow straight and fast (2022), https://arxiv.org/abs/2209.03003, theorems 3.5 and 3.7
    """
    if not callable(cost) and cost not in _COSTS:
        raise one_of("cost", cost, _COSTS)
    of_entry = cost if callable(cost) else _COSTS[cost]
    noise, data, shape = _ends(pairs)
    difference = (data - noise).reshape(shape)
    found = of_entry(difference)
    if not isinstance(found, Tensor) or found.shape != shape:
        given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ShapeError(f"the cost of differences {tuple(shape)} is {given}; expected one number for each entry")
    return float(found.double().sum() / len(noise))


@dataclass(frozen=True)
class Crossing:
    """How much straight lines cross.

    Attributes:
        share: of all pairs of lines, those that approach and part again, from 0 to 1.
        depth: mean over all pairs of 1 - (least distance / the smaller of those at the ends): 0 for two that are never
            nearer than at an end, 1 for two that meet.
        n: how many lines were compared with each other.
    """

    share: float
    depth: float
    n: int


def crossing(pairs: Any, most: int = 2000, seed: int = 0) -> Crossing:
    """How much the straight lines (1 - t) noise + t data cross, over all pairs of them.

    With a and b the differences of two lines at their ends, A = |a|², B = |b|² and P = a·b, the squared distance
    (1-t)² A + 2t(1-t) P + t² B has its minimum inside where A > P and B > P, and is there

        (A B - P²) / (A + B - 2 P).

    On the line, share and depth are both the share of pairs in opposite order: 1/2 for an independent coupling, 0 for
    an ODE's. In many dimensions independent differences are nearly orthogonal, so that all lines approach (share 1)
    and their depth tends to 1 - 1/√(1 + r²), r the smaller of |a|, |b| over the larger: 0.29 at most. Read the depth,
    against that of an independent coupling of the same ends.

    Args:
        pairs: as for `transport_cost`.
        most: how many lines are compared at most, taken at random where there are more.
        seed: of that choice.

    Raises:
        ShapeError: fewer than two lines, or ends of different shapes.
        OptionError: NaN or infinity; most below 2.
    """
    if isinstance(most, bool) or not isinstance(most, int) or most < 2:
        raise OptionError(f"most is {most!r}; expected a whole number, 2 or more")
    noise, data, _ = _ends(pairs, least=2)
    if len(noise) > most:
        chosen = random.permutation(len(noise), seed, stream=_SUBSET)[:most]
        noise, data = noise[chosen], data[chosen]
    # Centred, inner products lose the fewest digits; differences stay as they are.
    noise, data = noise - noise.mean(0), data - data.mean(0)
    size = noise.square().sum(1) + data.square().sum(1)
    share = depth = 0.0
    for k in torch.arange(len(noise)).split(max(1, _CHUNK_BYTES // (64 * len(noise)))):
        others = size[k, None] + size
        a, b, p = _products(noise[k], data[k], noise, data)
        # Lines that keep their distance approach by rounding alone.
        inside = torch.minimum(a, b) - p > 1e-12 * others
        least = (a * b - p.square()).clamp(min=0.0) / (a + b - 2.0 * p)
        near = 1.0 - (least / torch.minimum(a, b)).sqrt()
        share += float(inside.sum())
        depth += float(near[inside].sum())
    count = len(noise) * (len(noise) - 1)
    return Crossing(share / count, depth / count, len(noise))


def _products(noise_i: Tensor, data_i: Tensor, noise: Tensor, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|a|², |b|² and a·b (I, J) of the differences a of noise and b of data between lines i and j."""

    def between(x: Tensor, y: Tensor, x_all: Tensor, y_all: Tensor) -> Tensor:
        own, others = (x * y).sum(1)[:, None], (x_all * y_all).sum(1)
        return own + others - x @ y_all.T - y @ x_all.T

    a, b = between(noise_i, noise_i, noise, noise), between(data_i, data_i, data, data)
    return a.clamp(min=0.0), b.clamp(min=0.0), between(noise_i, data_i, noise, data)


def _ends(pairs: Any, least: int = 1) -> tuple[Tensor, Tensor, torch.Size]:
    """Noise and data as float64 matrices (n, D) in path units, and the shape (n, …) they had."""
    ends: Any = pairs if isinstance(pairs, tuple) else (getattr(pairs, "noise", None), getattr(pairs, "data", None))
    if len(ends) != 2 or not all(isinstance(end, Tensor) for end in ends):
        raise OptionError(f"pairs is a {type(pairs).__name__}; expected (noise, data), or an object that has both")
    noise, data = ends
    if noise.shape != data.shape:
        raise ShapeError(f"noise has shape {tuple(noise.shape)} and data {tuple(data.shape)}; expected the same")
    normalisation = getattr(pairs, "normalisation", None)
    if normalisation is not None:
        # float64, so that a cost in path units does not carry the rounding of the data's own.
        data = normalisation.apply(data.double())
    return rows(noise, "noise", least), rows(data, "data", least), noise.shape
