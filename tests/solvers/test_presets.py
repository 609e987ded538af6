"""Every stochastic sampler by its name: true facts, its ODE at rate zero, the right law, each sample's own noise."""

from __future__ import annotations

import functools

import pytest
import torch
from gaussian_runs import errors, final_std, law, ratio, uniform

import fluvial as fl
from fluvial import solvers
from fluvial.plans import plan
from fluvial.running import Drawn
from problems import PATHS, gaussian, mixture, normal, state

STOCHASTIC = [
    "euler_maruyama", "langevin", "ddpm", "ancestral", "stochastic_euler", "noise_refresh", "overshoot", "churn",
    "restart", "sde_dpmpp_2m", "seeds", "predictor_corrector", "annealed_langevin",
]  # fmt: skip
ORDERS = {"churn": 2, "restart": 2, "sde_dpmpp_2m": 2, "seeds": 2}
STAGES = {"churn": 2, "restart": 2, "seeds": 2, "predictor_corrector": 2, "annealed_langevin": 20}
WITHOUT_NOISE = [
    ("euler", solvers.Langevin(0.0)),
    ("euler", solvers.Langevin(0)),
    ("euler", solvers.Langevin(lambda t: 0.0)),
    ("euler", solvers.EulerMaruyama(0.0)),
    ("euler", solvers.EulerMaruyama(lambda t: 0.0)),
    ("euler", solvers.Overshoot(0.0)),
    ("euler", solvers.Overshoot(torch.zeros(2))),
    ("ddim", solvers.named("ddpm", eta=0.0)),
    ("ddim", solvers.named("ancestral", eta=0)),
    ("ddim", solvers.NoiseMixing(0.0)),
    ("ddim", solvers.NoiseMixing(lambda t: 0.0)),
    ("ddim", solvers.StochasticEuler(0.0)),
    ("ddim", solvers.StochasticEuler(lambda t: 0.0)),
    ("ddim", solvers.NoiseRefresh(0.0)),
    ("ddim", solvers.NoiseRefresh(lambda t: 0.0)),
    ("heun", solvers.Churn(0.0)),
    ("heun", solvers.Restart(())),
    ("heun", solvers.Restart([(0.1, 1.0, 0, 3)])),
    ("midpoint", solvers.Churn(0.0, base=solvers.Midpoint())),
    ("dpmpp_2m", solvers.SDEAdams(0.0)),
    ("dpmpp_2m", solvers.SDEAdams(lambda t: 0.0)),
    ("dpmpp_2s", solvers.Seeds(0.0)),
    ("dpmpp_2s", solvers.Seeds(lambda t: 0.0)),
    ("ddim", solvers.PredictorCorrector(0)),
    ("ddim", solvers.PredictorCorrector(3, snr=0.0)),
    ("dpmpp_2m", solvers.PredictorCorrector(0, predictor=solvers.named("dpmpp_2m"))),
]


# Facts


def test_who_is_stochastic():
    assert [name for name in solvers.names() if solvers.named(name).stochastic] == STOCHASTIC


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("path", ["rectified", "vp"])
def test_facts_are_true(name, path):
    solver = solvers.named(name)
    assert solver.order == ORDERS.get(name, 1)
    assert solver.stages == STAGES.get(name, 1)
    assert solver.needs == "score"
    steps = plan(gaussian().model(PATHS[path]), solver, uniform(9))
    # The step from pure noise may differ, and the landing step makes fewer calls.
    assert {len(step.stages) for step in steps[1:-1]} == {solver.stages}
    assert len(steps[-1].stages) == (1 if name not in ("restart", "churn") else solver.stages - 1)
    assert max(step.memory for step in steps) == solver.memory
    assert all(step.noises for step in steps[1:-1]) or name == "restart"
    assert not steps[-1].noises


@pytest.mark.parametrize(("ode", "silent"), WITHOUT_NOISE, ids=lambda x: x if isinstance(x, str) else x.name)
def test_without_a_rate_it_is_the_ode_bit_for_bit(ode, silent):
    function = any(callable(value) for value in vars(silent).values())
    assert silent.stochastic == (function and not isinstance(silent, solvers.PredictorCorrector))
    assert silent.order == solvers.named(ode).order
    if not silent.stochastic:
        assert silent.needs == solvers.named(ode).needs
    for name in ("rectified", "vp", "cosine", "edm"):
        model = mixture().model(PATHS[name])
        for noise in (normal(16, 2, dtype=torch.float32), normal(16, 2)):
            for times in (None, [0.0, 0.2, 0.7]):
                given = {"steps": 13 if times is None else None, "times": times, "record": True}
                one = fl.sample(model, noise, solver=silent, seed=1, **given)
                two = fl.sample(model, noise, solver=ode, seed=2, **given)
                assert torch.equal(one.x, two.x)
                assert torch.equal(one.data, two.data)


