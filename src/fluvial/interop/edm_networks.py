"""The networks of EDM: SongUNet (DDPM++ and NCSN++) and DhariwalUNet (ADM), with the names of their weights.

Both are U-Nets of residual blocks. A block convolves twice, is told the noise level in between, and may change the
size; some end with attention over all positions:

    y = conv1(silu(told(norm1, conv0(silu(norm0 x))))),    x <- c (skip x + y),    x <- c (x + proj(attention(norm2 x)))

| | SongUNet | DhariwalUNet |
|---|---|---|
| c | √½ | 1 |
| told | norm1(h + a) | (1 + a) norm1(h) + b |
| heads | one | of 64 channels |
| noise level | sines, or Fourier features | sines |
| class | joins the noise level before the two layers | after them |

Modules are named as in NVlabs' state dicts, `enc.32x32_block0.conv0.weight`. They are made to be filled: their fresh
weights are PyTorch's usual ones.

Sources: Karras, Aittala, Aila, Laine: Elucidating the design space (2022), https://arxiv.org/abs/2206.00364,
appendix F; Song et al.: Score-based generative modeling through SDEs (2021), https://arxiv.org/abs/2011.13456;
Dhariwal, Nichol: Diffusion models beat GANs on image synthesis (2021), https://arxiv.org/abs/2105.05233
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Level(NamedTuple):
    """One resolution of a U-Net."""

    depth: int
    size: int
    width: int
    attends: bool


def levels(size: int, width: int, multipliers: Sequence[int], attention: Sequence[int]) -> list[Level]:
    """The resolutions of a U-Net, the finest first."""
    sizes = [size >> depth for depth in range(len(multipliers))]
    return [Level(k, s, width * m, s in attention) for k, (s, m) in enumerate(zip(sizes, multipliers))]


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Attention over positions: (B, C, 3, N) of queries, keys and values side by side -> (B, C, N)."""
    batch, channels, _, positions = qkv.shape
    query, key, value = qkv.reshape(batch, heads, channels // heads, 3, positions).transpose(2, 4).unbind(3)
    return F.scaled_dot_product_attention(query, key, value).transpose(2, 3).reshape(batch, channels, positions)


class Conv(nn.Module):
    """A convolution of odd kernel (0: none) that may first double or halve the size through a filter.

    `filtered_last` halves after the convolution in place of before it.
    """

    def __init__(
        self,
        before: int,
        after: int,
        kernel: int,
        resample: str | None = None,
        taps: Sequence[float] = (1, 1),
        filtered_last: bool = False,
    ) -> None:
        super().__init__()
        self.after, self.resample, self.filtered_last = after, resample, filtered_last
        self.weight = nn.Parameter(torch.empty(after, before, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(after)) if kernel else None
        if self.weight is not None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        row = torch.tensor([float(tap) for tap in taps])
        self.register_buffer("resample_filter", (row[:, None] * row / row.sum() ** 2)[None, None] if resample else None)

    def forward(self, x: Tensor) -> Tensor:
        taps: Tensor | None = self.resample_filter  # type: ignore[assignment]
        pad = 0 if taps is None else (taps.shape[-1] - 1) // 2
        if self.filtered_last:
            return self._filtered(self._convolved(x, pad), 0)
        return self._convolved(x if taps is None else self._filtered(x, pad))

    def _convolved(self, x: Tensor, margin: int = 0) -> Tensor:
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2 + margin)

    def _filtered(self, x: Tensor, pad: int) -> Tensor:
        channels = x.shape[1]
        taps = self.resample_filter.to(x).expand(channels, 1, -1, -1)  # type: ignore[operator, union-attr]
        if self.resample == "down":
            return F.conv2d(x, taps, stride=2, padding=pad, groups=channels)
        return F.conv_transpose2d(x, 4 * taps, stride=2, padding=pad, groups=channels)


def norm(channels: int, eps: float) -> nn.GroupNorm:
    """GroupNorm of groups of 4 channels or more, 32 groups at most."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


class Block(nn.Module):
    """The residual block of both networks: see the table above.

    Args:
        before, after: channels.
        told: width of the embedding of the noise level.
        song: whether it is SongUNet's.
        resample: "up", "down" or None.
        attends: whether it ends with attention.
        dropout: the share of dropped channels, in training.
        taps: the filter of `resample`.
    """

    def __init__(
        self,
        before: int,
        after: int,
        told: int,
        song: bool,
        resample: str | None = None,
        attends: bool = False,
        dropout: float = 0.0,
        taps: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        self.after, self.song, self.dropout = after, song, dropout
        self.heads = (1 if song else after // 64) if attends else 0
        self.scale = math.sqrt(0.5) if song else 1.0
        eps = 1e-6 if song else 1e-5
        self.norm0 = norm(before, eps)
        self.conv0 = Conv(before, after, 3, resample, taps)
        self.affine = nn.Linear(told, after if song else 2 * after)
        self.norm1 = norm(after, eps)
        self.conv1 = Conv(after, after, 3)
        changed = before != after
        projects = changed or song
        self.skip = Conv(before, after, 1 if projects else 0, resample, taps) if changed or resample else None
        if self.heads:
            self.norm2 = norm(after, eps)
            self.qkv = Conv(after, 3 * after, 1)
            self.proj = Conv(after, after, 1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """x (B, C, H, W), told (B, E) -> (B, C', H', W')."""
        h = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(told)[:, :, None, None]
        if self.song:
            h = self.norm1(h + params)
        else:
            factor, offset = params.chunk(2, dim=1)
            h = torch.addcmul(offset, self.norm1(h), factor + 1)
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = ((x if self.skip is None else self.skip(x)) + h) * self.scale
        if self.heads:
            shape = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(shape[0], shape[1], 3, -1)
            x = (self.proj(attend(qkv, self.heads).reshape(shape)) + x) * self.scale
        return x


class Sines(nn.Module):
    """Cosines, then sines, of the time at the frequencies 10000^(-k/n), k = 0 … h - 1; n is h - 1 if closed, else h."""

    def __init__(self, width: int, closed: bool) -> None:
        super().__init__()
        self.width, self.closed = width, closed

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        # In float32 as in training, whose frequencies these are to the last bit: a clock may count to 1000.
        powers = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1 if self.closed else half)
        angles = t[:, None] * ((1 / 10000) ** powers).to(t.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Features(nn.Module):
    """Cosines, then sines, of the time at random frequencies, which are saved with the weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * 16)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * (2 * math.pi * self.freqs).to(t.dtype)  # type: ignore[operator]
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNetBase(nn.Module):
    """What the two have in common: the levels down and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()

    def _descend(self, block: partial[Block], plan: list[Level], first: int, count: int) -> Iterator[tuple[Level, int]]:
        """Fills the encoder; between a level's way down and its blocks the caller may add modules of its own."""
        width = first
        for level in plan:
            if level.depth:
                self.enc[f"{level.size}x{level.size}_down"] = block(width, width, resample="down")
            yield level, width
            for k in range(count):
                self.enc[f"{level.size}x{level.size}_block{k}"] = block(width, level.width, attends=level.attends)
                width = level.width

    def _climb(self, block: partial[Block], plan: list[Level], count: int, attends_last: bool) -> Iterator[Level]:
        """Fills the decoder likewise; the caller's modules come after a level's blocks."""
        widths: list[Any] = [module.after for name, module in self.enc.items() if "_aux_" not in name]
        width = plan[-1].width
        for level in reversed(plan):
            at = f"{level.size}x{level.size}"
            if level is plan[-1]:
                self.dec[f"{at}_in0"] = block(width, width, attends=True)
                self.dec[f"{at}_in1"] = block(width, width)
            else:
                self.dec[f"{at}_up"] = block(width, width, resample="up")
            for k in range(count + 1):
                attends = level.attends and (k == count or not attends_last)
                self.dec[f"{at}_block{k}"] = block(width + widths.pop(), level.width, attends=attends)
                width = level.width
            yield level


class SongUNet(UNetBase):
    """DDPM++ (as it is) and NCSN++ (fourier, residual, channel_mult_noise 2, filter 1 3 3 1).

    Args:
        img_resolution, in_channels, out_channels: of the image.
        label_dim: number of classes, 0 for none; augment_dim: width of the augmentation's description, 0 for none.
        model_channels, channel_mult: width of the finest level, and factors on it level by level.
        channel_mult_emb, channel_mult_noise: factors on it for the two widths of the noise level's embedding.
        num_blocks: per level; attn_resolutions: sizes with attention.
        dropout: in training.
        embedding_type: "positional" or "fourier".
        encoder_type: "standard"; "skip" or "residual": the image itself, filtered down, joins at each level.
        decoder_type: "standard"; "skip": each level adds to the output.
        resample_filter: by which sizes are doubled and halved.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        told, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        self.map_noise = Sines(noise, closed=True) if embedding_type == "positional" else Features(noise)
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, told), nn.Linear(told, told)

        taps = tuple(resample_filter)
        block = partial(Block, told=told, song=True, dropout=dropout, taps=taps)
        plan = levels(img_resolution, model_channels, channel_mult, attn_resolutions)
        beside = in_channels
        for level, width in self._descend(block, plan, model_channels, num_blocks):
            at = f"{level.size}x{level.size}"
            if not level.depth:
                self.enc[f"{at}_conv"] = Conv(in_channels, width, 3)
            elif encoder_type == "skip":
                self.enc[f"{at}_aux_down"] = Conv(beside, beside, 0, "down", taps)
                self.enc[f"{at}_aux_skip"] = Conv(beside, width, 1)
            elif encoder_type == "residual":
                self.enc[f"{at}_aux_residual"] = Conv(beside, width, 3, "down", taps, filtered_last=True)
                beside = width
        for level in self._climb(block, plan, num_blocks, attends_last=True):
            at = f"{level.size}x{level.size}"
            if decoder_type == "skip" and level is not plan[-1]:
                self.dec[f"{at}_aux_up"] = Conv(out_channels, out_channels, 0, "up", taps)
            if decoder_type == "skip" or not level.depth:
                self.dec[f"{at}_aux_norm"] = norm(level.width, 1e-6)
                self.dec[f"{at}_aux_conv"] = Conv(level.width, out_channels, 3)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,), label (B, label_dim) one-hot or zeros, augment (B, augment_dim) -> (B, C', H, W).

        The label is needed where there are classes.
        """
        cosines, sines = self.map_noise(t).chunk(2, dim=1)
        told = torch.cat([sines, cosines], dim=1).to(x.dtype)
        if self.map_label is not None:
            assert label is not None
            told = told + self.map_label(label * math.sqrt(label.shape[1]))
        if self.map_augment is not None and augment is not None:
            told = told + self.map_augment(augment)
        told = F.silu(self.map_layer1(F.silu(self.map_layer0(told))))
        skips: list[Tensor] = []
        beside = x
        for name, module in self.enc.items():
            if name.endswith("_aux_down"):
                beside = module(beside)
            elif name.endswith("_aux_skip"):
                x = skips[-1] = x + module(beside)
            elif name.endswith("_aux_residual"):
                x = skips[-1] = beside = (x + module(beside)) * math.sqrt(0.5)
            else:
                x = module(x, told) if isinstance(module, Block) else module(x)
                skips.append(x)
        return self._decode(x, told, skips)

    def _decode(self, x: Tensor, told: Tensor, skips: list[Tensor]) -> Tensor:
        out, normed = None, x
        for name, module in self.dec.items():
            if name.endswith("_aux_up"):
                out = module(out)
            elif name.endswith("_aux_norm"):
                normed = module(x)
            elif name.endswith("_aux_conv"):
                more = module(F.silu(normed))
                out = more if out is None else out + more
            else:
                x = module(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, told)
        assert out is not None
        return out
