"""The exponential moving average of a network's weights: what is sampled from and, by default, what is loaded.

    average <- average + (1 - d) (weights - average),        d = min(decay, (1 + n) / (10 + n)) at update n = 1, 2, …

The rising d forgets the random start within the first updates, so that the average is of use early on. Buffers are
not averaged but copied.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fluvial.errors import OptionError
from fluvial.model import Model


class EMA:
    """The moving average of a network's parameters, kept as a network of its own.

    Args:
        network: the network that is trained; its weights are the average's start.
        decay: d once it is warm, 0 <= decay < 1; 0 follows the weights.

    Attributes:
        network: the averaged network, in eval mode, its weights at least float32.
        updates: how many there were.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise OptionError(f"ema_decay is {decay}; expected 0 <= ema_decay < 1, such as 0.999")
        self.decay, self.updates = decay, 0
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        for tensor in self.network.parameters():
            # Below float32 the small differences would be rounded away.
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
        self._source = network
        self._weights: list[Tensor] = [*network.parameters()]
        self._averages: list[Tensor] = [*self.network.parameters()]
        self._buffers = list(self.network.buffers())

    @torch.no_grad()
    def update(self) -> None:
        """Takes the network's present weights into the average."""
        self.updates += 1
        rate = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = self._weights
        if any(w.dtype != a.dtype for w, a in zip(weights, self._averages)):
            weights = [w.to(a.dtype) for w, a in zip(weights, self._averages)]
        torch._foreach_lerp_(self._averages, weights, rate)  # pyright: ignore[reportPrivateImportUsage]
        if self._buffers:
            torch._foreach_copy_(self._buffers, [*self._source.buffers()])  # pyright: ignore[reportPrivateImportUsage]

    def model(self, model: Model) -> Model:
        """`model` with the averaged weights: it shares them, so that it follows later updates."""
        return model.with_network(self.network)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights and the buffers, by name; the count of updates is not among them."""
        return self.network.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Goes on from an average saved after so many updates."""
        self.network.load_state_dict(state)
        self.updates = updates
