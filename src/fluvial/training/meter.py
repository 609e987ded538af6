"""What a training run knows of its loss: where on the path it is large, and whether it is still a number.

Everything is summed on the device, and read only when a line of metrics is due: a GPU never waits for it.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

# The bins of log-SNR, two wide; the outer two are open.
EDGES = tuple(range(-8, 9, 2))
BINS = (f"..{EDGES[0]}", *(f"{low}..{high}" for low, high in itertools.pairwise(EDGES)), f"{EDGES[-1]}..")


def bin_of(log_snr: Tensor) -> Tensor:
    """Which of `BINS` (B,) a log_snr (B,) falls into."""
    return torch.bucketize(log_snr, torch.tensor(EDGES, dtype=log_snr.dtype, device=log_snr.device), right=True)


class Meter:
    """Means over the steps since it was last read.

    Attributes:
        sums: everything in one tensor, to be saved, and added up over the processes: the sums of the loss per bin,
            the counts per bin, the sum of the gradients' norm, the steps.
    """

    def __init__(self, device: torch.device) -> None:
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(2 * len(BINS) + 2, dtype=exact, device=device)

    def add(self, loss: Tensor, log_snr: Tensor, norm: Tensor) -> None:
        """Takes in a step: loss (B,), log_snr (B,), and the norm of the gradient."""
        place = bin_of(log_snr)
        self.sums.index_add_(0, place, loss.to(self.sums.dtype))
        self.sums.index_add_(0, place + len(BINS), torch.ones_like(loss, dtype=self.sums.dtype))
        self.sums[-2] += norm
        self.sums[-1] += 1

    @staticmethod
    def read(sums: Tensor) -> tuple[dict[str, Any], int]:
        """The means, where bins without samples are left out, and how many samples there were."""
        values = sums.tolist()
        totals, counts, (norm, steps) = values[: len(BINS)], values[len(BINS) : -2], values[-2:]
        samples = int(sum(counts))
        means = {
            "loss": sum(totals) / max(samples, 1),
            "loss_by_log_snr": {name: total / n for name, total, n in zip(BINS, totals, counts) if n},
            "grad_norm": norm / max(steps, 1),
        }
        return means, samples


class Watch:
    """Looks for the first step whose loss or gradient was not finite, among those since it was cleared."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Takes in a step: loss (B,), and the norm of the gradient."""
        self._seen[step] = loss, norm

    def first(self) -> int | None:
        """The first bad step. One wait for the device, however many steps there were."""
        if not self._seen:
            return None
        fine = torch.stack([loss.isfinite().all() & norm.isfinite() for loss, norm in self._seen.values()]).tolist()
        return next((step for step, ok in zip(self._seen, fine) if not ok), None)

    def loss(self, step: int) -> Tensor:
        """The losses (B,) of a step."""
        return self._seen[step][0]

    def clear(self) -> None:
        self._seen = {}


def culprit(loss: Tensor, index: Tensor, t: Tensor, log_snr: Tensor) -> str:
    """What of a bad step was not finite, in words: samples by number, and where on the path.

    Args:
        loss, index, t, log_snr: (B,) of the step's samples.
    """
    bad = (~loss.isfinite()).nonzero()[:, 0]
    if not len(bad):
        return "the gradient (every loss is finite)"
    numbers, times = index[bad].tolist(), t[bad].tolist()
    named = ", ".join(map(str, numbers[:5])) + (", …" if len(bad) > 5 else "")
    bins = ", ".join(BINS[place] for place in sorted(set(bin_of(log_snr[bad]).tolist())))
    where = f"t = {times[0]:.4f}" if len(bad) == 1 else f"t from {min(times):.4f} to {max(times):.4f}"
    return f"the loss of {len(bad)} of {len(loss)} samples (number {named}; {where}, log-SNR {bins})"
