"""What diffusers asks of all its schedulers, asked of FluvialScheduler: configs, saving, tables, steps, loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from fluvial.errors import OptionError
from fluvial.interop.diffusers import FluvialScheduler

PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
SOLVERS = pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m", "unipc", "ddpm", "langevin", "sde_dpmpp_2m"])


def made(prediction="epsilon", solver="ddim", **options):
    family = {"family": "flow"} if prediction == "flow_prediction" else {}
    return FluvialScheduler(solver=solver, prediction_type=prediction, **family, **options)


def sample(seed=0):
    return torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


def network(x, t):
    return x * float(t) / (float(t) + 1)


def loop(scheduler, x, begin=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, generator=generator).prev_sample
    return x


# Configs


@PREDICTIONS
def test_config_comes_back_as_it_was(prediction, tmp_path):
    scheduler = made(prediction, "langevin", solver_options={"gamma": 0.25})
    assert scheduler.compatibles == [FluvialScheduler]
    again = FluvialScheduler.from_config(scheduler.config)
    assert dict(again.config) == dict(scheduler.config)
    scheduler.save_pretrained(tmp_path)
    loaded = FluvialScheduler.from_pretrained(tmp_path)
    assert {key: value for key, value in scheduler.config.items() if key != "_use_default_values"} == loaded.config
    changed, unused = FluvialScheduler.from_pretrained(tmp_path, return_unused_kwargs=True, solver="heun")
    assert (changed.config.solver, changed.config.solver_options, unused) == ("heun", None, {})


@pytest.mark.parametrize(
    "theirs",
    [
        DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(solver_order=3, thresholding=True, use_karras_sigmas=True),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=["ddim", "dpm", "dpm_flow", "flow"],
)
def test_it_leads_back_to_the_scheduler_it_replaced(theirs, tmp_path):
    ours = FluvialScheduler.from_config(theirs.config, solver="langevin", gamma=0.5)
    ours.save_pretrained(tmp_path)
    for each in (ours, FluvialScheduler.from_pretrained(tmp_path)):
        back = type(theirs).from_config(each.config)
        assert {key: back.config[key] for key in theirs.config if not key.startswith("_")} == {
            key: value for key, value in theirs.config.items() if not key.startswith("_")
        }
        assert FluvialScheduler.from_config(back.config).config.solver_options == {"gamma": 0.5}


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "continuous"),
        (DPMSolverMultistepScheduler(use_lu_lambdas=True), "use_lu_lambdas"),
    ],
)
def test_what_would_be_misread_is_refused(theirs, message):
    with pytest.raises(OptionError, match=message):
        FluvialScheduler.from_config(theirs.config, solver="heun")


def test_a_spacing_that_is_not_known_may_be_replaced():
    theirs = DPMSolverMultistepScheduler(use_lu_lambdas=True)
    ours = FluvialScheduler.from_config(theirs.config, grid="log_snr")
    ours.set_timesteps(5)
    assert len(ours.timesteps) == 5


# Tables


@pytest.mark.parametrize("options", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}])
def test_tables_are_those_of_diffusers(options):
    theirs = DDPMScheduler(num_train_timesteps=100, **options)
    ours = FluvialScheduler.from_config(theirs.config)
    for name in ("betas", "alphas", "alphas_cumprod"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=2e-5, atol=2e-6)
    assert not hasattr(made("flow_prediction"), "betas")


def test_trained_betas_are_saved(tmp_path):
    scheduler = FluvialScheduler(trained_betas=np.array([0.1, 0.3]))  # type: ignore[arg-type]
    scheduler.save_pretrained(tmp_path)
    loaded = FluvialScheduler.from_pretrained(tmp_path)
    assert loaded.betas.tolist() == scheduler.betas.tolist() == pytest.approx([0.1, 0.3])
    assert loaded.alphas_cumprod.tolist() == pytest.approx([0.9, 0.63])


# Steps


@PREDICTIONS
@SOLVERS
def test_steps_have_the_samples_shape_as_tuples_and_by_name(prediction, solver):
    scheduler, x = made(prediction, solver), sample()
    outputs = []
    for return_dict in (True, False):
        scheduler.set_timesteps(10)
        first, second = scheduler.timesteps[:2]
        generator = torch.Generator().manual_seed(0)
        out = scheduler.step(0.1 * x, first, x, generator=generator, return_dict=return_dict)
        outputs.append(out.prev_sample if return_dict else out[0])
        further = scheduler.step(0.1 * x, second, x, generator=generator)
        assert further.prev_sample.shape == x.shape
    assert torch.equal(*outputs)
    assert outputs[0].shape == x.shape


@PREDICTIONS
@SOLVERS
def test_given_times_and_levels_make_the_run_again(prediction, solver):
    scheduler, x = made(prediction, solver), sample()
    scheduler.set_timesteps(6)
    expected, starts = loop(scheduler, x), slice(None, None, scheduler.order)
    assert bool(torch.isfinite(expected).all())
    times, levels = scheduler.timesteps[starts], torch.cat([scheduler.sigmas[:-1][starts], torch.zeros(1)])
    for given in ({"timesteps": times}, {"sigmas": levels}):
        scheduler.set_timesteps(**given)
        # The given numbers are single, the run's own times are not.
        torch.testing.assert_close(loop(scheduler, x), expected, rtol=0, atol=2e-4)


@PREDICTIONS
def test_half_precision_stays_half(prediction):
    scheduler, x = made(prediction, "dpmpp_2m"), sample().half()
    scheduler.set_timesteps(6)
    out = loop(scheduler, x)
    assert out.dtype == torch.float16
    assert bool(torch.isfinite(out).all())


def test_bad_arguments_are_one_clear_error():
    for given, message in (
        ({}, "nothing was given"),
        ({"num_inference_steps": 0}, "steps is 0"),
        ({"num_inference_steps": 1001}, "at most 1000"),
        ({"num_inference_steps": 3, "timesteps": [900, 100]}, "expected them to agree"),
        ({"timesteps": [900], "sigmas": [1.0]}, "timesteps and sigmas was given"),
        ({"timesteps": [100, 900]}, "fall strictly"),
        ({"timesteps": [1000]}, "0 to 999"),
        ({"sigmas": [1.0, -1.0]}, "not positive"),
    ):
        with pytest.raises(ValueError, match=message):
            made().set_timesteps(**given)
    with pytest.raises(AttributeError, match="'FluvialScheduler' object has no attribute 'does_not_exist'"):
        made().does_not_exist  # noqa: B018


# Loops, against diffusers' own


@pytest.mark.parametrize("begin", [0, 4], ids=["whole", "noised"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@PREDICTIONS
def test_loops_are_those_of_diffusers(prediction, spacing, begin):
    if prediction == "flow_prediction":
        pairs = [(FlowMatchEulerDiscreteScheduler(), "euler")]
    else:
        table = {"prediction_type": prediction, "timestep_spacing": spacing}
        pairs = [(DPMSolverMultistepScheduler(**table), "dpmpp_2m")]
        if spacing == "trailing":  # on the other their DDIM steps to N/steps before, not to the next time
            pairs.append((DDIMScheduler(**table, clip_sample=False), "ddim"))
    for theirs, solver in pairs:
        ours = FluvialScheduler.from_config(theirs.config, solver=solver)
        theirs.set_timesteps(10)
        # Both at the times that theirs visits: it rounds them.
        ours.set_timesteps(timesteps=theirs.timesteps.tolist())
        x = sample()
        ends = []
        for each in (theirs, ours):
            start = x
            if begin:
                noised = each.scale_noise if prediction == "flow_prediction" else each.add_noise
                first, noise = each.timesteps[begin : begin + 1], sample(1)
                start = noised(x, first, noise) if prediction == "flow_prediction" else noised(x, noise, first)
            state = start
            for t in each.timesteps[begin:]:
                state = each.step(network(state, t), t, state).prev_sample
            ends.append(state)
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)
