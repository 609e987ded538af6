"""Grids of sampling times and densities of training times."""

from __future__ import annotations

import itertools
import json
import math

import numpy
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import fluvial as fl
from fluvial import grids, paths, random
from fluvial.errors import OptionError
from problems import PATHS, mixture, normal, one_line

GRIDS = {
    "uniform": grids.Uniform(),
    "shifted": grids.Shifted(3.0),
    "cosine": grids.Cosine(),
    "log_snr": grids.LogSNR(),
    "karras": grids.Karras(),
    "exponential": grids.Exponential(),
    "beta": grids.Beta(),
    "flow": grids.Flow(),
}
LEVELS = (0.0, 0.1, 0.3, 0.35, 0.8, 0.9, 1.0)
ANY_GRID = {
    **GRIDS,
    "polyexponential": grids.Exponential(rho=2.0),
    "lopsided_beta": grids.Beta(0.5, 2.0),
    "fitted": grids.Fitted(LEVELS),
    "fitted_late": grids.Fitted((0.05, 0.2, 0.9, 0.999, 1.0)),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("grid", ANY_GRID.values(), ids=ANY_GRID.keys())
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 18, 250])
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


# Exponential


@pytest.mark.parametrize("steps", [2, 3, 18])
def test_exponential_levels_are_a_geometric_sequence(steps):
    path = paths.EDM()
    sigmas = [path(t).sigma for t in grids.Exponential().times(path, steps)[:-1]]
    assert sigmas[0] == pytest.approx(80.0, rel=1e-12)
    assert sigmas[-1] == pytest.approx(0.002, rel=1e-9)
    assert [b / a for a, b in itertools.pairwise(sigmas)] == pytest.approx([4e4 ** (-1 / (steps - 1))] * (steps - 1))


def test_exponential_is_the_limit_of_karras():
    """(a^(1/rho) + share (b^(1/rho) - a^(1/rho)))^rho tends to a (b/a)^share as rho grows."""
    path = paths.Rectified()
    found, limit = grids.Exponential().times(path, 9), grids.Karras(rho=1e6).times(path, 9)
    assert found == pytest.approx(limit, abs=1e-5)


def test_exponential_starts_at_its_sigma_max_and_is_kept_within_the_path():
    path = paths.EDM()
    times = grids.Exponential(sigma_min=0.02, sigma_max=10.0).times(path, 6)
    assert [path(t).sigma for t in (times[0], times[-2])] == pytest.approx([10.0, 0.02], rel=1e-9)
    path = paths.VE(0.01, 50.0)
    times = grids.Exponential().times(path, 6)
    assert times == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0])  # VE's own clock is this grid


def test_polyexponential():
    """exp(ramp^rho (log sigma_max - log sigma_min) + log sigma_min), ramp from 1 to 0: k-diffusion's."""
    path, rho = paths.EDM(), 1.7
    ramp = torch.linspace(1, 0, 7, dtype=torch.float64) ** rho
    expected = (ramp * math.log(80 / 0.002) + math.log(0.002)).exp().tolist()
    times = grids.Exponential(rho=rho).times(path, 7)
    assert [path(t).sigma for t in times[:-1]] == pytest.approx(expected, rel=1e-9)


# Beta


@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0, 2.5, 40.0])
@pytest.mark.parametrize("beta", [0.3, 0.6, 1.0, 7.0])
def test_beta_is_scipys(alpha, beta):
    """Noise levels 1 - t at the quantiles, as the paper's peers place their training steps."""
    steps = 25
    expected = 1.0 - scipy.stats.beta.ppf(1.0 - torch.arange(steps + 1).double().numpy() / steps, alpha, beta)
    assert grids.Beta(alpha, beta).times(paths.VP(), steps) == pytest.approx(list(expected), abs=1e-10)


