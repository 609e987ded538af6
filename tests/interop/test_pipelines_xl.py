"""SDXL and Sana whole: FluvialScheduler against diffusers' own in their pipelines, and the models they hold."""

from __future__ import annotations

import diffusers_pipelines as tiny
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import fluvial as fl
from fluvial.interop import diffusers as fd
from fluvial.interop.diffusers import FluvialScheduler

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Their schedulers, and what each is called here: Euler steps in sigma/alpha are DDIM's, whatever the path. The spacings
# are those where both begin at the same state: "trailing" Euler starts with less than unit noise, and "leading"
# DPM-Solver counts one step more.
THEIRS = {
    "EulerDiscrete": (lambda: EulerDiscreteScheduler(**TABLE, timestep_spacing="leading", steps_offset=1), "ddim"),
    "DDIM": (lambda: DDIMScheduler(**TABLE, timestep_spacing="trailing", clip_sample=False), "ddim"),
    "DPMSolverMultistep": (lambda: DPMSolverMultistepScheduler(**TABLE, timestep_spacing="trailing"), "dpmpp_2m"),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(pipe, kind, steps=5, **options):
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    if kind:
        options = {"image": image, "strength": 0.6} | options
    if kind == "Inpaint":
        options["mask_image"] = (torch.arange(16) > 8).float().expand(1, 1, 16, 16)
    if kind != "Img2Img":
        options |= {"height": 16, "width": 16}
    generator = torch.Generator().manual_seed(0)
    options = {"guidance_scale": 2.0, "output_type": "latent", "generator": generator} | options
    return torch.as_tensor(pipe("a b", num_inference_steps=steps, **options).images)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint"])
def test_sdxl_is_as_by_diffusers(kind, name, tmp_path):
    make, solver = THEIRS[name]
    pipe = tiny.stable_diffusion_xl(kind, make(), tmp_path)
    theirs = images(pipe, kind)
    pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver=solver)
    torch.testing.assert_close(images(pipe, kind), theirs, rtol=0, atol=1e-4)
    for other in ("heun", "langevin"):
        pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver=other)
        ours = images(pipe, kind)
        assert torch.equal(images(pipe, kind), ours)
        assert bool(torch.isfinite(ours).all())
        assert not torch.equal(ours, theirs)


def test_sdxl_in_two_parts_is_the_whole(tmp_path):
    """The base model ends early and a second pipeline goes on: its `denoising_end` and `denoising_start`."""
    scheduler = FluvialScheduler.from_config(THEIRS["DDIM"][0]().config, solver="ddim")
    base = tiny.stable_diffusion_xl("", scheduler, tmp_path)
    rest = tiny.stable_diffusion_xl("Img2Img", FluvialScheduler.from_config(scheduler.config), tmp_path)
    whole = images(base, "", steps=8)
    half = images(base, "", steps=8, denoising_end=0.5)
    assert not torch.equal(half, whole)
    both = images(rest, "Img2Img", steps=8, denoising_start=0.5, image=half)
    torch.testing.assert_close(both, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_sdxl_sampled_here_is_the_pipelines(guided, name, tmp_path):
    make, solver = THEIRS[name]
    pipe = tiny.stable_diffusion_xl("", make(), tmp_path)
    noise = normal(1, 4, 8, 8)
    theirs = images(pipe, "", guidance_scale=2.0 if guided else 1.0, latents=noise)
    with torch.no_grad():
        text, null, pooled, no_pooled = pipe.encode_prompt("a b", device="cpu", do_classifier_free_guidance=True)
    ids = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])
    cond = {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": ids}
    model = fd.from_diffusers(pipe)
    guidance = None
    if guided:
        nothing = {"encoder_hidden_states": null[0], "text_embeds": no_pooled[0], "time_ids": ids[0]}
        model, guidance = model.under(null=nothing), fl.guidance.CFG(2.0)
    ours = fl.sample(
        model, solver=solver, times=fd.sampling_times(pipe.scheduler, 5), state=noise, cond=cond, guidance=guidance
    )
    torch.testing.assert_close(ours * 0.13, theirs, rtol=0, atol=1e-4)


def sana(pipe, steps=5, scale=2.0, **options):
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "output_type": "latent", "use_resolution_binning": False} | options
    return pipe(
        prompt=None,
        negative_prompt=None,  # the embeddings stand for it
        height=32,
        width=32,
        num_inference_steps=steps,
        guidance_scale=scale,
        **tiny.sana_text(),
        **options,
    ).images


def test_sana_is_as_by_diffusers():
    pipe = tiny.sana(FlowMatchEulerDiscreteScheduler())
    theirs = sana(pipe)
    pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver="euler")
    torch.testing.assert_close(sana(pipe), theirs, rtol=0, atol=1e-4)
    for other in ("dpmpp_2m", "overshoot"):
        pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver=other)
        ours = sana(pipe)
        assert torch.equal(sana(pipe), ours)
        assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_sana_sampled_here_is_the_pipelines(guided):
    pipe, noise, text = tiny.sana(FlowMatchEulerDiscreteScheduler()), normal(1, 4, 16, 16), tiny.sana_text()
    theirs = sana(pipe, scale=2.0 if guided else 1.0, latents=noise)
    names = ("encoder_hidden_states", "encoder_attention_mask")
    cond = dict(zip(names, (text["prompt_embeds"], text["prompt_attention_mask"])))
    null = dict(zip(names, (text["negative_prompt_embeds"][0], text["negative_prompt_attention_mask"][0])))
    model = fd.from_diffusers(pipe)
    guidance = None
    if guided:
        model, guidance = model.under(null=null), fl.guidance.CFG(2.0)
    ours = fl.sample(
        model, solver="euler", times=fd.sampling_times(pipe.scheduler, 5), state=noise, cond=cond, guidance=guidance
    )
    torch.testing.assert_close(ours * 0.41407, theirs, rtol=0, atol=1e-4)
