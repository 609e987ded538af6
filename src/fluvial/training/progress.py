"""The progress bar of a training run: step, loss, rate and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar(Protocol):
    """What training tells its bar."""

    def __call__(self, step: int, loss: float | None = None, rate: float | None = None) -> None: ...


@contextlib.contextmanager
def bar(shown: bool, done: int, steps: int, batch_size: int) -> Iterator[Bar]:
    """A function to call after each step; where it is not shown, the function does nothing."""
    if not shown:
        yield lambda step, loss=None, rate=None: None
        return
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, completed=done, loss="", rate="")

        def advance(step: int, loss: float | None = None, rate: float | None = None) -> None:
            progress.update(task, completed=step)
            if loss is not None and rate is not None:
                progress.update(task, loss=f"loss {loss:.4f}  ", rate=f"{rate / batch_size:.1f} steps/s")

        yield advance