def test_beta_of_one_is_uniform_and_equal_parameters_treat_the_ends_alike():
    assert grids.Beta(1.0, 1.0).times(paths.VP(), 7) == pytest.approx(grids.Uniform().times(paths.VP(), 7), abs=1e-12)
    times = grids.Beta().times(paths.VP(), 7)
    assert [1.0 - t for t in times[::-1]] == pytest.approx(times, abs=1e-12)


def test_beta_crowds_where_its_parameter_is_small():
    near_data, near_noise = grids.Beta(0.4, 1.5).times(paths.VP(), 9), grids.Beta(1.5, 0.4).times(paths.VP(), 9)
    assert 1.0 - near_data[-2] < 0.01 < near_data[1]
    assert near_noise[1] < 0.01 < 1.0 - near_noise[-2]


def test_beta_so_sharp_that_steps_meet_is_refused():
    with pytest.raises(OptionError, match=r"Beta\(alpha=0.05, beta=0.05\) puts two of 200 steps at one time") as caught:
        resolve(grids.Beta(0.05, 0.05), 200)
    one_line(caught.value)


# Split


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize(
    "grid", [None, "uniform", "cosine", "karras", "log_snr", "beta", grids.Fitted(LEVELS)], ids=str
)
def test_split_keeps_its_nodes_and_its_budgets(path, grid):
    nodes, steps = [0.0, 0.3, 0.7, 1.0], [1, 5, 3]
    times = resolve(grids.Split(nodes, steps, [grid] * 3), path=path)
    assert len(times) == 10
    assert all(type(t) is float for t in times)
    assert all(node in times for node in nodes)  # the very float
    assert [times.index(node) for node in nodes] == [0, 1, 6, 9]
    assert all(a < b for a, b in itertools.pairwise(times))


def test_split_into_equal_steps():
    assert resolve(grids.Split([0, 0.5, 1], steps=[1, 2])) == [0.0, 0.5, 0.75, 1.0]
    assert resolve(grids.Split()) == pytest.approx([0.0, *(0.5 + k / 18 for k in range(10))])
    assert resolve(grids.Split([0.2, 0.6], steps=[2])) == pytest.approx([0.2, 0.4, 0.6])


def test_levels_in_a_segment_run_between_its_nodes():
    """On the rectified path t = .5 is sigma/alpha = 1: Karras from 80 to 1 in 3 steps, then from 1 to .002 in 4."""
    path = paths.Rectified()
    times = resolve(grids.Split([0, 0.5, 1], steps=[3, 4], grids=["karras", "karras"]))
    levels = [(1 - t) / t for t in times[1:-1]]
    before = [(80 ** (1 / 7) + k / 3 * (1 - 80 ** (1 / 7))) ** 7 for k in range(1, 4)]
    after = [(1 + k / 3 * (0.002 ** (1 / 7) - 1)) ** 7 for k in range(1, 4)]
    assert levels == pytest.approx([*before, *after], rel=1e-9)
    even = [path.log_snr(t) for t in resolve(grids.Split([0.2, 0.8], steps=[4], grids=["log_snr"]))]
    assert [b - a for a, b in itertools.pairwise(even)] == pytest.approx([math.log(16) / 2] * 4)


def test_a_split_within_a_split():
    inner = grids.Split([0, 0.5, 1], steps=[1, 2], grids=[None, "log_snr"])
    times = resolve(grids.Split([0, 0.5, 1], steps=[3, 1], grids=[inner, None]))
    path = paths.Rectified()
    assert [times[0], times[1], *times[3:]] == [0.0, 0.25, 0.5, 1.0]
    assert path.log_snr(times[2]) == pytest.approx((path.log_snr(0.25) + path.log_snr(0.5)) / 2)


def test_a_grid_may_declare_its_number_of_steps():
    split = grids.Split([0, 0.5, 1], steps=[1, 9])
    assert split.count == 10
    assert resolve(split, 10) == resolve(split)
    for call in (lambda: resolve(split, 7), lambda: split.times(paths.VP(), 7)):
        with pytest.raises(OptionError, match=r"steps is 7 but the segments have 1 \+ 9 = 10") as caught:
            call()
        one_line(caught.value)


