"""Tiny diffusers pipelines of random weights, made without a download."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch


def unet(seed: int = 0, **options: Any) -> Any:
    """A UNet2DModel on (1, 8, 8)."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **options,
    ).eval()


def text_unet(channels: int = 4, **options: Any) -> Any:
    """A UNet2DConditionModel on (4, 8, 8), with text of width 16."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    ).eval()


def sd3_transformer() -> Any:
    """An SD3Transformer2DModel on (4, 8, 8), text width 16, pooled 16."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(2)
    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return net.eval()


def flux_transformer() -> Any:
    """A FluxTransformer2DModel on (4, H, W), guided, text width 16, pooled 32."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(6)
    net = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return net.eval()


def vae(channels: int = 4, **options: Any) -> Any:
    """An AutoencoderKL that halves 16x16 images to (4, 8, 8)."""
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 8),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **options,
    ).eval()


def tokenizer(folder: Path) -> Any:
    """A CLIPTokenizer that knows a few letters."""
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{c}</w>" for c in "abcdefgh")]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


@cache
def _text_config() -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=18,
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def stable_diffusion(kind: str, scheduler: Any, folder: Path, channels: int = 4) -> Any:
    """A StableDiffusion…Pipeline: "", "Img2Img" or "Inpaint"."""
    import diffusers
    from transformers import CLIPTextModel

    torch.manual_seed(4)
    pipe = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
        vae=vae(),
        text_encoder=CLIPTextModel(_text_config()).eval(),
        tokenizer=tokenizer(folder),
        unet=text_unet(channels),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_3(kind: str, scheduler: Any, folder: Path) -> Any:
    """A StableDiffusion3…Pipeline without T5: "" or "Img2Img"."""
    import diffusers
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(5)
    words = tokenizer(folder)
    encoders = [CLIPTextModelWithProjection(_text_config()).eval() for _ in range(2)]
    pipe = getattr(diffusers, f"StableDiffusion3{kind}Pipeline")(
        transformer=sd3_transformer(),
        scheduler=scheduler,
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoders[0],
        tokenizer=words,
        text_encoder_2=encoders[1],
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
