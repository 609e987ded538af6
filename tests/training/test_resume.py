"""A run that is killed, interrupted or continued ends as one that never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fluvial import networks
from fluvial.errors import RunError
from fluvial.training.checkpoints import load, weights_of
from fluvial.training.interrupts import RunInterrupted
from fluvial.training.source import Tensors
from fluvial.training.trainer import model_for, train

DRIVER = Path(__file__).with_name("killed_run.py")
TIMES = ("seconds", "samples_per_second")


def killed(folder: Path, how: str) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DRIVER), str(folder), how]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


def remains(folder: Path) -> dict[str, object]:
    """All that a run leaves and that is not a time: the bytes of the tensors, and the metrics."""
    (state,) = (folder / "state").glob("step-*")
    kept: dict[str, object] = {p.name: p.read_bytes() for p in state.glob("*.safetensors")}
    kept |= {f"top {p.name}": p.read_bytes() for p in folder.glob("*.safetensors")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept["metrics"] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    counters = json.loads((state / "counters.json").read_text())
    kept["counters"] = {key: value for key, value in counters.items() if "seconds" not in key}
    return kept


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("never") / "run"
    assert killed(folder, "never") == 0
    return remains(folder)


@pytest.mark.parametrize(("how", "least"), [("moments", 5), ("operations", 20)])
def test_killed_run_ends_bit_identical(tmp_path, untouched, how, least):
    assert killed(tmp_path / "run", how) >= least
    assert remains(tmp_path / "run") == untouched
    names = {path.name for path in (tmp_path / "run").rglob("*")}
    assert not [name for name in names if name.startswith(".")], "nothing unfinished is left"


class Interrupting(Tensors):
    """Points whose n-th batch raises a signal, as somebody at the keyboard would."""

    def __init__(self, at: int, number: int = signal.SIGINT, **rows):
        super().__init__("points", rows)
        self.at, self.number, self.count = at, number, 0

    def batch(self, indices):
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)
        return super().batch(indices)


def images(n: int = 24) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"data": torch.randn(n, 1, 4, 4, generator=generator), "label": torch.arange(n) % 3}


def go(out, steps, source, channels_last=True, **options):
    network = networks.unet(1, 4, 3, width=8, multipliers=(1,), attention=(True,))
    # As if freshly made: whatever it starts with, a resumed run must not see it.
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(7))
    options = {"precision": "fp32", "log_every": 3, "checkpoint_every": 4, "sheet_every": 5, **options}
    model = model_for(source, network=network)
    return train(
        model, source, steps=steps, batch_size=6, out=out, progress=False, channels_last=channels_last, **options
    )


@pytest.mark.parametrize(("number", "precision"), [(signal.SIGINT, "fp32"), (signal.SIGTERM, "bf16")])
def test_interrupted_unet_goes_on_bit_identical(tmp_path, number, precision):
    before = signal.getsignal(number)
    whole = go(tmp_path / "whole", 12, Tensors("points", images()), precision=precision)
    source = Interrupting(7, number, **images())
    with pytest.raises(RunInterrupted, match=r"interrupted at step \d+ of 12 and saved") as caught:
        go(tmp_path / "parts", 12, source, precision=precision)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert 0 < caught.value.run.step < 12
    assert signal.getsignal(number) == before
    run = go(tmp_path / "parts", 12, Tensors("points", images()), precision=precision)
    assert remains(tmp_path / "parts") == remains(tmp_path / "whole")
    assert [line["step"] for line in run.metrics] == [3, 6, 9, 12]
    for a, b in ((run.model, whole.model), (run.ema, whole.ema)):
        others = weights_of(b.network)
        assert all(torch.equal(value, others[name]) for name, value in weights_of(a.network).items())


def test_finished_run_returns_at_once_and_can_be_extended(tmp_path):
    source = Tensors("points", images())
    go(tmp_path / "a", 8, source)
    before = remains(tmp_path / "a")
    counting = Interrupting(0, **images())
    again = go(tmp_path / "a", 8, counting)
    assert counting.count == 0
    assert again.step == 8
    assert remains(tmp_path / "a") == before
    more = go(tmp_path / "a", 12, source)
    assert more.step == 12
    go(tmp_path / "b", 12, source)
    kept, direct = remains(tmp_path / "a"), remains(tmp_path / "b")
    assert kept["model.safetensors"] == direct["model.safetensors"]
    assert kept["ema.safetensors"] == direct["ema.safetensors"]
    with pytest.raises(RunError, match="steps is 4, and the run has made 12"):
        go(tmp_path / "a", 4, source)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 0.5}, r"lr = 0.001, and lr = 0.5 is asked"),
        ({"seed": 1}, r"seed = 0, and seed = 1"),
        ({"precision": "bf16"}, r"precision = 'fp32', and precision = 'bf16'"),
        ({"channels_last": False}, r"channels_last = True, and channels_last = False"),
        ({"clip": None}, r"clip = 1.0, and clip = None"),
    ],
)
def test_other_settings_are_refused(tmp_path, options, said):
    source = Tensors("points", images())
    go(tmp_path / "a", 2, source)
    before = remains(tmp_path / "a")
    with pytest.raises(RunError, match=said) as caught:
        go(tmp_path / "a", 3, source, **options)
    assert "\n" not in str(caught.value)
    assert remains(tmp_path / "a") == before


def test_cosine_schedule_cannot_be_extended(tmp_path):
    source = Tensors("points", images())
    go(tmp_path / "a", 2, source, schedule="cosine")
    with pytest.raises(RunError, match="cosine schedule"):
        go(tmp_path / "a", 3, source, schedule="cosine")


def test_weights_of_the_last_complete_state_are_loaded(tmp_path):
    """Killed between two files, the top of a folder may hold two steps; its state decides."""
    source = Tensors("points", images())
    go(tmp_path / "a", 4, source)
    old = (tmp_path / "a" / "ema.safetensors").read_bytes()
    go(tmp_path / "a", 8, source)
    expected = weights_of(load(tmp_path / "a").network)
    (tmp_path / "a" / "ema.safetensors").unlink()
    (tmp_path / "a" / "ema.safetensors").write_bytes(old)
    found = weights_of(load(tmp_path / "a").network)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
