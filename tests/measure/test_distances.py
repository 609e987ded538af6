"""Distances against closed forms, brute force and other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from fluvial.errors import OptionError, ShapeError
from fluvial.measure import distances as module
from fluvial.measure import energy_distance, frechet, real_floor, sliced_wasserstein


def normal(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_moments(mean: torch.Tensor, covariance: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """Rows (n, D) whose mean and unbiased covariance are exactly these."""
    raw = normal(n, len(mean), seed)
    white = torch.linalg.qr(raw - raw.mean(dim=0)).Q * math.sqrt(n - 1)
    return mean + white @ torch.linalg.cholesky(covariance).T


def by_sqrtm(a: torch.Tensor, b: torch.Tensor) -> float:
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = np.asarray(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    shift = a.numpy().mean(axis=0) - b.numpy().mean(axis=0)
    return float(shift @ shift + np.trace(cov_a + cov_b - 2.0 * root))


# Fréchet


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    # Covariances with common eigenvectors: |shift|² + Σ (std_a - std_b)².
    basis = torch.linalg.qr(normal(6, 6, 1)).Q
    std_a = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 0.0], dtype=torch.float64) + 1e-3
    std_b = torch.tensor([0.4, 0.5, 0.2, 2.5, 1.0, 1.0], dtype=torch.float64)
    shift = torch.arange(6, dtype=torch.float64) / 3
    a = with_moments(torch.zeros(6).double(), basis @ torch.diag(std_a**2) @ basis.T, 200, seed=2)
    b = with_moments(shift, basis @ torch.diag(std_b**2) @ basis.T, 300, seed=3)
    expected = float(shift.square().sum() + (std_a - std_b).square().sum())
    assert frechet(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_two_by_two_gaussians_that_do_not_commute():
    # For 2 x 2 matrices tr (A B)^{1/2} = sqrt(tr(A B) + 2 sqrt(det A det B)).
    cov_a = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    cov_b = torch.tensor([[0.5, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    zero = torch.zeros(2).double()
    root = math.sqrt(torch.trace(cov_a @ cov_b) + 2 * math.sqrt(torch.det(cov_a) * torch.det(cov_b)))
    expected = float(torch.trace(cov_a + cov_b)) - 2 * root
    a, b = with_moments(zero, cov_a, 50, 1), with_moments(zero, cov_b, 70, 2)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_agrees_with_sqrtm_when_well_conditioned():
    a = normal(500, 20, 1) @ normal(20, 20, 2)
    b = normal(400, 20, 3) @ normal(20, 20, 4) + 0.3
    assert frechet(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-8)


def test_frechet_of_rank_deficient_sets_is_that_of_their_span():
    # 8 and 6 rows lie in 12 of the 40 dimensions; padding with zero coordinates and rotating changes nothing.
    a, b = normal(8, 12, 1), 2.0 * normal(6, 12, 2) + 1.0
    gram = (a - a.mean(0)) @ (b - b.mean(0)).T / math.sqrt(7 * 5)
    expected = float((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum())
    expected -= 2.0 * float(torch.linalg.matrix_norm(gram, ord="nuc"))
    embed = torch.linalg.qr(normal(40, 40, 3)).Q[:12]
    assert frechet(a @ embed, b @ embed) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "width"), [(300, 16), (10, 64), (2, 5)])
def test_frechet_of_a_set_and_itself_is_zero(n: int, width: int):
    x = 100.0 * normal(n, width, 1) + 1000.0
    assert frechet(x, x.clone()) <= 1e-11 * float(x.var(0).sum())
    assert frechet(x, x.flip(0)) <= 1e-11 * float(x.var(0).sum())


def test_frechet_is_symmetric_and_does_not_see_a_rotation_and_scales_with_the_square():
    a, b = normal(60, 9, 1), normal(50, 9, 2) @ normal(9, 9, 3) + 1.0
    turn = torch.linalg.qr(normal(9, 9, 4)).Q
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-12)
    assert frechet(a @ turn, b @ turn) == pytest.approx(frechet(a, b), rel=1e-11)
    assert frechet(3.0 * a, 3.0 * b) == pytest.approx(9.0 * frechet(a, b), rel=1e-11)


def test_frechet_computes_in_float64_whatever_it_is_given():
    a, b = (normal(100, 8, 1) + 300.0).float(), (normal(100, 8, 2) + 300.0).float()
    assert frechet(a, b) == frechet(a.double(), b.double())


# Sliced Wasserstein


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_sliced_wasserstein_in_one_dimension_is_wasserstein(p: float):
    a = normal(40, 1, 1)
    assert sliced_wasserstein(a, a + 0.7, projections=3, p=p) == pytest.approx(0.7, rel=1e-12)
    assert sliced_wasserstein(a[:, 0], a[:, 0] - 0.7, projections=3, p=p) == pytest.approx(0.7, rel=1e-12)


@pytest.mark.parametrize(("width", "projections"), [(2, 256), (5, 5), (5, 20), (16, 64)])
def test_sliced_wasserstein_of_a_shift(width: int, projections: int):
    a, shift = normal(30, width, 1), normal(1, width, 2)
    expected = float(shift.norm()) / math.sqrt(width)
    assert sliced_wasserstein(a, a + shift, projections) == pytest.approx(expected, rel=1e-12)


def test_sliced_wasserstein_of_a_scaling():
    # u·x and 3 u·x have the same order, so that the distance is 2 sqrt(mean (u·x)²) = 2 |x| / √D in the mean.
    a = normal(30, 4, 1)
    expected = 2.0 * math.sqrt(float(a.square().sum(1).mean()) / 4)
    assert sliced_wasserstein(a, 3.0 * a, projections=64) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(7, 5), (6, 4), (12, 4), (3, 100)])
def test_sliced_wasserstein_of_unequal_counts_is_exact(n: int, m: int):
    a, b = normal(n, 1, 1), 2.0 * normal(m, 1, 2) + 0.5
    expected = scipy.stats.wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy())
    assert sliced_wasserstein(a, b, projections=1, p=1.0) == pytest.approx(expected, rel=1e-12)
    # Every sample repeated until the counts agree: the same distributions, and sorting pairs them.
    wide_a, wide_b = a.repeat_interleave(m, 0).sort(0).values, b.repeat_interleave(n, 0).sort(0).values
    squared = float((wide_a - wide_b).square().mean())
    assert sliced_wasserstein(a, b, projections=1) == pytest.approx(math.sqrt(squared), rel=1e-12)


def test_sliced_wasserstein_of_gaussians_tends_to_the_law():
    # The projections of Normal(0, 1) and Normal(0, 4) in any direction are 1 apart, so the distance is 1.
    zero, unit = torch.zeros(3).double(), torch.eye(3).double()
    a, b = with_moments(zero, unit, 8000, seed=1), with_moments(zero, 4.0 * unit, 6000, seed=2)
    assert sliced_wasserstein(a, b, projections=30) == pytest.approx(1.0, abs=0.003)


def test_directions_are_uniform_reproducible_and_a_prefix_of_more():
    directions = module._directions(4000, 3, seed=5)
    assert torch.allclose(directions.norm(dim=1), torch.ones(4000).double(), atol=1e-12)
    # 1/3 on the diagonal is exact for whole blocks; fourth moments of the uniform sphere are 1/5 and 1/15.
    assert float(directions[:, 0].pow(4).mean()) == pytest.approx(1 / 5, abs=0.01)
    assert float((directions[:, 0] * directions[:, 1]).square().mean()) == pytest.approx(1 / 15, abs=0.005)
    assert torch.equal(module._directions(99, 3, seed=5), directions[:99])
    assert not torch.allclose(module._directions(99, 3, seed=6), directions[:99], atol=0.1)


def test_sliced_wasserstein_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch):
    a, b = normal(50, 2, 8).reshape(25, 2, 2), normal(40, 4, 2)
    whole = sliced_wasserstein(a, b)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 32 * 65 * 7)
    assert sliced_wasserstein(a, b) == pytest.approx(whole, rel=1e-13)


# Energy distance


def test_energy_distance_is_the_mean_over_all_pairs():
    a, b = normal(13, 3, 1), normal(17, 3, 2) + 0.5

    def mean(x: torch.Tensor, y: torch.Tensor) -> float:
        return sum(math.dist(p, q) for p in x.tolist() for q in y.tolist()) / (len(x) * len(y))

    expected = 2 * mean(a, b) - mean(a, a) - mean(b, b)
    assert energy_distance(a, b) == pytest.approx(expected, abs=1e-8)
    assert energy_distance(b, a) == pytest.approx(expected, abs=1e-8)


def test_energy_distance_in_one_dimension_is_the_square_of_scipys():
    a, b = normal(200, 1, 1), 1.5 * normal(150, 1, 2)
    expected = scipy.stats.energy_distance(a[:, 0].numpy(), b[:, 0].numpy()) ** 2
    assert energy_distance(a, b) == pytest.approx(expected, rel=1e-7)


def test_energy_distance_of_two_points_is_twice_their_distance_far_from_the_origin():
    a = torch.tensor([[1e6, 1e6]], dtype=torch.float64)
    assert energy_distance(a, a + torch.tensor([3.0, 4.0])) == pytest.approx(10.0, rel=1e-9)


def test_energy_distance_of_equal_sets_is_zero():
    a = 50.0 + normal(100, 30, 1)
    assert energy_distance(a, a.clone()) == 0.0
    assert energy_distance(a, a.flip(0)) < 1e-7
    assert energy_distance(a, torch.cat([a, a])) < 1e-7
    assert energy_distance(a, a + 0.1) > 1e-3


def test_energy_distance_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch):
    a, b = normal(50, 2, 1), normal(31, 2, 2)
    whole = energy_distance(a, b)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 8 * 31 * 3)
    assert energy_distance(a, b) == pytest.approx(whole, rel=1e-10)


# The floor


def test_floor_compares_disjoint_subsets_of_the_stated_count():
    real = torch.arange(101.0)[:, None]
    seen = []

    def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
        both = torch.cat([a, b])[:, 0].tolist()
        assert len(set(both)) == len(a) + len(b)
        seen.append(tuple(both))
        return float(len(a))

    floor = real_floor(overlap, real, n=30, repeats=4)
    assert (floor.mean, floor.std, floor.n) == (30.0, 0.0, 30)
    assert len(set(seen)) == 4
    seen.clear()
    assert real_floor(overlap, real, n=1000).n == 50
    # Even when nearly all of the data is used, each repeat divides it differently.
    assert len({frozenset(both[:50]) for both in seen}) == 5


def test_floor_of_one_law_is_what_two_fresh_sets_measure():
    # For Gaussians E |mean_a - mean_b|² = 2 D / n, the distance of this test.
    real = normal(4000, 10, 1)
    mean, std = real_floor(lambda a, b: float((a.mean(0) - b.mean(0)).square().sum()), real, 200, repeats=40)
    assert mean == pytest.approx(2 * 10 / 200, rel=0.2)
    # Chi-squared with 10 degrees of freedom: the standard deviation is sqrt(2 / 10) of the mean.
    assert std == pytest.approx(0.1 * math.sqrt(0.2), rel=0.35)


def test_floor_with_labels_has_the_same_classes_on_both_sides():
    labels = torch.tensor([0] * 31 + [1] * 10 + [2])

    def same_classes(a: torch.Tensor, b: torch.Tensor) -> float:
        assert torch.equal(a[:, 0].sort().values, b[:, 0].sort().values)
        return float(len(a))

    assert real_floor(same_classes, labels[:, None].double(), n=12, labels=labels).n == 12
    # 15 pairs of class 0 and 5 of class 1; the single sample of class 2 has no partner.
    assert real_floor(same_classes, labels[:, None].double(), n=100, labels=labels).n == 20


def test_floor_depends_on_the_seed_alone():
    real = normal(100, 3, 1)
    before = torch.get_rng_state()
    assert real_floor(frechet, real, 40, seed=3) == real_floor(frechet, real, 40, seed=3)
    assert real_floor(frechet, real, 40, seed=3) != real_floor(frechet, real, 40, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


# Bad input


@pytest.mark.parametrize("distance", [frechet, sliced_wasserstein, energy_distance])
def test_bad_sets_are_named(distance):
    good, bad = normal(5, 3, 1), normal(5, 3, 1)
    bad[1, 2], bad[4] = math.nan, math.inf
    with pytest.raises(OptionError, match=r"b has NaN or infinity in 2 of 5 samples"):
        distance(good, bad)
    with pytest.raises(ShapeError, match="have 3 and 4 numbers per sample"):
        distance(good, normal(5, 4, 1))
    with pytest.raises(ShapeError, match=r"\(0, 3\); expected [12] or more samples"):
        distance(good[:0], good)


def test_a_covariance_needs_two_rows():
    with pytest.raises(ShapeError, match=r"features_b has shape \(1, 3\); expected 2 or more"):
        frechet(normal(5, 3, 1), normal(1, 3, 1))


def test_bad_options_are_named():
    x = normal(5, 3, 1)
    with pytest.raises(OptionError, match="projections is 0"):
        sliced_wasserstein(x, x, projections=0)
    with pytest.raises(OptionError, match=r"p is 0\.5"):
        sliced_wasserstein(x, x, p=0.5)
    with pytest.raises(OptionError, match="n is 1"):
        real_floor(frechet, x, n=1)
    with pytest.raises(OptionError, match="repeats is 1"):
        real_floor(frechet, x, n=2, repeats=1)
    with pytest.raises(ShapeError, match="real has 3 samples"):
        real_floor(frechet, x[:3], n=2)
    with pytest.raises(ShapeError, match="labels have shape"):
        real_floor(frechet, x, n=2, labels=torch.zeros(4).long())
