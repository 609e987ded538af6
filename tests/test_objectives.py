"""Objectives: the identities between targets, the minimum at the truth, and what is drawn."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

import fluvial as fl
from fluvial import random
from fluvial.errors import OptionError, ShapeError
from fluvial.model import Model, convert
from fluvial.objectives import Objective, PseudoHuber
from problems import PATHS, PREDICTIONS, Net, column, gaussian, mixture, normal, one_line, weights

TARGETS = list(PREDICTIONS)
TIMES = torch.tensor([0.1, 0.35, 0.6, 0.9], dtype=torch.float64)
all_paths = pytest.mark.parametrize("name", ["rectified", "cosine", "vp", "subvp", "ve", "edm", "discrete"])


def losses(target, path, weight="uniform", distance="mse", t=TIMES):
    """Of an arbitrary model, whose errors are arbitrary, at fixed data, noise and times."""
    model = Model(lambda x, t: torch.sin(x), path, "v")
    objective = Objective(target=PREDICTIONS[target], weight=weight, distance=distance)
    return objective(model, normal(len(t), 3), t=t, noise=normal(len(t), 3, seed=1))


@all_paths
def test_errors_of_the_targets_are_one_error(name):
    """loss_noise = (a/s)² loss_data, loss_velocity = (w/s)² loss_data, loss_score = (a/s²)² loss_data."""
    path = PATHS[name]
    c, data = path(TIMES), losses("data", PATHS[name])
    factors = {
        "noise": c.alpha / c.sigma,
        "velocity": c.wronskian / c.sigma,
        "score": c.alpha / c.sigma**2,
        "v": (c.sigma**2 + c.alpha**2) / c.sigma,
        "edm": (c.sigma**2 + (0.7 * c.alpha) ** 2).sqrt() / (0.7 * c.sigma),
    }
    for target, factor in factors.items():
        torch.testing.assert_close(losses(target, path), factor.square() * data, rtol=1e-8, atol=1e-12)


def snr_weights(log_snr):
    snr = log_snr.exp()
    return {
        # Each as its paper states it, brought to the noise error: |data error|² = |noise error|² / snr.
        "noise": torch.ones_like(snr),
        "truncated_snr": snr.clamp(min=1.0) / snr,
        "min_snr": snr.clamp(max=5.0) / snr,
        "edm": (1 / snr + 0.25) / (0.25 / snr) / snr,  # lambda(sigma) of EDM, times sigma² / alpha²
        "sigmoid": 1 / (1 + (log_snr - 2).exp()),
    }


@all_paths
@pytest.mark.parametrize("weight", ["noise", "truncated_snr", "min_snr", "edm", "sigmoid", "own"])
def test_weighting_is_derived_for_every_target(name, weight):
    path = PATHS[name]
    log_snr = path.log_snr(TIMES)
    own = lambda l: 1 + l.square()  # noqa: E731
    factor = own(log_snr) if weight == "own" else snr_weights(log_snr)[weight]
    expected = factor * losses("noise", path)
    for target in TARGETS:
        found = losses(target, path, own if weight == "own" else weight)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_edm_weighting_is_one_on_its_networks_error():
    path = PATHS["edm"]
    model = Model(lambda x, t: torch.sin(x), path, fl.predictions.EDM(0.5))
    given = {"t": TIMES, "noise": normal(4, 3, seed=1)}
    weighted = Objective(target="data", weight="edm")(model, normal(4, 3), **given)
    plain = Objective(target=fl.predictions.EDM(0.5))(model, normal(4, 3), **given)
    torch.testing.assert_close(weighted, plain, rtol=1e-10, atol=0)


@all_paths
def test_uniform_is_the_targets_own_error(name):
    """|out - (p data + q noise)|², averaged over the dimensions of each sample."""
    path, data, noise = PATHS[name], normal(4, 3), normal(4, 3, seed=1)
    for target in TARGETS:
        rows = [weights(target, path(float(t))) for t in TIMES]
        p, q = (column(torch.tensor(w, dtype=torch.float64), 2) for w in zip(*rows))
        model = Model(lambda x, t: torch.sin(x), path, PREDICTIONS[target])
        c = path(TIMES)
        x = column(c.alpha, 2) * data + column(c.sigma, 2) * noise
        if target == "edm":
            x = x * column(PREDICTIONS["edm"].scale_input(c), 2)
        expected = (torch.sin(x) - (p * data + q * noise)).square().mean(1)
        objective = Objective(target=PREDICTIONS[target])
        torch.testing.assert_close(objective(model, data, t=TIMES, noise=noise), expected, rtol=1e-9, atol=1e-12)


def test_loss_of_a_converted_model_is_its_own():
    """Training in another notation measures the very same errors of the noise."""
    net = Net(3, dtype=torch.float64)
    source, path = Model(net, "rectified"), PATHS["vp"]
    t = path.time(torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64))
    s = PATHS["rectified"].time(path.log_snr(t))
    data, noise = normal(3, 3), normal(3, 3, seed=1)
    objective = Objective(target="noise")
    there = objective(convert(source, path), data, t=t, noise=noise)
    here = objective(source, data, t=s, noise=noise)
    torch.testing.assert_close(there, here, rtol=1e-9, atol=0)


# The minimum


@pytest.mark.parametrize("name", ["rectified", "vp", "edm"])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_minimum_is_the_irreducible_variance(name, t):
    """For Normal(0, s²) data Var(p data + q noise | x) = s² (p sigma - q alpha)² / V, which the exact model reaches."""
    gm, path, n = gaussian(0.0, 0.5), PATHS[name], 60_000
    model, c = gm.model(path), PATHS[name](t)
    data = gm.sample(n, seed=1, dtype=torch.float64)
    times, variance = torch.full((n,), t, dtype=torch.float64), c.alpha**2 * 0.25 + c.sigma**2
    for target in TARGETS:
        p, q = weights(target, c)
        # The pair given x is one Gaussian number along (sigma, -alpha): its variance is s²/V.
        irreducible = 0.25 / variance * (p * c.sigma - q * c.alpha) ** 2
        loss = Objective(target=PREDICTIONS[target])(model, data, t=times, seed=2)
        assert float(loss.mean()) == pytest.approx(irreducible, rel=4 * math.sqrt(2 / n))


def test_truth_is_the_minimum():
    """Every change of the exact model costs, by the square of the change."""
    gm, path, n = mixture(), PATHS["cosine"], 20_000
    data, t = gm.sample(n, seed=1, dtype=torch.float64), torch.full((n,), 0.5, dtype=torch.float64)
    truth = gm.model(path)

    def loss(shift):
        model = Model(lambda x, t: truth.predict(x, t) + shift * torch.sin(x), path, "v")
        return float(Objective(target="v")(model, data, t=t, seed=3).mean())

    least = loss(0.0)
    for shift in (-0.5, -0.2, 0.2, 0.5):
        assert loss(shift) > least
    curvature = loss(0.5) + loss(-0.5) - 2 * least
    x = path(0.5).alpha * data + path(0.5).sigma * random.normal(n, (2,), 3, 0, random.TRAIN, torch.float64)
    assert curvature == pytest.approx(2 * 0.25 * float(torch.sin(x).square().mean()), rel=1e-9)
    # The cross term vanishes: the residual of a conditional mean is orthogonal to every function of x.
    assert abs(loss(0.5) - loss(-0.5)) < 0.02


def test_gradient_descends_to_the_exact_model():
    """A linear network trained on a Gaussian finds the exact linear velocity."""
    gm, path, n = gaussian(0.0, 0.5), PATHS["rectified"], 40_000
    gain = torch.zeros((), dtype=torch.float64, requires_grad=True)
    model = Model(lambda x, t: gain * x, path)
    data, t = gm.sample(n, seed=1, dtype=torch.float64), torch.full((n,), 0.6, dtype=torch.float64)
    for _ in range(2):  # Newton's steps on a quadratic
        loss = Objective()(model, data, t=t, seed=0).mean()
        (slope,) = torch.autograd.grad(loss, gain)
        x2 = 0.36 * 0.25 + 0.16
        with torch.no_grad():
            gain -= slope / (2 * x2)
    exact = float(gm.model(path)(torch.ones(1, 1, dtype=torch.float64), 0.6).velocity)
    assert gain.item() == pytest.approx(exact, abs=0.02)


# Distances


def test_pseudo_huber_limits():
    error = normal(6, 3, 4)
    size = error.square().flatten(1).mean(1)
    for c in (0.03, 1.0):
        huber = PseudoHuber(c)
        torch.testing.assert_close(huber(1e-4 * error), 1e-8 * size / (2 * c), rtol=1e-4, atol=0)
        torch.testing.assert_close(huber(1e6 * error), 1e6 * size.sqrt() - c, rtol=1e-9, atol=0)
        torch.testing.assert_close(huber(error), (size + c * c).sqrt() - c)
        assert huber(torch.zeros(2, 3)).tolist() == [0.0, 0.0]


def test_distance_is_used():
    path = PATHS["rectified"]
    plain = losses("noise", path)
    torch.testing.assert_close(losses("noise", path, distance="pseudo_huber"), (plain + 0.03**2).sqrt() - 0.03)
    torch.testing.assert_close(losses("noise", path, distance=PseudoHuber(2.0)), (plain + 4).sqrt() - 2)
    own = losses("noise", path, distance=lambda e: e.abs().flatten(1).sum(1))
    assert own.shape == (4,)
    # By the weight, not inside the distance.
    heavy = losses("noise", path, weight=lambda l: 3 * torch.ones_like(l), distance="pseudo_huber")
    torch.testing.assert_close(heavy, 3 * losses("noise", path, distance="pseudo_huber"))


# What is drawn


def seen_by_the_network(**given):
    seen = {}

    def network(x, t):
        seen.update(x=x, t=t)
        return x

    data = given.pop("data")
    loss = given.pop("objective", Objective())(Model(network, "rectified"), data, **given)
    return seen["x"], seen["t"], loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_and_times_are_functions_of_seed_and_index(dtype):
    data = normal(10, 3, dtype=dtype)
    x, t, loss = seen_by_the_network(data=data, seed=5)
    again = seen_by_the_network(data=data, seed=5)
    assert torch.equal(x, again[0])
    assert torch.equal(loss, again[2])
    order = torch.tensor([7, 2, 9])
    part = seen_by_the_network(data=data[order], seed=5, index=order)
    assert torch.equal(part[0], x[order])
    assert torch.equal(part[1], t[order])
    assert torch.equal(part[2], loss[order])
    other = seen_by_the_network(data=data, seed=6)
    assert not (other[1] == t).any()
    assert not (other[0] == x).any()


def test_drawn_noise_is_normal_and_independent_of_the_times():
    data = torch.zeros(20_000, 1, dtype=torch.float64)
    x, t, _ = seen_by_the_network(data=data, seed=1, objective=Objective(times="logit_normal"))
    noise = x[:, 0] / (1 - t)
    logit = torch.logit(t)
    n = len(t)
    for number in (noise, logit):
        assert abs(float(number.mean())) < 4 / math.sqrt(n)
        assert float(number.var()) == pytest.approx(1.0, abs=6 / math.sqrt(n))
    assert abs(float((noise * logit).mean())) < 4 / math.sqrt(n)


def test_seed_of_none_follows_torch():
    data = normal(4, 3)
    torch.manual_seed(0)
    first = seen_by_the_network(data=data)[0]
    assert not torch.equal(seen_by_the_network(data=data)[0], first)
    torch.manual_seed(0)
    assert torch.equal(seen_by_the_network(data=data)[0], first)


def test_given_times_and_noise_are_used():
    data, noise, t = normal(4, 3), normal(4, 3, seed=1), TIMES
    x, time, _ = seen_by_the_network(data=data, t=t, noise=noise)
    assert torch.equal(time, t)
    torch.testing.assert_close(x, t[:, None] * data + (1 - t[:, None]) * noise)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2), (4, 1)])
@pytest.mark.parametrize("target", TARGETS)
def test_loss_is_one_number_per_sample(shape, target):
    """t is per sample: no broadcasting across the wrong axis, even where the batch equals another dimension."""
    data, noise = normal(*shape), normal(*shape, seed=1)
    model = Model(lambda x, t: torch.sin(x), "cosine", "v")
    objective = Objective(target=PREDICTIONS[target], weight="min_snr")
    loss = objective(model, data, t=TIMES, noise=noise)
    assert loss.shape == (4,)
    alone = [objective(model, data[i : i + 1], t=TIMES[i : i + 1], noise=noise[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(loss, torch.cat(alone), rtol=1e-12, atol=0)


def test_network_is_called_once_and_learns():
    network = Net(3)
    objective = Objective(target="noise", weight="min_snr")
    objective(Model(network, "rectified"), normal(5, 3, dtype=torch.float32), seed=0).mean().backward()
    assert network.calls == 1
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in network.parameters())


def test_who_may_have_a_score():
    assert Objective().independent
    assert not Objective(coupling="ot").independent
    assert not Objective(coupling="pairs").independent


def test_pairs_use_the_noise_they_were_stored_with():
    data, noise = normal(4, 3), normal(4, 3, seed=1)
    x, _, _ = seen_by_the_network(data=data, noise=noise, t=TIMES, objective=Objective(coupling="pairs"))
    torch.testing.assert_close(x, TIMES[:, None] * data + (1 - TIMES[:, None]) * noise)


@pytest.mark.parametrize("coupling", ["pairs", fl.couplings.Pairs()], ids=str)
def test_pairs_need_their_noise(coupling):
    with pytest.raises(OptionError, match="expected noise=") as caught:
        Objective(coupling=coupling)(Model(lambda x, t: x, "rectified"), normal(4, 3))
    one_line(caught.value)


def test_noise_of_another_shape():
    with pytest.raises(ShapeError, match="noise has shape") as caught:
        Objective()(Model(lambda x, t: x, "rectified"), normal(4, 3), noise=normal(4, 2))
    one_line(caught.value)


@pytest.mark.parametrize("t", [torch.full((3,), 0.5), torch.full((4, 1), 0.5)])
def test_times_of_another_shape(t):
    with pytest.raises(ShapeError) as caught:
        Objective()(Model(lambda x, t: x, "rectified"), normal(4, 3), t=t, seed=0)
    one_line(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "epsilon"}, ["epsilon", "velocity", "noise"]),
        ({"times": "lognormal"}, ["lognormal", "log_normal", "uniform"]),
        ({"weight": "snr"}, ["snr", "min_snr", "uniform", "sigmoid"]),
        ({"coupling": "optimal"}, ["optimal", "ot", "pairs"]),
        ({"distance": "l2"}, ["l2", "mse", "pseudo_huber"]),
    ],
)
def test_unknown_names_are_known_at_once(options, words):
    with pytest.raises(OptionError) as caught:
        Objective(**options)
    message = one_line(caught.value)
    assert all(word in message for word in words), message


def test_bad_huber():
    with pytest.raises(OptionError, match="c is"):
        PseudoHuber(0.0)


def test_lpips_is_asked_for_the_data_estimate_and_the_data(monkeypatch):
    """A stand-in for the package: what it is given, at which size, and how its answer counts."""
    seen = []

    class StandIn(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert (net, verbose) == ("alex", False)

        def forward(self, a, b):
            seen.append((a, b))
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=StandIn))
    data, noise = torch.randn(2, 3, 1, 8, 8)
    model = fl.Model(lambda x, t: torch.zeros_like(x), "rectified")
    t = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    objective = fl.Objective(distance=fl.objectives.LPIPS(weight=2.0, net="alex", size=16))
    loss = objective(model, data, t=t, noise=noise)
    ((estimate, truth),) = seen
    assert estimate.shape == truth.shape == (3, 3, 16, 16)
    x = (t[:, None, None, None] * data + (1 - t[:, None, None, None]) * noise).float()
    double = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")
    torch.testing.assert_close(estimate, double.expand(3, 3, 16, 16))  # a velocity of 0: the state is the estimate
    error = (data - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, error + 2.0 * (estimate - truth).square().mean((1, 2, 3)))
    with pytest.raises(ShapeError, match="compares images"):
        objective(model, torch.randn(3, 2), t=t, noise=torch.randn(3, 2))


def test_lpips_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    objective = fl.Objective(distance=fl.objectives.LPIPS(net="squeeze"))
    with pytest.raises(OptionError, match="pip install lpips"):
        objective(fl.Model(lambda x, t: x, "rectified"), torch.randn(2, 3, 8, 8))
