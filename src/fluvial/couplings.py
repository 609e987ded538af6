"""Couplings: which noise goes with which data.

A coupling looks at a batch of noise and of data and returns two index tensors, (noise_index, data_index): pair k is
noise[noise_index[k]] with data[data_index[k]]. Indices, not tensors, so that labels and everything else that belongs
to the data can follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fluvial.errors import OptionError, one_of


class Coupling(Protocol):
    """`independent`: whether the noise stays independent of the data, so that the model has a score."""

    independent: bool

    def __call__(self, noise: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        """(noise_index, data_index), each (B,) int64, for noise and data (B, …)."""
        ...


@dataclass(frozen=True)
class Independent:
    """Each data point with the noise drawn for it: the coupling of diffusion models."""

    independent = True

    def __call__(self, noise: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.arange(len(data), device=data.device)
        return index, index


@dataclass(frozen=True)
class MinibatchOT:
    """The assignment within the batch that minimises the sum of |data - noise|²: exact, every point used once.

    The data keep their places, the noise is reordered. It makes paths cross less, and noise depend on data: a model
    trained with it has no score. Cost: cubic in the batch (1 ms at 128).

    Source: Pooladian et al.: Multisample flow matching (2023), https://arxiv.org/abs/2304.14772; Tong et al.:
    Improving and generalizing flow-based generative models (2023), https://arxiv.org/abs/2302.00482
    """

    independent = False

    def __call__(self, noise: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        from scipy.optimize import linear_sum_assignment

        # |data|² and |noise|² are the same for every assignment: only the inner products matter.
        gain = data.flatten(1).double().cpu() @ noise.flatten(1).double().cpu().T
        _, columns = linear_sum_assignment(gain.numpy(), maximize=True)
        index = torch.arange(len(data), device=data.device)
        return torch.as_tensor(columns, device=data.device), index


@dataclass(frozen=True)
class Pairs:
    """The noise stored with each data point (a reflow pair, say): it must be given, never drawn."""

    independent = False

    def __call__(self, noise: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        return Independent()(noise, data)


_NAMED: dict[str, type] = {"independent": Independent, "ot": MinibatchOT, "pairs": Pairs}


def named(coupling: Any) -> Coupling:
    """A coupling by name ("independent", "ot", "pairs"); an object as it is."""
    if isinstance(coupling, str):
        if coupling not in _NAMED:
            raise one_of("coupling", coupling, _NAMED)
        return _NAMED[coupling]()
    if not callable(coupling) or not isinstance(getattr(coupling, "independent", None), bool):
        raise OptionError(f"coupling {coupling!r} cannot be used; expected a callable with `independent` True or False")
    return coupling  # type: ignore[return-value]
