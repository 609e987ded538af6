"""FluvialScheduler: the rows that `fl.sample` drives, driven by a pipeline's loop; and diffusers' common checks."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import fluvial as fl
from fluvial.errors import OptionError
from fluvial.exact import GaussianMixture
from fluvial.interop import diffusers as fd
from fluvial.interop.diffusers import FluvialScheduler
from fluvial.solvers import names

# The sampler of the table's scheduler is replaced, and with it its clipping.
SOURCES = {
    "epsilon": DDIMScheduler(clip_sample=False),
    "v_prediction": DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sample": DDIMScheduler(prediction_type="sample", timestep_spacing="linspace"),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow_table": DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0, use_karras_sigmas=False
    ),
    "edm": EDMEulerScheduler(sigma_data=0.5),
}
ONE_RUN = [name for name in names() if name not in ("dopri5", "annealed_langevin", "churn")]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(x, t):
    """A network that reads its time and its input."""
    column = t.to(x.dtype).expand(len(x)).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(0.7 * x + 0.2 * x.flip(-1) - torch.cos(0.01 * column))


def loop(scheduler, x, begin=0, **options):
    """A pipeline's loop."""
    for t in scheduler.timesteps[begin:]:
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **options, return_dict=False)[0]
    return x


def made(source, solver, **options):
    return FluvialScheduler.from_config(SOURCES[source].config, solver=solver, **options)


def own(source, x, solver, steps=6, **options):
    """The same run by `fl.sample`, from the state x."""
    model = fd.read_schedule(SOURCES[source]).model(network)
    times = fd.sampling_times(SOURCES[source], steps)
    return fl.sample(model, solver=solver, times=times, state=x, **options)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "vabm", "ddpm", "restart"])
def test_run_is_that_of_sample(solver, source):
    scheduler = made(source, solver, seed=5)
    scheduler.set_timesteps(6)
    x = normal(3, 2, 4) * scheduler.init_noise_sigma
    assert torch.equal(loop(scheduler, x), own(source, x, solver, seed=5))


@pytest.mark.parametrize("solver", ONE_RUN)
def test_every_solver_runs_as_in_sample(solver):
    x = normal(2, 1, 3)
    scheduler = made("flow", solver, seed=7)
    scheduler.set_timesteps(5)
    assert torch.equal(loop(scheduler, x), own("flow", x, solver, 5, seed=7))


