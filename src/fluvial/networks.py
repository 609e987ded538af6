"""Networks to train: a U-Net from diffusers for images, and one small MLP of our own for points, tables and
series.

Both are called as `network(x, t, label=None)` and answer with a tensor like x. The null class, asked of the
network where a label is dropped or unknown, is the index `num_classes`: the last row of the label embedding.

The two read different clocks, and do not translate (that is the model's `clock`): the U-Net wants diffusers'
0 … 1000, as any float; the MLP wants t in [0, 1], or any other clock a few units long.

Both can be told numbers beside the time: r, the time a flow map is to lead to, and `guidance`, the scale that a
distilled network imitates. `told` adds them to a network that was trained without, which answers as before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluvial.embeddings import Sinusoids, Told, require_known, turns
from fluvial.errors import OptionError, one_of


class UNet(nn.Module):
    """A `diffusers.UNet2DModel` of any image size, with a null class.

    Sizes that the levels do not divide are padded by repeating the border, and cropped again. `unet` is the
    diffusers model itself, so that `network.unet.save_pretrained(folder)` writes what a diffusers pipeline
    loads (its `sample_size` is then the padded size, and its last class the null class).

    Args: as for `unet`, each spelled out.
    """

    def __init__(
        self,
        channels: int,
        size: Sequence[int],
        num_classes: int | None,
        width: int,
        multipliers: Sequence[int],
        layers: int,
        attention: Sequence[bool],
        numbers: Sequence[str] = (),
        blur: float = 0.0,
        beside: int = 0,  # channels that it sees beside those of x: see systems.cascade_network
    ):
        super().__init__()
        from diffusers.models.unets.unet_2d import UNet2DModel  # slow to import, and points never need it

        self.channels, self.size, self.num_classes = channels, tuple(size), num_classes
        self.width, self.multipliers, self.layers = width, tuple(multipliers), layers
        self.attention = tuple(attention)
        self._padding = tuple(-side % 2 ** (len(multipliers) - 1) for side in size)
        down = ["AttnDownBlock2D" if here else "DownBlock2D" for here in attention]
        up = ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)]
        height, length = (side + extra for side, extra in zip(size, self._padding))
        self.unet = UNet2DModel(
            sample_size=height if height == length else (height, length),
            in_channels=channels + beside,
            out_channels=channels,
            block_out_channels=tuple(width * factor for factor in multipliers),
            layers_per_block=layers,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            norm_num_groups=8,
            attention_head_dim=width,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=None if num_classes is None else num_classes + 1,
            add_attention=attention[-1],
        )
        self.numbers: tuple[str, ...] = ()
        self.tell(numbers)
        self.blur_times(blur)
        # The first prediction is then 0 for every input: training starts from the mean, not from noise of its
        # own.
        _zero(self.unet.conv_out)

    def tell(self, names: Sequence[str]) -> None:
        """Adds inputs for these numbers, which change nothing until they are trained."""
        if names and not self.numbers:
            label: Any = self.unet.class_embedding
            told = Told(label, self.unet.time_proj, self.width, 4 * self.width, 1000.0)
            self.unet.class_embedding = told  # type: ignore[assignment]
        for name in names:
            self.unet.class_embedding.add(name)  # type: ignore[union-attr]
        self.numbers += tuple(names)

    def blur_times(self, blur: float) -> None:
        """Blurs the features of all times by this share of the clock; see `embeddings.Sinusoids`."""
        self.blur = blur
        self.unet.time_proj = Sinusoids(self.width, 1000.0 * blur)  # type: ignore[assignment]
        if self.numbers:
            self.unet.class_embedding.read_by(self.unet.time_proj)  # type: ignore[union-attr]

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, **numbers: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,) in 0 … 1000, label (B,) long or None (the null class) -> (B, C, H, W).

        numbers: those that it was built to be told, (B,) each: r on the clock of t, guidance.
        """
        label = _label(label, len(x), self.num_classes, x.device)
        require_known(numbers, self.numbers)
        told: Any = (label, t, numbers, self.unet.dtype) if self.numbers else label
        height, length = x.shape[-2:]
        if any(self._padding):
            x = F.pad(x, (0, self._padding[1], 0, self._padding[0]), mode="replicate")
        return self.unet(x, t, class_labels=told, return_dict=False)[0][..., :height, :length]

    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build the same architecture: JSON-able."""
        return {
            "kind": "unet",
            "channels": self.channels,
            "size": list(self.size),
            "num_classes": self.num_classes,
            "width": self.width,
            "multipliers": list(self.multipliers),
            "layers": self.layers,
            "attention": list(self.attention),
            **_added(self.numbers, self.blur),
        }


class MLP(nn.Module):
    """Residual blocks over a flattened sample, with time and label added inside each block.

        h <- h + W2 silu(W1 norm(h) + Wc c),   c = embed(fourier(t)) + embed(label)

    Args: as for `mlp`, each spelled out.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int | None,
        width: int,
        depth: int,
        numbers: Sequence[str] = (),
        blur: float = 0.0,
    ):
        super().__init__()
        self.shape, self.channels, self.num_classes = tuple(shape), shape[0], num_classes
        self.width, self.depth = width, depth
        dim = math.prod(shape)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.label: nn.Module | None = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.enter = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        _zero(self.leave[1])
        self.numbers: tuple[str, ...] = ()
        self.tell(numbers)
        self.blur_times(blur)

    def tell(self, names: Sequence[str]) -> None:
        """Adds inputs for these numbers, which change nothing until they are trained."""
        if names and not self.numbers:
            self.label = Told(self.label, turns, 64, self.width, 1.0)
        for name in names:
            self.label.add(name)  # type: ignore[union-attr]
        self.numbers += tuple(names)

    def blur_times(self, blur: float) -> None:
        """Blurs the features of all times by this share of the clock; see `embeddings.Sinusoids`."""
        self.blur = blur
        if self.numbers:
            self.label.read_by(partial(turns, blur=blur))  # type: ignore[union-attr]

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, **numbers: Tensor) -> Tensor:
        """x (B, *shape), t (B,), label (B,) long or None (the null class) -> (B, *shape).

        numbers: those that it was built to be told, (B,) each: r on the clock of t, guidance.
        """
        label = _label(label, len(x), self.num_classes, x.device)
        require_known(numbers, self.numbers)
        told: Any = (label, t, numbers, x.dtype) if self.numbers else label
        condition = self.time(turns(t, self.blur).to(x.dtype))
        if self.label is not None:
            condition = condition + self.label(told)
        hidden = self.enter(x.flatten(1))
        condition = F.silu(condition)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.leave(hidden).reshape(x.shape)

    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build the same architecture: JSON-able."""
        return {
            "kind": "mlp",
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "width": self.width,
            "depth": self.depth,
            **_added(self.numbers, self.blur),
        }


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.condition = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        return hidden + self.second(F.silu(self.first(self.norm(hidden)) + self.condition(condition)))


def _added(names: Sequence[str], blur: float) -> dict[str, Any]:
    """Only where there is something, so that a network without keeps the description that it had."""
    return ({"numbers": list(names)} if names else {}) | ({"blur": blur} if blur else {})


def told(network: nn.Module, names: Sequence[str], blur: float = 0.0) -> Any:
    """A copy of one of our networks that can be told these numbers too, and answers as it did until it is trained.

    Args:
        network: a `UNet` or an `MLP`.
        names: "r", the time that a flow map is to lead to (without: t itself); "guidance", a scale (without: 1).
            Those that it is told already are left as they are.
        blur: of its times, as a share of its clock, where its derivative in time will matter; 0 leaves them. A
            hundredth changes what it answers by about as much.

    Raises:
        OptionError: for another network, or another name.
    """
    if not isinstance(network, UNet | MLP):
        raise OptionError(
            f"a {type(network).__name__} cannot be told {', '.join(names)}; expected a network of fl.networks, or one "
            "of your own that takes them: network(x, t, r=…, **cond)"
        )
    network = copy.deepcopy(network)
    parameter = next(network.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # so that a run that starts from it is a function of its own seed alone
        network.tell([name for name in names if name not in network.numbers])
    if blur:
        network.blur_times(blur)
    return network.to(device=parameter.device, dtype=parameter.dtype)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _label(label: Tensor | None, count: int, num_classes: int | None, device: torch.device) -> Tensor | None:
    """The label (B,) to embed: the null class where none is given."""
    if num_classes is None:
        if label is not None:
            raise OptionError("this network was built without classes, but was given a label")
        return None
    if label is None:
        return torch.full((count,), num_classes, dtype=torch.long, device=device)
    return label


def unet(
    channels: int,
    size: int | Sequence[int],
    num_classes: int | None = None,
    width: int = 32,
    multipliers: Sequence[int] | None = None,
    layers: int = 1,
    attention: Sequence[bool] | None = None,
) -> UNet:
    """A U-Net for images, sized for them; its time is diffusers' 0 … 1000.

    Args:
        channels: of an image, in and out.
        size: height and width in pixels, or one number for both; any size from 1.
        num_classes: how many classes; the network has one more, the null class. None: no labels.
        width: channels of the first level, a multiple of 8.
        multipliers: of the width, one per level; each level halves the image. Default: as many levels, at most
            four, as leave four pixels or more at the last: (1, 2) for 8x8, (1, 2, 2) for 16x16 and 28x28,
            (1, 2, 2, 4) from 32x32.
        layers: residual blocks per level.
        attention: per level, whether its pixels attend to each other. Default: the last level only.

    Raises:
        OptionError: for a width that is not a multiple of 8, or an `attention` that is not one flag per
            level.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1 or channels < 1:
        raise OptionError(f"a U-Net is for images: channels is {channels}, size is {size}; expected numbers from 1")
    if width < 8 or width % 8:
        raise OptionError(f"width is {width}; expected a multiple of 8 (the groups of its normalisation)")
    if multipliers is None:
        levels = 1
        while levels < 4 and max(sides) >= 4 * 2**levels:
            levels += 1
        multipliers = (1, 2, 2, 4)[:levels]
    if attention is None:
        attention = [False] * (len(multipliers) - 1) + [True]
    if len(attention) != len(multipliers):
        raise OptionError(f"attention has {len(attention)} flags for {len(multipliers)} levels; expected one each")
    return UNet(channels, sides, num_classes, width, multipliers, layers, attention)


