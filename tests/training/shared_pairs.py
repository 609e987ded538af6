"""The same sets of pairs by as many processes as it was launched on; started by `test_pairs`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from killed_pairs import attempt

from fluvial.training.pairs import open_pairs
from fluvial.training.trainer import is_main_process


def sets(folder: Path) -> None:
    torch.set_num_threads(1)
    # The second time there are more of them, and the last shard is made anew.
    for n in (20, 44):
        attempt(str(folder), n)
        assert len(open_pairs(folder)) == n, "every process can read all of them"
    if is_main_process():
        print("done")


if __name__ == "__main__":
    sets(Path(sys.argv[1]))
