"""SDE solvers: the right law at any rate and any time, and the steps that the papers write.

On Gaussian data of mean 0 the exact model is linear, out = k x, so that every step is x -> A x + B xi with numbers
read off its rows: the variance of a whole run is then known without a single sample, and convergence can be asserted
without the noise of a Monte Carlo estimate. A few runs through `sample` check that what is run is what is planned.
"""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_runs import DATA_STD, errors, final_std, law, uniform

import fluvial as fl
from fluvial.exact import GaussianMixture
from fluvial.plans import plan
from problems import PATHS, gaussian, mixture, normal, state

GAMMAS = [0.5, 20.0]


# The law, as steps grow


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("name", ["rectified", "vp"])
def test_std_of_gaussian_samples_tends_to_the_truth(name, gamma):
    found = errors(PATHS[name], fl.solvers.Langevin(gamma), [200, 400, 800])
    assert found[1] < 0.02, found
    assert found[2] < 0.7 * found[1] < 0.7 * 0.8 * found[0], found


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("name", ["rectified", "vp"])
@pytest.mark.parametrize("t", [0.3, 0.9])
def test_law_between_is_the_paths(name, gamma, t):
    found = errors(PATHS[name], fl.solvers.Langevin(gamma), [200, 600], t_end=t)
    assert found[0] < 0.07, found
    # VP starts from sigma(0) noise, whose variance misses that of its law by alpha(0)² = 4e-5.
    assert found[1] < max(0.5 * found[0], 2e-4), found


@pytest.mark.parametrize(
    "solver",
    [
        fl.solvers.EulerMaruyama(lambda t: 2 * t),
        fl.solvers.Langevin(lambda t: 3 * (1 - t)),
        fl.solvers.Langevin(lambda t: 10.0 if 0.3 < t < 0.6 else 0.0),
        fl.solvers.DDIM(eta=0.4),
        fl.solvers.NoiseMixing(lambda t: 2 * t),
        fl.solvers.StochasticEuler(lambda t: 3 * (1 - t)),
        fl.solvers.NoiseRefresh(lambda t: 8 * t),
        fl.solvers.SDEAdams(lambda t: 2 * t, steps=3, rule="exact"),
        fl.solvers.Seeds(lambda t: 3 * (1 - t)),
    ],
    ids=lambda solver: solver.name,
)
@pytest.mark.parametrize(("name", "t"), [("subvp", 1.0), ("ve", 1.0), ("discrete", 0.7)])
def test_every_rate_keeps_the_law_on_every_path(name, solver, t):
    """From t = 0.1, at the law there; to a time between, or to the data, where no noise is added."""
    found = errors(PATHS[name], solver, [40, 320], t_end=t, t_start=0.1, start=law(PATHS[name], 0.1))
    assert found[1] < 0.03, found
    # Not better than the level that is landed from allows: VE and the table stop at sigma = 0.01.
    assert found[1] < 0.5 * found[0] + 1e-3, found


@pytest.mark.parametrize(("name", "gamma"), [("rectified", 20.0), ("vp", 0.5)])
def test_samples_have_the_std_that_was_planned(name, gamma):
    """What runs is what was planned: 8,192 samples of 200 steps, within their own error and 2 % of the truth."""
    path, n = PATHS[name], 8192
    solver = fl.solvers.Langevin(gamma)
    x = fl.sample(gaussian(0.0, DATA_STD).model(path), (n, 1), solver=solver, steps=200, seed=0).double()
    planned = final_std(path, solver, uniform(200))
    assert float(x.std()) == pytest.approx(planned, rel=4 / math.sqrt(2 * n))
    assert abs(float(x.mean())) < 4 * DATA_STD / math.sqrt(n)
    assert abs(float(x.std()) / DATA_STD - 1) < 0.03 + 4 / math.sqrt(2 * n)
    kurtosis = float((x / x.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3.0, abs=4 * math.sqrt(24 / n))


@pytest.mark.parametrize("solver", [fl.solvers.Langevin(1.0), fl.solvers.DDIM(1.0)])
def test_mixture_keeps_its_weights_and_widths(solver):
    """Not only for Gaussians: each component gets its share and its own spread."""
    gm, n = mixture(), 3000
    x = fl.sample(gm.model(PATHS["cosine"]), (n, 2), solver=solver, steps=250, seed=3).double()
    label = (torch.cdist(x, gm.means) / gm.stds).argmin(1)
    true = gm.sample(200_000, seed=1, dtype=torch.float64)
    true_label = (torch.cdist(true, gm.means) / gm.stds).argmin(1)
    for k in range(3):
        share, expected = float((label == k).double().mean()), float((true_label == k).double().mean())
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected / n) + 0.01)
        spread = float((x[label == k] - gm.means[k]).square().mean().sqrt())
        true_spread = float((true[true_label == k] - gm.means[k]).square().mean().sqrt())
        assert spread == pytest.approx(true_spread, rel=0.07)


