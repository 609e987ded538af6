"""Training: what it learns, writes, refuses, and how it stops."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fluvial import networks, objectives, sheets
from fluvial.convention import Normalisation
from fluvial.errors import DataError, NonFiniteError, OptionError, RunError, ShapeError
from fluvial.model import Model, convert
from fluvial.paths import Affine
from fluvial.sampling import sample
from fluvial.training import atomic, batch, precision
from fluvial.training.checkpoints import load, model_hash, weights_of
from fluvial.training.data import open_source
from fluvial.training.meter import BINS, Meter, bin_of
from fluvial.training.settings import Settings
from fluvial.training.trainer import model_for, train

POINTS = {"data": torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) * 0.1 + torch.tensor([3.0, -1.0])}
LABELLED = {**POINTS, "label": torch.arange(60) % 3}


def small(source=POINTS, **options) -> Model:
    source = open_source(source)
    torch.manual_seed(1)
    return model_for(source, network=networks.mlp(2, source.num_classes, width=16, depth=1), **options)


def quick(model, source=POINTS, **options):
    return train(model, source, **{"steps": 6, "batch_size": 8, "precision": "fp32", "progress": False, **options})


def test_learns(tmp_path):
    run = quick(small(), steps=400, batch_size=64, lr=1e-2, ema_decay=0.98, log_every=100, out=tmp_path / "a")
    # Normal data on the straight path cannot be told from noise: the least loss is the mean of 1/(t² + (1-t)²), pi/2.
    assert math.pi / 2 - 0.1 < run.metrics[-1]["loss"] < math.pi / 2 + 0.1
    x = sample(load(tmp_path / "a"), 500, seed=0)
    assert torch.allclose(x.mean(0), POINTS["data"].mean(0), atol=0.03)
    assert torch.allclose(x.std(0), POINTS["data"].std(0), rtol=0.25)


def test_folder_explains_itself(tmp_path):
    out = tmp_path / "deep" / "a"
    run = quick(small(LABELLED), LABELLED, out=out, log_every=4, sheet_every=3, checkpoint_every=2)
    names = {"config.json", "model.safetensors", "ema.safetensors", "state", "metrics.jsonl", "sheets"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in sorted((out / "sheets").iterdir())] == ["step-000003.png", "step-000006.png"]
    assert [path.name for path in (out / "state").glob("step-*")] == ["step-000006"]
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    info = sheets.read_info(out / "sheets" / "step-000006.png")
    assert info["model"] == model_hash(out) == model_hash(run.ema)
    assert (info["solver"], info["nfe"], info["seed"], info["step"]) == ("heun", 19, 0, 6)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6]
    assert lines == run.metrics
    keys = {"step", "loss", "loss_by_log_snr", "lr", "samples_per_second", "grad_norm", "seconds"}
    assert set(lines[0]) == keys
    config = json.loads((out / "config.json").read_text())
    assert config["training"]["precision"] == "fp32"
    assert config["convention"]["normalisation"]["shift"] == pytest.approx(POINTS["data"].mean(0).tolist())
    assert load(out).shape == (2,)


def test_without_a_folder_ends_the_same(tmp_path):
    one, two = quick(small(), out=tmp_path / "a"), quick(small())
    assert two.folder is None
    others = weights_of(two.ema.network)
    assert all(torch.equal(value, others[name]) for name, value in weights_of(one.ema.network).items())


def test_leaves_torchs_generator_and_mode_alone():
    model = small()
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    run = quick(model)
    assert torch.equal(torch.rand(3), expected)
    assert run.model is model
    assert not model.network.training


def test_convention_is_the_datas_and_the_couplings():
    model = Model(networks.mlp(2, width=8, depth=1), "vp", prediction="v")
    quick(model, objective=objectives.Objective(coupling="ot"))
    assert model.shape == (2,)
    assert model.normalisation == open_source(POINTS).normalisation
    assert not model.independent
    own = Normalisation((3.0,), (2.0,))
    kept = Model(networks.mlp(2, width=8, depth=1), "vp", normalisation=own)
    quick(kept)
    assert kept.normalisation == own


@pytest.mark.parametrize("prediction", ["data", "noise", "velocity", "v", "score", "edm"])
def test_every_prediction_trains(prediction):
    path = "edm" if prediction == "edm" else "cosine"
    assert quick(small(path=path, prediction=prediction)).step == 6


def test_a_converted_model_trains_on():
    model = convert(small(), path="vp", prediction="noise")
    before = {name: value.clone() for name, value in weights_of(model.network).items()}
    run = quick(model)
    assert run.ema.prediction.name == "noise"
    after = weights_of(model.network)
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_model_for_images_and_points():
    images = open_source({"data": torch.randint(0, 255, (8, 1, 8, 8), dtype=torch.uint8), "label": torch.arange(8)})
    model = model_for(images, width=8)
    assert isinstance(model.network, networks.UNet)
    assert model.convention.clock(0.25) == 750.0
    assert model.null == {"label": 8}
    again = model_for(images, width=8)
    other = model_for(images, width=8, seed=1)
    first, second, third = (weights_of(m.network) for m in (model, again, other))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, third[name]) for name, value in first.items())
    assert model_for(POINTS).convention.clock is None
    assert model_for(POINTS, prediction="edm").prediction.sigma_data == 1.0


def test_conditions_are_dropped_by_sample():
    model, index = small(LABELLED), torch.arange(4000)
    cond = {"label": torch.zeros(4000, dtype=torch.long)}
    label = batch.dropped(cond, model, index, seed=0, share=0.1)["label"]
    assert set(label.tolist()) == {0, 3}
    assert 0.08 < (label == 3).float().mean() < 0.12
    part = batch.dropped({"label": cond["label"][:7]}, model, index[100:107], seed=0, share=0.1)["label"]
    assert torch.equal(part, label[100:107])
    assert batch.dropped(cond, model, index, 0, 0.0)["label"].eq(0).all()
    assert batch.dropped(cond, model, index, 0, 1.0)["label"].eq(3).all()


def test_bins_of_log_snr():
    values = torch.tensor([-float("inf"), -8.1, -8.0, 0.0, 1.9, 8.0, float("inf")])
    assert [BINS[i] for i in bin_of(values).tolist()] == ["..-8", "..-8", "-8..-6", "0..2", "0..2", "8..", "8.."]
    meter = Meter(torch.device("cpu"))
    meter.add(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.5, 1.5, 9.0]), torch.tensor(2.0))
    means, samples = Meter.read(meter.sums)
    assert samples == 3
    assert means == {"loss": 3.0, "loss_by_log_snr": {"0..2": 2.0, "8..": 5.0}, "grad_norm": 2.0}


def test_rates():
    settings = Settings(100, 8, 0, 0.1, 1e-3, 10, "cosine", 0.0, 1.0, 0.9)
    rates = [settings.rate(step) for step in range(1, 101)]
    assert rates[4] == pytest.approx(0.5e-3, rel=0.01)
    assert max(rates) < 1e-3
    assert rates[-1] < 1e-6
    flat = Settings(100, 8, 0, 0.1, 1e-3, 0, "constant", 0.0, 1.0, 0.9)
    assert {flat.rate(step) for step in range(1, 101)} == {1e-3}


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"drop_cond": 1.5}, "drop_cond is 1.5"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
        ({"precision": "fp64"}, "unknown precision 'fp64'"),
        ({"channels_last": "yes"}, "channels_last is 'yes'"),
        ({"log_every": 0}, "log_every is 0"),
    ],
)
def test_options_are_checked_at_once(tmp_path, options, said):
    with pytest.raises(OptionError, match=said):
        quick(small(), out=tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_models_that_do_not_fit(tmp_path):
    with pytest.raises(OptionError, match=r"nn\.Module"):
        quick(Model(lambda x, t: x, "vp"))
    with pytest.raises(ShapeError, match=r"\(3,\).*\(2,\)"):
        quick(Model(networks.mlp(3), "vp", shape=(3,)))
    with pytest.raises(OptionError, match=r"no null condition for 'label'"):
        quick(Model(networks.mlp(2, 3), "vp"), LABELLED)
    with pytest.raises(DataError):
        quick(small(), tmp_path / "nowhere")
    with pytest.raises(OptionError, match="functions"):
        quick(small(path=Affine(lambda t: t, lambda t: 1 - t)), out=tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("")
    with pytest.raises(RunError, match=r"not a run \(it holds thesis.txt\)"):
        quick(small(), out=tmp_path / "b")


# How it stops


class Exploding(nn.Module):
    """Its output for one sample is not a number from some call on."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__()
        self.linear, self.calls, self.at, self.what = nn.Linear(2, 2), 0, at, what

    def forward(self, x, t):
        out = self.linear(x)
        if self.training:
            self.calls += 1
        if self.calls >= self.at:
            if self.what == "loss":
                out = out * torch.where(torch.arange(len(x)) == 5, float("nan"), 1.0)[:, None]
            else:
                out = out + 0 * (out - out.detach()).abs().sqrt()  # value fine, slope infinite
        return out


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("loss", r"step 5: the loss of 1 of 8 samples \(number 37; t = 0\.\d+, log-SNR "),
        ("gradient", r"step 5: the gradient"),
    ],
)
def test_not_finite(tmp_path, what, said):
    model = Model(Exploding(5, what), "rectified")
    with pytest.raises(NonFiniteError, match=said) as caught:
        quick(model, out=tmp_path / "a", checkpoint_every=2, sheet_every=None)
    text = str(caught.value)
    assert "\n" not in text
    assert "of step 4, is kept" in text
    kept, metadata = atomic.read_tensors(tmp_path / "a" / "nonfinite" / "step-000005.safetensors")
    assert metadata["step"] == "5"
    assert kept["data"].shape == kept["noise"].shape == (8, 2)
    assert kept["index"].tolist() == list(range(32, 40))
    assert kept["loss"].isfinite().all() == (what == "gradient")
    weights = weights_of(load(tmp_path / "a", Exploding(9, "loss"), weights="raw").network)
    assert all(value.isfinite().all() for value in weights.values())
    # What is in memory stayed good, too.
    assert all(value.isfinite().all() for value in weights_of(model.network).values())


