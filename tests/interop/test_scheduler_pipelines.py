"""FluvialScheduler in unmodified pipelines: text to image, image to image, inpainting; diffusion and flow."""

from __future__ import annotations

import diffusers_pipelines as tiny
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline

from fluvial.interop.diffusers import FluvialScheduler


def images(pipe, kind, image, steps=4):
    options = {} if kind == "" else {"image": image, "strength": 0.6}
    if kind == "Inpaint":
        options["mask_image"] = (torch.arange(16) > 8).float().expand(1, 1, 16, 16)
    if kind != "Img2Img":
        options |= {"height": 16, "width": 16}
    generator = torch.Generator().manual_seed(0)
    out = pipe(
        "a b", num_inference_steps=steps, guidance_scale=2.0, output_type="latent", generator=generator, **options
    )
    return torch.as_tensor(out.images)


@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint"])
def test_stable_diffusion(kind, tmp_path):
    source = DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear")
    pipe = tiny.stable_diffusion(kind, source, tmp_path)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    theirs = images(pipe, kind, image)
    pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver="ddim")
    torch.testing.assert_close(images(pipe, kind, image), theirs, rtol=0, atol=1e-4)
    for solver, options in (("heun", {}), ("langevin", {"gamma": 0.5})):
        pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver=solver, **options)
        ours = images(pipe, kind, image)
        assert torch.equal(images(pipe, kind, image), ours)
        assert bool(torch.isfinite(ours).all())
        assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["", "Img2Img"])
def test_stable_diffusion_3(kind, tmp_path):
    pipe = tiny.stable_diffusion_3(kind, FlowMatchEulerDiscreteScheduler(), tmp_path)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    theirs = images(pipe, kind, image)
    pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver="euler", seed=0)
    torch.testing.assert_close(images(pipe, kind, image), theirs, rtol=0, atol=1e-4)
    for solver in ("heun", "sde_dpmpp_2m"):
        pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver=solver)
        assert torch.equal(images(pipe, kind, image), images(pipe, kind, image))


def test_a_pipeline_is_saved_and_loaded_with_it(tmp_path):
    pipe = DDPMPipeline(
        tiny.unet(), FluvialScheduler.from_config(DDIMScheduler().config, solver="langevin", gamma=0.1, seed=1)
    )
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    both = []
    for each in (pipe, loaded):
        each.set_progress_bar_config(disable=True)
        out = each(num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np")
        both.append(torch.from_numpy(out.images))
    assert type(loaded.scheduler) is FluvialScheduler
    assert torch.equal(*both)


def test_flux_with_its_shift():
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny.vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=tiny.flux_transformer(),
    )
    pipe.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": torch.randn(1, 5, 16), "pooled_prompt_embeds": torch.randn(1, 32)}

    def latents():
        generator = torch.Generator().manual_seed(0)
        return pipe(
            **text, height=16, width=16, num_inference_steps=4, output_type="latent", generator=generator
        ).images

    theirs = latents()
    pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver="euler", seed=0)
    torch.testing.assert_close(latents(), theirs, rtol=0, atol=1e-4)
    for solver in ("rk4", "overshoot"):
        pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver=solver)
        assert torch.equal(latents(), latents())
        assert not torch.equal(latents(), theirs)
