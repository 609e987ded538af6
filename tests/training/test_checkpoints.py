"""Saved models come back as they were, and what is wrong with a folder is said in one line."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from fluvial import distill, networks, predictions
from fluvial.convention import Clock, Normalisation
from fluvial.errors import OptionError, RunError
from fluvial.flow_maps import KINDS, FlowMap
from fluvial.model import Converted, Model, convert
from fluvial.paths import VP, Affine, Rectified
from fluvial.training.checkpoints import convert_run, load, model_hash, save
from fluvial.training.ema import EMA
from fluvial.training.runs import describe
from fluvial.training.trainer import train


def model(**options) -> Model:
    torch.manual_seed(0)
    network = networks.mlp(2, 3, width=8, depth=1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    known = {"null": {"label": 3}, "shape": (2,), "normalisation": Normalisation((1.0, 2.0), (0.5, 3.0), -1.0, 4.0)}
    return Model(network.eval(), **{"path": "rectified", **known, **options})


def same(one: Model, two: Model) -> bool:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    t, label = torch.linspace(0.1, 0.9, 5), torch.tensor([0, 1, 2, 3, 0])
    return all(torch.equal(m.predict(x, t, label=label), one.predict(x, t, label=label)) for m in (one, two))


def line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"path": VP(0.2, 15.0), "prediction": "noise", "clock": Clock.steps(1000), "independent": False},
        {"path": "edm", "prediction": predictions.EDM(0.7)},
        {"null": None, "normalisation": None, "shape": None},
    ],
    ids=["plain", "vp", "edm", "bare"],
)
def test_comes_back(tmp_path, options):
    saved = model(**options)
    save(saved, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert loaded.convention == saved.convention
    assert same(saved, loaded)
    assert not loaded.network.training
    assert model_hash(loaded) == model_hash(saved) == model_hash(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert describe(tmp_path / "m")["model"].startswith(model_hash(saved))


def test_converted_comes_back_converted(tmp_path):
    saved = convert(model(prediction="velocity"), path=VP(), prediction="noise").under(independent=False)
    save(saved, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert isinstance(loaded, Converted)
    assert loaded.path == VP()
    assert loaded.source.path == Rectified()
    assert loaded.convention == saved.convention
    assert same(saved, loaded)
    assert model_hash(loaded) == model_hash(tmp_path / "m") != model_hash(model())


def test_both_weights(tmp_path):
    raw = model()
    ema = EMA(raw.network)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter += 1
    averaged = ema.model(raw)
    save(raw, tmp_path / "m", ema=averaged)
    assert same(load(tmp_path / "m"), averaged)
    assert same(load(tmp_path / "m", weights="raw"), raw)
    assert model_hash(tmp_path / "m", "raw") == model_hash(raw) != model_hash(tmp_path / "m")
    with pytest.raises(OptionError, match="raw"):
        load(tmp_path / "m", weights="latest")


def test_a_run_in_another_notation(tmp_path):
    run = train(model(), {"data": torch.randn(9, 2)}, steps=2, batch_size=4, out=tmp_path / "a", progress=False)
    converted = convert_run(tmp_path / "a", tmp_path / "b", "vp", "noise")
    assert same(converted, convert(run.ema, "vp", "noise"))
    assert same(load(tmp_path / "b"), converted)
    assert same(load(tmp_path / "b", weights="raw"), convert(run.model, "vp", "noise"))
    words = describe(tmp_path / "b")
    assert "velocity on Rectified()" in words["model"]
    assert words["seen as"] == "noise on VP(beta_min=0.1, beta_max=20.0)"


class Own(nn.Module):
    """A network that Fluvial does not know, with tied weights and a buffer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, width), nn.Linear(2, width)
        self.outer.weight = self.inner.weight
        self.register_buffer("scale", torch.full((2,), 3.0))

    def forward(self, x, t):
        return torch.tanh(self.inner(x) + self.outer(x))[:, :2] * self.scale


def test_network_of_the_users_own(tmp_path):
    saved = Model(Own(), "cosine")
    save(saved, tmp_path / "m")
    with pytest.raises(RunError, match=r"Own.*network=") as caught:
        load(tmp_path / "m")
    line(caught)
    loaded = load(tmp_path / "m", network=Own())
    x, t = torch.randn(3, 2), torch.tensor([0.2, 0.5, 0.8])
    assert torch.equal(loaded.predict(x, t), saved.predict(x, t))
    with pytest.raises(RunError, match=r"inner.weight is \(4, 2\) and should be \(5, 2\)") as caught:
        load(tmp_path / "m", network=Own(5))
    line(caught)


