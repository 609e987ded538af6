"""The kernels of stochastic samplers: each as its paper writes it, and exact where it must be."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from gaussian_runs import DATA_STD, errors, law, ratio, uniform

import fluvial as fl
from fluvial import solvers
from fluvial.plans import plan
from problems import PATHS, gaussian, mixture, normal, state


def run_step(step, x, *noises, memory=()):
    return step(x, list(memory), list(noises), {})


# Noise mixing


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["rectified", "vp", "cosine", "edm"])
@pytest.mark.parametrize("kind", [solvers.NoiseMixing, solvers.StochasticEuler, solvers.NoiseRefresh])
@pytest.mark.parametrize("rate", [0.0, 0.7, 5.0])
def test_with_the_datas_variance_any_number_of_steps_is_exact_on_gaussians(kind, rate, name, steps):
    path, solver = PATHS[name], kind(rate, data_std=DATA_STD)
    assert solver.stochastic
    for t_end in (0.7, 1.0):
        truth = math.hypot(path(0.0).alpha * DATA_STD, path(0.0).sigma)
        assert ratio(path, solver, steps, t_end=t_end, start=truth) == pytest.approx(1.0, abs=1e-12)


def test_without_it_variance_is_lost():
    assert ratio(PATHS["vp"], solvers.NoiseMixing(1.0), 20) < 0.8


@pytest.mark.parametrize("name", ["rectified", "vp", "ve"])
def test_ddim_at_one_is_mixing_at_one(name):
    model, x = mixture().model(PATHS[name]), state(mixture(), PATHS[name], 0.2)
    times = [0.2, 0.3, 0.6, 1.0]
    one, two = (
        fl.sample(model, state=x, solver=solver, times=times, seed=3)
        for solver in (solvers.named("ddpm"), solvers.NoiseMixing(1.0))
    )
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_ancestral_on_ve_is_the_ancestral_euler_sampler(eta):
    """Euler ancestral as written for sigma: down to sigma_down by the ODE, up again by noise."""
    path, t, s = PATHS["ve"], 0.3, 0.5
    model, x, xi = mixture().model(path), state(mixture(), path, 0.3), normal(16, 2, seed=9)
    (step,) = plan(model, solvers.named("ancestral", eta=eta), [t, s])
    sigma_from, sigma_to = path(t).sigma, path(s).sigma
    up = min(sigma_to, eta * math.sqrt(sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2))
    down = math.sqrt(sigma_to**2 - up**2)
    slope = (x - model(x, t).data) / sigma_from
    expected = x + slope * (down - sigma_from) + up * xi
    torch.testing.assert_close(run_step(step, x, xi)[0], expected, rtol=1e-10, atol=1e-10)


def test_ancestral_is_the_same_sampler_on_every_path():
    """The state on another path is the same state: at equal log-SNR and equal noise the samples agree."""
    levels = [-4.0, -1.0, 1.0, 3.0]
    ends = []
    for name in ("rectified", "vp", "ve"):
        path = PATHS[name]
        times = [path.time(level) for level in levels]
        scale = math.hypot(*path(times[0])[:2])
        x = scale * normal(16, 2)
        ends.append(fl.sample(mixture().model(path), state=x, solver="ancestral", times=[*times, 1.0], seed=4))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-7, atol=1e-7)


def test_refresh_by_hand():
    """N ← √(1 - rho²) N + rho xi before natural Euler, rho² = 1 - exp(-rate (s - t))."""
    path, t, s = PATHS["cosine"], 0.3, 0.4
    model, x, xi = mixture().model(path), state(mixture(), path, 0.3), normal(16, 2, seed=9)
    (step,) = plan(model, solvers.NoiseRefresh(3.0), [t, s])
    estimate, rho2 = model(x, t), 1 - math.exp(-0.3)
    noise = math.sqrt(1 - rho2) * estimate.noise + math.sqrt(rho2) * xi
    expected = path(s).alpha * estimate.data + path(s).sigma * noise
    torch.testing.assert_close(run_step(step, x, xi)[0], expected, rtol=1e-10, atol=1e-10)


# Overshooting and going back


def test_overshoot_by_hand():
    path, t, r, c = PATHS["rectified"], 0.3, 0.4, 2.0
    model, x, xi = mixture().model(path), state(mixture(), path, 0.3), normal(16, 2, seed=9)
    (step,) = plan(model, solvers.Overshoot(c), [t, r])
    o = r + c * (r - t) * (1 - r)
    past = x + (o - t) * model(x, t).velocity
    expected = (r / o) * past + math.sqrt((1 - r) ** 2 - (r * (1 - o) / o) ** 2) * xi
    torch.testing.assert_close(run_step(step, x, xi)[0], expected, rtol=1e-10, atol=1e-10)


def test_overshoot_never_passes_the_data():
    path = PATHS["rectified"]
    model, x, xi = mixture().model(path), state(mixture(), path, 0.3), normal(16, 2, seed=9)
    (step,) = plan(model, solvers.Overshoot(100.0), [0.3, 0.4])
    expected = 0.4 * model(x, 0.3).data + 0.6 * xi
    torch.testing.assert_close(run_step(step, x, xi)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["rectified", "vp"])
def test_overshoot_by_a_mask_is_each_positions_own(name):
    model = mixture().model(PATHS[name])
    start, mask = normal(16, 2), torch.tensor([0.0, 3.0])
    solver = solvers.Overshoot(mask)
    mask += 1.0  # the solver has its own
    (masked, _), (plain, _), (full, _) = (
        plan(model, one, [0.3, 0.5, 0.7]) for one in (solver, solvers.Euler(), solvers.Overshoot(3.0))
    )
    xi = normal(16, 2, seed=9)
    x = run_step(masked, start, xi)[0]
    torch.testing.assert_close(x[:, 0], run_step(plain, start)[0][:, 0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(x[:, 1], run_step(full, start, xi)[0][:, 1], rtol=1e-13, atol=1e-13)


def test_overshoot_by_a_mask_samples_images():
    gm = fl.exact.GaussianMixture(torch.zeros(1, 2, 3, 4), torch.ones(1), torch.ones(1))
    mask = torch.zeros(3, 4)
    mask[1] = 2.0
    x = fl.sample(gm.model(PATHS["rectified"]), (5, 2, 3, 4), solver=solvers.Overshoot(mask), steps=4, seed=0)
    assert x.shape == (5, 2, 3, 4)
    assert x.dtype == torch.float32
    plain = fl.sample(gm.model(PATHS["rectified"]), (5, 2, 3, 4), solver="euler", steps=4, seed=0)
    torch.testing.assert_close(x[:, :, [0, 2]], plain[:, :, [0, 2]])
    assert not (x[:, :, 1] == plain[:, :, 1]).any()


def test_churn_is_edms_algorithm_two():
    """Written in sigma, with alpha = 1 and Heun in sigma; the last step is not churned (s_tmin)."""
    path = PATHS["edm"]
    model, x = mixture().model(path), normal(16, 2) * path(0.0).sigma
    along = fl.paths.EDM(rho=1.0)
    solver = solvers.Churn(20.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003, base=solvers.Heun(along=along))
    n = 12
    times = [k / (n - 1) for k in range(n - 1)] + [0.999, 1.0]
    steps = plan(model, solver, times)
    noises = [normal(16, 2, seed=k) for k in range(n)]
    expected = x
    for k, (t, s) in enumerate(pairwise(times)):
        sigma, sigma_next = path(t).sigma, path(s).sigma if s < 1.0 else 0.0
        g = min(20.0 / n, math.sqrt(2) - 1) if 0.05 <= sigma <= 50.0 else 0.0
        higher = sigma * (1 + g)
        hat = expected + math.sqrt(higher**2 - sigma**2) * 1.003 * noises[k]
        slope = (hat - model(hat, path.time(-2 * math.log(higher))).data) / higher
        expected = hat + (sigma_next - higher) * slope
        if sigma_next:
            second = (expected - model(expected, s).data) / sigma_next
            expected = hat + (sigma_next - higher) * (slope + second) / 2
        x = run_step(steps[k], x, *noises[k : k + len(steps[k].noises)])[0]
        torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-8)
    assert sum(bool(step.noises) for step in steps) >= n // 2


def test_churn_never_goes_back_beyond_the_start():
    for name in ("ve", "vp", "rectified"):
        legs = solvers.Churn(1e3).legs(uniform(100), PATHS[name])
        assert all(leg.start is None or 0.0 <= leg.start < leg.t for leg in legs)
        assert legs[0].start is None


def test_restart_goes_back_and_down_again():
    path = PATHS["rectified"]
    solver = solvers.Restart([(0.25, 1.0, 2, 3), (3.0, 9.0, 1, 1)])
    legs = solver.legs(uniform(10), path)
    # Level 0.25 is t = 0.8, a node; 3 is t = 0.25, whose nearest node by ratio is 0.3 (2.33, not 0.2's 4).
    ends = [round(leg.s, 9) for leg in legs]
    again = [leg for leg in legs if leg.start is not None]
    assert [(round(leg.t, 9), round(leg.start, 9)) for leg in again] == [(0.3, 0.1), (0.8, 0.5), (0.8, 0.5)]
    assert len(legs) == 10 + 1 + 2 * 3
    assert ends.count(0.8) == 3
    assert ends.count(0.3) == 2
    for before, after in pairwise(legs):
        assert after.t == before.s
        assert after.s > (after.t if after.start is None else after.start)
    # No node of one or two steps lies inside (0.06, 0.3): there is nothing to restart from.
    assert len(solvers.named("restart").legs(uniform(2), path)) == 2


@pytest.mark.parametrize("name", ["rectified", "vp", "ve"])
def test_restarts_keep_the_law_as_their_steps_grow(name):
    path = PATHS[name]
    found = [
        abs(ratio(path, solvers.Restart([(0.1, 2.0, 4, steps)]), 50, t_start=0.1, t_end=0.95, start=law(path, 0.1)) - 1)
        for steps in (2, 8, 32)
    ]
    assert found[2] < 0.01
    assert found[1] < found[0]


def test_first_order_legs_lose_what_second_order_legs_keep():
    """All error of a forward kernel is its ODE leg's: churning with Euler loses variance, with Heun hardly any."""
    path = PATHS["rectified"]
    euler, heun = (ratio(path, solvers.Churn(10.0, base=base), 50) for base in (solvers.Euler(), solvers.Heun()))
    assert euler < 0.96 < 0.998 < heun < 1.002


