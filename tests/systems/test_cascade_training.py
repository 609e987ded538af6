"""Stages of a cascade are trained, straightened and distilled as any model is; and the commands around them."""

from __future__ import annotations

import json

import pytest
import torch

import fluvial as fl
from fluvial import sheets
from fluvial.errors import OptionError
from fluvial.systems import Augmentation, Cascade, StageSource, Upsampler, stage_model, stage_source
from problems import command

FEW = {"batch_size": 16, "precision": "fp32", "progress": False, "sheet_every": None}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A short run of 8 x 8 digits from 4 x 4, and its data."""
    folder = tmp_path_factory.mktemp("cascade") / "up"
    source = StageSource("digits", 8, low=4, augmentation=Augmentation(0.0, 6.0), seed=1)
    run = fl.train(stage_model(source, width=8), source, steps=12, out=folder, **{**FEW, "sheet_every": 12})
    return run, source


@pytest.fixture(scope="module")
def base():
    source = StageSource("digits", 4)
    return fl.train(stage_model(source, width=8), source, steps=3, **FEW).ema


def test_a_stage_s_folder_says_what_it_is_and_comes_back(stage, tmp_path):
    run, source = stage
    config = json.loads((run.folder / "config.json").read_text())
    assert config["network"]["class"] == "fluvial.systems.cascade_network.Upsampler"
    assert config["network"]["config"]["low"] == [4, 4]
    assert config["network"]["config"]["augmentation"] == {"lowest": 0.0, "highest": 6.0, "clean": 0.1}
    assert config["training"]["data"]["conditions"] == ["low", "level", "label"]
    assert config["training"]["data"]["name"] == "digits"
    assert [path.name for path in (run.folder / "sheets").iterdir()] == ["step-000012.png"]
    assert sheets.read_info(run.folder / "sheets" / "step-000012.png")["label"] is None  # those of the rows
    again = fl.load(run.folder)
    rows = source.batch(torch.arange(3))
    x, cond = torch.randn(3, 1, 8, 8), {name: rows[name] for name in source.conditions}
    # To rounding: the run's own weights lie in another order.
    torch.testing.assert_close(again(x, 0.4, **cond).data, run.ema(x, 0.4, **cond).data, rtol=0, atol=1e-5)
    resumed = fl.train(stage_model(source, width=8), source, steps=12, out=run.folder, **{**FEW, "sheet_every": 12})
    assert resumed.step == 12


def test_the_first_prediction_is_the_mean_and_training_uses_what_it_is_told(stage):
    run, source = stage
    rows = source.batch(torch.arange(4))
    x, told = torch.randn(4, 1, 8, 8), {name: rows[name] for name in source.conditions}
    fresh = stage_model(source, width=8)
    assert float(fresh.predict(x, 0.3, **told).detach().abs().max()) == 0.0
    learned = run.model.predict(x, 0.3, **told)
    for name, other in (("low", -told["low"]), ("level", told["level"] - 3.0)):
        assert not torch.allclose(run.model.predict(x, 0.3, **{**told, name: other}), learned, rtol=0, atol=1e-7), name
    # Not told the level means clean, to the last bit; and from a level of 20 on nothing changes that one could see.
    del told["level"]
    clean = run.model.predict(x, 0.3, **told)
    assert torch.equal(clean, run.model.predict(x, 0.3, **told, level=torch.full((4,), torch.inf)))
    nearly = run.model.predict(x, 0.3, **told, level=torch.full((4,), 20.0))
    torch.testing.assert_close(nearly, clean, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(5, 7), (1, 3), (9, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_size_with_or_without_classes(size, dtype):
    low = (1, 2) if size[0] == 1 else (3, 3)
    for classes in (None, 2):
        network = fl.systems.upsampler(2, size, low, classes, 8).to(dtype)
        again = Upsampler.from_config(json.loads(json.dumps(network.config())))
        assert again.config() == network.config()
        again.to(dtype).load_state_dict(network.state_dict())
        with torch.no_grad():
            again.unet.conv_out.weight.fill_(0.1)
        x = torch.randn(3, 2, *size, dtype=dtype)
        out = again(x, torch.tensor([0.0, 500.0, 1000.0]), low=x.flip(0), level=torch.tensor([0.0, 5.0, 20.0]))
        assert out.shape == x.shape
        assert float(out.detach().abs().max()) > 0.0
    with pytest.raises(OptionError, match="not a config of an upsampler"):
        Upsampler.from_config({"kind": "upsampler", "low": [1, 1]})
    with pytest.raises(OptionError, match="unknown kind of network"):
        Upsampler.from_config({"kind": "unet"})


@pytest.mark.parametrize("method", [fl.distill.consistency, fl.distill.mean_flow])
def test_a_distilled_stage_works_in_the_cascade(stage, base, method, tmp_path):
    run, source = stage
    student = method(run.ema, source, 2, out=tmp_path / "student", **FEW)
    student = fl.load(tmp_path / "student")
    assert isinstance(student, fl.FlowMap)
    assert ("r" in student.network.numbers) == (method is fl.distill.mean_flow)
    cascade = Cascade([base, student])
    assert cascade.augmentations["up1"] == Augmentation(0.0, 6.0)
    calls = []
    how = {"seed": 2, "steps": {"base": 3}, "solver": {"base": "ddim"}, "cond": {"label": torch.arange(4)}}
    made = cascade.stages(4, callback=lambda step: calls.append(step.nfe), **how)
    assert calls == [1, 2, 3, 1]
    teacher = cascade.with_models({**cascade.models, "up1": run.ema})
    assert torch.equal(teacher.stages(4, **how)["base"], made["base"])
    assert torch.equal(fl.sample(fl.load(fl.save(cascade, tmp_path / "all")), 4, **how), made["up1"])
    # The base's own student, stopped early, hands its state on as any other does.
    lower = fl.FlowMap(fl.convert(base, "rectified", "velocity"))
    stopped = Cascade([lower, student]).stages(2, seed=0, truncated=0.8)
    assert bool(stopped["up1"].isfinite().all())


def test_a_stage_is_straightened_on_its_own_pairs(stage, base):
    run, source = stage
    rows = source.batch(torch.arange(24))
    cond = {name: rows[name] for name in source.conditions}
    how = {"steps": 2, "drop_cond": 0.0, "progress": False}
    pairs = fl.straighten.make_pairs(run.ema, 24, cond=cond, **how)
    straight = fl.straighten.reflow(run.ema, pairs, 2, **FEW)
    assert not straight.independent
    made = Cascade([base, straight]).stages(2, seed=0, solver="euler", steps=1)
    assert bool(made["up1"].isfinite().all())
    # Of real data too: each row is encoded under its own corruption.
    small = StageSource("digits", 8, low=4, draws=1)
    back = fl.straighten.make_pairs(run.ema, 5, data=small, **how)
    assert torch.equal(back.cond["low"], small.batch(torch.arange(5))["low"])


def test_labels_are_dropped_and_lower_images_never(stage):
    from fluvial.training.batch import prepare

    run, source = stage
    rows = {**source.batch(torch.arange(400)), "index": torch.arange(400)}
    given = prepare(dict(rows), run.model, fl.Objective(), seed=0, drop_cond=0.5, device=torch.device("cpu"))
    dropped = given.cond["label"] == 10
    assert 0.4 < float(dropped.double().mean()) < 0.6
    assert torch.equal(given.cond["label"][~dropped], rows["label"][~dropped])
    assert torch.equal(given.cond["low"], rows["low"])
    assert torch.equal(given.cond["level"], rows["level"])
    assert stage_source(run.ema, source) is source


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two stages by the command line."""
    folder = tmp_path_factory.mktemp("stages")
    few = ["--steps", 2, "--batch-size", 8, "--precision", "fp32"]
    assert command("train", "digits", "--size", 4, "--out", folder / "base", *few) == 0
    asked = ["--from", folder / "base", "--stage", 2, "--augmentation", "1..5"]
    assert command("train", "digits", *asked, "--out", folder / "up", *few) == 0
    return folder


