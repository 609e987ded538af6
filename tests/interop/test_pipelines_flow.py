"""SD3's and Flux's other pipelines with FluvialScheduler; and where diffusers' flow samplers err, by closed form."""

from __future__ import annotations

import diffusers
import diffusers_pipelines as tiny
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from fluvial.interop.diffusers import FluvialScheduler

MEAN, STD = 0.6, 0.5


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def flux(kind):
    pipe = getattr(diffusers, f"Flux{kind}Pipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny.vae(shift_factor=0.1, scaling_factor=0.36),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=tiny.flux_transformer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, kind, text):
    options = {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)), "strength": 0.6}
    if kind == "Inpaint":
        options["mask_image"] = (torch.arange(16) > 8).float().expand(1, 1, 16, 16)
    generator = torch.Generator().manual_seed(0)
    shape = {"height": 16, "width": 16, "num_inference_steps": 5, "output_type": "latent"}
    return torch.as_tensor(pipe(**text, **shape, generator=generator, **options).images)


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_flows_are_as_by_diffusers(family, kind, tmp_path):
    if family == "flux":
        pipe = flux(kind)
        text = {"prompt_embeds": normal(1, 5, 16), "pooled_prompt_embeds": normal(1, 32)}
    else:
        pipe, text = tiny.stable_diffusion_3(kind, FlowMatchEulerDiscreteScheduler(), tmp_path), {"prompt": "a b"}
    theirs = latents(pipe, kind, text)
    pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver="euler")
    torch.testing.assert_close(latents(pipe, kind, text), theirs, rtol=0, atol=1e-4)
    for solver in ("dpmpp_2m", "heun", "ddpm"):
        # These pipelines hand over no generator: the noise is the scheduler's own.
        pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver=solver, seed=0)
        ours = latents(pipe, kind, text)
        assert torch.equal(latents(pipe, kind, text), ours)
        assert not torch.equal(ours, theirs)


def flow(x, sigma):
    """E[noise - data | x] at x = (1 - sigma) data + sigma noise, data Normal(MEAN, STD²)."""
    alpha, variance = 1 - sigma, (1 - sigma) ** 2 * STD**2 + sigma**2
    off = (x - alpha * MEAN) / variance
    return sigma * off - MEAN - alpha * STD**2 * off


def run(scheduler, x):
    for t in scheduler.timesteps:
        x = scheduler.step(flow(x, float(t) / 1000), t, x, return_dict=False)[0]
    return x


def test_levels_are_shifted_once():
    config = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    theirs, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), FluvialScheduler.from_config(config, solver="euler")
    for each in (theirs, ours):
        each.set_timesteps(10)
    u = torch.linspace(1.0, 0.001, 10)
    torch.testing.assert_close(ours.sigmas[:-1], 3 * u / (1 + 2 * u))
    # Theirs shifts the ends of its grid, which were shifted already: the last level is three times as high.
    assert float(theirs.sigmas[-2] / ours.sigmas[-2]) == pytest.approx(3.0, abs=0.05)
    # On one grid the two are the same.
    same = FluvialScheduler.from_config({**config, "shift": 1.0}, solver="euler")
    same.set_timesteps(sigmas=theirs.sigmas.tolist())
    x = normal(16, 1)
    torch.testing.assert_close(run(same, x), run(theirs, x), rtol=0, atol=1e-5)


def test_times_of_a_flow_are_not_rounded():
    theirs = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    ours = FluvialScheduler.from_config(theirs.config, solver="dpmpp_2m")
    theirs.set_timesteps(400)
    ours.set_timesteps(sigmas=theirs.sigmas.double().tolist())
    x = normal(64, 1, dtype=torch.float64)
    first = float(theirs.sigmas[0])
    mean, std = (1 - first) * MEAN, ((1 - first) ** 2 * STD**2 + first**2) ** 0.5
    errors = [float((run(each, mean + std * x) - (MEAN + STD * x)).abs().max()) for each in (theirs, ours)]
    assert errors[1] < 3e-4
    assert errors[0] > 8 * errors[1]
