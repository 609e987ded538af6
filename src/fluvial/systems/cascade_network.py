"""The network of a cascade's upper stages: a U-Net that sees the lower image beside the state.

Sources: Ho, Saharia, Chan, Fleet, Norouzi, Salimans: Cascaded diffusion models for high fidelity image generation
(2021), https://arxiv.org/abs/2106.15282; Saharia et al.: Image super-resolution via iterative refinement (2021),
https://arxiv.org/abs/2104.07636
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluvial.errors import OptionError, ShapeError, one_of
from fluvial.networks import UNet, unet
from fluvial.systems.upsampling import USUAL, Augmentation, sides


class Upsampler(UNet):
    """A `networks.UNet` of an image and a lower image, which is enlarged to its size and may be corrupted.

    It is told the `level`, the log-SNR of that corruption, as it is told the time: as 1000 sigma/(alpha + sigma), the
    rectified time of that log-SNR on diffusers' clock. Its first prediction is 0, as that of every U-Net here.

    Args:
        low: height and width of the lower image before it was enlarged.
        augmentation: the corruptions that it is trained under; None: of clean lower images alone.
        channels, size, num_classes, width, multipliers, layers, attention, numbers, blur: as for `networks.UNet`.
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
        low: Sequence[int],
        augmentation: Augmentation | None = None,
        numbers: Sequence[str] = (),
        blur: float = 0.0,
    ) -> None:
        told = ("level", *(name for name in numbers if name != "level"))
        super().__init__(
            channels, size, num_classes, width, multipliers, layers, attention, told, blur, beside=channels
        )
        self.low, self.augmentation = (int(low[0]), int(low[1])), augmentation

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        low: Tensor | None = None,
        level: Tensor | None = None,
        **numbers: Tensor,
    ) -> Tensor:
        """x (B, C, H, W), t (B,) in 0 … 1000, label (B,) long or None (the null class) -> (B, C, H, W).

        Args:
            low: (B, C, H, W) the lower image in path units, corrupted and enlarged; see `systems.StageSource`.
            level: (B,) the log-SNR of its corruption; None is clean.
            numbers: as for `networks.UNet`.

        Raises:
            OptionError: without the lower image.
        """
        if low is None:
            raise OptionError(
                "an Upsampler needs the lower image; expected low= and level=: fl.systems.StageSource gives them in "
                "training, fl.systems.Cascade (fluvial cascade) in sampling"
            )
        if low.shape != x.shape:
            raise ShapeError(
                f"low has shape {tuple(low.shape)} and x {tuple(x.shape)}; expected the same: enlarged to its size"
            )
        told = numbers if level is None else {**numbers, "level": level}
        return super().forward(torch.cat([x, low.to(x.dtype)], 1), t, label, **told)

    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build the same architecture: JSON-able."""
        augmentation = None if self.augmentation is None else self.augmentation.config()
        return {**super().config(), "kind": "upsampler", "low": list(self.low), "augmentation": augmentation}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Upsampler:
        """The architecture that `config()` described, with fresh weights.

        Raises:
            OptionError: for another kind of network, or an argument that is not known here.
        """
        arguments = dict(config)
        kind = arguments.pop("kind", None)
        if kind != "upsampler":
            raise one_of("kind of network", kind, ["upsampler"])
        try:
            given = arguments.pop("augmentation")
            return cls(**arguments, augmentation=None if given is None else Augmentation(**given))
        except (TypeError, KeyError) as error:
            raise OptionError(f"not a config of an upsampler: {error}") from error


def upsampler(
    channels: int,
    size: int | Sequence[int],
    low: int | Sequence[int],
    num_classes: int | None = None,
    width: int = 32,
    *,
    augmentation: Augmentation | None = USUAL,
    **rest: Any,
) -> Upsampler:
    """A network for one upper stage of a cascade, sized for its images.

    Args:
        channels, size, num_classes, width, rest: as for `networks.unet`.
        low: the size of the stage below.
        augmentation: the corruptions it is trained under; None: of clean lower images alone.
    """
    with torch.device("meta"):
        plan = unet(channels, size, num_classes, width, **rest).config()
    plan.pop("kind")
    return Upsampler(**plan, low=sides(low), augmentation=augmentation)
