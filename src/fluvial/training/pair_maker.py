"""Making pairs: shard by shard, so that a set survives being killed, and several processes can share it.

A shard is cut into batches in one fixed way, and its pairs are functions of their numbers: whoever makes it, and
however often the work was stopped before, it is the same file. So there is no state to save but the shards themselves.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluvial.training import batch
from fluvial.training.interrupts import Interrupts, RunInterrupted
from fluvial.training.pair_recipe import Recipe
from fluvial.training.pairs import Shards, write_shard
from fluvial.training.source import Rows, join


@dataclass
class Maker:
    """Makes the shards of a set, or a process's part of them.

    Attributes:
        recipe: how.
        manifest: of the set.
        folder: where they are written; None: they are kept in `kept`.
    """

    recipe: Recipe
    manifest: Mapping[str, Any]
    folder: Path | None
    kept: dict[int, Rows] = field(default_factory=dict)

    def run(self, mine: Sequence[int], progress: bool) -> None:
        """Makes those of these shards that are not there yet.

        Raises:
            RunError: for a shard that is damaged; for a disk that is full.
            NonFiniteError: names the pairs.
            RunInterrupted: after Ctrl-C or SIGTERM, when the batch at hand is done.
        """
        self.shards = Shards(self.manifest["n"], self.manifest["shard_size"])
        todo = [k for k in mine if self.folder is None or not self.shards.complete(self.folder, k)]
        total, left = (sum(len(self.shards.rows(k)) for k in some) for some in (mine, todo))
        began = time.perf_counter()
        with _bar(progress and left > 0, total, total - left) as tell:
            self._make(todo, tell)
        if progress:
            print(self._summary(left, time.perf_counter() - began, len(mine) == len(self.shards)))

    def _cuts(self, todo: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The batches to make: the shard, and the numbers of the samples."""
        first, size = self.manifest["first"], self.manifest["batch_size"]
        for k in todo:
            rows = self.shards.rows(k)
            for begin in range(rows.start, rows.stop, size):
                yield k, torch.arange(begin, min(begin + size, rows.stop)) + first

    def _starts(self, todo: Sequence[int]) -> Generator[Rows]:
        """What each batch starts from: read while the network computes the one before, where that gains anything."""
        starts = (self.recipe.start(numbers) for _, numbers in self._cuts(todo))
        source = self.recipe.source
        if self.recipe.model.device.type != "cpu" or (source is not None and source.waits):
            yield from batch.ahead(chain(starts, repeat({})))
        else:
            yield from starts  # drawing takes the threads that the network is using

    def _make(self, todo: Sequence[int], tell: Callable[[int], None]) -> None:
        parts: list[Rows] = []
        writing: Future[None] | None = None
        with (
            Interrupts() as interrupts,
            ThreadPoolExecutor(1) as writer,
            contextlib.closing(self._starts(todo)) as starts,
        ):
            for (k, numbers), start in zip(self._cuts(todo), starts):
                rows = self.recipe.rows(numbers, start)
                if self.manifest["noise"] != "stored":
                    del rows["noise"]
                parts.append(rows)
                whole_shard = sum(len(part["data"]) for part in parts) == len(self.shards.rows(k))
                if writing is not None and (whole_shard or writing.done()):
                    writing.result()  # raises what stopped it; and no more than two shards are ever held
                    writing = None
                if whole_shard:
                    writing, parts = writer.submit(self._keep, k, parts), []
                tell(len(numbers))
                if interrupts.asked is not None and not (whole_shard and k == todo[-1]):
                    if writing is not None:
                        writing.result()
                    raise RunInterrupted(self._farewell(), None)
            if writing is not None:
                writing.result()

    def _keep(self, k: int, parts: list[Rows]) -> None:
        rows = join(parts)
        if self.folder is None:
            self.kept[k] = rows
        else:
            write_shard(self.shards.file(self.folder, k), rows)

    def _farewell(self) -> str:
        if self.folder is None:
            return "interrupted; without a folder (out=…) nothing is kept"
        there = len([*self.folder.glob("shard-*.safetensors")])
        where = f"{there} of {len(self.shards)} shards in {self.folder}"
        return f"interrupted with {where}; the same command goes on from there"

    def _summary(self, made: int, seconds: float, alone: bool) -> str:
        where = "in memory" if self.folder is None else f"in {self.folder}"
        calls = "" if self.manifest["nfe"] is None else f", {self.manifest['nfe']} NFE each"
        who = "" if alone else "this process "
        how = f"made {made:,} at {made / max(seconds, 1e-9):,.1f} pairs/s" if made else "had nothing left to make"
        return f"{self.manifest['n']:,} pairs {where}{calls}: {who}{how}"


@contextlib.contextmanager
def _bar(shown: bool, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the pairs that were just made; where it is not shown, it does nothing."""
    if not shown:
        yield lambda made: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("pairs"), BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()) as progress:
        task = progress.add_task("pairs", total=total, completed=done, rate="")
        began, count = time.perf_counter(), 0

        def advance(made: int) -> None:
            nonlocal count
            count += made
            progress.update(task, advance=made, rate=f"{count / (time.perf_counter() - began):,.1f} pairs/s")

        yield advance
