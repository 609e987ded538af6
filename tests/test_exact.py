"""Exact models against integration, torch's distributions and brute force."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

import fluvial as fl
from fluvial.errors import FluvialError, ShapeError
from fluvial.exact import Empirical, GaussianMixture
from problems import MIXTURES, PATHS, column, gaussian, log_density, mixture, normal, one_line, pair, state

all_paths = pytest.mark.parametrize("name", PATHS)


# The mixture as a distribution


@pytest.mark.parametrize("problem", MIXTURES)
def test_log_prob_is_torchs(problem):
    gm = MIXTURES[problem]()
    x = 2 * normal(50, *gm.shape)
    torch.testing.assert_close(gm.log_prob(x), log_density(gm, x, 1.0, 0.0), rtol=1e-12, atol=1e-12)
    assert gm.log_prob(x.float()).dtype == torch.float32


def test_log_prob_integrates_to_one():
    gm, axis = mixture(), torch.linspace(-6, 6, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0]) ** 2
    assert float(gm.log_prob(grid).exp().sum()) * cell == pytest.approx(1.0, abs=1e-9)


def test_weights_are_normalised():
    one = GaussianMixture(torch.zeros(2, 1), torch.ones(2), torch.tensor([2.0, 6.0]))
    assert one.weights.tolist() == [0.25, 0.75]


@pytest.mark.parametrize("problem", MIXTURES)
def test_samples_have_the_right_moments(problem):
    gm, n = MIXTURES[problem](), 40_000
    x, label = gm.sample_with_labels(n, seed=3, dtype=torch.float64)
    assert torch.equal(gm.sample(n, seed=3, dtype=torch.float64), x)
    share = torch.bincount(label) / n
    torch.testing.assert_close(share.double(), gm.weights, atol=4 * 0.5 / math.sqrt(n), rtol=0)
    for k in range(len(gm.means)):
        z = (x[label == k] - gm.means[k]) / gm.stds[k]
        assert scipy.stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    mean = (column(gm.weights, x.ndim) * gm.means).sum(0)
    torch.testing.assert_close(x.mean(0), mean, atol=0.03, rtol=0)


def test_samples_do_not_depend_on_their_number():
    gm = mixture()
    assert torch.equal(gm.sample(10, seed=1), gm.sample(100, seed=1)[:10])
    assert not torch.equal(gm.sample(10, seed=1), gm.sample(10, seed=2))


# The mixture as a model


@all_paths
@pytest.mark.parametrize("problem", MIXTURES)
def test_model_is_the_closed_form(name, problem):
    gm, path = MIXTURES[problem](), PATHS[name]
    times = torch.tensor([0.05, 0.4, 0.8, 0.99], dtype=torch.float64)
    for t in times.tolist():
        x = state(gm, path, t)
        c, est = path(t), gm.model(path)(x, t)
        data, noise = pair(gm, x, c.alpha, c.sigma)
        for found, expected in [(est.data, data), (est.noise, noise)]:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    x = state(gm, path, times, 4)
    est = gm.model(path)(x, times)
    for i, t in enumerate(times.tolist()):
        alone = gm.model(path)(x[i : i + 1], t)
        torch.testing.assert_close(est.data[i : i + 1], alone.data, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(est.noise[i : i + 1], alone.noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["rectified", "cosine", "vp", "subvp", "edm", "discrete"])
@pytest.mark.parametrize("t", [0.25, 0.7])
def test_posterior_means_by_quadrature(name, t):
    """Bayes by brute force on a grid of the data: p(data | x) ∝ p(data) Normal(x; alpha data, sigma²)."""
    gm, path = mixture(), PATHS[name]
    c, x = path(t), state(mixture(), path, t, 5)
    # Where p(data) is, finer than the narrowest of prior and likelihood.
    axis = torch.linspace(-4.5, 4.5, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_prior = gm.log_prob(grid)
    est = gm.model(path)(x, t)
    for i in range(len(x)):
        weight = (log_prior - (x[i] - c.alpha * grid).square().sum(1) / (2 * c.sigma**2)).softmax(0)
        data = weight @ grid
        torch.testing.assert_close(est.data[i], data, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(est.noise[i], (x[i] - c.alpha * data) / c.sigma, rtol=1e-8, atol=1e-8)


@all_paths
def test_pair_exists_at_both_ends(name):
    """At pure noise the data estimate is the mean of the data; at the data, the data themselves, and the noise is 0."""
    gm, path = mixture(), PATHS[name]
    mean = gm.weights @ gm.means
    for t in (0.0, 1.0):
        x, c = state(gm, path, t), path(t)
        for time in (t, torch.full((len(x),), t, dtype=torch.float64)):
            est = gm.model(path)(x, time)
            data, noise = pair(gm, x, c.alpha, c.sigma)
            torch.testing.assert_close(est.data, data, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(est.noise, noise, rtol=1e-9, atol=1e-9)
            if c.alpha == 0.0:
                torch.testing.assert_close(est.data, mean.expand_as(x), rtol=1e-9, atol=1e-9)
            if c.sigma == 0.0:
                torch.testing.assert_close(est.noise, torch.zeros_like(x), rtol=0, atol=1e-12)


def test_label_chooses_a_component():
    gm, path = mixture(), PATHS["vp"]
    x, model = state(gm, path, 0.5, 8), gm.model(path)
    c = path(0.5)
    for k in range(3):
        alone = GaussianMixture(gm.means[k : k + 1], gm.stds[k : k + 1], torch.ones(1))
        est = model(x, 0.5, label=torch.full((8,), k))
        torch.testing.assert_close(est.data, pair(alone, x, c.alpha, c.sigma)[0], rtol=1e-10, atol=1e-10)
    label = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    est = model(x, 0.5, label=label)
    for i in range(8):
        alone = model(x[i : i + 1], 0.5, label=label[i : i + 1])
        torch.testing.assert_close(est.data[i : i + 1], alone.data, rtol=1e-12, atol=1e-12)
    # The null label is the whole mixture, which is what no label means.
    assert model.null == {"label": 3}
    assert torch.equal(model(x, 0.5, label=torch.full((8,), 3)).data, model(x, 0.5).data)
    assert torch.equal(est.data[3:5], model(x, 0.5).data[3:5])


def test_unknown_condition_is_not_ignored():
    gm, emp = mixture(), Empirical(normal(4, 2))
    for model in (gm.model(PATHS["vp"]), emp.model(PATHS["vp"])):
        with pytest.raises((FluvialError, TypeError)):
            model(normal(3, 2), 0.5, lable=torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("name", ["rectified", "vp", "edm"])
def test_float32_states_are_nearly_as_good(name):
    gm, path = mixture(), PATHS[name]
    for t in (0.01, 0.3, 0.9, 0.999):
        x = state(gm, path, t)
        single, double = gm.model(path)(x.float(), t), gm.model(path)(x.float().double(), t)
        torch.testing.assert_close(single.data.double(), double.data, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianMixture(torch.zeros(2, 3), torch.ones(3), torch.ones(2)),
        lambda: GaussianMixture(torch.zeros(2, 3), torch.ones(2), torch.ones(3)),
        lambda: GaussianMixture(torch.zeros(2), torch.ones(2), torch.ones(2)),
        lambda: GaussianMixture(torch.zeros(2, 1), torch.tensor([1.0, 0.0]), torch.ones(2)),
        lambda: GaussianMixture(torch.zeros(2, 1), torch.ones(2), torch.tensor([1.0, -1.0])),
        lambda: Empirical(torch.zeros(0, 2)),
        lambda: Empirical(torch.zeros(3)),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(FluvialError) as caught:
        make()
    one_line(caught.value)


# The empirical distribution


def by_brute_force(points, x, alpha, sigma):
    """softmax_i(-|x - alpha d_i|² / 2 sigma²) by differences, in float64."""
    flat, d = x.double().flatten(1), points.double().flatten(1)
    distance = (flat[:, None] - alpha * d).square().sum(-1)  # (B, n)
    return ((-distance / (2 * sigma**2)).softmax(1) @ d).reshape(x.shape)


def between(points, path, t, n=8):
    c = path(t)
    data = points.double()[torch.arange(n) * 7 % len(points)]
    return c.alpha * data + c.sigma * normal(n, *points.shape[1:], seed=5)


@all_paths
@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_empirical_is_brute_force(name, shape):
    points, path = 1.0 + normal(50, *shape), PATHS[name]
    model = Empirical(points).model(path)
    for t in (0.01, 0.3, 0.6, 0.9, 0.99):
        c, x = path(t), between(points, path, t)
        expected = by_brute_force(points, x, c.alpha, c.sigma)
        torch.testing.assert_close(model(x, t).data, expected, rtol=1e-9, atol=1e-9)
        times = torch.full((len(x),), t, dtype=torch.float64)
        torch.testing.assert_close(model(x, times).data, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["rectified", "vp", "edm"])
@pytest.mark.parametrize("t", [0.001, 0.3, 0.7, 0.95, 0.999])
def test_empirical_in_float32(name, t):
    """Pixels around 0.5 with a large common part: the hard case for expanded squares."""
    points, path = (0.5 + 0.2 * normal(200, 64)).float(), PATHS[name]
    x = between(points, path, t).float()
    c, est = path(t), Empirical(points).model(path)(x, t)
    assert est.data.dtype == torch.float32
    expected = by_brute_force(points, x, c.alpha, c.sigma)
    torch.testing.assert_close(est.data.double(), expected, rtol=1e-3, atol=2e-3)


def test_empirical_far_from_the_origin_in_float32():
    points, path = 1000.0 + normal(30, 2).float(), PATHS["edm"]
    for t in (0.2, 0.5, 0.8):
        c, x = path(t), between(points, path, t).float()
        found = Empirical(points).model(path)(x, t).data.double()
        expected = by_brute_force(points, x, c.alpha, c.sigma)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)


@all_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empirical_at_both_ends(name, dtype):
    points, path = normal(40, 3).to(dtype), PATHS[name]
    model, x = Empirical(points).model(path), between(points, path, 1.0).to(dtype)
    for t in (1.0, torch.ones(8, dtype=torch.float64)):
        found = model(x, t).data
        # A data point each, though sigma may be 0.
        assert float(torch.cdist(found, points).min(1).values.max()) < 1e-5
        torch.testing.assert_close(found, points[torch.arange(8) * 7 % 40], rtol=0, atol=1e-5)
    if path(0.0).alpha == 0.0:
        for t in (0.0, torch.zeros(8, dtype=torch.float64)):
            found = model(normal(8, 3, dtype=dtype), t).data
            torch.testing.assert_close(found, points.mean(0).expand(8, 3), rtol=0, atol=1e-6)


def test_empirical_velocity_on_the_rectified_path():
    """(sum_i w_i d_i - x) / (1 - t), equation 5's note."""
    points, path = normal(20, 2), PATHS["rectified"]
    x = between(points, path, 0.6)
    expected = (by_brute_force(points, x, 0.6, 0.4) - x) / 0.4
    torch.testing.assert_close(Empirical(points).model(path)(x, 0.6).velocity, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["rectified", "cosine", "vp", "subvp", "edm", "ve", "discrete"])
