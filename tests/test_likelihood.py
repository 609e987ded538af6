"""Likelihood: exact mixtures, Hutchinson's error bars, units, labels, batches, bits per dimension, refusals."""

from __future__ import annotations

import math

import pytest
import torch

import fluvial as fl
from fluvial.errors import NonFiniteError, OptionError, PathTimeError
from fluvial.exact import GaussianMixture
from fluvial.likelihood import Levels, _backward, _forward, log_likelihood
from fluvial.model import Model, Normalisation, convert
from problems import PATHS, Net, mixture, normal, odd_mixture, one_line


def square():
    """Four components at the corners of a square: mean 0, the same variance in every direction."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    return GaussianMixture(0.9 * corners, torch.full((4,), 0.4), torch.ones(4))


def std_of(problem):
    """Of all coordinates together."""
    mean = torch.einsum("k,k...->...", problem.weights, problem.means)
    spread = problem.stds.square() + (problem.means - mean).square().flatten(1).mean(1)
    return float((problem.weights * spread).sum().sqrt())


def units(tensors, dtype=torch.float64):
    return torch.tensor(tensors, dtype=dtype)


# Exactness


@pytest.mark.parametrize("name", ["rectified", "cosine", "vp", "edm"])
def test_mixture_is_exact_to_a_ten_thousandth_of_a_nat(name):
    problem = square()
    data = problem.sample(24, seed=3, dtype=torch.float64)
    found = log_likelihood(problem.model(PATHS[name]), data, moments=(0.0, std_of(problem)))
    torch.testing.assert_close(found.log_prob, problem.log_prob(data), rtol=0, atol=1e-4)
    assert found.standard_error.tolist() == [0.0] * 24
    assert found.dims == 2


@pytest.mark.parametrize(("name", "tolerance"), [("rectified", 1e-4), ("vp", 0.01), ("edm", 0.02), ("ve", 0.03)])
def test_unknown_moments_cost_what_is_said(name, tolerance):
    """A mean of length 0.25 that nobody told: alpha_0/sigma_0 times it, on paths that never quite forget the data."""
    data = mixture().sample(16, seed=3, dtype=torch.float64)
    error = log_likelihood(mixture().model(PATHS[name]), data).log_prob - mixture().log_prob(data)
    assert float(error.abs().max()) < tolerance


@pytest.mark.parametrize(
    ("solver", "steps", "tolerance"),
    [("euler", 128, 0.3), ("heun", 64, 5e-3), ("midpoint", 64, 5e-3), ("rk4", 64, 1e-4)],
)
def test_fixed_steps_share_the_loop(solver, steps, tolerance):
    data = mixture().sample(16, seed=3, dtype=torch.float64)
    model = mixture().model(PATHS["rectified"])
    found = log_likelihood(model, data, solver=solver, steps=steps)
    assert float((found.log_prob - mixture().log_prob(data)).abs().max()) < tolerance
    assert found.nfe == steps * fl.solvers.named(solver).stages


def test_dependent_models_have_a_likelihood_too():
    model = mixture().model(PATHS["rectified"]).under(independent=False)
    data = mixture().sample(4, seed=3, dtype=torch.float64)
    torch.testing.assert_close(log_likelihood(model, data).log_prob, mixture().log_prob(data), rtol=0, atol=1e-4)


def test_notations_agree():
    model = mixture().model(PATHS["rectified"])
    data = mixture().sample(8, seed=3, dtype=torch.float64)
    found = log_likelihood(convert(model, "cosine", "noise").under(independent=True), data, times=[0.001, 0.5, 1.0])
    torch.testing.assert_close(found.log_prob, mixture().log_prob(data), rtol=0, atol=1e-2)


def test_a_run_may_end_at_a_noise_level():
    """The density there, in the data's units: that of the data blurred by sigma/alpha."""
    problem, t = mixture(), 0.8
    data = problem.sample(8, seed=3, dtype=torch.float64)
    blurred = GaussianMixture(problem.means, (problem.stds.square() + (0.2 / 0.8) ** 2).sqrt(), problem.weights)
    found = log_likelihood(problem.model(PATHS["rectified"]), data, times=[0.0, t])
    torch.testing.assert_close(found.log_prob, blurred.log_prob(data), rtol=0, atol=1e-4)


# Hutchinson


