"""A training step's samples, as a function of the data, the seed and the samples' numbers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluvial import couplings, random
from fluvial.model import Model, fill_null
from fluvial.objectives import Objective
from fluvial.training.source import COUPLED, Rows


@dataclass
class Batch:
    """What the loss is a function of: data (B, …) in path units, conditions, times (B,), and the samples' numbers.

    `noise` is None where the objective draws it; `states` (B, J, …) are those on a pair's way, where it has some.
    """

    index: Tensor
    data: Tensor
    cond: Rows
    t: Tensor
    noise: Tensor | None
    states: Tensor | None = None

    def loss(self, objective: Objective, model: Model, seed: int) -> Tensor:
        """The objective's loss (B,)."""
        return objective(model, self.data, self.cond, self.t, self.noise, seed, self.index, self.states)

    def watched(self, objective: Objective, model: Model, seed: int) -> dict[str, float]:
        """What else the objective has to say of the model."""
        return objective.watched(model, self.data, self.cond, self.t, self.noise, seed, self.index, self.states)

    def drawn_noise(self, seed: int) -> Tensor:
        """The noise (B, …) that belongs to the samples."""
        if self.noise is not None:
            return self.noise
        shape = self.data.shape[1:]
        return random.normal(self.index, shape, seed, 0, random.TRAIN, self.data.dtype, self.data.device)


def prepare(rows: Rows, model: Model, objective: Objective, seed: int, drop_cond: float, device: torch.device) -> Batch:
    """A batch from what the source gave, in the data's own units."""
    rows = {name: value.to(device, non_blocking=True) for name, value in rows.items()}
    index, data = rows.pop("index"), model.normalisation.apply(rows.pop("data"))
    noise, states = (rows.pop(name, None) for name in COUPLED)
    cond = dropped(rows, model, index, seed, drop_cond)
    return Batch(index, data, cond, objective.draw_times(model, index, seed), noise, states)


def dropped(cond: Rows, model: Model, index: Tensor, seed: int, share: float) -> Rows:
    """The conditions, those of a sample that have a null one all replaced by it for this share of the samples."""
    if not cond or not model.null or not share:
        return cond
    drop = random.uniform(index, (), seed, stream=random.DROP, device=index.device) < share  # (B,)
    null = fill_null(model.null, index)
    return {
        name: torch.where(drop.reshape(-1, *[1] * (value.ndim - 1)), null[name].to(value.dtype), value)
        if name in null
        else value
        for name, value in cond.items()
    }


def coupled_share(batch: Batch, objective: Objective, seed: int, rank: int, world: int) -> Batch:
    """Pairs noise and data of a whole step, as every process does alike, and keeps this one's share of the pairs."""
    share = len(batch.data) // world
    mine = slice(rank * share, (rank + 1) * share)
    noise = batch.drawn_noise(seed)
    noise_index, data_index = (i[mine] for i in couplings.named(objective.coupling)(noise, batch.data))
    cond = {name: value[data_index] for name, value in batch.cond.items()}
    return Batch(batch.index[mine], batch.data[data_index], cond, batch.t[mine], noise[noise_index])


def needs_whole(objective: Objective) -> bool:
    """Whether pairing looks at more than one sample."""
    return not isinstance(couplings.named(objective.coupling), (couplings.Independent, couplings.Pairs))


def already_coupled(objective: Objective) -> Objective:
    """The same objective for pairs that are made."""
    return replace(objective, coupling="pairs")


def seed_torch(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Makes what the network's dropout draws in this step a function of the seed, the step and the process."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    # Not torch.manual_seed: where there is no GPU it keeps a note of every call, for one that might yet appear.
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def ahead(rows: Iterator[Rows]) -> Iterator[Rows]:
    """The same rows, each read while the one before is used."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, rows)
        while True:
            current = following.result()
            following = reader.submit(next, rows)
            yield current