def test_sample_takes_a_split():
    gm = mixture()
    noise, model = normal(4, 2), gm.model(paths.Rectified())
    run = fl.sample(model, noise, times=grids.Split([0, 0.5, 1], steps=[1, 9]), solver="euler", record=True)
    assert run.nfe == 10
    assert run.times[1] == 0.5
    first = run.x[0] + 0.5 * model(run.x[0], 0.0).velocity
    assert torch.allclose(run.x[1], first, atol=1e-14)


# Fitted


def levels_of(times, path):
    return [float(torch.special.expit(torch.tensor(path.log_snr(t) / 2, dtype=torch.float64))) for t in times]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_fitted_visits_the_same_levels_on_every_path(path):
    found = levels_of(grids.Fitted(LEVELS).times(path, 6), path)
    assert found[1:-1] == pytest.approx(LEVELS[1:-1], abs=1e-12)


def test_fitted_between_its_levels():
    """Straight lines between them: at twice the steps every other level is one of them."""
    path = paths.Rectified()
    assert grids.Fitted(LEVELS).times(path, 12)[::2] == pytest.approx(LEVELS, abs=1e-15)
    assert grids.Fitted(LEVELS).times(path, 12)[1::2] == pytest.approx(
        [(a + b) / 2 for a, b in itertools.pairwise(LEVELS)], abs=1e-15
    )
    assert grids.Fitted(LEVELS).times(path, 2) == [0.0, pytest.approx(LEVELS[3]), 1.0]


def test_fitted_is_kept_within_a_short_path():
    """VE from 5 to 0.2 has the levels 1/6 … 5/6: even shares of that part, its ends among them."""
    path = paths.VE(0.2, 5.0)
    first, last = 1 + (1 / 6 - 0.1) / 0.2, 4 + (5 / 6 - 0.8) / 0.1  # counted in knots
    expected = numpy.interp(numpy.linspace(first, last, 40), range(7), LEVELS)
    found = levels_of(grids.Fitted(LEVELS).times(path, 40)[:-1], path)
    assert found == pytest.approx(list(expected), abs=1e-9)
    # With few steps the levels are those of any path, and the run starts at its own start.
    assert levels_of(grids.Fitted(LEVELS).times(path, 2)[:-1], path) == pytest.approx([1 / 6, 0.35])


@pytest.mark.parametrize(
    "grid",
    [grids.Fitted(LEVELS, 255, 128, "curvature, Heun"), grids.Fitted((1 / 3, math.pi / 4, 1.0))],
    ids=["all", "bare"],
)
def test_fitted_comes_back_from_json(grid):
    again = grids.Fitted.from_config(json.loads(json.dumps(grid.config())))
    assert again == grid
    assert again.times(paths.VP(), 7) == grid.times(paths.VP(), 7)


def test_level_is_the_same_on_every_path():
    for path in PATHS.values():
        t = path.time(1.2)
        assert grids.level_of(path, t) == pytest.approx(path(t).alpha / (path(t).alpha + path(t).sigma), abs=1e-12)
    assert (grids.level_of(paths.Rectified(), 0.0), grids.level_of(paths.Rectified(), 1.0)) == (0.0, 1.0)


def test_fitted_by_name_is_the_models_own():
    own = grids.Fitted(LEVELS)
    path = paths.Rectified()
    assert grids.resolve("fitted", path, 6, 18, fitted=own) == own.times(path, 6)
    assert grids.resolve("karras", path, 6, 18, fitted=own) == grids.Karras().times(path, 6)
    with pytest.raises(OptionError, match='times is "fitted" and the model has no grid of its own; expected') as caught:
        resolve("fitted")
    one_line(caught.value)


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


