"""A training run that is killed again and again; started by `test_resume`, in a process of its own.

    python killed_run.py FOLDER moments | operations | never

Prints how often it was killed. Each attempt is a fork, so that it costs no imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

# What the attempts would each import again: optimisers need dynamo.
import torch._dynamo
import torch._inductor
from torch import nn

from fluvial.model import Model
from fluvial.training import loop
from fluvial.training.trainer import train

_USED_LATER = (loop, torch._dynamo, torch._inductor)

STEPS = 40


class Net(nn.Module):
    """Small, and random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Dropout(0.3), nn.Linear(16, 2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x, t, label=None):
        if self.training:
            self.calls += 1
        return self.layers(torch.cat([x, t[:, None]], dim=1))


def attempt(folder: str) -> None:
    torch.manual_seed(5)
    model = Model(Net(), "rectified", null={"label": 2})
    points = torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
    train(
        model, {"data": points}, steps=STEPS, batch_size=8, out=folder, seed=3, precision="fp32",
        log_every=4, checkpoint_every=1, sheet_every=None, progress=False,
    )  # fmt: skip


def killed_at_operation(number: int) -> None:
    """Has this process kill itself at its n-th operation on the disk, just before it or just after."""
    count = 0

    def lethal(operation: Callable) -> Callable:
        def counted(*arguments, **options):
            nonlocal count
            count += 1
            if count == number and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return operation(*arguments, **options)
            finally:
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        return counted

    for name in ("replace", "fsync", "link", "mkdir", "unlink"):
        setattr(os, name, lethal(getattr(os, name)))


def step(folder: str) -> int:
    """The step of the run's last state."""
    with contextlib.suppress(OSError):
        return json.loads(Path(folder, "state", "latest.json").read_text())["step"]
    return 0


def survived(folder: str, prepare: Callable[[], None] | None = None, steps: int = 0, seconds: float = 0) -> bool:
    """One attempt in a fork, killed `seconds` after it made `steps`: whether it came to its end all the same."""
    begun = step(folder)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if prepare:
                prepare()
            attempt(folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds:
        while step(folder) < begun + steps and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("an attempt failed")
    return os.WIFEXITED(status)


def main(folder: str, how: str) -> None:
    torch.set_num_threads(1)
    draw, kills = random.Random(0), 0
    if how == "moments":
        # The first while the folder is being made; the others anywhere in a step, the next step, or between.
        for steps in (0, 0, 1, 2, 4, 3, 5):
            kills += not survived(folder, steps=steps, seconds=draw.uniform(0.001, 0.03))
    if how == "operations":
        for number in [*range(1, 24), *(draw.randrange(24, 80) for _ in range(5))]:
            kills += not survived(folder, lambda number=number: killed_at_operation(number))
    if not survived(folder):
        sys.exit("the last attempt died")
    print(kills)


if __name__ == "__main__":
    main(*sys.argv[1:])