@pytest.mark.parametrize("operation", ["fsync", "replace", "save_file"])
def test_full_disk(tmp_path, monkeypatch, operation):
    out = tmp_path / "a"
    quick(small(), steps=4, out=out, checkpoint_every=2, sheet_every=None)
    before = {p: p.read_bytes() for p in out.rglob("*.safetensors")}

    def full(*arguments, **options):
        if operation == "save_file":
            Path(arguments[1]).write_bytes(b"some of it")
            raise atomic.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = atomic if operation == "save_file" else os
    real, calls = getattr(place, operation), 0

    def soon_full(*arguments, **options):
        nonlocal calls
        calls += 1
        return (full if calls > 14 or operation == "save_file" else real)(*arguments, **options)

    monkeypatch.setattr(place, operation, soon_full)
    with pytest.raises(RunError, match="no space is left") as caught:
        quick(small(), steps=200, out=out, checkpoint_every=2, sheet_every=None)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert not list(out.rglob(".*")), "nothing unfinished is left"
    if operation == "save_file":
        assert "state of step 4 is kept" in str(caught.value)
        assert {p: p.read_bytes() for p in out.rglob("*.safetensors")} == before
    assert quick(small(), steps=200, out=out, checkpoint_every=50, sheet_every=None).step == 200


