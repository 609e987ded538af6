"""A small U-Net whose every block begins with a LayerNorm over the whole image: blind to the scale of its input.

Built to take the weights of a released DDPM on MNIST (1000 steps, noise, images in [-1, 1]).
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

DATA = Path(__file__).parents[3] / "shared" / "data"
WEIGHTS = DATA / "weights" / "ddpm_mnist_scale_invariant.safetensors"


class Block(nn.Module):
    def __init__(self, size: int, before: int, after: int) -> None:
        super().__init__()
        self.ln: nn.Module = nn.LayerNorm([before, size, size])
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.conv2(functional.silu(self.conv1(self.ln(x)))))


def blocks(size: int, *channels: int) -> nn.Sequential:
    return nn.Sequential(*(Block(size, before, after) for before, after in pairwise(channels)))


def embedding(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(100, width), nn.SiLU(), nn.Linear(width, width))


class ScaleBlind(nn.Module):
    """net(x, t): x (B, 1, 28, 28) and whole steps t (B,), int64, for the table of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Embedding(1000, 100)
        widths = {"1": 1, "2": 10, "3": 20, "_mid": 40, "4": 80, "5": 40, "_out": 20}
        for name, width in widths.items():
            setattr(self, f"te{name}", embedding(width))
        self.b1, self.b2, self.b3 = blocks(28, 1, 10, 10, 10), blocks(14, 10, 20, 20, 20), blocks(7, 20, 40, 40, 40)
        self.b_mid, self.b4 = blocks(3, 40, 20, 20, 40), blocks(7, 80, 40, 20, 20)
        self.b5, self.b_out = blocks(14, 40, 20, 10, 10), blocks(28, 20, 10, 10, 10)
        self.down1, self.down2 = nn.Conv2d(10, 10, 4, 2, 1), nn.Conv2d(20, 20, 4, 2, 1)
        self.down3 = nn.Sequential(nn.Conv2d(40, 40, 2, 1), nn.SiLU(), nn.Conv2d(40, 40, 4, 2, 1))
        self.up1 = nn.Sequential(nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(40, 40, 2, 1))
        self.up2, self.up3 = nn.ConvTranspose2d(20, 20, 4, 2, 1), nn.ConvTranspose2d(10, 10, 4, 2, 1)
        self.conv_out = nn.Conv2d(10, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        table = self.time_embed(t)

        def at(name: str) -> Tensor:
            return getattr(self, f"te{name}")(table)[..., None, None]

        first = self.b1(x + at("1"))
        second = self.b2(self.down1(first) + at("2"))
        third = self.b3(self.down2(second) + at("3"))
        middle = self.b_mid(self.down3(third) + at("_mid"))
        up = self.b4(torch.cat((third, self.up1(middle)), 1) + at("4"))
        up = self.b5(torch.cat((second, self.up2(up)), 1) + at("5"))
        return self.conv_out(self.b_out(torch.cat((first, self.up3(up)), 1) + at("_out")))


def scale_blind() -> ScaleBlind:
    """The network with its released weights."""
    from safetensors.torch import load_file

    net = ScaleBlind()
    # The last block has a normalisation among its weights, and was trained without.
    net.load_state_dict({name.removeprefix("network."): value for name, value in load_file(WEIGHTS).items()})
    net.b_out[2].ln = nn.Identity()
    return net.eval().requires_grad_(False)


def mnist(n: int) -> Tensor:
    """The first n test images (n, 1, 28, 28), in [0, 1]."""
    import numpy as np

    with np.load(DATA / "mnist.npz") as archive:
        return torch.from_numpy(archive["test_x"][:n]).float()[:, None] / 255
