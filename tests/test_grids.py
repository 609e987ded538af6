"""Grids of sampling times and densities of training times."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluvial import grids, paths, random
from fluvial.errors import OptionError
from problems import PATHS, one_line

GRIDS = {
    "uniform": grids.Uniform(),
    "shifted": grids.Shifted(3.0),
    "cosine": grids.Cosine(),
    "log_snr": grids.LogSNR(),
    "karras": grids.Karras(),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("steps", [1, 2, 3, 18, 250])
def test_ends_are_nodes_and_times_rise(path, grid, steps):
    times = grid.times(path, steps)
    assert len(times) == steps + 1
    assert all(type(t) is float for t in times)
    assert times[0] == 0.0
    assert times[-1] == 1.0
    assert all(a < b for a, b in itertools.pairwise(times))


@pytest.mark.parametrize("steps", [2, 3, 18])
def test_karras_on_edm_is_the_published_schedule(steps):
    """Equation 5 of Karras et al.: sigma_i for i < N, then 0 (the landing)."""
    path, times = paths.EDM(), grids.Karras().times(paths.EDM(), steps)
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    published = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)]
    assert [path(t).sigma for t in times[:-1]] == pytest.approx(published, rel=1e-10)
    # On EDM's own clock the levels are equally spaced.
    assert times[:-1] == pytest.approx([i / (steps - 1) for i in range(steps)], abs=1e-12)


def test_karras_levels_are_the_same_on_every_path_that_has_them():
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    for name in ["rectified", "cosine", "vp", "subvp", "shifted"]:
        path = PATHS[name]
        levels = [math.exp(-path.log_snr(t) / 2) for t in grids.Karras().times(path, 18)[1:-1]]
        assert levels == pytest.approx(expected[1:], rel=1e-9), name


def test_karras_is_kept_within_the_path():
    path = paths.VE(0.01, 50.0)
    sigmas = [path(t).sigma for t in grids.Karras().times(path, 5)[:-1]]
    assert sigmas[0] == pytest.approx(50.0, rel=1e-12)
    assert sigmas[-1] == pytest.approx(0.01, rel=1e-9)
    roots = [s ** (1 / 7) for s in sigmas]
    assert [b - a for a, b in itertools.pairwise(roots)] == pytest.approx([roots[1] - roots[0]] * 4, rel=1e-8)


def test_karras_starts_at_its_sigma_max():
    """ "The N noise levels run from sigma_max to sigma_min inclusive where the path starts at a finite level"."""
    path = paths.EDM()
    times = grids.Karras(sigma_min=0.02, sigma_max=10.0).times(path, 6)
    assert [path(t).sigma for t in (times[0], times[-2])] == pytest.approx([10.0, 0.02], rel=1e-9)


@pytest.mark.parametrize("name", ["rectified", "cosine", "vp", "subvp", "edm", "ve", "discrete", "zero_snr"])
def test_log_snr_grid_is_clipped_and_even(name):
    path, steps = PATHS[name], 12
    times = grids.LogSNR().times(path, steps)
    levels = [path.log_snr(t) for t in times]
    low, high = max(path.log_snr(0.0), -9.0), min(path.log_snr(1.0), 12.4)
    expected = [low + (high - low) * k / (steps - 1) for k in range(steps)]
    assert levels[1:-1] == pytest.approx(expected[1:], abs=1e-6)
    assert levels[0] == path.log_snr(0.0)


@pytest.mark.parametrize("steps", [1, 2, 3, 18])
def test_closed_forms(steps):
    path = paths.Rectified()
    share = [k / steps for k in range(steps + 1)]
    assert grids.Uniform().times(path, steps) == pytest.approx(share)
    assert grids.Cosine().times(path, steps) == pytest.approx([math.sin(math.pi / 2 * s) ** 2 for s in share])
    # Noise level k tau / (1 + (k - 1) tau) at tau = 1 - s.
    shifted = [1 - 3 * (1 - s) / (1 + 2 * (1 - s)) for s in share]
    assert grids.Shifted(3.0).times(path, steps) == pytest.approx(shifted)


def test_shifted_grid_visits_the_levels_of_the_shifted_path():
    path, shifted = paths.Rectified(), paths.Rectified().shifted(3.0)
    for t, s in zip(grids.Shifted(3.0).times(path, 7), grids.Uniform().times(shifted, 7)):
        assert path(t)[:2] == pytest.approx(shifted(s)[:2], abs=1e-15)


# What the user gives


def resolve(times=None, steps=None, path=None):
    return grids.resolve(times, path or paths.Rectified(), steps, 18)


def test_resolve():
    assert len(resolve()) == 19
    assert resolve(steps=2) == [0.0, 0.5, 1.0]
    assert resolve(grids.Cosine(), 2) == grids.Cosine().times(paths.Rectified(), 2)
    assert resolve("karras", 5) == grids.Karras().times(paths.Rectified(), 5)
    assert resolve([0.1, 0.2, 1]) == [0.1, 0.2, 1.0]
    assert resolve((0.1, 0.2), 1) == [0.1, 0.2]
    assert resolve(torch.tensor([0.25, 0.5])) == [0.25, 0.5]
    assert resolve(torch.linspace(0, 1, 4, dtype=torch.float64), 3) == pytest.approx([0, 1 / 3, 2 / 3, 1], rel=1e-15)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8, unique=True))
def test_any_rising_list_is_taken_as_it_is(values):
    assert resolve(sorted(values)) == sorted(values)


@pytest.mark.parametrize("name", ["uniform", "shifted", "cosine", "log_snr", "karras"])
def test_grids_by_name(name):
    assert grids.named(name) == GRIDS[name]


BAD = {
    "no steps": {"steps": 0},
    "negative steps": {"steps": -3},
    "half a step": {"steps": 2.5},
    "steps as text": {"steps": "10"},
    "true steps": {"steps": True},
    "zero steps with a grid": {"times": grids.Karras(), "steps": 0},
    "falling": {"times": [1.0, 0.5, 0.0]},
    "twice the same": {"times": [0.0, 0.5, 0.5, 1.0]},
    "below zero": {"times": [-0.1, 0.5, 1.0]},
    "above one": {"times": [0.0, 0.5, 1.1]},
    "not a number": {"times": [0.0, math.nan, 1.0]},
    "infinite": {"times": [0.0, math.inf]},
    "one time": {"times": [0.5]},
    "no time": {"times": []},
    "text in a list": {"times": ["a", "b"]},
    "a number": {"times": 0.5},
    "a table": {"times": torch.zeros(3, 3)},
    "a nought-dimensional tensor": {"times": torch.tensor(0.5)},
    "too few steps": {"times": [0.0, 0.5, 1.0], "steps": 1},
    "too many steps": {"times": torch.linspace(0, 1, 5), "steps": 5},
    "unknown grid": {"times": "karas"},
}


@pytest.mark.parametrize("given", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line(given):
    with pytest.raises(OptionError) as caught:
        resolve(**given)
    message = one_line(caught.value)
    assert ("expected" in message) or ("but times has" in message)
    assert len(message) < 250


def test_unknown_grid_lists_the_known_ones():
    with pytest.raises(OptionError, match=r"karas.*cosine, karras, log_snr, shifted, uniform.*did you mean 'karras'"):
        grids.named("karas")


@pytest.mark.parametrize(
    "make",
    [
        lambda: grids.Shifted(0.0),
        lambda: grids.Shifted(-1.0),
        lambda: grids.Karras(rho=0.0),
        lambda: grids.Karras(sigma_min=0.0),
        lambda: grids.Karras(sigma_min=2.0, sigma_max=1.0),
        lambda: grids.LogitNormal(std=0.0),
        lambda: grids.LogNormal(std=-1.0),
        lambda: grids.UShaped(sharpness=0.0),
    ],
)
def test_bad_options(make):
    with pytest.raises(OptionError) as caught:
        make()
    one_line(caught.value)


# Densities: the quantile function is the inverse of the stated law.


def drawn(density, path=None, n=20_000):
    u = random.uniform(n, (), 7, dtype=torch.float64)
    return density.quantile(u, path or paths.Rectified()).numpy()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.6), (0.5, 1.5)])
def test_logit_normal_law(mean, std):
    t = drawn(grids.LogitNormal(mean, std))
    assert scipy.stats.kstest(scipy.special.logit(t), "norm", args=(mean, std)).pvalue > 1e-3


def test_uniform_law():
    assert scipy.stats.kstest(drawn(grids.Uniform()), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("sharpness", [0.5, 4.0, 10.0])
def test_u_shaped_law(sharpness):
    """p(t) = a cosh(a (t - 1/2)) / (2 sinh(a / 2)): the normalised density, integrated numerically."""

    def density(t):
        return sharpness * math.cosh(sharpness * (t - 0.5)) / (2 * math.sinh(sharpness / 2))

    assert scipy.integrate.quad(density, 0, 1)[0] == pytest.approx(1.0)
    for share in (0.01, 0.3, 0.5, 0.9, 0.999):
        u = torch.tensor(share, dtype=torch.float64)
        t = float(grids.UShaped(sharpness).quantile(u, paths.Rectified()))
        assert scipy.integrate.quad(density, 0, t)[0] == pytest.approx(share, abs=1e-10)


@pytest.mark.parametrize("path", [paths.EDM(), paths.Rectified(), paths.VP()], ids=str)
def test_log_normal_law(path):
    t = torch.tensor(drawn(grids.LogNormal(-1.2, 1.2), path))
    noise_level = -path.log_snr(t) / 2  # log(sigma/alpha)
    assert scipy.stats.kstest(noise_level.numpy(), "norm", args=(-1.2, 1.2)).pvalue > 1e-3


def test_log_normal_outside_the_path_falls_on_its_ends():
    path = paths.EDM(sigma_min=0.3, sigma_max=1.0)
    t = drawn(grids.LogNormal(-1.2, 1.2), path)
    below = scipy.stats.norm.cdf(math.log(0.3), -1.2, 1.2)
    assert abs((t == 1.0).mean() - below) < 0.02
    assert 0.1 < (t == 0.0).mean() < 0.25


@pytest.mark.parametrize("density", [grids.Uniform(), grids.LogitNormal(), grids.UShaped(), grids.LogNormal()], ids=str)
@given(u=st.lists(st.floats(1e-9, 1 - 1e-9), min_size=2, max_size=6))
def test_quantiles_rise_within_the_path(density, u):
    t = density.quantile(torch.tensor(sorted(u), dtype=torch.float64), paths.VP())
    assert bool((t.diff() >= 0).all())
    assert bool(((t >= 0) & (t <= 1)).all())


def test_densities_by_name():
    assert grids.density("logit_normal") == grids.LogitNormal()
    assert grids.density("u_shaped") == grids.UShaped()
    assert grids.density("log_normal") == grids.LogNormal()
    assert grids.density(None) == grids.density("uniform") == grids.Uniform()
    own = grids.LogitNormal(1.0)
    assert grids.density(own) is own
    with pytest.raises(OptionError, match=r"logitnormal.*logit_normal") as caught:
        grids.density("logitnormal")
    one_line(caught.value)