def test_a_wrong_sampler_is_noticed():
    """An ancestral step derived for VE, run on the rectified path, gets worse with more steps; the measure says so."""

    class Borrowed(fl.solvers.DDIM):
        def step(self, at):
            estimate = at.ask(at.x, at.t)
            (sigma, sigma_next) = at.start.sigma, at.end.sigma
            up = sigma_next * math.sqrt(max(1 - (sigma_next / sigma) ** 2, 0.0))
            down = math.sqrt(sigma_next**2 - up**2)
            # alpha is left out: the state is put back at the level `down` of the rectified path, and shaken by `up`.
            row = estimate.want(1 - down, down, "state")
            return row + up * at.randn() if up else row

    found = errors(PATHS["rectified"], Borrowed(), [50, 150, 500])
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.1


# The formulas themselves


@pytest.mark.parametrize("name", ["vp", "cosine", "discrete"])
@pytest.mark.parametrize("prediction", ["noise", "data", "velocity", "v"])
def test_ddim_with_eta_one_is_the_ddpm_posterior(name, prediction):
    """q(x_next | x, data) of Ho et al. 2020, equations 6 and 7, with their beta and alpha-bar."""
    path = PATHS[name]
    model = fl.convert(gaussian(0.0, DATA_STD).model(path), prediction=prediction)
    times = [0.2, 0.35, 0.6, 0.61]
    for step in plan(model, fl.solvers.DDIM(eta=1.0), times):
        bar, bar_next = path(step.t).alpha ** 2, path(step.s).alpha ** 2
        beta = 1 - bar / bar_next
        x, xi = normal(6, 1), normal(6, 1, seed=1)
        slots = [x] + [None] * (step.slots - 1)
        slots[step.stages[0].slot] = step.stages[0].query.call(x, {})
        slots[step.noises[0].slot] = xi
        data = model(x, step.t).data
        mean = math.sqrt(bar_next) * beta / (1 - bar) * data
        mean = mean + math.sqrt(1 - beta) * (1 - bar_next) / (1 - bar) * x
        deviation = math.sqrt((1 - bar_next) / (1 - bar) * beta)
        torch.testing.assert_close(step.next(slots), mean + deviation * xi, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_ddim_with_eta_between_is_the_papers(eta):
    """Song et al. 2021, equations 12 and 16."""
    path = PATHS["vp"]
    model = gaussian(0.0, DATA_STD).model(path)
    (step,) = plan(model, fl.solvers.DDIM(eta=eta), [0.3, 0.5])
    x, xi = normal(6, 1), normal(6, 1, seed=1)
    slots = [x] + [None] * (step.slots - 1)
    slots[step.stages[0].slot] = step.stages[0].query.call(x, {})
    slots[step.noises[0].slot] = xi
    bar, bar_next, est = path(0.3).alpha ** 2, path(0.5).alpha ** 2, model(x, 0.3)
    omega = eta * math.sqrt((1 - bar_next) / (1 - bar)) * math.sqrt(1 - bar / bar_next)
    expected = math.sqrt(bar_next) * est.data + math.sqrt(1 - bar_next - omega**2) * est.noise + omega * xi
    torch.testing.assert_close(step.next(slots), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["rectified", "vp", "edm"])
def test_small_steps_are_the_langevin_sde(name):
    """dZ = v dt + gamma (a v - a' Z) dt + √(2 w s gamma) dW, read off a step of length h -> 0."""
    path, gamma, t, h = PATHS[name], 0.7, 0.45, 1e-6
    model = gaussian(0.0, DATA_STD).model(path)
    (step,) = plan(model, fl.solvers.Langevin(gamma), [t, t + h])
    x, c = normal(6, 1), path(t)
    slots = [x] + [None] * (step.slots - 1)
    slots[step.stages[0].slot] = step.stages[0].query.call(x, {})
    slots[step.noises[0].slot] = torch.zeros_like(x)
    velocity = model(x, t).velocity
    drift = velocity + gamma * (c.alpha * velocity - c.dalpha * x)
    torch.testing.assert_close((step.next(slots) - x) / h, drift, rtol=1e-3, atol=1e-3)
    quiet = step.next(slots)
    slots[step.noises[0].slot] = torch.ones_like(x)
    shake = (step.next(slots) - quiet) / math.sqrt(h)
    expected = math.sqrt(2 * c.wronskian * c.sigma * gamma)
    torch.testing.assert_close(shake, torch.full_like(x, expected), rtol=1e-3, atol=0)


def test_kappa_one_is_the_reverse_of_the_noising_sde():
    """dZ = [-f Z + g² score] dt + g dW, Anderson's, on VP."""
    path, t, h = PATHS["vp"], 0.45, 1e-6
    model = gaussian(0.0, DATA_STD).model(path)
    (step,) = plan(model, fl.solvers.EulerMaruyama(1.0), [t, t + h])
    x = normal(6, 1)
    slots = [x] + [None] * (step.slots - 1)
    slots[step.stages[0].slot] = step.stages[0].query.call(x, {})
    slots[step.noises[0].slot] = torch.zeros_like(x)
    f, g = path.drift(t), path.diffusion(t)
    drift = -f * x + g**2 * model(x, t).score
    torch.testing.assert_close((step.next(slots) - x) / h, drift, rtol=1e-3, atol=1e-3)
    quiet = step.next(slots)
    slots[step.noises[0].slot] = torch.ones_like(x)
    torch.testing.assert_close((step.next(slots) - quiet) / math.sqrt(h), torch.full_like(x, g), rtol=1e-3, atol=0)


def test_kappa_is_alpha_gamma():
    path = PATHS["vp"]
    model, noise = mixture().model(path), normal(16, 2)
    one = fl.sample(model, noise, solver=fl.solvers.EulerMaruyama(0.6), steps=9, seed=5)
    two = fl.sample(model, noise, solver=fl.solvers.Langevin(lambda t: 0.6 / path(t).alpha), steps=9, seed=5)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_gamma_as_a_constant_function_is_the_constant():
    model, noise = mixture().model(PATHS["rectified"]), normal(16, 2)
    one, two = (
        fl.sample(model, noise, solver=fl.solvers.Langevin(gamma), steps=9, seed=5) for gamma in (0.7, lambda t: 0.7)
    )
    assert torch.equal(one, two)
    asked = []
    fl.sample(model, noise, solver=fl.solvers.Langevin(lambda t: asked.append(t) or 0.5), steps=4, seed=5)
    assert asked == [0.0, 0.25, 0.5, 0.75]


def test_pure_noise_is_left_without_noise_at_a_given_kappa():
    """alpha = 0 makes gamma infinite: that step is Euler's."""
    model, noise = mixture().model(PATHS["rectified"]), normal(16, 2)
    times = [0.0, 0.1]
    one = fl.sample(model, noise, solver=fl.solvers.EulerMaruyama(1.0), times=times, seed=5)
    assert torch.equal(one, fl.sample(model, noise, solver="euler", times=times))


@pytest.mark.parametrize("solver", [fl.solvers.Langevin(2.0), fl.solvers.EulerMaruyama(), fl.solvers.DDIM(1.0)])
def test_landing_adds_no_noise_and_ending_before_does(solver):
    model = mixture().model(PATHS["vp"])
    x = state(mixture(), PATHS["vp"], 0.8)
    landed = [fl.sample(model, state=x, solver=solver, times=[0.8, 1.0], seed=seed) for seed in (1, 2)]
    assert torch.equal(*landed)
    torch.testing.assert_close(landed[0], model(x, 0.8).data, rtol=1e-9, atol=1e-9)
    stopped = [fl.sample(model, state=x, solver=solver, times=[0.8, 0.99], seed=seed) for seed in (1, 2)]
    assert not (stopped[0] == stopped[1]).any()


@pytest.mark.parametrize("solver", [fl.solvers.Langevin(2.0), fl.solvers.DDIM(1.0)])
def test_noise_of_the_steps_is_independent(solver):
    """Between steps, between samples, and of the start: read back from the recorded states."""
    n, path = 3000, PATHS["vp"]
    model = GaussianMixture(torch.zeros(1, 2), torch.full((1,), DATA_STD), torch.ones(1)).model(path)
    times = [0.3, 0.4, 0.5, 0.6]
    tr = fl.sample(model, (n, 2), solver=solver, times=times, seed=1, record=True)
    shakes = [tr.x[0].double() / path(0.3).sigma]
    for k, step in enumerate(plan(model, solver, times)):
        slots = [tr.x[k].double()] + [None] * (step.slots - 1)
        slots[step.stages[0].slot] = step.stages[0].query.call(slots[0], {})
        slots[step.noises[0].slot] = torch.zeros_like(slots[0])
        quiet = step.next(slots)
        slots[step.noises[0].slot] = torch.ones_like(slots[0])
        shakes.append((tr.x[k + 1].double() - quiet) / (step.next(slots) - quiet))
    every = torch.cat(shakes, dim=1)  # (n, steps + start times 2)
    correlation = torch.corrcoef(every.T) - torch.eye(8, dtype=torch.float64)
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(n)
    torch.testing.assert_close(every.std(0), torch.ones(8, dtype=torch.float64), rtol=0, atol=4.5 / math.sqrt(2 * n))
    assert abs(float((every[1:] * every[:-1]).mean())) < 4 / math.sqrt(every.numel())
