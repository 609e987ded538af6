"""A set of pairs whose maker is killed again and again; started by `test_pairs`, in a process of its own.

    python killed_pairs.py FOLDER killed | never

Prints how often it was killed. Each attempt is a fork, so that it costs no imports. It dies at the n-th network call
(between and inside batches) or at the n-th operation on the disk, just before it or just after.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable

import torch
from killed_run import killed_at_operation
from torch import nn

from fluvial.model import Model, Normalisation
from fluvial.training.pair_engine import make_pairs

N, BATCH, SHARD = 44, 4, 8  # six shards, of two batches but for the last


class Net(nn.Module):
    """Small, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 2))
        self.calls, self.deadly = 0, 0

    def forward(self, x, t, label):
        self.calls += 1
        if self.calls == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layers(torch.cat([x, t[:, None], label[:, None].to(x)], dim=1))


def model() -> Model:
    torch.manual_seed(5)
    return Model(Net(), "vp", "v", null={"label": 3}, normalisation=Normalisation((1.0,), (2.0,)), shape=(2,))


def attempt(folder: str, n: int = N, deadly: int = 0) -> None:
    teacher = model()
    teacher.network.deadly = deadly  # type: ignore[attr-defined]
    options = {"solver": "heun", "steps": 3, "states": [0.5], "seed": 3}
    make_pairs(teacher, n, out=folder, batch_size=BATCH, shard_size=SHARD, progress=False, **options)


def survived(work: Callable[[], None]) -> bool:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("an attempt failed")
    return os.WIFEXITED(status)


def main(folder: str, how: str) -> None:
    torch.set_num_threads(1)
    kills = 0
    if how == "killed":
        for number in (1, 2, 3, 4, 6, 9):

            def on_disk(number: int = number) -> None:
                killed_at_operation(number)
                attempt(folder)

            kills += not survived(on_disk)
        # In the first batch, and anywhere in later ones.
        for deadly in (3, 9, 14, 25):
            kills += not survived(lambda deadly=deadly: attempt(folder, deadly=deadly))
    if not survived(lambda: attempt(folder)):
        sys.exit("the last attempt died")
    print(kills)


if __name__ == "__main__":
    main(*sys.argv[1:])
