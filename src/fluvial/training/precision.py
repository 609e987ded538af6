"""Which precision and memory format a network trains fastest in, on this machine.

Weights, their average and the optimiser stay float32 in any case; "bf16" is autocast around the network's matrix
products. A GPU that has bfloat16 always gains. A processor may have the instructions and still lose: with 64-wide
layers, converting costs more than multiplying. So there it is timed, on the network itself.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fluvial.errors import OptionError, one_of
from fluvial.model import Model
from fluvial.objectives import Objective
from fluvial.training.batch import Batch

_GAIN = 1.1  # what bf16 must gain to be worth its rounding


class Choice(NamedTuple):
    """`precision` is "fp32" or "bf16"; `why` says how it was chosen, for people."""

    precision: str
    channels_last: bool
    why: str


def check(precision: str, channels_last: bool | str) -> None:
    """Refuses what is not known."""
    if precision not in ("auto", "fp32", "bf16"):
        raise one_of("precision", precision, ("auto", "fp32", "bf16"))
    if channels_last not in ("auto", True, False):
        raise OptionError(f"channels_last is {channels_last!r}; expected True, False or 'auto'")


def choose(
    model: Model,
    batch: Batch,
    objective: Objective,
    precision: str = "auto",
    channels_last: bool | str = "auto",
) -> Choice:
    """The choice for this model, by rule on a GPU and by timing on a processor that has bfloat16.

    Args:
        model: on the device it will train on; it is not changed.
        batch: some samples, there too.
        objective: the loss.
        precision: "fp32" or "bf16" to decide it here, or "auto".
        channels_last: True or False to decide it here, or "auto": for images, yes.
    """
    device = batch.data.device.type
    last = channels_last is True or (channels_last == "auto" and batch.data.ndim == 4 and device != "mps")
    if precision != "auto":
        return Choice(precision, last, "as asked")
    if device == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return Choice("bf16" if able else "fp32", last, f"the GPU has {'' if able else 'no '}bfloat16")
    if device != "cpu" or not has_bfloat16():
        return Choice("fp32", last, f"no fast bfloat16 on this {device}")
    if sum(p.numel() for p in model.parameters()) > 200e6:
        return Choice("bf16", last, "the processor has bfloat16, and the network is too large to time")
    seconds = {name: _seconds(model, batch, objective, name, last) for name in ("fp32", "bf16")}
    gain = seconds["fp32"] / seconds["bf16"]
    return Choice("bf16" if gain >= _GAIN else "fp32", last, f"bf16 timed at {gain:.2f} times the speed of fp32")


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        if getattr(torch.cpu, name, lambda: False)():
            return True
    flags = Path("/proc/cpuinfo")
    # The ARM flag; torch has no question for it.
    return flags.is_file() and " bf16" in flags.read_text(encoding="utf-8", errors="ignore")


def _seconds(model: Model, batch: Batch, objective: Objective, precision: str, channels_last: bool) -> float:
    """Processor time of forward and backward, the best of three: other programs make it longer, never shorter."""
    assert isinstance(model.network, nn.Module)
    network = copy.deepcopy(model.network).train()
    batch = replace(batch, noise=batch.drawn_noise(0))
    if channels_last:
        as_channels_last(network)
        batch = replace(batch, data=batch.data.to(memory_format=torch.channels_last))
    trial, times = model.with_network(network), []
    for _ in range(4):
        start = time.process_time()
        with autocast(batch.data.device, precision):
            loss = batch.loss(objective, trial, 0)
        loss.mean().backward()
        times.append(time.process_time() - start)
    return min(times[1:])


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def as_channels_last(network: nn.Module) -> None:
    """Lays the weights of convolutions out with channels last, in place."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