def mlp(dim: int | Sequence[int], num_classes: int | None = None, width: int = 256, depth: int = 4) -> MLP:
    """An MLP for points, vectors and short series; its time is t in [0, 1].

    Args:
        dim: numbers in a sample, or the sample's shape, such as (channels, length) for a series.
        num_classes: how many classes; the network has one more, the null class. None: no labels.
        width: of the hidden layers.
        depth: how many residual blocks.

    Raises:
        OptionError: for a number below 1.
    """
    shape = (dim,) if isinstance(dim, int) else tuple(dim)
    if not shape or min(*shape, width, depth) < 1:
        raise OptionError(f"dim is {dim}, width {width}, depth {depth}; expected numbers from 1")
    return MLP(shape, num_classes, width, depth)


def for_data(shape: Sequence[int], num_classes: int | None = None, width: int | None = None) -> UNet | MLP:
    """The network for samples of this shape: a U-Net for images (C, H, W), the MLP for everything else."""
    if len(shape) == 3:
        return unet(shape[0], shape[1:], num_classes, width or 32)
    return mlp(shape, num_classes, width or 256)


def from_config(config: dict[str, Any]) -> UNet | MLP:
    """The architecture that `config()` described, with fresh weights.

    Raises:
        OptionError: for a kind of network, or an argument, that is not known here.
    """
    kinds = {"unet": UNet, "mlp": MLP}
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    if kind not in kinds:
        raise one_of("kind of network", kind, kinds)
    try:
        return kinds[kind](**arguments)
    except TypeError as error:
        raise OptionError(f"not a config of a {kind}: {error}") from error
