"""Kernel distances: laws of an unbiased estimate, closed forms for Gaussians and moments, invariances."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from fluvial.errors import OptionError, ShapeError
from fluvial.measure import kernel as module
from fluvial.measure import kid, median_distance, mmd


def normal(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(a, b, kernel) -> float:
    def mean(x, y, skip):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (skip and i == j)]
        return sum(kernel(x[i], y[j]) for i, j in pairs) / len(pairs)

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


def gaussian(h: float):
    return lambda x, y: math.exp(-float((x - y).square().sum()) / (2 * h * h))


def cubic(x, y):
    return (float(x @ y) / len(x) + 1) ** 3


DISTANCES = {"mmd": lambda a, b: mmd(a, b, 0.8), "kid": lambda a, b: kid(a, b).mean}
KERNELS = {"mmd": gaussian(0.8), "kid": cubic}


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(("n", "m", "width"), [(13, 17, 3), (2, 2, 1), (2, 3, 5)])
def test_is_the_mean_over_pairs_of_different_samples(name, n, m, width):
    a, b = normal(n, width, 1), normal(m, width, 2) + 0.5
    expected = by_loops(a, b, KERNELS[name])
    assert DISTANCES[name](a, b) == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert DISTANCES[name](b, a) == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("name", DISTANCES)
def test_is_unbiased_for_every_law(name):
    # Of a U-statistic the mean over all subsets of a finite set is, exactly, that of the whole set.
    a, b = normal(6, 2, 1), 2.0 * normal(5, 2, 2) + 1.0
    parts = itertools.product(itertools.combinations(range(6), 3), itertools.combinations(range(5), 2))
    found = [DISTANCES[name](a[list(i)], b[list(j)]) for i, j in parts]
    assert statistics.fmean(found) == pytest.approx(DISTANCES[name](a, b), rel=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
def test_is_zero_in_expectation_for_equal_laws_however_few_the_samples(name):
    draws = normal(400 * 20, 3, 3).reshape(400, 2, 10, 3)
    found = [DISTANCES[name](a, b) for a, b in draws]
    error = statistics.stdev(found) / 20
    assert abs(statistics.fmean(found)) < 3 * error
    # With each sample paired with itself too, as in a biased estimate, the mean would be this far above 0.
    bias = {"mmd": 2 * (1 - 0.15) / 10, "kid": 2 * (12.2 - 2.0) / 10}[name]
    assert error < 0.05 * bias
    assert 100 < sum(value < 0 for value in found) < 300


def mmd_of_gaussians(shift: float, std_a: float, std_b: float, width: int, h: float) -> float:
    """For Normal(0, std_a² I), Normal(m, std_b² I) with |m| = shift: x - y is Gaussian, and so is its kernel's mean."""

    def mean(distance, variance):
        return (h * h / (h * h + variance)) ** (width / 2) * math.exp(-(distance**2) / (2 * (h * h + variance)))

    return mean(0, 2 * std_a**2) + mean(0, 2 * std_b**2) - 2 * mean(shift, std_a**2 + std_b**2)


@pytest.mark.parametrize(("shift", "std_b", "width", "h"), [(1.0, 1.0, 2, 1.0), (0.0, 2.0, 3, 1.5), (0.7, 0.5, 1, 0.3)])
def test_mmd_of_gaussians_is_the_closed_form(shift, std_b, width, h):
    n, found = 1500, []
    for seed in range(8):
        a, b = normal(n, width, 2 * seed), std_b * normal(n, width, 2 * seed + 1)
        b[:, 0] += shift
        found.append(mmd(a, b, h))
    expected = mmd_of_gaussians(shift, 1.0, std_b, width, h)
    error = statistics.stdev(found) / math.sqrt(8)
    assert statistics.fmean(found) == pytest.approx(expected, abs=4 * error)
    assert error < 0.03 * expected


def test_kid_in_one_dimension_is_the_difference_of_three_moments():
    # E (x y + 1)³ = Σ_k binom(3, k) E x^k E y^k; of one set, less the pairs of a sample with itself.
    a, b = normal(40, 1, 1) + 1.0, 2.0 * normal(31, 1, 2)

    def mean(x, y, one_set):
        total = sum(math.comb(3, k) * float((x**k).sum() * (y**k).sum()) for k in range(4))
        same = float(((x * x + 1) ** 3).sum()) if one_set else 0.0
        return (total - same) / (len(x) * (len(y) - one_set))

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert kid(a, b).mean == pytest.approx(expected, rel=1e-12)


def test_kid_of_gaussians_is_the_closed_form():
    # x, x' ~ Normal(0, I), y, y' ~ Normal(m, I), s = |m|²: the odd moments of x·x' and x·y vanish, and
    # y·y' - s has the moments 0, 2 s + D, 6 s.
    width, n, found = 4, 1500, []
    shift = torch.tensor([1.0, -0.5, 0.5, 0.0], dtype=torch.float64)
    s, d = float(shift @ shift), width

    def mean(first, second, third):
        return 1 + 3 * first / d + 3 * second / d**2 + third / d**3

    fake = mean(s, s * s + 2 * s + d, s**3 + 3 * s * (2 * s + d) + 6 * s)
    expected = mean(0, d, 0) + fake - 2 * mean(0, s + d, 0)
    for seed in range(8):
        found.append(kid(normal(n, width, 2 * seed), normal(n, width, 2 * seed + 1) + shift, size=n).mean)
    error = statistics.stdev(found) / math.sqrt(8)
    assert statistics.fmean(found) == pytest.approx(expected, abs=4 * error)
    assert error < 0.02 * expected


