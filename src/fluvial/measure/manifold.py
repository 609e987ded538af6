"""Precision and recall of samples: is each one like the data, and is all of the data there?

Both laws are taken for the union of balls about their samples, each reaching to its k-th nearest neighbour in its own
set. One distance cannot tell blurred samples from missing ones; these two figures can.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluvial.errors import OptionError, ShapeError
from fluvial.measure.distances import rows

_CHUNK_BYTES = 64 * 2**20
_ROUNDING = 1e-12  # of squared distances, over the largest square


@dataclass(frozen=True)
class PrecisionRecall:
    """How two sets cover each other. A perfect sampler does not reach 1: compare with `real_floor`.

    Attributes:
        precision: share of samples inside some real ball: fidelity. Between equal laws it is not 1 but depends on k,
            the counts and the dimension.
        recall: share of real data inside some ball of the samples: variety.
        density: real balls around a sample, on average and over k. 1 between equal laws, whatever they are, and above
            for samples that crowd where the data are dense. One far outlier of the data raises it far less than it
            raises precision.
        coverage: share of real balls with a sample in them. An outlier among the samples cannot raise it.
        k: the nearest neighbour that balls reach to. n_real, n_fake: the counts.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    k: int
    n_real: int
    n_fake: int


def precision_recall(features_real: Tensor, features_fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Precision, recall, density and coverage of fake features y_j (M, D) against real ones x_i (N, D).

        precision = mean_j [y_j in some B(x_i)]         density  = Σ_ij [y_j in B(x_i)] / (k M)
        recall    = mean_i [x_i in some B(y_j)]         coverage = mean_i [some y_j in B(x_i)]

    B is the closed ball about a sample up to its k-th nearest neighbour in its own set, itself not counted. In
    float64 on the CPU; distances are held for at most 64 MB at a time, and a tie up to rounding is inside.

    Args:
        features_real, features_fake: (N, D) and (M, D), more than k rows each. At equal counts the two sets have equal
            chances: compare figures at the same counts and k only.
        k: 1 or more. 3 is usual for precision and recall; Naeem et al. use 5.

    Raises:
        ShapeError: k rows or fewer, or other widths.
        OptionError: NaN or infinity; k below 1.

    Source: Kynkäänniemi, Karras, Laine, Lehtinen, Aila: Improved precision and recall metric for assessing generative
    models (2019), https://arxiv.org/abs/1904.06991; Naeem, Oh, Uh, Choi, Yoo: Reliable fidelity and diversity metrics
    for generative models (2020), https://arxiv.org/abs/2002.09797
    """
    if k < 1:
        raise OptionError(f"k is {k}; expected 1 or more")
    real = rows(features_real, "features_real", least=k + 1)
    fake = rows(features_fake, "features_fake", least=k + 1)
    if real.shape[1] != fake.shape[1]:
        widths = f"{real.shape[1]} and {fake.shape[1]}"
        raise ShapeError(f"features_real and features_fake have {widths} numbers per sample; expected the same width")
    # Distances come from matrix products; centred, they lose the fewest digits.
    centre = torch.cat([real, fake]).mean(dim=0)
    real, fake = real - centre, fake - centre
    slack = _ROUNDING * float(torch.cat([real, fake]).square().sum(1).max())
    reach_real, reach_fake = (_reach(x, k) + slack for x in (real, fake))
    of_fake = torch.zeros(len(fake), dtype=torch.int64)  # the real balls around each
    recalled, covered = [], []
    for part, reach in zip(real.split(_rows_of(fake)), reach_real.split(_rows_of(fake))):
        squared = _squared(part, fake)
        inside = squared <= reach[:, None]  # (real, fake): the fake one in the real one's ball
        of_fake += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((squared <= reach_fake).any(1))
    return PrecisionRecall(
        precision=_share(of_fake > 0),
        recall=_share(torch.cat(recalled)),
        density=float(of_fake.double().mean()) / k,
        coverage=_share(torch.cat(covered)),
        k=k,
        n_real=len(real),
        n_fake=len(fake),
    )


def _reach(x: Tensor, k: int) -> Tensor:
    """The squared distance of each row of x (N, D) to its k-th nearest neighbour."""
    # Each is its own nearest, at rounding from 0.
    return torch.cat([_squared(part, x).kthvalue(k + 1, dim=1).values for part in x.split(_rows_of(x))])


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (n, m), rounding below 0 included."""
    return a.square().sum(1, keepdim=True) + b.square().sum(1) - 2.0 * a @ b.T


def _rows_of(b: Tensor) -> int:
    return max(1, _CHUNK_BYTES // (8 * len(b)))


def _share(x: Tensor) -> float:
    return float(x.double().mean())