# The law


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("path", ["rectified", "vp"])
def test_std_on_the_data_tends_to_the_truth(name, path):
    """Within 2 % at 250 steps; or, of the methods of first order, a bias that halves as steps double."""
    if name == "annealed_langevin":  # its bias falls as steps^(-2/3) on a uniform grid
        found = errors(PATHS[path], solvers.named(name), [125, 250])
        assert found[1] < 0.75 * found[0] < 0.75 * 0.06, found
        return
    found = errors(PATHS[path], solvers.named(name), [20, 250, 500])
    assert found[1] < max(0.4 * found[0], 2e-3), found
    if found[1] > 0.02:
        assert found[2] == pytest.approx(found[1] / 2, rel=0.1)
        assert found[1] < 0.03
        assert solvers.named(name).order == 1


@pytest.mark.parametrize("name", [n for n in STOCHASTIC if n not in ("predictor_corrector", "annealed_langevin")])
@pytest.mark.parametrize("path", ["rectified", "vp", "ve"])
def test_law_between_is_the_paths(name, path):
    """A run that ends before the data keeps its noise. From the law at 0.1, so that VE's own start does not matter."""
    path, solver = PATHS[path], solvers.named(name)
    found = errors(path, solver, [50, 250], t_end=0.6, t_start=0.1, start=law(path, 0.1))
    assert found[1] < max(0.4 * found[0], 1e-3), found
    assert found[1] < 0.025, found


def test_a_share_of_noise_fixed_per_step_is_noticed():
    """What does not depend on the step as a rate does converges to a wrong law; the measure says so."""

    class Fixed(solvers.StochasticEuler):
        def exponent(self, at):
            return 0.7

    found = [ratio(PATHS["rectified"], Fixed(), n) for n in (50, 250, 500)]
    assert abs(found[2] - found[1]) < 0.01
    assert found[2] < 0.95


@functools.cache
def exact_samples(n):
    return [mixture().sample(n, seed=seed) for seed in range(100, 104)]


def distance(x, y):
    return fl.measure.sliced_wasserstein(x, y, projections=64)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_mixture_is_sampled_to_the_floor(name):
    """As far from an exact set of samples as other exact sets of that size are."""
    n, path, steps = 1000, "rectified", 40 if name == "annealed_langevin" else 100
    if name in ("churn", "seeds", "sde_dpmpp_2m", "restart", "predictor_corrector"):
        path = "vp"
    truth, *others = exact_samples(n)
    floor = max(distance(truth, other) for other in others)
    x = fl.sample(mixture().model(PATHS[path]), (n, 2), solver=name, steps=steps, seed=5)
    assert distance(truth, x) < 1.5 * floor
    assert distance(truth, 0.8 * x) > 1.5 * floor


