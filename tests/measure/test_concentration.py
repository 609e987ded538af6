"""Spread within classes: against what the clusters were built with."""

from __future__ import annotations

import math

import pytest
import torch

from fluvial.errors import OptionError, ShapeError
from fluvial.measure import within_class_spread, within_mode_spread


def cluster(centre: float, variance: float, n: int, seed: int, width: int = 4) -> torch.Tensor:
    """Rows (n, width) with exactly this mean and this mean variance over the dimensions."""
    raw = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    raw = raw - raw.mean(dim=0)
    return centre + raw * math.sqrt(variance / float(raw.var(dim=0).mean()))


def labels(*counts: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def test_spread_of_known_clusters():
    x = torch.cat([cluster(0.0, 0.5, 11, 1), cluster(7.0, 2.0, 31, 2)])
    spread = within_class_spread(x, labels(11, 31))
    assert spread.per_class == pytest.approx({0: 0.5, 1: 2.0}, rel=1e-12)
    assert spread.overall == pytest.approx((10 * 0.5 + 30 * 2.0) / 40, rel=1e-12)
    assert spread.counts == {0: 11, 1: 31}
    assert spread.ratio is None
    assert spread.ratio_per_class is None


def test_spread_is_unbiased_for_small_classes():
    # 2000 classes of three samples each from Normal(mean_c, 0.3²): a biased variance would be 2/3 of it.
    g = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(2000, 3, 8, generator=g) + 5.0 * torch.randn(2000, 1, 8, generator=g)
    spread = within_class_spread(x.reshape(6000, 2, 4), torch.arange(2000).repeat_interleave(3))
    assert spread.overall == pytest.approx(0.09, rel=0.03)


def test_samples_half_way_to_their_class_mean_have_a_quarter_of_the_variance():
    real = torch.cat([cluster(0.0, 1.0, 40, 1), cluster(5.0, 3.0, 20, 2)])
    means = torch.cat([torch.zeros(40, 1), torch.full((20, 1), 5.0)])
    pulled = means + 0.5 * (real - means)
    spread = within_class_spread(pulled, labels(40, 20), real, labels(40, 20))
    assert spread.ratio == pytest.approx(0.25, rel=1e-12)
    assert spread.ratio_per_class == pytest.approx({0: 0.25, 1: 0.25}, rel=1e-12)


def test_another_mix_of_classes_is_not_another_spread():
    real = torch.cat([cluster(0.0, 1.0, 100, 1), cluster(5.0, 9.0, 10, 2)])
    x = torch.cat([cluster(0.0, 1.0, 10, 3), cluster(5.0, 9.0, 100, 4)])
    spread = within_class_spread(x, labels(10, 100), real, labels(100, 10))
    assert spread.ratio == pytest.approx(1.0, rel=1e-12)


def test_order_and_shift_do_not_matter():
    x, y = torch.cat([cluster(0.0, 1.0, 9, 1), cluster(5.0, 3.0, 14, 2)]), labels(9, 14)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    moved = within_class_spread(x[order] + 100.0, y[order])
    assert moved.per_class == pytest.approx(within_class_spread(x, y).per_class, rel=1e-10)


def test_a_single_sample_is_counted_but_has_no_spread():
    x = torch.cat([cluster(0.0, 0.5, 11, 1), cluster(7.0, 1.0, 1 + 1, 2)[:1]])
    spread = within_class_spread(x, labels(11, 1), x, labels(11, 1))
    assert spread.counts == {0: 11, 1: 1}
    assert math.isnan(spread.per_class[1])
    assert spread.overall == pytest.approx(0.5, rel=1e-12)
    assert spread.ratio_per_class == pytest.approx({0: 1.0})


def test_collapse_is_zero():
    real = torch.cat([cluster(0.0, 1.0, 10, 1), cluster(5.0, 3.0, 10, 2)])
    collapsed = torch.tensor([0.0, 5.0]).repeat_interleave(10)[:, None].expand(20, 4)
    spread = within_class_spread(collapsed, labels(10, 10), real, labels(10, 10))
    assert spread.overall == 0.0
    assert spread.ratio == 0.0


def test_modes_are_found_by_the_nearest_mean():
    x = torch.cat([cluster(0.2, 0.04, 30, 1), cluster(9.9, 0.09, 20, 2)])
    real = torch.cat([cluster(0.0, 0.08, 50, 3), cluster(10.0, 0.09, 60, 4)])
    means = torch.tensor([0.0, 10.0, 500.0])[:, None].expand(3, 4)
    spread = within_mode_spread(x, means, real)
    # A displaced mode keeps its own variance, and the mode that nothing fell to is not there.
    assert spread.per_class == pytest.approx({0: 0.04, 1: 0.09}, rel=1e-10)
    assert spread.ratio_per_class == pytest.approx({0: 0.5, 1: 1.0}, rel=1e-10)
    assert spread.counts == {0: 30, 1: 20}
    assert within_mode_spread(x, means).overall == pytest.approx(spread.overall)


def test_bad_input_is_named():
    x, y = cluster(0.0, 1.0, 6, 1), labels(3, 3)
    with pytest.raises(ShapeError, match=r"labels has shape \(5,\); expected \(6,\)"):
        within_class_spread(x, y[:5])
    with pytest.raises(OptionError, match=r"labels is torch\.float32; expected integers"):
        within_class_spread(x, y.float())
    with pytest.raises(OptionError, match="only one of them"):
        within_class_spread(x, y, x)
    with pytest.raises(ShapeError, match="one sample in each of 6 classes"):
        within_class_spread(x, torch.arange(6))
    with pytest.raises(ShapeError, match="x and reference have 4 and 3 numbers"):
        within_class_spread(x, y, x[:, :3], y)
    with pytest.raises(ShapeError, match="reference has 1 samples of class 1"):
        within_class_spread(x, y, x[:4], y[:4])
    with pytest.raises(ShapeError, match="x and means have 4 and 2 numbers"):
        within_mode_spread(x, torch.zeros(3, 2))
    with pytest.raises(OptionError, match="x has NaN or infinity in 1 of 6"):
        within_class_spread(x.index_fill(0, torch.tensor([2]), math.nan), y)