def test_error_bars_cover():
    """The truth is within two standard errors for about 95 % of 400 samples, and there is no bias."""
    problem = odd_mixture()
    model = problem.model(PATHS["rectified"])
    data = problem.sample(400, seed=5, dtype=torch.float64)
    given = {"solver": "heun", "steps": 16}
    exact = log_likelihood(model, data, **given).log_prob
    found = log_likelihood(model, data, divergence="hutchinson", probes=64, seed=1, **given)
    z = (found.log_prob - exact) / found.standard_error
    covered = float((z.abs() < 2).double().mean())
    assert 0.92 < covered < 0.98
    error = found.log_prob - exact
    assert abs(float(error.mean())) < 3 * float(error.std()) / math.sqrt(400)
    few = log_likelihood(model, data[:100], divergence="hutchinson", probes=2, seed=1, **given)
    assert float(few.standard_error.mean()) > 2 * float(found.standard_error.mean())


def test_one_probe_tells_nothing_of_its_spread():
    data = mixture().sample(3, seed=5)
    found = log_likelihood(
        mixture().model(PATHS["rectified"]), data, divergence="hutchinson", probes=1, solver="euler", steps=4, seed=0
    )
    assert bool(found.standard_error.isnan().all())


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_sample_does_not_depend_on_its_batch(divergence):
    model = Model(Net(dtype=torch.float64), "rectified")
    data = normal(12, 2)
    given = {"divergence": divergence, "probes": 3, "seed": 4, "dequantise": 16, "draws": 2}
    whole = log_likelihood(model, data, **given)
    for first, count in [(0, 1), (5, 7)]:
        part = log_likelihood(model, data[first : first + count], first=first, **given)
        rows = slice(first, first + count)
        torch.testing.assert_close(part.log_prob, whole.log_prob[rows], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(part.standard_error, whole.standard_error[rows], rtol=1e-8, atol=1e-10)
    assert not torch.equal(log_likelihood(model, data, **{**given, "seed": 5}).log_prob, whole.log_prob)


# Derivatives


def test_both_ways_of_differentiating_agree():
    net, x = Net(width=3, dtype=torch.float64), normal(5, 3)
    velocity = lambda x: net(x, torch.full((5,), 0.3, dtype=torch.float64))  # noqa: E731
    every = torch.autograd.functional.jacobian(velocity, x).detach()[range(5), :, range(5)]  # (B, D, D)
    for directions in (torch.eye(3, dtype=torch.float64)[:, None], normal(4, 5, 3)):
        e = directions.expand(len(directions), 5, 3)
        expected = torch.einsum("pbi,bij,pbj->pb", e, every, e)
        for way in (_forward, _backward):
            out, along = way(velocity, x, directions)
            torch.testing.assert_close(along, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(out, velocity(x).detach(), rtol=1e-12, atol=1e-12)


def test_network_that_cannot_be_vectorised():
    """One that looks at numbers is differentiated backwards, with the same result."""
    net = Net(dtype=torch.float64)

    def looks(x, t):
        assert float(x.sum()) < 1e9
        return net(x, t)

    data, given = normal(6, 2), {"solver": "heun", "steps": 5, "seed": 0}
    for divergence in ("exact", "hutchinson"):
        expected = log_likelihood(Model(net, "rectified"), data, divergence=divergence, **given).log_prob
        found = log_likelihood(Model(looks, "rectified"), data, divergence=divergence, **given).log_prob
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_broken_network_says_so_itself():
    def broken(x, t):
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        log_likelihood(Model(broken, "rectified"), normal(2, 2))


# Units, shapes, conditions


def test_units_are_the_datas_own():
    """data = 3 + 2 x in one coordinate and -1 + 0.5 x in the other: the density divides by 2 · 0.5 · …"""
    problem = mixture()
    norm = Normalisation((3.0, -1.0), (2.0, 0.25))
    model = problem.model(PATHS["rectified"]).under(normalisation=norm)
    x = problem.sample(8, seed=3, dtype=torch.float64)
    found = log_likelihood(model, norm.invert(x))
    torch.testing.assert_close(found.log_prob, problem.log_prob(x) - math.log(0.5), rtol=0, atol=1e-4)


def test_measured_moments_serve_at_the_start():
    """A mean of 1 known to the normalisation, in the data's units, does not count as an error."""
    problem = GaussianMixture(torch.tensor([[0.5, 0.5]]), units([0.5]), torch.ones(1))
    norm = Normalisation((4.0,), (2.0,), mean=5.0, std=1.0)
    model, x = problem.model(PATHS["edm"]).under(normalisation=norm), problem.sample(8, seed=3, dtype=torch.float64)
    found = log_likelihood(model, norm.invert(x))
    torch.testing.assert_close(found.log_prob, problem.log_prob(x) - 2 * math.log(2), rtol=0, atol=1e-4)


def test_images():
    """Samples of shape (3, 1, 2), a number of the normalisation for each of three channels, in float32."""
    problem = odd_mixture()
    norm = Normalisation((0.1, 0.2, 0.3), (2.0, 4.0, 0.5))
    model = problem.model(PATHS["cosine"]).under(normalisation=norm)
    x = problem.sample(6, seed=3)
    found = log_likelihood(model, norm.invert(x))
    torch.testing.assert_close(found.log_prob, problem.log_prob(x.double()) - 2 * math.log(4.0), rtol=0, atol=1e-3)
    assert found.dims == 6
    torch.testing.assert_close(found.bits_per_dim, -found.log_prob / (6 * math.log(2.0)))


def test_labels():
    problem = mixture()
    data, label = problem.sample_with_labels(6, seed=3, dtype=torch.float64)
    found = log_likelihood(problem.model(PATHS["rectified"]), data, cond={"label": label})
    for k in range(3):
        alone = GaussianMixture(problem.means[k : k + 1], problem.stds[k : k + 1], torch.ones(1))
        own = label == k
        torch.testing.assert_close(found.log_prob[own], alone.log_prob(data[own]), rtol=0, atol=1e-4)
    guided = log_likelihood(
        problem.model(PATHS["rectified"]), data, cond={"label": label}, guidance=fl.guidance.CFG(1.0)
    )
    torch.testing.assert_close(guided.log_prob, found.log_prob, rtol=0, atol=1e-4)


# Bits


def test_uniform_data_on_256_levels_are_8_bits():
    """Levels blurred by one width each are as good as uniform, except at the two ends."""
    levels = torch.linspace(0, 1, 256, dtype=torch.float64)
    width = 1 / 255

    def network(x, t):
        alpha, sigma = t[:, None], 1 - t[:, None]
        variance = alpha**2 * width**2 + sigma**2
        off = x - alpha * levels  # (B, 256)
        share = (-off.square() / (2 * variance)).softmax(1)
        return (share * (levels + alpha * width**2 / variance * off)).sum(1, keepdim=True)

    data = levels[20:-20:9, None]
    found = log_likelihood(Model(network, "rectified", "data"), data, dequantise=256, seed=0)
    torch.testing.assert_close(found.bits_per_dim, torch.full_like(data[:, 0], 8.0), rtol=0, atol=0.01)


def test_gaussian_on_a_grid_has_its_entropy():
    """Entropy of Normal(m, s²) on cells of width w: log2(s √(2 pi e) / w), up to w²/s²."""
    problem, levels = GaussianMixture(torch.tensor([[0.5]]), units([0.1]), torch.ones(1)), Levels(64)
    quantiles = 0.5 + 0.1 * torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)
    data = (quantiles[:, None] / levels.width).round() * levels.width
    found = log_likelihood(
        problem.model(PATHS["rectified"]), data, dequantise=64, draws=2, seed=1, solver="heun", steps=64
    )
    entropy = math.log2(0.1 * math.sqrt(2 * math.pi * math.e) / levels.width)
    assert float(found.bits_per_dim.mean()) == pytest.approx(entropy, abs=0.02)
    assert float(found.standard_error.mean()) > 0


# Refusals


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"solver": "ddim"}, ["DDIM", "heun"]),
        ({"solver": "dpmpp_2m"}, ["velocities"]),
        ({"solver": "langevin"}, ["velocities"]),
        ({"solver": fl.solvers.Heun(along=fl.paths.VP())}, ["along", "convert"]),
        ({"divergence": "hutchison"}, ["hutchison", "did you mean"]),
        ({"probes": 0}, ["probes is 0"]),
        ({"draws": 3}, ["draws is 3", "dequantise"]),
        ({"dequantise": 1}, ["2 levels"]),
        ({"dequantise": 0.5}, ["dequantise is 0.5"]),
        ({"cond": {"label": torch.tensor([7, 0])}}, ["label"]),
    ],
)
def test_bad_input_is_one_clear_line(given, words):
    with pytest.raises(OptionError) as caught:
        log_likelihood(mixture().model(PATHS["rectified"]), normal(2, 2), **given)
    message = one_line(caught.value)
    assert all(word in message for word in words), message


def test_times_that_cannot_be_are_refused():
    with pytest.raises(PathTimeError, match="noise end"):
        log_likelihood(Model(lambda x, t: x, "rectified", "noise"), normal(2, 2))


def test_numbers_that_are_not_finite_are_named():
    data = normal(3, 2)
    data[1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"nan in 1 of 3 samples \(1\)"):
        log_likelihood(mixture().model(PATHS["rectified"]), data, solver="euler", steps=2)