# Exponential integrators of the SDE


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", ["ve", "vp", "rectified"])
def test_sde_dpmpp_2m_by_hand(name, eta):
    """SDE-DPM-Solver++(2M) with the midpoint rule, as written with h = log(alpha/sigma)."""
    path, times = PATHS[name], [0.2, 0.35, 0.6, 0.8]
    model, x = mixture().model(path), state(mixture(), path, 0.2)
    steps = plan(model, solvers.named("sde_dpmpp_2m", kappa=eta), times)
    old, h_last, memory, expected = None, None, [], x
    for k, (t, s) in enumerate(pairwise(times)):
        xi = normal(16, 2, seed=20 + k)
        h = (path.log_snr(s) - path.log_snr(t)) / 2
        data = model(expected, t).data
        expected = path(s).sigma / path(t).sigma * math.exp(-eta * h) * expected
        gain = path(s).alpha * -math.expm1(-h - eta * h)
        expected = expected + gain * data
        if old is not None:
            expected = expected + 0.5 * gain * (h / h_last) * (data - old)
        expected = expected + path(s).sigma * math.sqrt(-math.expm1(-2 * eta * h)) * xi
        old, h_last = data, h
        x, kept, _ = run_step(steps[k], x, xi, memory=memory)
        memory = [*kept, *memory]
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_seeds_by_hand(name, eta):
    """SEEDS-2 with r = 1/2, as written with h = log(alpha/sigma)."""
    path, t, s = PATHS[name], 0.3, 0.5
    model, x = mixture().model(path), state(mixture(), path, 0.3)
    (step,) = plan(model, solvers.Seeds(eta), [t, s])
    one, two = normal(16, 2, seed=1), normal(16, 2, seed=2)
    h = (path.log_snr(s) - path.log_snr(t)) / 2
    middle = path.time(path.log_snr(t) + h)
    c, mid, end = path(t), path(middle), path(s)
    half = math.sqrt(-math.expm1(-eta * h))
    inner = (
        mid.sigma / c.sigma * math.exp(-eta * h / 2) * x - mid.alpha * math.expm1(-(1 + eta) * h / 2) * model(x, t).data
    )
    inner = inner + mid.sigma * half * one
    expected = end.sigma / c.sigma * math.exp(-eta * h) * x
    expected = expected - end.alpha * math.expm1(-(1 + eta) * h) * model(inner, middle).data
    expected = expected + end.sigma * half * (math.exp(-eta * h / 2) * one + two)
    torch.testing.assert_close(run_step(step, x, one, two)[0], expected, rtol=1e-8, atol=1e-8)
    assert [noise.stretch for noise in step.noises] == [(t, pytest.approx(middle)), (pytest.approx(middle), s)]


