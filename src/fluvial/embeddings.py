"""Numbers that a network is told beside its time: where a flow map is to lead, and the guidance it is to imitate.

Each is embedded like the time, and added to the embedding of the label. Its last layer starts at zero: a network that
is told more than it was trained with answers as before, until it is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.errors import OptionError, one_of

NUMBERS = ("r", "guidance", "level")


class Sinusoids(nn.Module):
    """diffusers' time features, in the precision of t: theirs round a float64 t to float32, which would show
    as differences of 1e-5 between notations whose clocks agree to 1e-16. It has no weights: saved models are
    unchanged.

    With a blur they are those of a time that is uncertain, t + blur * Normal(0, 1), on average: waves shorter than that
    vanish. A network that has learned from samples of t wiggles between them, which its values hardly show, and its
    derivative does.
    """

    def __init__(self, size: int, blur: float = 0.0):
        super().__init__()
        self.size, self.blur = size, blur

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) -> (B, size): cosines, then sines."""
        precise = torch.promote_types(t.dtype, torch.float32)
        half = self.size // 2
        step = torch.arange(half, dtype=precise, device=t.device)
        return _waves(t.to(precise), torch.exp(-math.log(10_000) / half * step), self.blur)


def turns(t: Tensor, blur: float = 0.0) -> Tensor:
    """Features of a time in [0, 1]: t (B,) -> (B, 64), cosines, then sines; blurred as those of `Sinusoids`."""
    precise = torch.promote_types(t.dtype, torch.float32)
    # From a quarter turn to 16 turns over [0, 1]: slow enough to order all times, fast enough to tell near ones.
    speeds = torch.logspace(-2, 4, 32, base=2.0, dtype=precise, device=t.device)
    return _waves(t, 2 * math.pi * speeds, blur)


def _waves(t: Tensor, speeds: Tensor, blur: float) -> Tensor:
    """cos and sin (B, 2 n) of t (B,) times each speed (n,), averaged over t + blur * Normal(0, 1)."""
    angle = t[:, None] * speeds
    waves = torch.cat([angle.cos(), angle.sin()], dim=1)
    return waves * torch.exp(-0.5 * (blur * speeds).square()).repeat(2) if blur else waves


class Told(nn.Module):
    """The sum of a label's embedding and those of numbers.

    r is read as t - r, the way that is left; where it is not given there is none. A guidance that is not given is 1. A
    level, the log-SNR of a lower image, is read as the rectified time that has it; where it is not given, as clean.

    Args:
        label: the label's embedding, if there is one.
        features: of a time (B,), `size` of them.
        size, width: of the features, and of the embedding.
        clock: how long the network's clock is.
    """

    def __init__(
        self, label: nn.Module | None, features: Callable[[Tensor], Tensor], size: int, width: int, clock: float
    ):
        super().__init__()
        self.label, self.size, self.width, self.clock = label, size, width, clock
        self.numbers = nn.ModuleDict()
        self.read_by(features)

    def read_by(self, features: Callable[[Tensor], Tensor]) -> None:
        """Reads the numbers by these features of a time."""
        self._features = (features,)  # in a tuple, so that it is no part of the weights

    def add(self, name: str) -> None:
        """One more number, as yet without effect."""
        if name not in NUMBERS:
            raise one_of("number to tell a network", name, NUMBERS)
        last = nn.Linear(self.width, self.width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.numbers[name] = nn.Sequential(nn.Linear(self.size, self.width), nn.SiLU(), last)

    def forward(self, told: tuple[Tensor | None, Tensor, Mapping[str, Tensor], torch.dtype]) -> Tensor:
        """(label (B,) or None, t (B,), numbers (B,) by name, the network's dtype) -> (B, width)."""
        label, t, given, dtype = told
        total: Any = 0.0 if self.label is None else self.label(label)
        for name, layers in self.numbers.items():
            if name == "r":
                value = t - given[name].to(t.dtype) if name in given else torch.zeros_like(t)
            elif name == "level":
                # sigma/(alpha + sigma): all levels, infinite ones too, fill the clock as the times do.
                value = self.clock * torch.sigmoid(-0.5 * given.get(name, torch.full_like(t, torch.inf)).to(t.dtype))
            else:
                # A scale of 1 to 10 then fills the range of the features as the time does.
                value = 0.1 * self.clock * given.get(name, torch.ones_like(t)).to(t.dtype)
            total = total + layers(self._features[0](value).to(dtype))
        return total


def require_known(given: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    """Refuses numbers that the network was built without."""
    for name in given:
        if name not in names:
            raise OptionError(f"the network was built without {name!r}; expected fl.networks.told(network, [{name!r}])")
