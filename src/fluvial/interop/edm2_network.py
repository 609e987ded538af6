"""The network of EDM2, whose layers keep the magnitude of what passes through them.

Every weight is divided by its norm, every sum is weighted so that two independent inputs of magnitude 1 give 1:

    sum_r(a, b) = ((1 - r) a + r b) / √((1 - r)² + r²),    silu(x) / 0.596,    w / (|w| per output)

so that no normalisation layer is needed but the pixel's: x / √mean_c x². Modules are named as in NVlabs' state dicts.

Source: Karras, Aittala, Lehtinen, Hellsten, Aila, Laine: Analyzing and improving the training dynamics of diffusion
models (2024), https://arxiv.org/abs/2312.02696, appendix B and figure 21
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluvial.interop.edm_networks import attend, levels

_TINY = 1e-4  # added to a magnitude before it divides


def unit(x: Tensor, dims: Sequence[int]) -> Tensor:
    """x divided by its root mean square over these dimensions, computed in float32 or better."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    magnitude = exact.square().mean(tuple(dims), keepdim=True).sqrt() + _TINY
    return x / magnitude.to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU over its root mean square on normal numbers."""
    return F.silu(x) / 0.596


def total(a: Tensor, b: Tensor, share: float) -> Tensor:
    """sum_r above, r the share of b."""
    return a.lerp(b, share) / math.hypot(1 - share, share)


def beside(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Channels of a, then of b, scaled so that b contributes r/(1 - r) times as much as a, whatever their numbers."""
    scale = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - share, share)
    on_a, on_b = (1 - share) / math.sqrt(a.shape[1]), share / math.sqrt(b.shape[1])
    return torch.cat([scale * on_a * a, scale * on_b * b], dim=1)