# Precision


def test_precision_is_chosen_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    monkeypatch.setattr(
        precision, "_seconds", lambda model, batch, objective, name, last: {"fp32": 3.0, "bf16": 2.0}[name]
    )
    run = quick(small(), precision="auto", out=tmp_path / "a", steps=2)
    config = json.loads((tmp_path / "a" / "config.json").read_text())["training"]
    assert config["precision"] == "bf16"
    assert "1.50 times" in config["precision_why"]
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert all(p.dtype == torch.float32 for p in run.ema.parameters())
    # Another machine, where fp32 is faster: the run stays what it is.
    monkeypatch.setattr(
        precision, "_seconds", lambda model, batch, objective, name, last: {"fp32": 1.0, "bf16": 2.0}[name]
    )
    quick(small(), precision="auto", out=tmp_path / "a", steps=4)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["training"]["precision"] == "bf16"


def test_precision_is_timed_without_touching_the_model():
    model = small()
    before = {name: value.clone() for name, value in weights_of(model.network).items()}
    rows = {**{name: value[:8] for name, value in POINTS.items()}, "index": torch.arange(8)}
    given = batch.prepare(rows, model, objectives.Objective(), 0, 0.0, torch.device("cpu"))
    assert precision._seconds(model, given, objectives.Objective(), "bf16", False) > 0
    after = weights_of(model.network)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_bf16_loss_is_that_of_fp32():
    images = {"data": torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))}
    losses = {}
    for name in ("fp32", "bf16"):
        torch.manual_seed(0)
        network = networks.unet(1, 4, width=8, multipliers=(1,), attention=(False,))
        losses[name] = quick(model_for(images, network=network), images, precision=name, steps=8).metrics[-1]["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_pairs_bring_their_noise():
    pairs = {**POINTS, "noise": torch.randn(60, 2, generator=torch.Generator().manual_seed(3))}
    model = small()
    quick(model, pairs, objective=objectives.Objective(coupling="pairs"))
    assert not model.independent
    with pytest.raises(OptionError, match="has stored noise"):
        quick(small(), pairs)
    with pytest.raises(OptionError, match="has no stored noise"):
        quick(small(), objective=objectives.Objective(coupling="pairs"))


def test_streams_train(tmp_path):
    chunks = [torch.randn(10, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    run = quick(small({"data": torch.cat(chunks)}), chunks, out=tmp_path / "a", steps=5)
    assert run.step == 5