def test_order_is_two_and_the_limit_the_closed_form():
    exact = GaussianMixture(torch.tensor([[0.7]]), torch.tensor([0.5], dtype=torch.float64), torch.ones(1))
    model = exact.model(fl.paths.Rectified())
    noise, errors = normal(32, 1, dtype=torch.float64), []
    for steps in (40, 80):
        scheduler = FluvialScheduler.from_config(
            FlowMatchEulerDiscreteScheduler().config, solver="midpoint", grid="uniform"
        )
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            flow = -model(x, 1.0 - float(t) / 1000.0).velocity
            x = scheduler.step(flow, t, x, return_dict=False)[0]
        errors.append(float((x - (0.7 + 0.5 * noise)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.2)
    assert errors[1] < 1e-3


# diffusers' common checks: configs, timesteps, noising, loops


@pytest.mark.parametrize("source", SOURCES)
def test_saved_and_loaded_it_runs_the_same(source, tmp_path):
    scheduler = made(source, "langevin", gamma=0.25, seed=3)
    scheduler.save_pretrained(tmp_path)
    loaded = FluvialScheduler.from_pretrained(tmp_path)
    configs = [{k: v for k, v in s.config.items() if not k.startswith("_")} for s in (scheduler, loaded)]
    assert configs[0] == configs[1]
    assert loaded.config.solver_options == {"gamma": 0.25}
    again = FluvialScheduler.from_config(loaded.config, gamma=0.5)
    assert again.config.solver == "langevin"
    assert again.config.solver_options == {"gamma": 0.5}
    assert FluvialScheduler.from_config(loaded.config, solver="heun").config.solver_options is None
    x = normal(2, 1, 3)
    for each in (scheduler, loaded):
        each.set_timesteps(4)
    assert torch.equal(scheduler.timesteps, loaded.timesteps)
    assert torch.equal(loop(scheduler, x), loop(loaded, x))


@pytest.mark.parametrize("source", SOURCES)
def test_timesteps_sigmas_and_their_number(source):
    scheduler, schedule = made(source, "heun"), fd.read_schedule(SOURCES[source])
    for steps in (1, 2, 3, 10):
        scheduler.set_timesteps(steps)
        calls = 2 * steps - 1
        assert len(scheduler.timesteps) == calls
        assert len(scheduler.sigmas) == calls + 1
        assert scheduler.sigmas[-1] == 0.0
        assert scheduler.order == 2
        assert scheduler.num_inference_steps == steps
        times = fd.sampling_times(SOURCES[source], steps)[:-1]
        exact = [schedule.timestep(t) for t in times]
        assert scheduler.timesteps[:1].tolist() + scheduler.timesteps[1::2].tolist() == pytest.approx(exact, rel=1e-6)
    assert len(scheduler) == SOURCES[source].config.num_train_timesteps


@pytest.mark.parametrize("source", ["epsilon", "v_prediction", "flow", "edm"])
def test_noise_is_added_by_the_path(source):
    scheduler = made(source, "ddim")
    data, noise = normal(3, 2, 2), normal(3, 2, 2, seed=1)
    steps = torch.tensor([0.3, -0.5, 1.0]) if source == "edm" else torch.tensor([0, 17, 999])
    if source == "flow":
        sigma = steps / 1000
        alpha = 1 - sigma
    elif source == "edm":
        alpha, sigma = torch.ones(3), (4 * steps).exp()
    else:
        table = SOURCES[source].alphas_cumprod[steps]
        alpha, sigma = table.sqrt(), (1 - table).sqrt()
    expected = alpha.reshape(3, 1, 1) * data + sigma.reshape(3, 1, 1) * noise
    torch.testing.assert_close(scheduler.add_noise(data, noise, steps), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(scheduler.scale_noise(data, steps, noise), scheduler.add_noise(data, noise, steps))


def test_two_runs_and_an_interrupted_one_are_the_same():
    scheduler = made("epsilon", "dpmpp_2m")
    scheduler.set_timesteps(6)
    x = normal(2, 1, 3)
    first = loop(scheduler, x)
    assert torch.equal(loop(scheduler, x), first)
    scheduler.step(network(x, scheduler.timesteps[0]), scheduler.timesteps[0], x)
    scheduler.set_timesteps(6)
    assert torch.equal(loop(scheduler, x), first)


def test_equal_times_are_counted_and_not_searched():
    # Restarting visits the same times again and again.
    scheduler = made("flow", "restart", intervals=[(0.1, 0.5, 3, 2)], seed=1)
    scheduler.set_timesteps(12)
    assert len(set(scheduler.timesteps.tolist())) < len(scheduler.timesteps)
    x = normal(2, 1, 3)
    solver = fl.solvers.Restart(intervals=[(0.1, 0.5, 3, 2)])
    assert torch.equal(loop(scheduler, x), own("flow", x, solver, 12, seed=1))


@pytest.mark.parametrize("source", ["flow", "edm"])
@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "langevin", "churn"])
@pytest.mark.parametrize("told", [True, False], ids=["begin_index", "first timestep"])
def test_a_run_begins_in_the_middle(solver, told, source):
    scheduler = made(source, solver, seed=2)
    scheduler.set_timesteps(8)
    begin = 3 * scheduler.order
    data, noise = normal(2, 1, 3), normal(2, 1, 3, seed=1)
    x = scheduler.scale_noise(data, scheduler.timesteps[begin : begin + 1], noise)
    if told:
        scheduler.set_begin_index(begin)
        assert scheduler.begin_index == begin
    result = loop(scheduler, x, begin)
    assert bool(torch.isfinite(result).all())
    if solver != "churn":
        model = fd.read_schedule(SOURCES[source]).model(network)
        times = fd.sampling_times(SOURCES[source], 8)[3:]
        assert torch.equal(result, fl.sample(model, solver=solver, times=times, state=x, seed=2))


def test_half_precision_keeps_its_state_in_single():
    scheduler, single = made("flow", "euler"), made("flow", "euler")
    x = normal(2, 1, 3).half()
    for each in (scheduler, single):
        each.set_timesteps(200)
    # The network's outputs are the same: what differs is what becomes of the state in between.
    a, b = x, x.float()
    for t in scheduler.timesteps:
        out = network(a.float(), t).half()
        a, b = (s.step(o, t, y, return_dict=False)[0] for s, o, y in ((scheduler, out, a), (single, out.float(), b)))
    assert a.dtype == torch.float16
    assert torch.equal(a, b.half())


def test_what_a_pipeline_changes_is_taken_over():
    scheduler = made("flow", "euler")
    scheduler.set_timesteps(2)
    first, second = scheduler.timesteps
    x = normal(2, 1, 3)
    x = scheduler.step(network(x, first), first, x, return_dict=False)[0]
    changed = x + 1.0
    out = network(changed, second)
    landed = scheduler.step(out, second, changed, return_dict=False)[0]
    torch.testing.assert_close(landed, changed - float(second) / 1000 * out)


def test_noise_is_the_generators_or_a_samples_own():
    x = normal(3, 1, 3)
    scheduler = made("flow", "ddpm", seed=4)
    scheduler.set_timesteps(5)
    whole = loop(scheduler, x)
    torch.testing.assert_close(loop(scheduler, x[:1]), whole[:1], rtol=0, atol=1e-6)
    runs = [loop(scheduler, x, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    unseeded = made("flow", "ddpm")
    unseeded.set_timesteps(5)
    assert not torch.equal(loop(unseeded, x), loop(unseeded, x))


def test_estimate_is_handed_out_where_it_exists():
    scheduler = made("flow", "heun")
    scheduler.set_timesteps(3)
    x, t = normal(2, 1, 3), scheduler.timesteps[0]
    out = network(x, t)
    torch.testing.assert_close(scheduler.step(out, t, x).pred_original_sample, x - out)
    # noise alone says nothing of the data
    silent = FluvialScheduler.from_config(
        {**SOURCES["v_prediction"].config, "prediction_type": "sample"}, solver="euler"
    )
    silent.set_timesteps(3)
    assert silent.step(out, silent.timesteps[0], x).pred_original_sample is out


def test_errors():
    config = SOURCES["epsilon"].config
    for make, message in (
        (lambda: FluvialScheduler.from_config(config, solver="heum"), "unknown solver 'heum'"),
        (lambda: FluvialScheduler.from_config(config, solver="langevin", gama=1), "unknown option of solver"),
        (lambda: FluvialScheduler.from_config(config, solver="dopri5"), "chooses its own times"),
        (lambda: FluvialScheduler.from_config(CMStochasticIterativeScheduler().config), "consistency"),
        (lambda: made("epsilon", "heun").step(normal(1, 1), 3, normal(1, 1)), "no run is laid out"),
    ):
        with pytest.raises(OptionError, match=message):
            make()
    scheduler = made("flow", "heun")
    scheduler.set_timesteps(4)
    with pytest.raises(OptionError, match="inside a step of Heun"):
        scheduler.set_begin_index(3)
    with pytest.raises(OptionError, match="expected steps, timesteps or sigmas"):
        scheduler.set_timesteps()


def test_grid_and_given_levels():
    scheduler = made("flow", "euler", grid="flow")
    scheduler.set_timesteps(5)
    model = fd.read_schedule(SOURCES["flow"]).model(network)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * (1 - t) for t in model.times("flow", 5, 5)[:-1]])
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.25])
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.0])  # shifted by 3, once
    scheduler.set_timesteps(timesteps=[900.5, 300.25])
    assert scheduler.timesteps.tolist() == [900.5, 300.25]
    dynamic = FluvialScheduler.from_config(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)
    dynamic.set_timesteps(sigmas=[1.0, 0.5], mu=math.log(2.0))
    assert dynamic.sigmas.tolist() == pytest.approx([1.0, 2 / 3, 0.0])
    with pytest.raises(OptionError, match="expected mu="):
        dynamic.set_timesteps(4)
