"""EDM's third network: ADM, of the blocks that `edm_networks` describes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluvial.interop.edm_networks import Block, Conv, Sines, UNetBase, levels, norm


class DhariwalUNet(UNetBase):
    """ADM. Arguments as of `SongUNet`.

    Source: Dhariwal, Nichol: Diffusion models beat GANs on image synthesis (2021), https://arxiv.org/abs/2105.05233
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        told = model_channels * channel_mult_emb
        self.map_noise = Sines(model_channels, closed=False)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, told), nn.Linear(told, told)
        self.map_label = nn.Linear(label_dim, told, bias=False) if label_dim else None

        block = partial(Block, told=told, song=False, dropout=dropout)
        plan = levels(img_resolution, model_channels, channel_mult, attn_resolutions)
        for level, width in self._descend(block, plan, plan[0].width, num_blocks):
            if not level.depth:
                self.enc[f"{level.size}x{level.size}_conv"] = Conv(in_channels, width, 3)
        for _ in self._climb(block, plan, num_blocks, attends_last=False):
            pass
        self.out_norm = norm(plan[0].width, 1e-5)
        self.out_conv = Conv(plan[0].width, out_channels, 3)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,), label (B, label_dim) one-hot or zeros, augment (B, augment_dim) -> (B, C', H, W)."""
        told = self.map_noise(t).to(x.dtype)
        if self.map_augment is not None and augment is not None:
            told = told + self.map_augment(augment)
        told = self.map_layer1(F.silu(self.map_layer0(told)))
        if self.map_label is not None and label is not None:
            told = told + self.map_label(label)
        told = F.silu(told)
        skips: list[Tensor] = []
        for module in self.enc.values():
            x = module(x, told) if isinstance(module, Block) else module(x)
            skips.append(x)
        for name, module in self.dec.items():
            x = module(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, told)
        return self.out_conv(F.silu(self.out_norm(x)))
