"""The command line as a user meets it: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import json

import numpy
import pytest
import torch

from fluvial import cli, load, sample, sheets


def run(*arguments) -> int:
    """The exit code of one command."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    """A short run on the moons."""
    folder = tmp_path_factory.mktemp("cli") / "moons"
    assert run("train", "moons", "--out", folder, "--steps", 8, "--batch-size", 64) == 0
    return folder


def test_train_leaves_a_folder_that_explains_itself(moons):
    names = {path.name for path in moons.iterdir()}
    assert {"model.safetensors", "ema.safetensors", "config.json", "state", "metrics.jsonl", "report.html"} <= names
    page = (moons / "report.html").read_text()
    assert "velocity on Rectified()" in page
    assert "8 of 8 steps" in page
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").split("<body>")[0]


def test_samples_say_how_they_were_made_and_are_the_library_s(moons, tmp_path, capsys):
    sheet, numbers = tmp_path / "s.png", tmp_path / "s.npz"
    given = ["-n", 6, "--solver", "langevin", "--gamma", 0.5, "--steps", 5, "--seed", 3, "--label", 1]
    assert run("sample", moons, *given, "--out", sheet, "--npz", numbers) == 0
    assert "6 samples, 5 NFE each" in capsys.readouterr().out
    info, saved = sheets.read_info(sheet), numpy.load(numbers)
    assert info == json.loads(str(saved["info"]))
    assert (info["solver"], info["nfe"], info["seed"], info["grid"]) == ("Langevin(gamma=0.5)", 5, 3, "uniform")
    from fluvial.solvers import Langevin

    cond = {"label": torch.ones(6, dtype=torch.long)}
    expected = sample(load(moons), 6, solver=Langevin(0.5), steps=5, seed=3, cond=cond)
    assert numpy.array_equal(saved["samples"], expected.numpy())
    assert saved["label"].tolist() == [1] * 6


def test_converted_run_draws_the_same(moons, tmp_path):
    out = tmp_path / "vp"
    assert run("convert", moons, "--path", "vp", "--prediction", "noise", "--out", out) == 0
    seen, x = load(out), torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (type(seen.path).__name__, seen.prediction.name) == ("VP", "noise")
    t = 0.4
    rectified = load(moons)
    level = seen.path(t)
    norm = (level.alpha**2 + level.sigma**2) ** 0.5
    s = rectified.path.time(seen.path.log_snr(t))
    there = rectified.path(s)
    scaled = x * ((there.alpha**2 + there.sigma**2) ** 0.5 / norm)
    torch.testing.assert_close(seen(x, t).data, rectified(scaled, s).data, rtol=1e-6, atol=1e-6)


def test_info_says_the_convention(moons, capsys):
    assert run("info", moons) == 0
    said = capsys.readouterr().out
    assert "predicts velocity on Rectified()" in said
    assert "label (2 is none)" in said


BAD = {
    "unknown solver": (["sample", "{moons}", "--solver", "heunn"], "did you mean 'heun'"),
    "option of another solver": (["sample", "{moons}", "--gamma", "1"], "takes no options"),
    "no steps": (["sample", "{moons}", "--steps", "0"], "steps is 0"),
    "no samples": (["sample", "{moons}", "-n", "0"], "-n is 0"),
    "unknown grid": (["sample", "{moons}", "--grid", "even"], "unknown grid 'even'"),
    "label out of range": (["sample", "{moons}", "--label", "2"], "expected 0 to 1"),
    "no run": (["sample", "{tmp}/nothing"], "does not exist"),
    "not a run": (["info", "{tmp}"], "config.json"),
    "unknown path": (["convert", "{moons}", "--path", "vpp", "--out", "{tmp}/x"], "unknown path 'vpp'"),
    "nothing to do": (["convert", "{moons}", "--out", "{tmp}/x"], "nothing to convert to"),
    "onto itself": (["convert", "{moons}", "--path", "vp", "--out", "{moons}"], "another folder"),
    "no such data": (["train", "{tmp}/no", "--out", "{tmp}/x"], "expected a folder of images"),
    "other settings": (
        ["train", "moons", "--out", "{moons}", "--steps", "8", "--batch-size", "64", "--seed", "1"],
        "seed = 0",
    ),
    "unknown weight": (["train", "moons", "--out", "{tmp}/x", "--weight", "heavy"], "unknown weight 'heavy'"),
    "negative steps": (["train", "moons", "--out", "{tmp}/x", "--steps", "-3"], "steps is -3"),
    "unknown option": (["sample", "{moons}", "--stepps", "3"], "--stepps"),
    "unknown command": (["smaple"], "smaple"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line(arguments, says, moons, tmp_path, capsys):
    before = sorted(path.name for path in moons.iterdir())
    assert run(*(a.format(moons=moons, tmp=tmp_path) for a in arguments)) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert "Traceback" not in told
    assert sorted(path.name for path in moons.iterdir()) == before
    assert not (tmp_path / "x").exists()


def test_truncated_weights_are_named(moons, tmp_path, capsys):
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(moons, damaged)
    weights = (damaged / "ema.safetensors").read_bytes()
    (damaged / "ema.safetensors").unlink()
    (damaged / "ema.safetensors").write_bytes(weights[: len(weights) // 2])
    assert run("sample", damaged) == 2
    told = capsys.readouterr().err
    assert "ema.safetensors" in told
    assert told.count("\n") == 1


def test_debug_shows_the_traceback():
    from fluvial.errors import RunError

    with pytest.raises(RunError):
        cli.main(["--debug", "info", "nowhere"])
