"""diffusers in: their tables, clocks and networks as models, and their samples where their arithmetic is right."""

from __future__ import annotations

import math

import diffusers
import diffusers_pipelines as tiny
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import fluvial as fl
from fluvial.errors import OptionError
from fluvial.exact import GaussianMixture
from fluvial.interop import diffusers as fd
from fluvial.interop.diffusers_schedule import TABLES
from fluvial.solvers import Heun

PREDICTIONS = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}
STEPS = [981, 900, 700, 500, 300, 150, 60, 10]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(scheduler, network, x, times=None):
    """diffusers' own loop; `times` are shown to the network in place of the scheduler's."""
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    with torch.no_grad():
        for k, t in enumerate(scheduler.timesteps):
            shown = t if times is None else times[k]
            out = network(scale(x, t), torch.as_tensor(shown).expand(len(x)))
            x = scheduler.step(out, t, x, return_dict=False)[0]
    return x


def call(net):
    return lambda x, t: net(x, t, return_dict=False)[0]


# Tables


@pytest.mark.parametrize("zero", [False, True], ids=["plain", "zero_snr"])
@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
        {"trained_betas": torch.linspace(0.001, 0.05, 17).tolist(), "num_train_timesteps": 17},
    ],
    ids=lambda o: o.get("beta_schedule", "trained"),
)
def test_table_is_theirs(options, zero):
    same_table(DDPMScheduler(**options, rescale_betas_zero_snr=zero), zero)


def test_exponential_table_is_theirs():
    same_table(HeunDiscreteScheduler(beta_schedule="exp"), False)


def same_table(scheduler, zero):
    schedule = fd.read_schedule(scheduler)
    table = torch.tensor(schedule.path.alphas_cumprod, dtype=torch.float64)
    # Theirs is summed up in float32.
    theirs = scheduler.alphas_cumprod.double().clamp(min=0)
    torch.testing.assert_close(table.sqrt(), theirs.sqrt(), rtol=1e-4, atol=2e-4)
    assert (table[-1] == 0.0) == zero
    assert schedule.timestep(0.0) == len(table) - 1
    assert schedule.timestep(1.0) == 0.0
    c = schedule.path(float(schedule.time(torch.tensor([3.0]))))
    assert c.alpha**2 == pytest.approx(float(table[3]), abs=1e-12)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_scheduler_is_known_by_itself_and_by_its_config(name):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name)(num_train_timesteps=50)
    for source in (scheduler, scheduler.config):
        schedule = fd.read_schedule(source)
        assert schedule.family == "table"
        assert schedule.prediction.name == "noise"
        assert schedule.timestep(0.0) == 49


@pytest.mark.parametrize("given", PREDICTIONS)
@pytest.mark.parametrize(
    ("cls", "solver"),
    [
        (DDIMScheduler, "ddim"),
        (EulerDiscreteScheduler, "ddim"),
        (DPMSolverMultistepScheduler, "dpmpp_2m"),
        (UniPCMultistepScheduler, "unipc"),
        (HeunDiscreteScheduler, Heun(along=fl.paths.EDM(rho=1.0))),
    ],
    ids=lambda v: v if isinstance(v, str) else getattr(v, "__name__", "heun"),
)
def test_samples_are_theirs_on_the_same_grid(cls, solver, given):
    options = {DDIMScheduler: {"clip_sample": False}}.get(cls, {})
    scheduler = cls(prediction_type=given, **options)
    net = tiny.unet()
    model = fd.from_diffusers(net, scheduler)
    assert model.prediction.name == PREDICTIONS[given]
    assert model.shape == (1, 8, 8)
    if cls in (DDIMScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler):
        scheduler.set_timesteps(8)
    else:
        scheduler.set_timesteps(timesteps=STEPS)
    visited = scheduler.timesteps.tolist()
    visited = visited[:1] + visited[1::2] if cls is HeunDiscreteScheduler else visited
    times = fd.sampling_times(scheduler, timesteps=visited)
    start = model.path(times[0])
    x = normal(3, 1, 8, 8) * scheduler.init_noise_sigma
    theirs = run(scheduler, call(net), x)
    # The schedulers that step in sigma/alpha hold x/alpha.
    own = x * start.alpha if cls in (EulerDiscreteScheduler, HeunDiscreteScheduler) else x
    ours = fl.sample(model, solver=solver, times=times, state=own)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacing_is_theirs(spacing):
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=0)
    for steps in (1, 2, 3, 10, 18):
        scheduler.set_timesteps(steps)
        if spacing == "linspace" and steps == 1:
            continue  # theirs then starts, and ends, at the cleanest entry
        times = fd.sampling_times(scheduler, steps)
        ours = [999 * (1 - t) for t in times[:-1]]
        assert times[-1] == 1.0
        assert len(times) == steps + 1
        # Theirs are rounded to integers.
        assert ours == pytest.approx(scheduler.timesteps.tolist(), abs=1e-9 if spacing == "leading" else 0.5 + 1e-9)


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
def test_levels_spaced_anew_are_theirs(kind):
    scheduler = EulerDiscreteScheduler(**{f"use_{kind}_sigmas": True})
    scheduler.set_timesteps(7)
    schedule = fd.read_schedule(scheduler)
    ours = torch.tensor([schedule.level(t) for t in fd.sampling_times(scheduler, 7)[:-1]])
    torch.testing.assert_close(ours, scheduler.sigmas[:-1].float(), rtol=2e-4, atol=0)


