"""`fluvial distill`, from a run folder to a flow map and what can be done with it."""

from __future__ import annotations

import inspect
import json
import shutil
import signal

import numpy
import pytest
import torch

import fluvial as fl
from fluvial import sheets
from fluvial.cli.distill import OPTIONS
from fluvial.distill import METHODS
from fluvial.training.ema import EMA
from fluvial.training.precision import Choice
from problems import command

SMALL = ("--steps", 4, "--batch-size", 16)


@pytest.fixture(autouse=True, scope="module")
def untimed():
    """Without the seconds in which a run times its precisions, and draws its sheets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fluvial.training.preview.draw", lambda *_: None)
        patch.setattr("fluvial.training.precision.choose", lambda *_: Choice("fp32", False, "as asked"))
        yield


@pytest.fixture(scope="module")
def run(untimed, tmp_path_factory):
    """A flow on the moons that has seen a few batches."""
    folder = tmp_path_factory.mktemp("runs") / "moons"
    assert command("train", "moons", "--out", folder, "--steps", 40, "--batch-size", 64) == 0
    return folder


@pytest.fixture
def unreported(monkeypatch):
    """The folders that are reported on, in order, without the time that their figures take."""
    written = []
    monkeypatch.setattr("fluvial.show.run_report.write", lambda folder: written.append(folder.name) or folder)
    return written


def error_of(capsys) -> str:
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("error:") == 1
    return " ".join(said.split())


def test_the_options_of_each_method_are_those_it_takes():
    assert OPTIONS.keys() == METHODS.keys()
    for name, method in METHODS.items():
        parameters = inspect.signature(method).parameters
        for option, parameter in (("--distance", "distance"), ("--no-teacher", "taught"), ("--solver", "solver")):
            pairs = name == "pairs" and option == "--solver"  # of the pairs it makes
            assert (option in OPTIONS[name]) == (parameter in parameters or pairs), (name, option)


def test_a_run_in_any_notation_becomes_a_flow_map_and_is_used_as_one(run, tmp_path, capsys):
    other, out = tmp_path / "vp", tmp_path / "one"
    assert command("convert", run, "--out", other, "--path", "vp", "--prediction", "noise") == 0
    options = ("--method", "consistency", "--solver", "euler", "--distance", "pseudo_huber", *SMALL)
    assert command("distill", other, "--out", out, "--data", "moons", *options) == 0
    assert "Report: " in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "gap and spread by step" in page
    assert "method ConsistencyDistillation" in page
    assert "scales None" not in page
    made = fl.load(out)
    assert isinstance(made, fl.FlowMap)
    assert made.kind == "consistency"
    objective = json.loads((out / "config.json").read_text())["training"]["objective"]
    assert (objective["solver"]["name"], objective["distance"]) == ("Euler", "pseudo_huber")

    # The same command finds everything done; another method is another run.
    assert command("distill", other, "--out", out, "--data", "moons", *options) == 0
    assert command("distill", other, "--out", out, "--data", "moons", "--method", "easy", *SMALL) == 2
    assert "another folder" in error_of(capsys)

    assert command("info", out) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "flow map consistency: to the data, from any time" in said
    assert "score no" in said
    assert command("diagnose", out, "--out", tmp_path / "d", "--data", "moons") == 2
    assert "flow map has no trajectories" in error_of(capsys)
    assert command("sample", out, "--compare", "steps=1,2", "--out", tmp_path / "no.png") == 2
    assert "fluvial evaluate" in error_of(capsys)


def numbers(folder, *options) -> torch.Tensor:
    at = folder.with_name(folder.name + ".npz")
    assert command("sample", folder, "-n", 6, "--npz", at, "--out", at.with_suffix(".png"), *options) == 0
    return torch.from_numpy(numpy.load(at)["samples"])


def test_it_is_sampled_by_jumps_and_converted(run, tmp_path, unreported):
    out = tmp_path / "one"
    assert command("distill", run, "--out", out, "--method", "shortcut", "--no-teacher", *SMALL) == 0
    made, cond = fl.load(out), {"label": torch.arange(6) % 2}
    assert torch.equal(numbers(out), fl.sample(made, 6, seed=0, cond=cond))
    info = sheets.read_info(tmp_path / "one.png")
    assert (info["solver"], info["steps"], info["nfe"]) == ("Jump(renoise=0.0)", 1, 1)
    assert torch.equal(numbers(out, "--steps", 2), fl.sample(made, 6, solver="jump", steps=2, seed=0, cond=cond))
    for path, prediction in (("vp", "noise"), ("edm", "data")):
        other = tmp_path / path
        assert command("convert", out, "--out", other, "--path", path, "--prediction", prediction) == 0
        # On VP and EDM the times of the path begin at a little less than pure noise: the start is the same by `times`.
        seen = fl.load(other)
        start = 0.2
        x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
        t = seen.path.time(made.path.log_snr(start))
        scale = seen.path(t).sigma / made.path(start).sigma
        for end in (0.5, 0.9):
            r = seen.path.time(made.path.log_snr(end))
            back = seen.path(r).sigma / made.path(end).sigma
            torch.testing.assert_close(
                seen(scale * x, t, r, **cond) / back, made(x, start, end, **cond), rtol=0, atol=1e-4
            )
        torch.testing.assert_close(numbers(other), numbers(out), rtol=0, atol=2e-2)


def test_a_range_of_guidance_is_told_when_sampling(run, tmp_path, unreported):
    out = tmp_path / "told"
    assert command("distill", run, "--out", out, "--method", "mean-flow", "--guidance", "1..4", *SMALL) == 0
    made, cond = fl.load(out), {"label": torch.arange(6) % 2}
    assert made.null == {"label": 2, "guidance": 1.0}
    with torch.no_grad():  # four steps hardly tell the scales apart
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    fl.save(made, tmp_path / "stirred")
    told = [numbers(tmp_path / "stirred", "--guidance", scale) for scale in (2, 3)]
    cond["guidance"] = torch.full((6,), 3.0)
    assert torch.equal(told[1], fl.sample(made, 6, seed=0, cond=cond))
    assert not torch.allclose(told[0], told[1])


def test_pairs_are_made_beside_the_run_and_gone_on_with(run, tmp_path, monkeypatch, unreported):
    out = tmp_path / "p"
    options = ("--method", "pairs", "--guidance", 2, "-n", 48, *SMALL)
    assert command("distill", run, "--out", out, *options) == 0
    pairs = fl.training.open_pairs(tmp_path / "p-pairs")
    assert (len(pairs), pairs.times) == (48, (0.25, 0.5, 0.75))
    assert (pairs.manifest["nfe"], pairs.manifest["guidance"]["scale"]) == (24, 2.0)
    config = json.loads((out / "config.json").read_text())["training"]
    assert config["objective"]["starts"] == pytest.approx([0.0, 0.25, 0.5, 0.75])
    # What pairs were made under is stored with them, and none of it is hidden from the student.
    assert config["drop_cond"] == 0.0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "p-pairs").rglob("*.safetensors")}
    assert command("distill", run, "--out", out, *options) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (
        command("distill", run, "--out", tmp_path / "q", "--method", "pairs", "--pairs", tmp_path / "p-pairs", *SMALL)
        == 0
    )
    assert not (tmp_path / "q-pairs").exists()


def test_a_straightened_run_learns_from_its_own_pairs(run, tmp_path, capsys, unreported):
    straight = tmp_path / "s"
    assert command("straighten", run, "--out", straight, "-n", 32, "--solver-steps", 3, *SMALL) == 0
    assert command("distill", straight, "--out", tmp_path / "one", "--method", "consistency", *SMALL) == 0
    assert not fl.load(tmp_path / "one").independent
    assert numbers(tmp_path / "one").shape == (6, 2)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("s", "s-pairs-1"):
        (tmp_path / name).rename(moved / name)
    straight = moved / "s"
    assert command("distill", straight, "--out", moved / "one", "--method", "consistency", *SMALL) == 0
    shutil.rmtree(moved / "s-pairs-1")
    capsys.readouterr()
    assert command("distill", straight, "--out", tmp_path / "two", "--method", "consistency", *SMALL) == 2
    assert "s-pairs-1, which are not beside it; expected --pairs" in error_of(capsys)
    assert command("distill", straight, "--out", tmp_path / "two", "--method", "easy", "--data", "moons", *SMALL) == 2
    assert "not independent" in error_of(capsys)
    assert not (tmp_path / "two").exists()


def test_progressive_rounds_are_each_reported(run, tmp_path, capsys, unreported):
    out = tmp_path / "p"
    assert command("distill", run, "--out", out, "--method", "progressive", "--steps", 10, "--batch-size", 8) == 0
    assert unreported == ["p-steps-16", "p-steps-8", "p-steps-4", "p-steps-2", "p"]
    assert fl.load(out).kind == "euler"
    other = tmp_path / "other"
    assert command("distill", run, "--out", other, "--method", "easy", *SMALL) == 0
    capsys.readouterr()
    # The last round would be refused after all others.
    assert command("distill", run, "--out", other, "--method", "progressive", "--steps", 10) == 2
    assert "run of another kind (EasyConsistencyTuning)" in error_of(capsys)
    assert not (tmp_path / "other-steps-16").exists()


def test_an_interrupted_run_goes_on_to_the_same_weights(run, tmp_path, monkeypatch, capsys, unreported):
    options = ("--method", "consistency-training", "--steps", 6, "--batch-size", 16)
    assert command("distill", run, "--out", tmp_path / "whole", *options) == 0
    update, calls = EMA.update, []

    def third(self):
        calls.append(1)
        update(self)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(EMA, "update", third)
        assert command("distill", run, "--out", tmp_path / "parts", *options) == 130
    assert "interrupted at step 3 of 6" in " ".join(capsys.readouterr().out.split())
    assert command("distill", run, "--out", tmp_path / "parts", *options) == 0
    assert fl.training.model_hash(tmp_path / "parts") == fl.training.model_hash(tmp_path / "whole")


def test_a_run_that_fails_leaves_its_report(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert command("distill", run, "--out", out, "--method", "consistency", "--lr", 1e30, *SMALL) == 2
    said = capsys.readouterr()
    assert "is not finite" in said.err
    assert "How it went until then" in said.out
    assert (out / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "consistensy"), "did you mean 'consistency'"),
        (("--method", "easy", "--guidance", 2), "method easy takes no --guidance; expected --distance"),
        (("--method", "easy", "-n", 8), "takes no -n"),
        (("--method", "shortcut", "--distance", "mse"), "takes no --distance; expected --guidance or --no-teacher"),
        (("--method", "progressive", "--solver", "heun"), "takes no --solver"),
        (("--method", "consistency", "--no-teacher"), "takes no --no-teacher"),
        (("--method", "pairs", "--pairs", "x", "-n", 8), "method pairs with --pairs takes no -n; expected --distance"),
        (("--method", "pairs", "--guidance", "1..3"), "expected a scale, such as 2"),
        (("--method", "pairs", "--data", "moons"), "expected --pairs, or none"),
        (("--method", "pairs", "-n", 0), "n is 0"),
        (("--method", "pairs", "--distance", "far"), "unknown distance"),
        (("--method", "pairs", "--distance", "lpips"), "LPIPS"),
        (("--method", "pairs", "--solver", "ddpm"), "stochastic"),
        (("--method", "consistency", "--solver", "ddpm"), "stochastic"),
        (("--method", "mean-flow", "--guidance", "two"), "such as 1..4"),
        (("--method", "mean-flow", "--guidance", "4..1"), "two that rise"),
        (("--method", "mean-flow", "--no-teacher", "--guidance", 2), "follows none"),
        (("--method", "consistency", "--lr", -1), "lr is -1"),
        (("--method", "progressive", "--lr", -1), "lr is -1"),
        (("--method", "consistency", "--steps", 0), "steps is 0"),
        (("--method", "consistency", "--data", "mons"), "did you mean 'moons'"),
        (("--method", "consistency", "--data", "digits"), "(1, 8, 8)"),
        (("--method", "consistency", "--weights", "best"), "unknown kind of weights"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, capsys, options, words):
    assert command("distill", run, "--out", tmp_path / "out", *SMALL, *options) == 2
    assert words in error_of(capsys)
    assert not list(tmp_path.iterdir())


def test_a_flow_map_is_no_teacher(run, tmp_path, capsys, unreported):
    assert command("distill", run, "--out", tmp_path / "one", "--method", "easy", *SMALL) == 0
    capsys.readouterr()
    for method in ("consistency", "pairs"):
        assert command("distill", tmp_path / "one", "--out", tmp_path / "two", "--method", method, *SMALL) == 2
        assert "flow map already" in error_of(capsys)
    assert not (tmp_path / "two").exists()
    assert not (tmp_path / "two-pairs").exists()
