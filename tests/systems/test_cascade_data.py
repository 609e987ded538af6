"""The data of a cascade: smaller images, corrupted lower ones, and states that are exactly such images."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import fluvial as fl
from fluvial import paths
from fluvial.convention import Normalisation
from fluvial.errors import DataError, OptionError, ShapeError
from fluvial.systems import CLEAN, Augmentation, StageSource, stage_source
from fluvial.systems.cascade_lower import Stopped
from fluvial.systems.upsampling import allowed, corrupt, enlarge, noise_of, shrink
from fluvial.training import open_source
from fluvial.training.data import batches
from problems import normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("high", "low"), [(32, 16), (16, 8), (28, 14), (14, 7), (32, 8), (8, 1)])
def test_whole_factors_are_exact_means_of_blocks(high, low, dtype):
    # Of whole numbers, so that sums are exact in any order; the factors are powers of two.
    images = torch.randint(0, 256, (3, 2, high, high), generator=torch.Generator().manual_seed(0)).to(dtype)
    k = high // low
    blocks = images.reshape(3, 2, low, k, low, k).mean((3, 5))
    assert torch.equal(shrink(images, low), blocks)


@pytest.mark.parametrize(("high", "low"), [((9, 15), (3, 5)), ((9, 15), (4, 7)), ((7, 5), (6, 2)), ((5, 5), (5, 3))])
def test_any_factor_averages_areas(high, low):
    """The integral of the image, as constant pixels, over each new pixel: counted on a grid that both divide."""
    images = normal(2, 3, *high)
    fine = images.repeat_interleave(low[0], 2).repeat_interleave(low[1], 3)
    blocks = fine.reshape(2, 3, low[0], high[0], low[1], high[1]).mean((3, 5))
    torch.testing.assert_close(shrink(images, low), blocks, rtol=0, atol=1e-14)
    torch.testing.assert_close(shrink(images, low).mean((2, 3)), images.mean((2, 3)), rtol=0, atol=1e-14)


def test_no_alias_survives_where_the_factor_is_no_whole_number():
    stripes = (torch.arange(15) % 2).double().expand(1, 1, 15, 15)
    assert float((shrink(stripes, 4) - stripes.mean()).abs().max()) < 0.14  # picking pixels would leave 0 and 1
    assert torch.equal(shrink(stripes, 15), stripes)


def test_levels_and_noise_are_what_is_stated():
    augmentation = Augmentation(-1.0, 5.0, clean=0.25)
    index = torch.arange(40_000)
    level = augmentation.levels(index, seed=3)
    clean = level == CLEAN
    assert float(clean.double().mean()) == pytest.approx(0.25, abs=0.01)
    drawn = level[~clean]
    assert -1.0 <= float(drawn.min()) <= -0.999
    assert 4.999 <= float(drawn.max()) <= 5.0
    assert float(drawn.mean()) == pytest.approx(2.0, abs=0.04)
    assert float(drawn.var()) == pytest.approx(36 / 12, rel=0.02)
    low, noise = normal(len(index), 1, 2, 1), noise_of(index, (1, 2, 1), 3, torch.zeros(1, dtype=torch.float64))
    z = corrupt(low, level, noise)
    assert torch.equal(z[clean], low[clean])
    # alpha and sigma, solved from two images of the same noise; their squares are 1 in all, their ratio the log-SNR.
    alpha = (corrupt(low + 1.0, level, noise) - z).flatten(1)[:, 0]
    sigma = ((z - alpha.reshape(-1, 1, 1, 1) * low) / noise).flatten(1)[:, 0]
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-9)
    torch.testing.assert_close((alpha / sigma).log()[~clean] * 2, drawn, rtol=0, atol=1e-6)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.015)
    assert float(noise.var()) == pytest.approx(1.0, rel=0.02)
    # Independent of the level, and of the training noise and times of the same seed and numbers.
    assert abs(float(torch.corrcoef(torch.stack([noise[~clean, 0, 0, 0], drawn]))[0, 1])) < 0.02
    trained = fl.random.normal(index, (1, 2, 1), 3, 0, fl.random.TRAIN, torch.float64)
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), trained.flatten()]))[0, 1])) < 0.02


@pytest.fixture(scope="module")
def digits():
    return open_source("digits")


def test_a_row_is_its_image_and_its_corruption(digits):
    augmentation = Augmentation(0.0, 6.0, clean=0.2)
    source = StageSource("digits", 8, low=4, augmentation=augmentation, draws=3, seed=5)
    assert len(source) == 3 * len(digits)
    assert source.shape == (1, 8, 8)
    assert source.conditions == ("low", "level", "label")
    index = torch.tensor([7, 7 + len(digits), 7 + 2 * len(digits), 20, 7])
    rows, own = source.batch(index), digits.batch(index % len(digits))
    assert torch.equal(rows["data"], own["data"])
    assert torch.equal(rows["label"], own["label"])
    assert len({float(level) for level in rows["level"][:3]}) == 3
    small = source.normalisation.apply(own["data"].reshape(5, 1, 4, 2, 4, 2).mean((3, 5)))
    level = augmentation.levels(index, 5)
    expected = corrupt(small, level, noise_of(index, (1, 4, 4), 5, small))
    torch.testing.assert_close(rows["low"], enlarge(expected, 8), rtol=0, atol=1e-6)
    assert torch.equal(rows["level"], level.float())
    for name, value in source.batch(index.flip(0)).items():
        assert torch.equal(value.flip(0), rows[name])
    other = StageSource("digits", 8, low=4, augmentation=augmentation, draws=3, seed=6)
    assert not torch.equal(other.batch(index)["level"], rows["level"])


def test_stages_share_their_units_and_chain(digits):
    sizes = [StageSource("digits", 2), StageSource("digits", 5, low=2), StageSource("digits", 8, 5, augmentation=None)]
    assert len({(s.normalisation.shift, s.normalisation.scale) for s in [digits, *sizes]}) == 1
    assert [len(s) // len(digits) for s in sizes] == [1, 64, 1]
    stds = [float(s.normalisation.std or 0) for s in sizes]
    assert all(a < b for a, b in pairwise(stds))  # averaging takes contrast away, which "edm" wants to know
    rows = sizes[2].batch(torch.arange(4))
    small = digits.normalisation.apply(shrink(rows["data"], 5))
    torch.testing.assert_close(rows["low"], enlarge(small, 8), rtol=0, atol=1e-6)
    assert rows["level"].tolist() == [CLEAN] * 4
    assert set(sizes[0].batch(torch.arange(2))) == {"data", "label"}
    first = next(batches(sizes[1], 8, seed=1))
    assert first["low"].shape == first["data"].shape == (8, 1, 5, 5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: StageSource("moons", 4), r"moons has samples \(2,\)"),
        (lambda: StageSource("digits", 9), "expected no larger ones"),
        (lambda: StageSource("digits", 4, low=4), "expected a smaller size"),
        (lambda: StageSource("digits", (4, 8), low=(8, 4)), "expected a smaller size"),
        (lambda: StageSource("digits", 0), "expected pixels from 1"),
        (lambda: StageSource("digits", 8, low=4, draws=0), "draws is 0"),
        (lambda: StageSource(StageSource("digits", 8, low=4), 6), "'low' beside its data"),
        (lambda: StageSource([torch.zeros(4, 1, 8, 8)], 4), "is a stream"),
        (lambda: Augmentation(3.0, 2.0), "log-SNR that rise"),
        (lambda: Augmentation(0.0, 30.0), "log-SNR that rise"),
        (lambda: Augmentation(clean=1.5), "clean is 1.5"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(make, said):
    with pytest.raises((OptionError, ShapeError, DataError), match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_which_levels_are_known():
    usual, without = Augmentation(0.0, 8.0, 0.1), Augmentation(0.0, 8.0, 0.0)
    assert [allowed(usual, level) for level in (-0.1, 0.0, 8.0, 8.1, CLEAN, math.inf)] == [0, 1, 1, 0, 1, 1]
    assert [allowed(without, level) for level in (4.0, CLEAN)] == [1, 0]
    assert [allowed(None, level) for level in (4.0, CLEAN)] == [0, 1]


@pytest.mark.parametrize("path", [paths.Rectified(), paths.VP(), paths.EDM(), paths.SubVP()], ids=str)
def test_a_stopped_state_is_the_corrupted_image_of_its_level(path):
    """Whatever path and units the lower stage has: the state is alpha low + sigma noise in those of the upper one."""
    lower = fl.Model(lambda x, t: x, path, normalisation=Normalisation((2.0,), (3.0,)), shape=(2, 3, 5))
    upper = fl.Model(lambda x, t: x, "rectified", normalisation=Normalisation((-1.0, 4.0), (5.0, 5.0)), shape=(2, 6, 9))
    images, noise, t = normal(4, 2, 3, 5), normal(4, 2, 3, 5, seed=1), 0.7
    c = path(t)
    told = Stopped(c.alpha * lower.normalisation.apply(images) + c.sigma * noise, t, lower).conditions(
        upper, None, 0, 0
    )
    level = Stopped.level_of(lower, upper, t)
    assert level == pytest.approx(path.log_snr(t) + 2 * math.log(5 / 3), abs=1e-12)
    z = corrupt(upper.normalisation.apply(images), torch.full((4,), level, dtype=torch.float64), noise)
    torch.testing.assert_close(told["low"], enlarge(z, (6, 9)), rtol=0, atol=1e-12)
    assert told["level"].tolist() == pytest.approx([level] * 4, abs=1e-6)
    bright = upper.under(normalisation=Normalisation((0.0,), (1.0, 2.0)))
    with pytest.raises(OptionError, match="not be white"):
        Stopped.level_of(lower, bright, t)


def test_a_stage_s_model_says_which_data_it_wants(digits):
    network = fl.systems.upsampler(1, 6, 3, 10, 8, augmentation=Augmentation(1.0, 2.0))
    model = fl.Model(network, "vp", shape=(1, 6, 6), normalisation=Normalisation((8.0,), (4.0,)))
    source = stage_source(fl.convert(model, "rectified"), "digits")
    assert isinstance(source, StageSource)
    assert (source.side, source.low, source.augmentation) == ((6, 6), (3, 3), Augmentation(1.0, 2.0))
    assert (source.normalisation.shift, source.normalisation.scale) == ((8.0,), (4.0,))
    assert stage_source(model, source) is source
    small = stage_source(fl.Model(lambda x, t: x, "vp", shape=(1, 4, 4)), "digits")
    assert (small.shape, small.conditions) == ((1, 4, 4), ("label",))
    assert stage_source(model.with_network(lambda x, t: x).under(shape=None), digits) is digits
    with pytest.raises(OptionError, match="expected its own data"):
        stage_source(model.under(shape=(3, 6, 6)), "digits")