# Flow schedulers


def test_flow_samples_are_theirs_and_the_static_shift_is_applied_once():
    net = tiny.unet()
    noise = normal(3, 1, 8, 8)
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        model = fd.from_diffusers(net, scheduler)
        assert (model.grid is None) == (shift == 1.0)
        scheduler.set_timesteps(8)
        theirs = run(scheduler, call(net), noise)
        same = fl.sample(
            model, noise, solver="euler", times=fd.sampling_times(scheduler, timesteps=scheduler.timesteps)
        )
        torch.testing.assert_close(same, theirs, rtol=0, atol=1e-5)
        # Their grid runs to a level shifted already, and shifts it again: u -> k u / (1 + (k - 1) u) twice.
        once = shift * 0.001 / (1 + (shift - 1) * 0.001)
        twice = shift * once / (1 + (shift - 1) * once)
        assert 1.0 - fd.sampling_times(scheduler, 8)[-2] == pytest.approx(once, rel=1e-12)
        assert float(scheduler.sigmas[-2]) == pytest.approx(twice, rel=1e-5)


def test_shifts_that_depend_on_the_image():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(6, mu=0.8)
    times = fd.sampling_times(scheduler, 6, mu=0.8)
    assert [1 - t for t in times[:-1]] == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-5)
    model = fd.from_diffusers(tiny.unet(), scheduler, mu=0.8)
    k, u = math.exp(0.8), 0.5
    assert model.times("fitted", 4, 4)[2] == pytest.approx(1 - k * u / (1 + (k - 1) * u), abs=1e-9)
    assert fd.from_diffusers(tiny.unet(), scheduler).grid is None
    with pytest.raises(OptionError, match="expected mu="):
        fd.sampling_times(scheduler, 6)
    stretched = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    stretched.set_timesteps(6)
    assert [1 - t for t in fd.sampling_times(stretched, 6)[:-1]] == pytest.approx(
        stretched.sigmas[:-1].tolist(), rel=1e-5
    )


def test_their_rounded_flow_times_are_seen_in_the_closed_form():
    gm = GaussianMixture(torch.tensor([[0.7]]), torch.tensor([0.5], dtype=torch.float64), torch.ones(1))
    exact = gm.model(fl.paths.Rectified())
    noise = normal(64, 1, dtype=torch.float64)

    def network(x, t):
        return -exact(x, (1.0 - t.double() / 1000.0).expand(len(x))).velocity

    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0)
    scheduler.set_timesteps(256)
    levels = scheduler.sigmas.double()
    model = fd.read_schedule(scheduler).model(network)
    ours = fl.sample(model, noise, solver="unipc", times=[*(1.0 - levels[:-1]).tolist(), 1.0])
    rounded = run(scheduler, network, noise)
    scheduler.set_timesteps(256)
    unrounded = run(scheduler, network, noise, times=(1000.0 * levels[:-1]))
    truth = 0.7 + 0.5 * noise  # the flow of one Gaussian keeps the quantiles
    ours, rounded, unrounded = (float((x - truth).abs().max()) for x in (ours, rounded, unrounded))
    # Rounded to integers, the network's times put a floor under the error that no number of steps lowers.
    assert ours < 5e-5
    assert unrounded < 5e-5
    assert rounded > 1e-3


# EDM and consistency


@pytest.mark.parametrize("given", ["epsilon", "v_prediction"])
def test_edm_estimate_is_theirs(given):
    scheduler = EDMEulerScheduler(prediction_type=given, sigma_data=0.6)
    net = tiny.unet()
    model = fd.from_diffusers(net, scheduler)
    x = 3 * normal(2, 1, 8, 8)
    for sigma in (0.01, 0.5, 20.0):
        scaled = scheduler.precondition_inputs(x, torch.tensor(sigma))
        with torch.no_grad():
            out = net(scaled, scheduler.precondition_noise(torch.tensor(sigma)).expand(2)).sample
            theirs = scheduler.precondition_outputs(x, out, torch.tensor(sigma))
            ours = model(x, model.path.time(-2 * math.log(sigma))).data
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    scheduler.set_timesteps(5)
    schedule = fd.read_schedule(scheduler)
    levels = [schedule.level(t) for t in fd.sampling_times(scheduler, 5)[:-1]]
    assert levels == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-4)


def test_consistency_model_is_theirs_and_keeps_its_boundary():
    scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
    net = tiny.unet()
    flow_map = fd.from_diffusers(net, scheduler)
    x = normal(2, 1, 8, 8)
    scheduler.set_timesteps(1)
    with torch.no_grad():
        out = net(scheduler.scale_model_input(80.0 * x, scheduler.timesteps[0]), scheduler.timesteps[:1].float()).sample
        theirs = scheduler.step(out, scheduler.timesteps[0], 80.0 * x).prev_sample
    ours = fl.sample(flow_map, x, steps=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(flow_map(x, 1.0).data, x, rtol=0, atol=1e-6)
