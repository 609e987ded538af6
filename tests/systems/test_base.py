"""What all systems share, on the smallest of them: two models in a row."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

import fluvial as fl
from fluvial import cli, interop, paths, training
from fluvial.cli.common import one_model
from fluvial.errors import OptionError, RunError
from fluvial.networks import MLP
from fluvial.show.evaluate import evaluate
from fluvial.systems import System, folders
from fluvial.systems.base import options_of


class Pair(System):
    """Points of one model, moved by those of another."""

    kind: ClassVar[str] = "pair"
    shape = (2,)
    normalisation = fl.model.Normalisation()

    def __init__(self, models, by=1.0):
        self.models, self.by = dict(models), by

    def stages(self, start, **options):
        made = {
            name: fl.sample(model, start, **options_of(name, options, list(self.models)))
            for name, model in self.models.items()
        }
        return {"first": made["first"], "second": made["first"] + self.by * made["second"]}

    def with_models(self, models):
        return Pair(models, self.by)

    def write_parts(self, folder):
        return {"by": self.by}

    @classmethod
    def read(cls, folder, models, settings):
        return cls(models, **settings)


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setitem(folders.KINDS, "pair", Pair)
    torch.manual_seed(0)
    models = {}
    for name in ("first", "second"):
        network = MLP((2,), None, 16, 1)
        torch.nn.init.normal_(network.leave[1].weight, std=0.3)
        models[name] = fl.Model(network, "rectified", shape=(2,))
    return Pair(models, 0.5)


def test_sample_hands_its_arguments_over(pair):
    x = fl.sample(pair, 5, seed=3, steps=4)
    first, second = (fl.sample(model, 5, seed=3, steps=4) for model in pair.models.values())
    torch.testing.assert_close(x, first + 0.5 * second, rtol=0, atol=0)
    assert fl.sample.__doc__.startswith("Samples (B")


def test_options_by_stage_are_for_that_stage_alone(pair):
    x = fl.sample(pair, 5, seed=3, steps={"first": 2, "second": 7}, solver={"second": "euler"})
    first = fl.sample(pair.models["first"], 5, seed=3, steps=2)
    second = fl.sample(pair.models["second"], 5, seed=3, steps=7, solver="euler")
    torch.testing.assert_close(x, first + 0.5 * second, rtol=0, atol=0)
    label = {"label": torch.arange(3)}
    assert options_of("a", {"cond": label, "steps": {"b": 2}, "seed": 1}, ["a", "b"]) == {"cond": label, "seed": 1}


def test_a_system_is_converted_part_by_part_and_samples_the_same(pair):
    converted = fl.convert(pair, path=paths.VP(), prediction="noise")
    for model in converted.models.values():
        assert isinstance(model.path, paths.VP)
        assert model.prediction.name == "noise"
    noise = torch.randn(4, 2, dtype=torch.float64)
    grid = [0.1 * k for k in range(1, 10)]
    own, seen = pair.models["first"], converted.models["first"]
    times = [float(seen.path.time(own.path.log_snr(t))) for t in grid] + [1.0]
    start, there = own.path(grid[0]), seen.path(times[0])
    x = fl.sample(own, state=noise * start.sigma, times=[*grid, 1.0], solver="ddim")
    y = fl.sample(seen, state=noise * there.sigma, times=times, solver="ddim")
    torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


def test_saved_and_loaded_it_is_the_same(pair, tmp_path):
    folder = fl.save(pair, tmp_path / "pair")
    assert sorted(path.name for path in folder.iterdir()) == ["first", "second", "system.json"]
    again = fl.load(folder)
    assert isinstance(again, Pair)
    assert again.by == 0.5
    torch.testing.assert_close(fl.sample(again, 5, seed=3), fl.sample(pair, 5, seed=3), rtol=0, atol=0)
    fl.save(again, folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds something else"):
        fl.save(pair, tmp_path / "other")


def test_a_system_is_described_and_converted_by_its_folder(pair, tmp_path):
    folder = fl.save(pair, tmp_path / "pair")
    words = fl.interop.describe(folder)
    assert words["system"] == "pair: first, second"
    assert (
        words["second"]
        == "predicts the velocity towards the data on the path Rectified(), time: t from noise 0 to data 1; samples 2"
    )
    assert words["by"] == "0.5"
    interop.opening.save_converted(folder, tmp_path / "vp", "vp", "noise")
    assert fl.load(tmp_path / "vp").models["first"].prediction.name == "noise"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "JSON"),
        ('{"system": "other", "models": [], "settings": {}}', "'other'; expected"),
        ('{"system": "pair", "settings": {}}', "lacks its models"),
        ('{"system": "pair", "models": ["../up"], "settings": {}}', "names of folders beside it"),
        ('{"system": "pair", "models": ["first"], "settings": {"by": 1}}', "first"),
    ],
)
def test_a_damaged_index_is_one_error(pair, tmp_path, text, said):
    (tmp_path / "system.json").write_text(text)
    with pytest.raises(RunError, match=said) as caught:
        fl.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("job", ["distill", "straighten", "pairs", "diagnose"])
def test_commands_of_one_model_name_the_parts_of_a_system(pair, tmp_path, job):
    folder = fl.save(pair, tmp_path / "pair")
    with pytest.raises(OptionError, match="is a system") as caught:
        one_model(folder)
    assert f"(pair); expected one model: {folder / 'first'}, {folder / 'second'}" in str(caught.value)
    assert job in cli.__all__
    assert getattr(cli, job).one_model is one_model


def test_a_system_is_evaluated_as_a_model_is(pair):
    """Each stage by the solver that suits it, its calls counted together."""
    data = torch.randn(300, 2, generator=torch.Generator().manual_seed(3))
    source = training.open_source(data)
    mixed = pair.with_models({"first": pair.models["first"], "second": fl.FlowMap(pair.models["second"])})
    found = evaluate({"pair": pair, "mixed": mixed}, source, steps=(1, 3), n=100, seeds=1)
    entries = {(entry.run, entry.steps): entry for entry in found.entries}
    assert [entry.nfe for entry in entries.values()] == [2, 6, 2, 6]
    jump = fl.solvers.Jump(renoise=1.0)
    for run, system, second in (("pair", pair, "euler"), ("mixed", mixed, jump)):
        x = fl.sample(system, 100, solver={"first": "euler", "second": second}, steps=3, seed=0)
        assert entries[run, "3"].x.equal(x)
    assert found.runs["mixed"]["system"] == "pair"
    assert set(found.runs["mixed"]["stages"]) == {"first", "second"}
    with pytest.raises(OptionError, match=r"steps are 1\+2, budgets for the segments of one model"):
        evaluate({"pair": mixed}, source, steps=((1, 2),), n=10, seeds=1)
