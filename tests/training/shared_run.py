"""The same small runs in as many processes as it was launched on; started by `test_processes`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fluvial import distill, networks
from fluvial.objectives import Objective
from fluvial.training.checkpoints import load
from fluvial.training.trainer import is_main_process, model_for, train

STUDENTS = {"consistency": distill.consistency, "mean-flow": distill.mean_flow, "shortcut": distill.shortcut}


def runs(folder: Path) -> None:
    torch.set_num_threads(1)
    for coupling in ("independent", "ot"):
        source = "moons"
        torch.manual_seed(4)
        model = model_for(source, network=networks.mlp(2, 2, width=16, depth=1))
        objective = Objective(coupling=coupling)
        run = train(
            model, source, objective, steps=12, batch_size=32, out=folder / coupling, precision="fp32",
            log_every=2, checkpoint_every=5, sheet_every=12, progress=False, lr=1e-2, warmup=0,
        )  # fmt: skip
        assert run.step == 12
        assert len(run.metrics) == 6, "every process has all metrics"
    for name, method in STUDENTS.items():
        teacher = load(folder / "independent", weights="raw")
        method(
            teacher, source, 12, batch_size=32, out=folder / name, precision="fp32", log_every=2, sheet_every=None,
            progress=False, lr=1e-2, warmup=0,
        )  # fmt: skip
    if is_main_process():
        print("done")


if __name__ == "__main__":
    runs(Path(sys.argv[1]))