def test_stages_are_trained_and_put_together_by_commands(runs, capsys):
    up = fl.load(runs / "up")
    assert (up.shape, up.network.low, up.network.augmentation) == ((1, 8, 8), (4, 4), Augmentation(1.0, 5.0))
    assert fl.load(runs / "base").shape == (1, 4, 4)
    out = runs / "both"
    told = ["--level", "2.5", "-n", 3, "--steps", 1]
    assert command("cascade", runs / "base", runs / "up", "--out", out, *told) == 0
    assert "2 stages, lower images of up1 at log-SNR 2.5" in capsys.readouterr().out
    assert {"samples.png", "samples-base.png"} <= {path.name for path in out.iterdir()}
    cascade = fl.load(out)
    assert cascade.levels == {"up1": 2.5}
    given = ["-n", 3, "--steps", 1, "--npz", runs / "x.npz", "--out", runs / "x.png"]
    assert command("sample", out, *given) == 0
    import numpy

    expected = fl.sample(cascade, 3, seed=0, steps=1, cond={"label": torch.arange(3)})
    assert numpy.array_equal(numpy.load(runs / "x.npz")["samples"], expected.numpy())
    few = ["--steps", 1, "--batch-size", 8]
    assert command("distill", runs / "up", "--out", runs / "one", *few) == 0
    assert isinstance(fl.load(runs / "one"), fl.FlowMap)


BAD = {
    "unsized": (["train", "digits", "--from", "{runs}/base", "--size", "9"], "expected no larger ones"),
    "not larger": (["train", "digits", "--from", "{runs}/base", "--size", "4"], "low is (4, 4) for a stage of (4, 4)"),
    "stage without lower": (["train", "digits", "--stage", "2"], "--stage is 2; expected 1 for a base"),
    "base with lower": (["train", "digits", "--from", "{runs}/base", "--stage", "1"], "expected 2 or more with --from"),
    "stage skipped": (
        ["train", "digits", "--from", "{runs}/base", "--stage", "3"],
        "is a base; expected the run of stage 2",
    ),
    "augmented base": (["train", "digits", "--augmentation", "0..8"], "without --from"),
    "no range": (["train", "digits", "--from", "{runs}/base", "--augmentation", "3"], "expected log-SNR such as 0..8"),
    "wrong order": (["cascade", "{runs}/up", "{runs}/base"], "base starts from a lower image"),
    "alone": (["cascade", "{runs}/base"], "there are 1 models"),
    "level": (["cascade", "{runs}/base", "{runs}/up", "--level", "9"], "level is 9.0; expected what up1"),
    "levels": (["cascade", "{runs}/base", "{runs}/up", "--level", "2,3"], "2 numbers for 1 upper stages"),
    "a stage alone": (["sample", "{runs}/up", "--steps", "1"], "needs the lower image"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_is_one_clear_line(arguments, says, runs, tmp_path, capsys):
    given = [a.format(runs=runs) for a in arguments]
    assert command(*given, "--out", tmp_path / "x") == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
    assert not (tmp_path / "x").exists()
