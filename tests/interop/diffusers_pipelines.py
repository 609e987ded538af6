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


def sd3_transformer(channels: int = 4) -> Any:
    """An SD3Transformer2DModel on (channels, 8, 8), text width 16, pooled 32."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(2)
    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=channels,
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


def sdxl_unet(channels: int = 4) -> Any:
    """A UNet2DConditionModel of SDXL's kind on (4, 8, 8): text of width 32, pooled 16, six numbers of size and crop."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(7)
    net = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    return net.eval()


def sana_transformer() -> Any:
    """A SanaTransformer2DModel on (4, 16, 16), text width 8."""
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(8)
    net = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=16,
        patch_size=1,
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
    """A StableDiffusion3…Pipeline without T5: "", "Img2Img", or "Inpaint", which takes 16 channels alone."""
    import diffusers
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(5)
    channels = 16 if kind == "Inpaint" else 4
    words = tokenizer(folder)
    encoders = [CLIPTextModelWithProjection(_text_config()).eval() for _ in range(2)]
    pipe = getattr(diffusers, f"StableDiffusion3{kind}Pipeline")(
        transformer=sd3_transformer(channels),
        scheduler=scheduler,
        vae=vae(channels, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoders[0],
        tokenizer=words,
        text_encoder_2=encoders[1],
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_xl(kind: str, scheduler: Any, folder: Path) -> Any:
    """A StableDiffusionXL…Pipeline: "", "Img2Img" or "Inpaint"."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(9)
    words = tokenizer(folder)
    pipe = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")(
        vae=vae(scaling_factor=0.13),
        text_encoder=CLIPTextModel(_text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config()).eval(),
        tokenizer=words,
        tokenizer_2=words,
        unet=sdxl_unet(),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sana(scheduler: Any) -> Any:
    """A SanaPipeline, to be given the embeddings of its text."""
    from diffusers import AutoencoderDC, SanaPipeline

    torch.manual_seed(10)
    decoder = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    pipe = SanaPipeline(
        tokenizer=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        vae=decoder.eval(),
        transformer=sana_transformer(),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sana_text(seed: int = 0) -> dict[str, torch.Tensor]:
    """What a SanaPipeline is called with in place of a prompt, and of a negative one."""
    drawn = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    return {
        "prompt_embeds": drawn[0],
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": drawn[1],
        "negative_prompt_attention_mask": mask,
    }
