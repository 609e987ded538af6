"""Two processes with half the batch each train as one with all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared_run import STUDENTS, runs

from fluvial.training.checkpoints import load, weights_of

SCRIPT = Path(__file__).with_name("shared_run.py")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    runs(one)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launch, str(SCRIPT), str(two)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done") == 1
    return one, two


@pytest.mark.parametrize("coupling", ["independent", "ot", *STUDENTS])
def test_same_loss_curve(folders, coupling):
    one, two = (metrics(folder / coupling) for folder in folders)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [2, 4, 6, 8, 10, 12]
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["loss_by_log_snr"] == pytest.approx(b["loss_by_log_snr"], rel=1e-4)


@pytest.mark.parametrize("coupling", ["independent", "ot", *STUDENTS])
def test_same_weights_saved_without_prefix(folders, coupling):
    first, second = (weights_of(load(folder / coupling, weights="raw").network) for folder in folders)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4)


def test_coupling_decides_about_the_score(folders):
    assert load(folders[1] / "independent").independent
    assert not load(folders[1] / "ot").independent
