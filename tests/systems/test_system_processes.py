"""Parts of systems in two processes with half the batch each train as in one with all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared_systems import RUNS, runs

import fluvial as fl
from fluvial.training import checkpoints

SCRIPT = Path(__file__).with_name("shared_systems.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    runs(one)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launch, str(SCRIPT), str(two)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done") == 1
    return one, two


@pytest.mark.parametrize("run", RUNS)
def test_the_loss_is_the_same(folders, run):
    lines = [(folder / run / "metrics.jsonl").read_text().splitlines() for folder in folders]
    one, two = ([json.loads(line) for line in text] for text in lines)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 4]
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_latents_and_their_folder_are_the_same(folders):
    """The autoencoders differ by rounding, and so their hashes; the shards are whole."""
    first, second = (fl.systems.open_latents(folder / "latent" / "latents") for folder in folders)
    rows = torch.arange(len(first))
    torch.testing.assert_close(first.batch(rows)["data"], second.batch(rows)["data"], rtol=0, atol=1e-3)
    system = fl.load(folders[1] / "latent")
    assert fl.sample(system, 2, steps=2, seed=0).isfinite().all()


@pytest.mark.parametrize("run", [name for name in RUNS if "autoencoder" not in name and name != "judged"])
def test_the_weights_are_the_same(folders, run):
    first, second = (checkpoints.weights_of(checkpoints.load(f / run, weights="raw").network) for f in folders)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-2, atol=5e-4)
