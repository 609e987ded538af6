"""`fluvial straighten`, from a run folder to a straightened one and what can be done with it."""

from __future__ import annotations

import json

import pytest

from fluvial import load
from problems import command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A flow on the moons that has seen a few batches."""
    folder = tmp_path_factory.mktemp("runs") / "moons"
    assert command("train", "moons", "--out", folder, "--steps", 3, "--batch-size", 16, "--precision", "fp32") == 0
    return folder


SMALL = ("-n", 32, "--steps", 3, "--batch-size", 8, "--solver-steps", 3)


def test_half_a_run_in_any_notation(run, tmp_path, capsys):
    other = tmp_path / "vp"
    assert command("convert", run, "--out", other, "--path", "vp", "--prediction", "noise") == 0
    for source, name in ((run, "half"), (other, "half-vp")):
        out = tmp_path / name
        halves = ("--segments", "0,0.5,1", "--straighten", "first", "--rounds", 1)
        assert command("straighten", source, "--out", out, *halves, *SMALL) == 0
        straight = load(out)
        assert straight.segments.straight == (True, False)
        assert (type(straight.path).__name__, straight.prediction.name) == ("Rectified", "velocity")
        assert not straight.independent
        assert (out / "report.html").is_file()
    capsys.readouterr()
    assert command("info", out) == 0
    assert "0 to 0.5 straight, 0.5 to 1 kept" in capsys.readouterr().out
    assert command("sample", out, "--solver", "langevin", "--out", tmp_path / "no.png") == 2
    assert "reflow" in capsys.readouterr().err
    compare = ("--steps", "1+2,4", "-n", 32, "--seeds", 2, "--data", "moons", "--out", tmp_path / "compare")
    assert command("evaluate", run, out, *compare) == 0
    entries = json.loads((tmp_path / "compare" / "evaluation.json").read_text())["entries"]
    assert [entry["nfe"] for entry in entries] == [3, 4, 3, 4]


def test_segments_may_be_chosen_and_rounds_made(run, tmp_path, capsys):
    out = tmp_path / "straight"
    assert command("straighten", run, "--out", out, "--segments", "auto:3", "--rounds", 2, *SMALL) == 0
    segments = load(out).segments
    assert len(segments.straight) == 3
    assert load(tmp_path / "straight-round-1").segments.straight == (True, True, True)
    capsys.readouterr()
    assert command("info", tmp_path / "straight-pairs-1") == 0
    said = capsys.readouterr().out
    assert "32 of shape 2, the noise from seed" in said
    assert "Adams(variable=v" in said
    # The same command finds everything done.
    assert command("straighten", run, "--out", out, "--segments", "auto:3", "--rounds", 2, *SMALL) == 0


def test_real_data_and_online_pairs(run, tmp_path, capsys):
    assert command("straighten", run, "--out", tmp_path / "a", "--data", run / "no.npz", *SMALL) == 2
    assert command("straighten", run, "--out", tmp_path / "b", "--online", *SMALL) == 0
    assert not (tmp_path / "b-pairs-1").exists()
    capsys.readouterr()
    assert command("straighten", run, "--out", tmp_path / "c", "--online", "--data", "moons", *SMALL) == 2
    assert "do not mix" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--segments", "0,half,1"), "expected times such as 0,0.5,1"),
        (("--straighten", "first"), "without segments"),
        (("--segments", "0,0.5,1", "--straighten", "third"), "unknown"),
        (("--segments", "0,0.5,1", "--straighten", "1,0,1"), "True or False for each"),
        (("--rounds", 0), "rounds is 0"),
        (("--solver", "ddpm"), "stochastic"),
        (("--distance", "far"), "unknown"),
        (("--times", "sometimes"), "unknown"),
        (("--lr", -1), "lr is -1"),
        (("--share", 2, "--data", "moons"), "share is 2"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, capsys, options, words):
    out = tmp_path / "out"
    assert command("straighten", run, "--out", out, *options, *SMALL) == 2
    error = capsys.readouterr().err
    assert words in " ".join(error.split())
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())