@pytest.mark.parametrize("name", GRIDS)
def test_grids_by_name(name):
    assert grids.named(name) == GRIDS[name]


def test_every_grid_by_name_is_listed():
    assert sorted(grids.names()) == sorted([*GRIDS, "fitted"])


@pytest.mark.parametrize("name", GRIDS)
def test_sample_takes_every_name(name):
    model, noise = mixture().model(paths.VP()), normal(3, 2)
    run = fl.sample(model, noise, times=name, steps=5, solver="ddim", record=True)
    assert run.times == GRIDS[name].times(paths.VP(), 5)


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
    with pytest.raises(
        OptionError,
        match=r"karas.*beta, cosine, exponential, fitted, flow, karras, log_snr, shifted, uniform.*mean 'karras'",
    ):
        grids.named("karas")


@pytest.mark.parametrize(
    "make",
    [
        lambda: grids.Shifted(0.0),
        lambda: grids.Shifted(-1.0),
        lambda: grids.Karras(rho=0.0),
        lambda: grids.Karras(sigma_min=0.0),
        lambda: grids.Karras(sigma_min=2.0, sigma_max=1.0),
        lambda: grids.Exponential(sigma_min=-1.0),
        lambda: grids.Exponential(rho=0.0),
        lambda: grids.Exponential(sigma_min=3.0, sigma_max=3.0),
        lambda: grids.Beta(0.0, 0.6),
        lambda: grids.Beta(0.6, -1.0),
        lambda: grids.Beta(0.6, math.nan),
        lambda: grids.Split([0.0, 1.0], [1, 1]),
        lambda: grids.Split([0.0, 0.5, 0.5, 1.0], [1, 1, 1]),
        lambda: grids.Split([0.0, 1.5], [1]),
        lambda: grids.Split([0.0], []),
        lambda: grids.Split([0.0, 0.5, 1.0], [0, 3]),
        lambda: grids.Split([0.0, 0.5, 1.0], [1.0, 3]),
        lambda: grids.Split([0.0, 0.5, 1.0], [True, 3]),
        lambda: grids.Split([0.0, 0.5, 1.0], [1, 3], ["uniform"]),
        lambda: grids.Split([0.0, 0.5, 1.0], [1, 3], ["uniform", "karas"]),
        lambda: grids.Fitted([1.0]),
        lambda: grids.Fitted([0.0, 0.5]),
        lambda: grids.Fitted([0.0, 0.5, 0.5, 1.0]),
        lambda: grids.Fitted([-0.1, 0.5, 1.0]),
        lambda: grids.Fitted([0.0, math.nan, 1.0]),
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


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 400])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_flow_takes_equal_steps_of_the_rectified_clock(name, steps, shift):
    """By its words: equal steps of tau, shifted, from the path's start towards 1, or as far as the path goes."""
    path = PATHS[name]
    times = grids.resolve(grids.Flow(shift), path, steps, 1)
    assert (times[0], times[-1], len(times)) == (0.0, 1.0, steps + 1)
    taus = [c.alpha / (c.alpha + c.sigma) for c in path.table(times)]
    shares = [k / (k + shift * (steps - k)) for k in range(steps)]
    length = (taus[-1] - taus[0]) / shares[-1] if steps > 1 and name != "rectified" else 1.0
    expected = [taus[0] + min(length, 1.0 - taus[0]) * share for share in shares]
    assert taus[:-1] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_flow_on_the_rectified_path_is_uniform_and_shifted(steps):
    path = PATHS["rectified"]
    assert grids.Flow().times(path, steps) == pytest.approx(grids.Uniform().times(path, steps), abs=1e-12)
    assert grids.Flow(3.0).times(path, steps) == pytest.approx(grids.Shifted(3.0).times(path, steps), abs=1e-12)
    with pytest.raises(OptionError, match="shift is 0"):
        grids.Flow(0.0)
