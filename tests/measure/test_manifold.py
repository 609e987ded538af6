"""Precision and recall: sets whose answers are known, laws that hold for any two equal laws, brute force."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from fluvial.errors import OptionError, ShapeError
from fluvial.measure import manifold as module
from fluvial.measure import precision_recall


def normal(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def line(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def figures(found) -> tuple[float, ...]:
    return found.precision, found.recall, found.density, found.coverage


def test_known_answers_on_a_line():
    # Real balls for k = 1: 0 and 1 reach 1; 3 reaches 2; 10 reaches 7. Fake ones: 0.5 and 1.5 reach 1, 20 reaches 18.5.
    real, fake = line(0, 1, 3, 10), line(0.5, 1.5, 20)
    found = precision_recall(real, fake, k=1)
    # 0.5 lies in the balls of 0 and 1; 1.5 in those of 1 and 3; 20 in none.
    assert found.precision == pytest.approx(2 / 3)
    assert found.density == pytest.approx((2 + 2 + 0) / 3)
    # 10 has none of the fake ones in its ball: 3 to 17.
    assert found.coverage == pytest.approx(3 / 4)
    # 0 and 1 lie in the ball of 0.5; 3 and 10 in that of 20, which begins at 1.5.
    assert found.recall == 1.0
    assert (found.k, found.n_real, found.n_fake) == (1, 4, 3)


def test_ties_are_inside():
    # The second real point is exactly at the first one's reach from the fake ones, in units rounding cannot hold.
    for scale in (1.0, 0.1, 1e6):
        found = precision_recall(scale * line(0, 1, 2), scale * line(3, 4, 5), k=1)
        assert figures(found) == (1 / 3, 1 / 3, 1 / 3, 1 / 3)


def test_repeated_samples_have_no_reach_but_hold_each_other():
    real = line(0, 0, 5, 5)
    assert figures(precision_recall(real, line(0, 0, 0), k=1)) == (1.0, 0.5, 2.0, 0.5)
    assert precision_recall(real, line(0.1, 0.1, 5), k=1).precision == pytest.approx(1 / 3)


def test_dropped_and_added_modes_are_told_apart():
    left, right = normal(200, 2, 1), normal(200, 2, 2) + 100.0
    dropped = precision_recall(torch.cat([left, right]), normal(200, 2, 3))
    assert dropped.recall == pytest.approx(0.5, abs=0.03)
    # Of the mode that is there 1 - 1/2³ is covered, as of equal laws.
    assert dropped.coverage == pytest.approx(0.5 * 7 / 8, abs=0.03)
    assert dropped.precision > 0.9
    added = precision_recall(left, torch.cat([normal(200, 2, 3), right]))
    assert added.precision == pytest.approx(0.5, abs=0.03)
    assert added.recall > 0.9
    far = precision_recall(left, right)
    assert figures(far) == (0.0, 0.0, 0.0, 0.0)
    # Samples at the middle of the data only are precise, and recall little of them.
    narrow = precision_recall(left, 0.1 * normal(200, 2, 4))
    assert narrow.precision > 0.8
    assert max(narrow.recall, narrow.coverage) < 0.1


def test_equal_sets_are_perfect():
    x = normal(50, 3, 1)
    found = precision_recall(x, x.flip(0))
    assert (found.precision, found.recall, found.coverage) == (1.0, 1.0, 1.0)
    # Each sample lies in its own ball and, on average, in those of k others.
    assert found.density == pytest.approx(4 / 3)


@pytest.mark.parametrize(("width", "k", "n", "m"), [(1, 1, 60, 40), (4, 3, 50, 50), (12, 5, 30, 80)])
def test_density_and_coverage_of_equal_laws_do_not_depend_on_the_law(width, k, n, m):
    # A fresh sample is within the k-th neighbour with probability k/n; of the n + m - 1 others of a real one, the k
    # nearest are all real with probability Π (n - j)/(n + m - j).
    found = [precision_recall(normal(n, width, 2 * s).exp(), normal(m, width, 2 * s + 1).exp(), k) for s in range(150)]
    missed = math.prod((n - j) / (n + m - j) for j in range(1, k + 1))
    for name, expected in (("density", 1.0), ("coverage", 1.0 - missed)):
        values = [getattr(one, name) for one in found]
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert statistics.fmean(values) == pytest.approx(expected, abs=4 * error)
        assert error < 0.03


@pytest.mark.parametrize(("k", "n", "m", "width"), [(1, 2, 2, 1), (2, 3, 5, 3), (3, 23, 17, 2)])
def test_is_what_its_definition_says(k, n, m, width):
    real, fake = normal(n, width, 1).tolist(), (normal(m, width, 2) + 0.3).tolist()

    def reach(x, i):
        return sorted(math.dist(x[i], y) for j, y in enumerate(x) if j != i)[k - 1]

    in_real = [[math.dist(x, y) <= reach(real, i) for y in fake] for i, x in enumerate(real)]
    in_fake = [[math.dist(x, y) <= reach(fake, j) for j, y in enumerate(fake)] for x in real]
    expected = (
        sum(any(row[j] for row in in_real) for j in range(m)) / m,
        sum(map(any, in_fake)) / n,
        sum(map(sum, in_real)) / (k * m),
        sum(map(any, in_real)) / n,
    )
    found = precision_recall(torch.tensor(real), torch.tensor(fake), k)
    assert figures(found) == pytest.approx(expected, abs=1e-12)
    # The roles exchanged, precision is recall.
    swapped = precision_recall(torch.tensor(fake), torch.tensor(real), k)
    assert (swapped.precision, swapped.recall) == (found.recall, found.precision)


def test_what_does_not_change_it(monkeypatch):
    real, fake = normal(80, 5, 1), 1.3 * normal(70, 5, 2)
    base = precision_recall(real, fake)
    turn = torch.linalg.qr(normal(5, 5, 3)).Q
    assert precision_recall(7.0 * real @ turn + 50.0, 7.0 * fake @ turn + 50.0) == base
    assert precision_recall(real.float().reshape(80, 5, 1), fake.float().reshape(70, 1, 5)) == base
    monkeypatch.setattr(module, "_CHUNK_BYTES", 8 * 70 * 9)
    assert precision_recall(real, fake) == base


def test_bad_input_is_named():
    x = normal(5, 3, 1)
    with pytest.raises(OptionError, match="k is 0"):
        precision_recall(x, x, k=0)
    with pytest.raises(ShapeError, match=r"features_fake has shape \(3, 3\); expected 4 or more"):
        precision_recall(x, x[:3])
    with pytest.raises(ShapeError, match="have 3 and 2 numbers"):
        precision_recall(x, x[:, :2])
    with pytest.raises(OptionError, match="features_real has NaN"):
        precision_recall(x / 0.0, x)
