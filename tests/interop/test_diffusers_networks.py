"""diffusers' networks behind one call: what they are handed is what their pipelines hand them."""

from __future__ import annotations

import diffusers_pipelines as tiny
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from fluvial.errors import OptionError
from fluvial.interop import diffusers as fd


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(net, cond, theirs, channels=4):
    scheduler = FlowMatchEulerDiscreteScheduler()
    model = fd.from_diffusers(net, scheduler)
    x = normal(2, channels, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            model.predict(x, 0.25, **cond), theirs(x, torch.full((2,), 750.0)), rtol=0, atol=1e-6
        )
    for name in cond:
        missing = {key: value for key, value in cond.items() if key != name}
        with pytest.raises(OptionError, match=f"{name} is missing"):
            model.predict(x, 0.25, **missing)
    with pytest.raises(OptionError, match="unknown condition of a"):
        model.predict(x, 0.25, **cond, colour=x)
    return model


def test_networks_are_called_as_their_pipelines_call_them():
    text, pooled = normal(2, 5, 16), normal(2, 32, seed=1)
    net = tiny.text_unet()
    check(net, {"encoder_hidden_states": text}, lambda x, t: net(x, t, encoder_hidden_states=text).sample)
    sd3 = tiny.sd3_transformer()
    model = check(
        sd3,
        {"encoder_hidden_states": text, "pooled_projections": pooled},
        lambda x, t: sd3(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample,
    )
    assert model.shape == (4, 8, 8)


def test_sdxl_conditions():
    net = tiny.text_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 6 * 4
    )
    text, added = normal(2, 5, 16), {"text_embeds": normal(2, 16), "time_ids": normal(2, 6).abs()}
    x, t = normal(2, 4, 8, 8), torch.full((2,), 500.0)
    model = fd.from_diffusers(net, EulerDiscreteScheduler(num_train_timesteps=1001))
    with torch.no_grad():
        theirs = net(x, t, encoder_hidden_states=text, added_cond_kwargs=added).sample
        ours = model.predict(x, 0.5, encoder_hidden_states=text, **added)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_flux_tokens():
    from diffusers import FluxPipeline

    net = tiny.flux_transformer()
    text, pooled, guidance = normal(2, 5, 16), normal(2, 32, seed=1), torch.tensor([3.5, 2.0])

    def theirs(x, t):
        packed = FluxPipeline._pack_latents(x, 2, 4, 8, 8)
        out = net(
            hidden_states=packed,
            timestep=t / 1000,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(5, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32),
        ).sample
        return FluxPipeline._unpack_latents(out, 16, 16, 2)

    cond = {"encoder_hidden_states": text, "pooled_projections": pooled, "guidance": guidance}
    model = check(net, cond, theirs)
    with pytest.raises(OptionError, match="even"):
        model.predict(normal(2, 4, 7, 8), 0.5, **cond)


def test_dit_keeps_the_mean_and_sana_its_scale():
    from diffusers import DiTTransformer2DModel, SanaTransformer2DModel

    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8
    ).eval()
    label = torch.tensor([3, 7])
    check(dit, {"label": label}, lambda x, t: dit(x, timestep=t, class_labels=label).sample[:, :4])
    sana = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        timestep_scale=0.001,
    ).eval()
    text = normal(2, 5, 16)
    check(
        sana,
        {"encoder_hidden_states": text},
        lambda x, t: sana(x, encoder_hidden_states=text, timestep=0.001 * t).sample,
    )