def test_folder_that_is_none(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("")
    (tmp_path / "file").write_text("")
    for name, said in (("nowhere", "does not exist"), ("photos", "has no config.json"), ("file", "is a file")):
        with pytest.raises(RunError, match=f"{name} {said}") as caught:
            load(tmp_path / name)
        line(caught)
    with pytest.raises(RunError, match=r"holds a.png"):
        save(model(), tmp_path / "photos")
    with pytest.raises(RunError, match="is a file"):
        save(model(), tmp_path / "file")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_weights_cut_short(tmp_path, share):
    save(model(), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(RunError, match=r"model.safetensors is damaged or cut short") as caught:
        load(tmp_path / "m")
    line(caught)


def test_weights_missing(tmp_path):
    save(model(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"model.safetensors is missing|ema.safetensors is missing") as caught:
        load(tmp_path / "m")
    line(caught)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["convention"]["path"].update(name="Loop"), "unknown path 'Loop'"),
        (lambda c: c["convention"]["prediction"].update(name="velocty"), "did you mean 'velocity'"),
        (lambda c: c["convention"].pop("clock"), "'clock' is missing"),
        (lambda c: c["network"]["config"].update(kind="rnn"), "unknown kind of network"),
        (lambda c: c["network"]["config"].update(width=16), "does not fit the MLP"),
        (lambda c: c.pop("network"), "lacks network"),
    ],
)
def test_config_that_does_not_fit(tmp_path, change, said):
    save(model(), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(RunError, match=said) as caught:
        load(tmp_path / "m")
    line(caught)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\x01"])
def test_config_that_is_no_json(tmp_path, text):
    save(model(), tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"config.json") as caught:
        load(tmp_path / "m")
    line(caught)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(OptionError, match="no weights"):
        save(Model(lambda x, t: x, "vp"), tmp_path / "m")
    with pytest.raises(OptionError, match="functions"):
        save(model(path=Affine(lambda t: t, lambda t: 1 - t)), tmp_path / "m")
    with pytest.raises(OptionError, match="clock"):
        save(model(clock=lambda t: 5 * t), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_saving_again_replaces_but_never_a_run(tmp_path):
    save(model(), tmp_path / "m", ema=model())
    save(model(prediction="data"), tmp_path / "m")
    assert load(tmp_path / "m").prediction.name == "data"
    assert not (tmp_path / "m" / "ema.safetensors").exists()
    train(model(), {"data": torch.randn(9, 2)}, steps=1, batch_size=4, out=tmp_path / "a", progress=False)
    with pytest.raises(RunError, match="training run"):
        save(model(), tmp_path / "a")
    with pytest.raises(RunError, match="saved model, not a training run"):
        train(model(), {"data": torch.randn(9, 2)}, steps=1, batch_size=4, out=tmp_path / "m", progress=False)


def flow_map(kind: str, numbers=(), **options) -> FlowMap:
    inner: Any = model(**options)
    inner = inner.with_network(networks.told(inner.network, ["r", *numbers] if kind == "average" else numbers))
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter += 0.1
    null = {**(inner.null or {}), **dict.fromkeys(numbers, 1.0)}
    return FlowMap(inner.under(null=null), kind)


def arrives_same(one: Any, two: Any, **cond) -> bool:
    x, label = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])
    return torch.equal(one(x, 0.3, 0.8, label=label, **cond), two(x, 0.3, 0.8, label=label, **cond))


@pytest.mark.parametrize("seen", [None, ("vp", "noise"), ("edm", "data")])
@pytest.mark.parametrize("numbers", [(), ("guidance",)])
@pytest.mark.parametrize("kind", KINDS)
def test_flow_maps_come_back(tmp_path, kind, numbers, seen):
    saved: Any = flow_map(kind, numbers)
    if seen is not None:
        saved = convert(saved, *seen)
    raw = saved.with_network(copy.deepcopy(saved.network))
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter += 0.1
    save(raw, tmp_path / "m", ema=saved)
    told = {"guidance": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])} if numbers else {}
    for weights, expected in (("ema", saved), ("raw", raw)):
        loaded = load(tmp_path / "m", weights=weights)
        assert isinstance(loaded, FlowMap)
        assert (loaded.kind, loaded.convention) == (kind, expected.convention)
        assert arrives_same(loaded, expected, **told)
        assert model_hash(loaded) == model_hash(expected) == model_hash(tmp_path / "m", weights)
    assert not arrives_same(raw, saved, **told)
    words = describe(tmp_path / "m")
    assert words["flow map"].startswith(f"{kind}: ")
    assert words["score"].startswith("no")
    assert ("seen as" in words) == (seen is not None)


def test_the_kind_belongs_to_the_hash_and_others_keep_theirs():
    """Golden: what was saved before there were flow maps has the hash that it had."""
    network = networks.mlp(2, 3, width=8, depth=1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / parameter.numel())
    plain = Model(network, "rectified", null={"label": 3}, shape=(2,))
    hashes = {model_hash(plain)} | {model_hash(FlowMap(plain, kind)) for kind in KINDS}
    assert len(hashes) == 4
    assert model_hash(plain) == "e82969989a42"


@pytest.mark.parametrize("damaged", ["teleport", None, 3, ["average"], {"name": "average"}])
def test_a_flow_map_of_no_known_kind(tmp_path, damaged):
    save(flow_map("average"), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "flow_map": damaged}))
    for read in (load, describe):
        with pytest.raises(
            RunError, match=r"config.json: .*unknown kind of flow map .* expected one of average"
        ) as caught:
            read(tmp_path / "m")
        line(caught)


def test_a_described_run_names_what_is_known_and_leaves_out_the_rest(tmp_path):
    source = {"data": torch.randn(9, 2), "label": torch.arange(9) % 3}
    distill.consistency(model(), source, 2, batch_size=4, out=tmp_path / "a", progress=False, precision="fp32")
    said = describe(tmp_path / "a")["objective"]
    assert said.startswith("method ConsistencyDistillation, target Data")
    assert f"teacher {model_hash(model())}" in said
    assert "None" not in said
    assert "seen as" not in describe(tmp_path / "a")