@pytest.mark.parametrize("solver", ["euler", "heun", "ddim", "langevin", "euler_maruyama"])
def test_every_sampler_lands_on_a_data_point(name, solver):
    # Far enough apart for the largest sigma(1) here, 0.01.
    axis = torch.linspace(-2, 2, 5, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    model = Empirical(points).model(PATHS[name])
    found = fl.sample(model, (16, 2), solver=solver, steps=40, times="log_snr", seed=0)
    distance = torch.cdist(found.double(), points).min(1)
    assert float(distance.values.max()) < 1e-5
    assert len(distance.indices.unique()) > 4


def largest_allocation(function):
    """The most bytes that one operator (with those it calls) took and kept on its way, by torch's own profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    return max(event.cpu_memory_usage for event in seen.events())


def test_no_tensor_of_batch_by_points_by_dimension():
    n, size, batch = 6000, 100, 32
    points, x = torch.rand(n, size), torch.rand(batch, size)
    empirical = Empirical(points)
    used = largest_allocation(lambda: empirical.posterior_mean(x, 0.5, 0.5))
    # The keys (n, size), made once, are the largest; batch x n x size would be 32 times that.
    assert used < 3 * n * size * 8
    again = largest_allocation(lambda: empirical.posterior_mean(x, 0.5, 0.5))
    assert again < 3 * batch * n * 4
    brute = largest_allocation(lambda: (x[:, None] - points).square().sum(-1))
    assert brute > 30 * n * size * 4


@pytest.mark.parametrize("points", [torch.zeros(5), torch.zeros(0, 3)])
def test_points_that_are_none(points):
    with pytest.raises(ShapeError, match="points has shape"):
        Empirical(points)


def test_integer_points_are_numbers():
    found = Empirical(torch.tensor([[0, 255], [255, 0]])).model(PATHS["rectified"])(torch.tensor([[0.1, 250.0]]), 0.99)
    torch.testing.assert_close(found.data, torch.tensor([[0.0, 255.0]]))


def test_single_gaussian_has_its_textbook_posterior():
    gm, path = gaussian(2.0, 0.5), PATHS["rectified"]
    x, t = torch.tensor([[1.0]], dtype=torch.float64), 0.5
    gain = t * 0.25 / (t**2 * 0.25 + (1 - t) ** 2)
    assert float(gm.model(path)(x, t).data) == pytest.approx(2.0 + gain * (1.0 - t * 2.0), rel=1e-12)
