"""The command line as a user meets it: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import json

import numpy
import pytest
import torch

from fluvial import cli, load, sample, sheets, solvers
from fluvial.show import compare, settings
from problems import command

LABELS = torch.arange(8) % 2  # as the command line takes them in turn


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    """A short run on the moons."""
    folder = tmp_path_factory.mktemp("cli") / "moons"
    assert command("train", "moons", "--out", folder, "--steps", 8, "--batch-size", 64) == 0
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
    assert command("sample", moons, *given, "--out", sheet, "--npz", numbers) == 0
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
    assert command("convert", moons, "--path", "vp", "--prediction", "noise", "--out", out) == 0
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
    assert command("info", moons) == 0
    said = capsys.readouterr().out
    assert "predicts velocity on Rectified()" in said
    assert "label (2 is none)" in said


def test_options_of_the_solver_are_read_as_what_they_are(moons, tmp_path):
    sheet, numbers = tmp_path / "s.png", tmp_path / "s.npz"
    given = ["-n", 4, "--solver", "dpmpp_2m", "-O", "steps=3", "--option", "correct=true", "--times", "0,0.3,0.7,1"]
    assert command("sample", moons, *given, "--out", sheet, "--npz", numbers) == 0
    solver = solvers.named("dpmpp_2m", steps=3, correct=True)
    expected = sample(load(moons), 4, solver=solver, times=[0.0, 0.3, 0.7, 1.0], seed=0, cond={"label": LABELS[:4]})
    assert numpy.array_equal(numpy.load(numbers)["samples"], expected.numpy())
    info = sheets.read_info(sheet)
    assert (info["solver"], info["grid"], info["steps"]) == (repr(solver), [0.0, 0.3, 0.7, 1.0], 3)


def test_solvers_that_choose_their_own_steps_say_what_they_took(moons, tmp_path):
    assert command("sample", moons, "-n", 2, "--solver", "dopri5", "-O", "rtol=1e-3", "--out", tmp_path / "s.png") == 0
    info = sheets.read_info(tmp_path / "s.png")
    assert info["nfe"] > 6
    assert info["steps"] == 1


def test_brownian_noise_is_the_library_s(moons, tmp_path):
    given = ["-n", 3, "--solver", "ddpm", "--steps", 4, "--noise", "brownian"]
    assert command("sample", moons, *given, "--out", tmp_path / "s.png", "--npz", tmp_path / "s.npz") == 0
    cond = {"label": LABELS[:3]}
    expected = sample(load(moons), 3, noise="brownian", solver="ddpm", steps=4, seed=0, cond=cond)
    assert numpy.array_equal(numpy.load(tmp_path / "s.npz")["samples"], expected.numpy())


@pytest.mark.parametrize(
    "asked",
    [["--compare", "solver=euler,ddpm", "steps=1,2"], ["--compare", "solver=euler,ddpm", "--compare", "steps=1,2"]],
)
def test_comparison_is_drawn_printed_and_written(asked, moons, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "REFERENCE_STEPS", 16)
    sheet, figures = tmp_path / "c.png", tmp_path / "c.json"
    assert command("sample", moons, *asked, "-n", 8, "--data", "moons", "--out", sheet, "--json", figures) == 0
    info = json.loads(figures.read_text())
    assert sheets.read_info(sheet) == info
    assert [(c["solver"], c["steps"], c["nfe"]) for c in info["cells"]] == [
        ("euler", "1", 1), ("euler", "2", 2), ("ddpm", "1", 1), ("ddpm", "2", 2),
    ]  # fmt: skip
    x = sample(load(moons), 8, solver="euler", steps=2, seed=0, cond={"label": LABELS[:8]})
    y = sample(load(moons), 8, solver="vabm", steps=16, times="log_snr", seed=0, cond={"label": LABELS[:8]})
    cell, said = info["cells"][1], capsys.readouterr().out
    assert cell["rms"] == pytest.approx(float((x - y).square().mean().sqrt()), rel=1e-5)
    for name in ("frechet", "sliced_wasserstein", "rms"):
        assert f"{cell[name]:.4g}" in said
    assert info["finding"] in said.replace("\n", " ")
    assert "Traceback" not in said


def test_info_says_what_solvers_there_are(capsys):
    assert command("info", "--solvers") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in solvers.names())
    solver, grid = solvers.recommended(16)
    assert [settings.spelled(solver), grid] == next(
        line for line in said.splitlines() if line.startswith("16")
    ).split()[1:]


BAD = {
    "unknown solver": (["sample", "{moons}", "--solver", "heunn"], "did you mean 'heun'"),
    "option of another solver": (["sample", "{moons}", "--gamma", "1"], "unknown option of Heun 'gamma'"),
    "no steps": (["sample", "{moons}", "--steps", "0"], "steps is 0"),
    "no samples": (["sample", "{moons}", "-n", "0"], "-n is 0"),
    "unknown grid": (["sample", "{moons}", "--grid", "even"], "unknown grid 'even'"),
    "value of an option": (
        ["sample", "{moons}", "--solver", "dpmpp_2m", "-O", "steps=two"],
        "expected a whole number",
    ),
    "option without a value": (["sample", "{moons}", "-O", "gamma"], "expected name=value"),
    "unknown noise": (["sample", "{moons}", "--noise", "white"], "unknown noise 'white'"),
    "times that are none": (["sample", "{moons}", "--times", "0,half,1"], "expected numbers rising"),
    "times and a grid": (["sample", "{moons}", "--times", "0,1", "--grid", "karras"], "expected one of them"),
    "unknown comparison": (["sample", "{moons}", "--compare", "colour=a,b"], "unknown option to compare 'colour'"),
    "unknown compared value": (["sample", "{moons}", "--compare", "solver=euler,heunn"], "did you mean 'heun'"),
    "no comparison": (["sample", "{moons}", "--compare", "solver"], "expected option=value,value"),
    "three compared": (
        ["sample", "{moons}", "--compare", "steps=1,2", "grid=uniform", "path=vp"],
        "3 options are compared",
    ),
    "steps and a budget": (["sample", "{moons}", "--compare", "steps=1,2", "nfe=4"], "expected one of them"),
    "a budget and steps": (["sample", "{moons}", "--steps", "2", "--compare", "nfe=1"], "nfe is compared, and given"),
    "a budget too small": (["sample", "{moons}", "--solver", "rk4", "--compare", "nfe=1"], "expected 3 or more"),
    "compared and given": (["sample", "{moons}", "--solver", "heun", "--compare", "solver=euler"], "expected one"),
    "nothing to compare": (["sample", "{moons}", "steps=4,8"], "of no use without --compare"),
    "figures of nothing": (["sample", "{moons}", "--json", "{tmp}/x"], "of no use without --compare"),
    "data of another shape": (
        ["sample", "{moons}", "-n", "4", "--compare", "steps=1", "--data", "digits"],
        "expected the model's, (2,)",
    ),
    "info of nothing": (["info"], "expected a run folder, or --solvers"),
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
    assert command(*(a.format(moons=moons, tmp=tmp_path) for a in arguments)) == 2
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
    assert command("sample", damaged) == 2
    told = capsys.readouterr().err
    assert "ema.safetensors" in told
    assert told.count("\n") == 1


def test_debug_shows_the_traceback():
    from fluvial.errors import RunError

    with pytest.raises(RunError):
        cli.main(["--debug", "info", "nowhere"])