# Noise and steps


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("noise", ["independent", "brownian"])
def test_samples_do_not_depend_on_the_batch(name, noise):
    model = mixture().model(PATHS["rectified"])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        start = normal(64, 2, dtype=dtype)
        given = {"noise": noise, "solver": name, "steps": 6, "seed": 3}
        whole = fl.sample(model, start, **given)
        for first, count in ((0, 1), (20, 7), (63, 1)):
            part = fl.sample(model, start[first : first + count], first=first, **given)
            torch.testing.assert_close(part, whole[first : first + count], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("brownian", [False, True])
def test_noise_is_bit_identical_in_any_batch_and_never_repeated(name, brownian):
    path = PATHS["vp"]
    steps = plan(mixture().model(path), solvers.named(name), uniform(5))

    def drawn(first, count):
        draw = Drawn(3, first, path, brownian).source(steps, torch.zeros(count, 2))
        return [noise for index, step in enumerate(steps) for noise in draw(index, step)]

    whole = drawn(0, 64)
    for first, count in ((0, 1), (20, 7)):
        assert all(torch.equal(a[first : first + count], b) for a, b in zip(whole, drawn(first, count), strict=True))
    assert len({float(noise[0, 0]) for noise in whole}) == len(whole)


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_finite_on_every_path(name, steps):
    for path in PATHS.values():
        x = fl.sample(mixture().model(path), (4, 2), solver=name, steps=steps, seed=0)
        assert x.isfinite().all()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_landing_adds_no_noise_and_ending_before_does(name):
    path = PATHS["vp"]
    model, x = mixture().model(path), state(mixture(), path, 0.8)
    landed = [fl.sample(model, state=x, solver=name, times=[0.8, 1.0], seed=seed) for seed in (1, 2)]
    assert torch.equal(*landed)
    # A restart begins at a node of the run, here at t = 0.97.
    times = [0.8, 0.97, 0.98] if name == "restart" else [0.8, 0.97]
    stopped = [fl.sample(model, state=x, solver=name, times=times, seed=seed) for seed in (1, 2)]
    assert not (stopped[0] == stopped[1]).any()


@pytest.mark.parametrize("name", ["churn", "seeds", "sde_dpmpp_2m", "predictor_corrector"])
def test_samples_have_the_std_that_was_planned(name):
    """What runs is what was planned, memory and stages included: 4,096 samples of 40 steps, to their own error."""
    path, n = PATHS["vp"], 4096
    x = fl.sample(gaussian(0.0, 0.5).model(path), (n, 1), solver=name, steps=40, seed=0).double()
    planned = final_std(path, solvers.named(name), uniform(40))
    assert float(x.std()) == pytest.approx(planned, rel=4 / (2 * n) ** 0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("langevin", {"gamma": -1.0}, "gamma is -1.0"),
        ("euler_maruyama", {"kappa": float("nan")}, "kappa is nan"),
        ("stochastic_euler", {"gamma": "fast"}, "gamma is 'fast'"),
        ("stochastic_euler", {"data_std": 0.0}, "data_std is 0.0"),
        ("noise_refresh", {"rate": float("inf")}, "rate is inf"),
        ("ddpm", {"eta": 1.5}, "eta is 1.5"),
        ("overshoot", {"c": -0.5}, "c is -0.5"),
        ("overshoot", {"c": torch.tensor([[0.0, -1.0]])}, "c is a tensor from -1 to 0"),
        ("churn", {"s_churn": -1.0}, "s_churn is -1.0"),
        ("churn", {"s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin is 2.0"),
        ("churn", {"base": solvers.Langevin()}, "base is Langevin"),
        ("churn", {"base": solvers.named("dpmpp_2m")}, "base is Adams"),
        ("restart", {"intervals": [(0.3, 0.1, 1, 3)]}, "the interval is (0.3, 0.1, 1, 3)"),
        ("restart", {"intervals": [0.3]}, "intervals is [0.3]"),
        ("sde_dpmpp_2m", {"kappa": -1}, "kappa is -1"),
        ("sde_dpmpp_2m", {"steps": 5}, "steps is 5"),
        ("sde_dpmpp_2m", {"rule": "simpson"}, "unknown rule 'simpson'"),
        ("predictor_corrector", {"correctors": -1}, "correctors is -1"),
        ("predictor_corrector", {"snr": -1.0}, "snr is -1.0"),
        ("predictor_corrector", {"predictor": solvers.Dopri5()}, "predictor is Dopri5"),
        ("annealed_langevin", {"step_size": 0.0}, "step_size is 0.0"),
        ("annealed_langevin", {"count": 0}, "count is 0"),
    ],
)
def test_bad_values_are_named_in_one_line(name, options, message):
    with pytest.raises(fl.errors.OptionError) as raised:
        solvers.named(name, **options)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["langevin", "stochastic_euler", "noise_refresh", "sde_dpmpp_2m", "seeds"])
def test_a_function_that_gives_a_bad_rate_is_named_with_its_time(name):
    knob = {"langevin": "gamma", "stochastic_euler": "gamma", "noise_refresh": "rate"}.get(name, "kappa")
    solver = solvers.named(name, **{knob: lambda t: -1.0})
    with pytest.raises(fl.errors.OptionError, match=rf"^{knob} is -1\.0 at t = "):
        fl.sample(gaussian().model(PATHS["vp"]), (2, 1), solver=solver, steps=3, seed=0)
