"""The two networks of unCLIP: a prior over embeddings, and a decoder of them into images.

Both are told vectors by name, (B, D) each: the embedding of a text, of an image, or both. A row of zeros stands for
none, as unit vectors never are; so does what is not given. Each condition has a learned vector for its absence, and in
training each is left out at random by its own share: the network does that by itself, as dropout, so that training
needs no null condition, `drop_cond=0`. What guidance compares with is `with_null(model)`.

    h(conditions) = sum over names of  embed(√D c)  or, where there is none,  absent
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluvial.embeddings import Told, require_known, turns
from fluvial.errors import OptionError, ShapeError
from fluvial.model import Model
from fluvial.networks import MLP, UNet, unet

AnyModel = TypeVar("AnyModel", bound=Model)


class Conditions(nn.Module):
    """The sum of the embeddings of vectors by name, each with a vector for its absence.

    Args:
        widths: D of each.
        width: of the embedding.
        drop: of each, the share of samples in training that it is kept from.
    """

    def __init__(self, widths: Mapping[str, int], width: int, drop: Mapping[str, float]):
        super().__init__()
        self.widths, self.width, self.drop = dict(widths), width, dict(drop)
        self.embed = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(d, width), nn.SiLU(), nn.Linear(width, width)) for name, d in widths.items()}
        )
        self.absent = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in widths})

    def forward(self, given: tuple[Mapping[str, Tensor | None], Tensor]) -> Tensor:
        """(vectors (B, D) by name, a tensor (B, …) of the batch and dtype to work in) -> (B, width)."""
        vectors, like = given
        total: Any = 0.0
        for name, d in self.widths.items():
            value = vectors.get(name)
            if value is None:
                total = total + self.absent[name].expand(len(like), -1)
                continue
            if tuple(value.shape) != (len(like), d):
                raise ShapeError(f"condition {name!r} has shape {tuple(value.shape)}; expected ({len(like)}, {d})")
            none = (value == 0).all(1)
            if self.training and self.drop.get(name):
                none = none | (torch.rand(len(value), device=value.device) < self.drop[name])
            told = self.embed[name](math.sqrt(d) * value.to(like.dtype))
            total = total + torch.where(none[:, None], self.absent[name], told)
        return total


class Prior(MLP):
    """An MLP over embeddings (B, D), told the embedding of a text.

    Args:
        dim: D.
        text: numbers in a text's embedding.
        width, depth: as for `networks.mlp`.
        drop: the share of samples in training whose text is left out.
        clip: the hash of the CLIP whose embeddings these are.
        numbers, blur: as for `networks.MLP`.
    """

    def __init__(
        self,
        dim: int,
        text: int,
        width: int = 256,
        depth: int = 4,
        drop: float = 0.1,
        clip: str | None = None,
        numbers: Sequence[str] = (),
        blur: float = 0.0,
    ):
        for name, value in (("dim", dim), ("text", text), ("width", width), ("depth", depth)):
            if value < 1:
                raise OptionError(f"{name} is {value}; expected a whole number, 1 or more")
        require_shares({"text": drop})
        super().__init__((dim,), None, width, depth)
        self.conditions, self.drop, self.clip = {"text": text}, drop, clip
        self.label = Conditions(self.conditions, width, {"text": drop})
        self.tell(numbers)
        self.blur_times(blur)

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None, **numbers: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (B, D), t (B,) in 0 … 1, text (B, text) or None -> (B, D); numbers as for `networks.MLP`."""
        require_known(numbers, self.numbers)
        given: Any = {"text": text}, x
        told = (given, t, numbers, x.dtype) if isinstance(self.label, Told) else given
        assert self.label is not None
        condition = F.silu(self.time(turns(t, self.blur).to(x.dtype)) + self.label(told))
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.leave(hidden)

    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build the same architecture: JSON-able."""
        own = {"dim": self.shape[0], "text": self.conditions["text"], "width": self.width, "depth": self.depth}
        return own | {"drop": self.drop, "clip": self.clip, "numbers": list(self.numbers), "blur": self.blur}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The architecture that `config()` described, with fresh weights."""
        return cls(**config)