@pytest.mark.parametrize("solver", [solvers.SDEAdams(1.0), solvers.Seeds(1.0)])
def test_tilted_integrators_are_of_second_order_in_the_law(solver):
    path = PATHS["vp"]
    found = errors(path, solver, [50, 100, 200], t_start=0.2, t_end=0.8, start=law(path, 0.2))
    assert found[2] < 0.35 * found[1] < 0.35 * 0.35 * found[0]


def test_very_large_rates_stay_finite():
    for solver in (solvers.SDEAdams(200.0), solvers.Seeds(200.0), solvers.StochasticEuler(1e4), solvers.Langevin(1e4)):
        x = fl.sample(mixture().model(PATHS["vp"]), (4, 2), solver=solver, steps=5, seed=0)
        assert x.isfinite().all()


# Langevin steps at a fixed time


def test_predictor_corrector_by_hand():
    path, t, s, snr = PATHS["vp"], 0.3, 0.5, 0.2
    model, x = mixture().model(path), state(mixture(), path, 0.3)
    (step,) = plan(model, solvers.PredictorCorrector(2, snr=snr), [t, s])
    noises = [normal(16, 2, seed=k) for k in range(2)]
    expected, sigma = model(x, t).at(s), path(s).sigma
    for xi in noises:
        epsilon = 2 * snr**2 * sigma**2
        expected = expected + epsilon * model(expected, s).score + math.sqrt(2 * epsilon) * xi
    torch.testing.assert_close(run_step(step, x, *noises)[0], expected, rtol=1e-10, atol=1e-10)