class Features(nn.Module):
    """√2 cos(frequency t + phase) at random frequencies and phases, which are saved with the weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, t: Tensor) -> Tensor:
        return math.sqrt(2) * (t[:, None] * self.freqs + self.phases).cos()  # type: ignore[operator]


class Weight(nn.Module):
    """A linear layer (kernel 0) or a convolution whose weight is normalised; in training the weight itself is, too."""

    def __init__(self, before: int, after: int, kernel: int = 0) -> None:
        super().__init__()
        self.after = after
        self.weight = nn.Parameter(torch.randn(after, before, *(kernel, kernel)[: 2 if kernel else 0]))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        rest = range(1, self.weight.ndim)
        if self.training:
            with torch.no_grad():
                self.weight.copy_(unit(self.weight, rest))
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        weight = (unit(weight, rest) * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Block(nn.Module):
    """A residual block: of the encoder, which normalises the pixels first, or of the decoder."""

    def __init__(
        self,
        before: int,
        after: int,
        told: int,
        encodes: bool,
        resample: str | None = None,
        attends: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
    ) -> None:
        super().__init__()
        self.after, self.encodes, self.resample, self.taps = after, encodes, resample, tuple(resample_filter)
        self.dropout, self.res_balance, self.attn_balance, self.clip_act = dropout, res_balance, attn_balance, clip_act
        self.heads = after // channels_per_head if attends else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = Weight(after if encodes else before, after, 3)
        self.emb_linear = Weight(told, after)
        self.conv_res1 = Weight(after, after, 3)
        self.conv_skip = Weight(before, after, 1) if before != after else None
        self.attn_qkv = Weight(after, 3 * after, 1) if self.heads else None
        self.attn_proj = Weight(after, after, 1) if self.heads else None

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """x (B, C, H, W), told (B, E) -> (B, C', H', W')."""
        if self.resample:
            x = _resampled(x, self.taps, self.resample)
        if self.encodes:
            x = unit(x if self.conv_skip is None else self.conv_skip(x), [1])
        y = self.conv_res0(silu(x))
        y = silu(y * (self.emb_linear(told, self.emb_gain) + 1)[:, :, None, None])
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if not self.encodes and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = total(x, y, self.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            batch, channels, *sides = x.shape
            qkv = self.attn_qkv(x).reshape(batch, self.heads, -1, 3, math.prod(sides))
            y = attend(unit(qkv, [2]).reshape(batch, channels, 3, -1), self.heads)
            x = total(x, self.attn_proj(y.reshape(x.shape)), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)


def _resampled(x: Tensor, taps: Sequence[float], mode: str) -> Tensor:
    """x with its sides doubled ("up") or halved ("down") through a filter."""
    channels, pad = x.shape[1], (len(taps) - 1) // 2
    row = torch.tensor([float(tap) for tap in taps], dtype=x.dtype, device=x.device)
    kernel = (row[:, None] * row / row.sum() ** 2).expand(channels, 1, -1, -1)
    if mode == "down":
        return F.conv2d(x, kernel, stride=2, padding=pad, groups=channels)
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=pad, groups=channels)


class EDM2UNet(nn.Module):
    """The U-Net of EDM2, configuration G.

    Args:
        img_resolution, img_channels: of the image, or of the latents.
        label_dim: number of classes, 0 for none.
        model_channels, channel_mult: width of the finest level, and factors on it level by level.
        channel_mult_noise, channel_mult_emb: factors for the widths of the noise level's features and of the embedding;
            None: those of the first level, and of the widest.
        num_blocks: per level; attn_resolutions: sizes with attention.
        label_balance, concat_balance: shares of the class in the embedding, of the skip connections in the decoder.
        block: resample_filter, channels_per_head, dropout, res_balance, attn_balance, clip_act, of every block.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        **block: Any,
    ) -> None:
        super().__init__()
        self.label_balance, self.concat_balance = label_balance, concat_balance
        plan = levels(img_resolution, model_channels, channel_mult, attn_resolutions)
        noise = plan[0].width if channel_mult_noise is None else model_channels * channel_mult_noise
        widest = max(level.width for level in plan)
        told = widest if channel_mult_emb is None else model_channels * channel_mult_emb
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = Features(noise)
        self.emb_noise = Weight(noise, told)
        self.emb_label = Weight(label_dim, told) if label_dim else None

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        down, up = partial(Block, told=told, encodes=True, **block), partial(Block, told=told, encodes=False, **block)
        width = plan[0].width
        widths = [width]
        self.enc[f"{img_resolution}x{img_resolution}_conv"] = Weight(img_channels + 1, width, 3)
        for level in plan:
            at = f"{level.size}x{level.size}"
            if level.depth:
                self.enc[f"{at}_down"] = down(width, width, resample="down")
                widths.append(width)
            for k in range(num_blocks):
                self.enc[f"{at}_block{k}"] = down(width, level.width, attends=level.attends)
                width = level.width
                widths.append(width)
        for level in reversed(plan):
            at = f"{level.size}x{level.size}"
            if level is plan[-1]:
                self.dec[f"{at}_in0"] = up(width, width, attends=True)
                self.dec[f"{at}_in1"] = up(width, width)
            else:
                self.dec[f"{at}_up"] = up(width, width, resample="up")
            for k in range(num_blocks + 1):
                self.dec[f"{at}_block{k}"] = up(width + widths.pop(), level.width, attends=level.attends)
                width = level.width
        self.out_conv = Weight(width, img_channels, 3)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,), label (B, label_dim) one-hot or zeros -> (B, C, H, W). Needed where classes are."""
        told = self.emb_noise(self.emb_fourier(t).to(x.dtype))
        if self.emb_label is not None:
            assert label is not None
            told = total(told, self.emb_label(label * math.sqrt(label.shape[1])), self.label_balance)
        told = silu(told)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips: list[Tensor] = []
        for module in self.enc.values():
            x = module(x, told) if isinstance(module, Block) else module(x)
            skips.append(x)
        for name, module in self.dec.items():
            x = module(beside(x, skips.pop(), self.concat_balance) if "_block" in name else x, told)
        return self.out_conv(x, self.out_gain)
