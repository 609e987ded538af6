"""Rates: their integrals over a step, and what one knob's setting is as another's."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_runs import ratio

import fluvial as fl
from fluvial.errors import OptionError, PathTimeError
from fluvial.plans import plan
from fluvial.solvers import rates
from fluvial.solvers.rows import At
from problems import PATHS, normal

KNOBS = ["kappa", "gamma", "sigma_l", "eta", "refresh", "rho", "churn", "overshoot"]


def step(path, t, s):
    return At(t, s, path(t), path(s), False, path, None)


def simpson(f, t, s, n=20_000):
    times = torch.linspace(t, s, n + 1, dtype=torch.float64)
    weights = torch.ones(n + 1, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((weights * f(times)).sum()) * (s - t) / (3 * n)


@pytest.mark.parametrize("name", ["rectified", "cosine", "vp", "subvp", "ve", "edm", "shifted", "affine"])
@pytest.mark.parametrize(("t", "s"), [(0.0, 0.3), (0.3, 0.31), (0.2, 0.97)])
def test_exponents_are_their_integrals(name, t, s):
    path = PATHS[name]

    def gamma(time):
        return 0.5 + math.sin(3 * time)

    def per_gamma(times):
        c = path(times)
        return 2 * (0.5 + (3 * times).sin()) * c.wronskian / c.sigma

    at = step(path, t, s)
    expected = simpson(per_gamma, t, s)
    assert rates.exponent_of_gamma(at, gamma) == pytest.approx(expected, rel=1e-6)
    expected = simpson(lambda times: 0.5 + (3 * times).sin(), t, s)
    assert rates.exponent_of_refresh(at, gamma) == pytest.approx(expected, rel=1e-9)
    if at.start.alpha == 0.0:
        assert rates.exponent_of_kappa(at, gamma) == 0.0
        return
    constant = rates.exponent_of_kappa(at, 0.7)
    assert constant == pytest.approx(0.7 * (path.log_snr(s) - path.log_snr(t)), rel=1e-12)
    assert rates.exponent_of_kappa(at, lambda time: 0.7) == pytest.approx(constant, rel=1e-6)
    as_kappa = rates.exponent_of_kappa(at, lambda time: path(time).alpha * gamma(time))
    assert as_kappa == pytest.approx(rates.exponent_of_gamma(at, gamma), rel=1e-9)


def test_exponents_add_up():
    """What is renewed in a step is what is renewed in its parts, together."""
    path = PATHS["vp"]
    for exponent in (rates.exponent_of_kappa, rates.exponent_of_gamma, rates.exponent_of_refresh):
        for rate in (0.8, lambda t: 1 + t * t):
            parts = [exponent(step(path, *leg), rate) for leg in ((0.1, 0.35), (0.35, 0.6), (0.6, 0.99))]
            assert exponent(step(path, 0.1, 0.99), rate) == pytest.approx(sum(parts), rel=1e-9)


def test_gamma_one_on_the_rectified_path_in_closed_form():
    """The integral of 2/(1 - t): towards the data and from pure noise."""
    for t, s in ((0.0, 0.5), (0.5, 0.999), (0.999, 0.9999)):
        found = rates.exponent_of_gamma(step(PATHS["rectified"], t, s), 1.0)
        assert found == pytest.approx(2 * math.log((1 - t) / (1 - s)), rel=1e-9)


@pytest.mark.parametrize("given", KNOBS)
@pytest.mark.parametrize("wanted", KNOBS)
@pytest.mark.parametrize("name", ["rectified", "vp", "ve"])
def test_translations_go_there_and_back(given, wanted, name):
    path = PATHS[name]
    there = rates.translate(path, lambda t: 0.03 + t / 20, given, wanted, steps=50)
    back = rates.translate(path, there, wanted, given, steps=50)
    for t in (0.2, 0.5, 0.9):
        assert back(t) == pytest.approx(0.03 + t / 20, rel=1e-9)


def test_translations_by_hand():
    path, t, n = PATHS["vp"], 0.4, 20
    alpha, sigma, *_ = c = path(t)
    w = c.wronskian
    for knob, kappa in {
        "gamma": 0.3 * alpha,
        "sigma_l": 0.09 * alpha / (w * sigma),
        "eta": 0.09,
        "refresh": 0.3 * alpha * sigma / (2 * w),
        "rho": -n * math.log(1 - 0.09) * alpha * sigma / (2 * w),
        "churn": 0.3 * alpha * sigma / w,
        "overshoot": 0.3 * (1 - t),
    }.items():
        assert rates.translate(path, 0.3, knob, "kappa", n)(t) == pytest.approx(kappa, rel=1e-12)


def renewed(path, solver, t, h):
    """The variance that a small step adds, per unit of log-SNR and of sigma²: kappa as it acts."""
    model = fl.exact.GaussianMixture(torch.zeros(1, 1), torch.ones(1), torch.ones(1)).model(path)
    times = [t, t + h]
    (step,) = plan(model, solver, times)
    x, total = normal(1, 1), 0.0
    for noise in step.noises:
        ends = []
        for value in (0.0, 1.0):
            noises = [torch.full_like(x, value * (other is noise)) for other in step.noises]
            ends.append(float(step(x, (), noises, {})[0]))
        total += (ends[1] - ends[0]) ** 2
    return total / path(t).sigma ** 2 / (path.log_snr(t + h) - path.log_snr(t))


@pytest.mark.parametrize("name", ["rectified", "vp"])
@pytest.mark.parametrize(
    ("knob", "solver"),
    [
        ("kappa", fl.solvers.EulerMaruyama),
        ("kappa", fl.solvers.NoiseMixing),
        ("kappa", fl.solvers.SDEAdams),
        ("kappa", fl.solvers.Seeds),
        ("gamma", fl.solvers.Langevin),
        ("gamma", fl.solvers.StochasticEuler),
        ("refresh", fl.solvers.NoiseRefresh),
        ("eta", fl.solvers.DDIM),
        ("overshoot", fl.solvers.Overshoot),
    ],
)
def test_solvers_act_at_the_rate_of_their_knob(name, knob, solver):
    path, t = PATHS[name], 0.45
    kappa = rates.translate(path, 0.6, knob, "kappa")(t)
    assert renewed(path, solver(0.6), t, 1e-5) == pytest.approx(kappa, rel=1e-3)


@pytest.mark.parametrize("name", ["rectified", "vp"])
def test_churn_acts_at_the_rate_of_its_knob(name):
    """The level is raised by 1 + churn/N: the kernel's exponent 2 log(1 + churn/N) over a uniform step's gain."""
    path, t, n = PATHS[name], 0.45, 500
    start = fl.solvers.Churn(0.6).legs([t, *[0.5] * (n - 1), 0.6], path)[0].start
    h = 1 / n
    acts = (path.log_snr(t) - path.log_snr(start)) / (path.log_snr(t + h) - path.log_snr(t))
    assert acts == pytest.approx(rates.translate(path, 0.6, "churn", "kappa")(t), rel=5e-3)


@pytest.mark.parametrize("name", ["rectified", "vp"])
def test_the_same_rate_by_other_knobs_has_the_same_limit(name):
    path = PATHS[name]
    gamma = rates.translate(path, lambda t: 4 * t * (1 - t), "refresh", "gamma")
    one = ratio(path, fl.solvers.NoiseRefresh(lambda t: 4 * t * (1 - t)), 100, t_end=0.8)
    two = ratio(path, fl.solvers.StochasticEuler(lambda t: gamma(t) if t else 0.0), 100, t_end=0.8)
    assert one == pytest.approx(two, rel=1e-6)


def test_what_cannot_be_translated_is_an_error_of_one_line():
    path = PATHS["rectified"]
    for arguments, message in {
        (1.0, "kapa", "gamma"): "unknown knob 'kapa'; expected one of",
        (1.0, "kappa", "speed"): "unknown knob 'speed'",
        (-1.0, "kappa", "gamma"): "kappa is -1.0; expected a finite number",
        (0.5, "rho", "gamma"): "steps is None; expected how many steps",
    }.items():
        with pytest.raises(OptionError, match=message):
            rates.translate(path, *arguments)
    with pytest.raises(OptionError, match=r"^rho is 1 at t = 0\.5"):
        rates.translate(path, 1.0, "rho", "kappa", steps=10)(0.5)
    with pytest.raises(PathTimeError, match=r"^kappa = 1 at t = 0 is no finite gamma there"):
        rates.translate(path, 1.0, "kappa", "gamma")(0.0)
    with pytest.raises(OptionError, match=r"^eta is -1\.0 at t = 0\.5"):
        rates.translate(path, lambda t: -1.0, "eta", "kappa")(0.5)
