"""Noise: known answers of the generator, addresses, and the law of the numbers."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluvial import random
from problems import one_line

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert tuple(int(word) for word in random.philox(counter, key)) == expected


def test_philox_on_tensors_equals_philox_on_each_number():
    words = torch.tensor([0, 1, 7, ONES], dtype=torch.int64)
    together = random.philox((words, words.flip(0), 5, 6), (1, 2))
    for i, (first, second) in enumerate(zip(words.tolist(), words.flip(0).tolist())):
        assert [int(w[i]) for w in together] == [int(w) for w in random.philox((first, second, 5, 6), (1, 2))]


def draw(kind, samples, shape, seed=3, **options):
    return getattr(random, kind)(samples, shape, seed, **options)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(order=st.permutations(range(9)), cut=st.integers(1, 8))
def test_sample_depends_on_its_number_alone(kind, dtype, order, cut):
    whole = draw(kind, 9, (2, 3), dtype=dtype)
    assert torch.equal(draw(kind, torch.tensor(order), (2, 3), dtype=dtype), whole[torch.tensor(order)])
    parts = [draw(kind, range(cut), (2, 3), dtype=dtype), draw(kind, range(cut, 9), (2, 3), dtype=dtype)]
    assert torch.equal(torch.cat(parts), whole)


def test_element_of_a_sample_depends_on_its_place_alone():
    assert torch.equal(random.normal(4, (3, 5), 1).flatten(1), random.normal(4, (15,), 1))
    assert torch.equal(random.normal(4, (15,), 1), random.normal(4, (40,), 1)[:, :15])


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_float32_is_float64_rounded(kind):
    exact = draw(kind, 500, (7,), dtype=torch.float64)
    rounded = draw(kind, 500, (7,), dtype=torch.float32)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact.float().clamp(max=1 - 2**-24) if kind == "uniform" else exact.float())


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (4,), (5,), (3, 1, 7), (0,)])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_shapes(kind, shape):
    numbers = draw(kind, 6, shape)
    assert numbers.shape == (6, *shape)
    # Every element is a number of its own.
    assert len(numbers.unique()) == numbers.numel()


def test_no_samples():
    assert random.normal(0, (3,), 0).shape == (0, 3)


def test_normal_law():
    x = random.normal(40_000, (5,), 11, dtype=torch.float64).flatten().numpy()
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3
    n = len(x)
    for power, moment, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((x**power).mean() - moment) < 4 * math.sqrt(spread / n)


def test_uniform_law():
    u = random.uniform(40_000, (5,), 11, dtype=torch.float64).flatten().numpy()
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    assert u.min() > 0
    assert u.max() < 1


def test_uniform_never_reaches_its_ends():
    ends = torch.tensor([0, ONES], dtype=torch.int64)
    assert random._unit(ends).tolist() == [2.0**-33, 1 - 2.0**-33]
    assert float(random.uniform(100_000, (8,), 0).max()) < 1.0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"seed": 0}, {"seed": 1}),
        ({"seed": 0}, {"seed": 1 << 32}),
        ({"seed": 0, "draw": 0}, {"seed": 0, "draw": 1}),
        ({"seed": 0, "stream": random.START}, {"seed": 0, "stream": random.STEP}),
        ({"samples": range(4000)}, {"samples": range(1 << 32, (1 << 32) + 4000)}),
        ({"samples": range(4000)}, {"samples": range(4000, 8000)}),
    ],
    ids=["seed", "high half of the seed", "draw", "stream", "high half of the sample", "sample"],
)
def test_addresses_are_independent(first, second):
    defaults = {"samples": 4000, "shape": (3,), "seed": 0, "dtype": torch.float64}
    a, b = (random.normal(**{**defaults, **given}).flatten() for given in (first, second))
    assert not (a == b).any()
    assert abs(float((a * b).mean())) < 4 / math.sqrt(len(a))


def test_elements_and_samples_are_uncorrelated():
    x = random.normal(4000, (8,), 5, dtype=torch.float64)
    correlation = torch.corrcoef(x.T) - torch.eye(8, dtype=torch.float64)
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(4000)
    assert abs(float((x[1:] * x[:-1]).mean())) < 4 / math.sqrt(x[1:].numel())


def test_streams_are_all_different():
    names = ["START", "STEP", "TIME", "TRAIN", "ORDER", "DROP", "COUPLING", "DATA"]
    assert len({getattr(random, name) for name in names}) == len(names)


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_is_one(n):
    assert random.permutation(n, 4).sort().values.tolist() == list(range(n))


def test_permutation_depends_on_seed_and_draw_and_is_fair():
    assert torch.equal(random.permutation(50, 4), random.permutation(50, 4))
    assert not torch.equal(random.permutation(50, 4), random.permutation(50, 5))
    assert not torch.equal(random.permutation(50, 4), random.permutation(50, 4, draw=1))
    counts = torch.zeros(4, 4)
    for seed in range(1200):
        counts[torch.arange(4), random.permutation(4, seed)] += 1
    # 300 expected in each cell, standard deviation 15.
    assert float((counts - 300).abs().max()) < 65


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_whole_range_of_seeds(seed):
    assert bool(random.normal(3, (4,), seed).isfinite().all())


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match="expected an integer from 0") as caught:
        random.normal(3, (4,), seed)
    assert str(seed) in one_line(caught.value)


def test_fresh_seed_follows_torch():
    torch.manual_seed(0)
    first = [random.fresh_seed() for _ in range(3)]
    torch.manual_seed(0)
    assert [random.fresh_seed() for _ in range(3)] == first
    assert len(set(first)) == 3
    assert all(0 <= seed < 2**64 for seed in first)