def test_annealed_langevin_by_hand():
    """As NCSN writes it: alpha_i = epsilon sigma_i²/sigma_L², x + alpha_i/2 score + √alpha_i xi."""
    path, t, s, step_size = PATHS["ve"], 0.5, 0.6, 0.1
    model, x = mixture().model(path), state(mixture(), path, 0.5)
    (step,) = plan(model, solvers.AnnealedLangevin(step_size, 3), [t, s])
    noises = [normal(16, 2, seed=k) for k in range(3)]
    a, expected = 2e-5 * path(s).sigma ** 2 / 0.01**2, x
    assert a == pytest.approx(2 * step_size * path(s).sigma ** 2)
    for xi in noises:
        expected = expected + a / 2 * model(expected, s).score + math.sqrt(a) * xi
    torch.testing.assert_close(run_step(step, x, *noises)[0], expected, rtol=1e-9, atol=1e-9)


def bias_at(path, solver, steps=100):
    return ratio(path, solver, steps, t_start=0.1, t_end=0.6, start=law(path, 0.1)) - 1


@pytest.mark.parametrize("name", ["rectified", "vp"])
def test_bias_of_langevin_steps_vanishes_with_their_length(name):
    """Run to equilibrium at level sigma, of variance V, they have V/(1 - step sigma²/2V)."""
    path = PATHS[name]
    share = path(0.6).sigma ** 2 / law(path, 0.6) ** 2
    for step in (0.2, 0.1, 0.05):
        annealed = bias_at(path, solvers.AnnealedLangevin(step, round(4 / step)), 20)
        assert annealed == pytest.approx((1 - step * share / 2) ** -0.5 - 1, rel=0.15)
        corrected = bias_at(path, solvers.PredictorCorrector(round(4 / step), snr=math.sqrt(step / 2)), 20)
        assert corrected == pytest.approx((1 - step * share / 2) ** -0.5 - 1, rel=0.15)


@pytest.mark.parametrize("name", ["rectified", "vp"])
def test_annealed_langevin_gets_better_with_levels_and_with_steps_at_each(name):
    path = PATHS[name]
    few, many = (abs(ratio(path, solvers.AnnealedLangevin(0.1, count), 60) - 1) for count in (5, 50))
    assert many < 0.5 * few
    few, many = errors(path, solvers.AnnealedLangevin(0.1, 20), [40, 160])
    assert many < 0.6 * few


@pytest.mark.parametrize("predictor", ["heun", "dpmpp_2m", "ddpm", "churn"])
def test_any_solver_may_predict(predictor):
    solver = solvers.PredictorCorrector(2, predictor=solvers.named(predictor))
    assert solver.stages == solvers.named(predictor).stages + 2
    assert abs(ratio(PATHS["vp"], solver, 200) - 1) < 0.03
    x = fl.sample(gaussian().model(PATHS["vp"]), (4, 1), solver=solver, steps=5, seed=0)
    assert x.isfinite().all()