class Decoder(UNet):
    """A U-Net told the embedding of an image, of a text, or both: added, through layers of their own, to its time's.

    Args: as for `networks.UNet`, and
        conditions: numbers in each vector that it is told, by name: "embedding", "text".
        drop: of each, the share of samples in training that it is left out of.
        clip: the hash of the CLIP whose embeddings these are.
    """

    def __init__(
        self,
        channels: int,
        size: Sequence[int],
        width: int,
        multipliers: Sequence[int],
        layers: int,
        attention: Sequence[bool],
        conditions: Mapping[str, int],
        drop: Mapping[str, float],
        clip: str | None = None,
        numbers: Sequence[str] = (),
        blur: float = 0.0,
    ):
        if not conditions or not set(conditions) <= {"embedding", "text"}:
            raise OptionError(f"conditions are {', '.join(conditions) or 'none'}; expected embedding, text, or both")
        require_shares(drop)
        super().__init__(channels, size, None, width, multipliers, layers, attention)
        self.conditions, self.drop, self.clip = dict(conditions), dict(drop), clip
        self.unet.class_embedding = Conditions(conditions, 4 * width, drop)  # type: ignore[assignment]
        self.tell(numbers)
        self.blur_times(blur)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, t: Tensor, embedding: Tensor | None = None, text: Tensor | None = None, **numbers: Tensor
    ) -> Tensor:
        """x (B, C, H, W), t (B,) in 0 … 1000, embedding (B, D), text (B, D) -> (B, C, H, W).

        numbers: as for `networks.UNet`.

        Raises:
            OptionError: for a condition that it was built without.
        """
        require_known(numbers, self.numbers)
        vectors = {name: value for name, value in (("embedding", embedding), ("text", text)) if value is not None}
        for name in vectors:
            if name not in self.conditions:
                raise OptionError(f"this decoder was built without {name!r}; expected {' or '.join(self.conditions)}")
        given: Any = vectors, x
        told = (given, t, numbers, self.unet.dtype) if self.numbers else given
        height, length = x.shape[-2:]
        if any(self._padding):
            x = F.pad(x, (0, self._padding[1], 0, self._padding[0]), mode="replicate")
        return self.unet(x, t, class_labels=told, return_dict=False)[0][..., :height, :length]

    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build the same architecture: JSON-able."""
        base = super().config()
        names = ("channels", "size", "width", "multipliers", "layers", "attention")
        own = {"conditions": self.conditions, "drop": self.drop, "clip": self.clip}
        return {name: base[name] for name in names} | own | {"numbers": list(self.numbers), "blur": self.blur}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The architecture that `config()` described, with fresh weights."""
        return cls(**config)


def decoder(
    shape: Sequence[int],
    conditions: Mapping[str, int],
    width: int = 32,
    drop: Mapping[str, float] | None = None,
    clip: str | None = None,
) -> Decoder:
    """A decoder sized for images (C, H, W), as `networks.unet` sizes its U-Nets.

    Args:
        shape: of an image.
        conditions: numbers in each vector that it is told, by name: "embedding", "text".
        width: channels of the first level, a multiple of 8.
        drop: of each condition, the share of samples in training that it is left out of; default: the published ones,
            0.1 of the embeddings and 0.5 of the texts, where it has both; 0.1 of the one that it has.
        clip: the hash of the CLIP whose embeddings these are.
    """
    with torch.device("meta"):  # for its sizes alone
        like = unet(shape[0], shape[1:], None, width)
    default = {"embedding": 0.1, "text": 0.5} if len(conditions) > 1 else dict.fromkeys(conditions, 0.1)
    return Decoder(
        like.channels,
        like.size,
        like.width,
        like.multipliers,
        like.layers,
        like.attention,
        conditions,
        default if drop is None else drop,
        clip,
    )


def with_null(model: AnyModel) -> AnyModel:
    """The same model, whose null conditions are rows of zeros: for guidance. It is not saved so: they are implied."""
    widths = getattr(model.network, "conditions", {})
    rows = {name: torch.zeros(d) for name, d in widths.items()}
    return model.under(null={**rows, **(model.null or {})}) if rows else model


def require_shares(drop: Mapping[str, float]) -> None:
    for name, share in drop.items():
        if not 0.0 <= share <= 1.0:
            raise OptionError(f"drop of {name!r} is {share}; expected a share from 0 to 1")