def test_subsets_average_to_the_whole_and_say_how_they_were_drawn():
    a, b = normal(300, 5, 1), normal(200, 5, 2) + 0.4
    whole, most, parts = kid(a, b), kid(a, b, size=250, subsets=20), kid(a, b, size=60, subsets=200)
    assert (most.size, most.subsets, parts.size, parts.subsets) == (250, 20, 60, 200)
    assert parts.mean == pytest.approx(whole.mean, abs=4 * parts.std / math.sqrt(200))
    # b is taken whole, and of a's 300 rows all but 50.
    assert most.mean == pytest.approx(whole.mean, abs=4 * most.std / math.sqrt(20))
    assert most.std < 0.3 * parts.std
    assert parts == kid(a, b, size=60, subsets=200, seed=0) != kid(a, b, size=60, subsets=200, seed=1)
    assert (whole.size, whole.subsets) == (300, 1)
    assert math.isnan(whole.std)
    assert math.isnan(kid(a, b, size=100, subsets=1).std)


def test_subsets_repeat_no_row():
    seen = []
    a = torch.arange(50, dtype=torch.float64)[:, None]

    def noted(x, y):
        seen.append(x[:, 0].tolist())
        return x @ y.T

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_cubic", noted)
        kid(a, a + 100, subsets=3, size=20)
    assert all(len(set(part)) == 20 for part in seen)
    assert len({frozenset(part) for part in seen}) == 6


def test_what_does_not_change_them():
    a, b = normal(60, 5, 1), 1.5 * normal(50, 5, 2) + 0.4
    turn, shift = torch.linalg.qr(normal(5, 5, 3)).Q, 100 * normal(1, 5, 4)
    base = mmd(a, b)
    assert mmd(a @ turn + shift, b @ turn + shift) == pytest.approx(base, rel=1e-9)
    assert mmd(7.0 * a, 7.0 * b) == pytest.approx(base, rel=1e-11)
    assert mmd(7.0 * a, 7.0 * b, 7.0) == pytest.approx(mmd(a, b, 1.0), rel=1e-11)
    assert mmd(a.flip(0), b.flip(0), 1.0) == pytest.approx(mmd(a, b, 1.0), rel=1e-11)
    assert mmd(a.reshape(60, 1, 5), b.reshape(50, 5, 1)) == base
    assert kid(a @ turn, b @ turn).mean == pytest.approx(kid(a, b).mean, rel=1e-11)
    assert mmd(a.float(), b.float()) == mmd(a.float().double(), b.float().double())


def test_default_bandwidth_is_the_median_of_the_pooled_sets():
    a, b = normal(9, 2, 1), normal(8, 2, 2) + 3.0
    pooled = torch.cat([a, b]).tolist()
    distances = sorted(math.dist(p, q) for p, q in itertools.combinations(pooled, 2))
    middle = distances[(len(distances) - 1) // 2]
    assert median_distance(torch.cat([a, b])) == pytest.approx(middle, rel=1e-12)
    assert mmd(a, b) == pytest.approx(mmd(a, b, middle), rel=1e-12)
    # For Normal(0, 1) the difference is Normal(0, 2): a median of 0.6745 √2, of many samples too.
    assert median_distance(normal(5000, 1, 1)) == pytest.approx(0.6745 * math.sqrt(2), rel=0.03)


def test_chunks_do_not_matter(monkeypatch):
    a, b = normal(50, 2, 1), normal(31, 2, 2)
    whole = mmd(a, b), kid(a, b).mean, kid(a, a + 1.0).mean
    monkeypatch.setattr(module, "_CHUNK_BYTES", 8 * 31 * 7)
    assert (mmd(a, b), kid(a, b).mean, kid(a, a + 1.0).mean) == pytest.approx(whole, rel=1e-12)


def test_bad_input_is_named():
    good, bad = normal(5, 3, 1), normal(5, 3, 1)
    bad[1, 2] = math.nan
    for distance in (mmd, kid):
        with pytest.raises(OptionError, match="b has NaN or infinity in 1 of 5 samples"):
            distance(good, bad)
        with pytest.raises(ShapeError, match="have 3 and 4 numbers per sample"):
            distance(good, normal(5, 4, 1))
        with pytest.raises(ShapeError, match=r"\(1, 3\); expected 2 or more"):
            distance(good[:1], good)
    with pytest.raises(OptionError, match="bandwidth is 0"):
        mmd(good, good, 0.0)
    with pytest.raises(OptionError, match="median distance of the pooled samples is 0"):
        mmd(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(OptionError, match="subsets is 0"):
        kid(good, good, subsets=0)
    with pytest.raises(OptionError, match="size is 1"):
        kid(good, good, size=1)
