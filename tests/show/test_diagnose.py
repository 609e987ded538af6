"""The diagnosis: its figures are those of the measures, what needs data says so, the page holds what was measured."""

from __future__ import annotations

import json
import re
import statistics

import pytest
import torch

from fluvial import exact, measure, paths, training
from fluvial.errors import OptionError, ShapeError
from fluvial.guidance import CFG
from fluvial.show import diagnose_report
from fluvial.show.diagnose import diagnose
from problems import command, mixture

SMALL = {"n": 40, "steps": 9, "seeds": 2}


@pytest.fixture(scope="module")
def source():
    data, label = mixture().sample_with_labels(120)
    return training.open_source({"data": data, "label": label})


@pytest.fixture(scope="module")
def model():
    return mixture().model(paths.Cosine())


@pytest.fixture(scope="module")
def labelled(model, source):
    """With data, labels and guidance 1, which changes nothing but is passed on."""
    said = []
    cond = {"label": torch.arange(40) % 3}
    return diagnose(model, source, **SMALL, cond=cond, guidance=1.0, segments=[0, 0.3, 1], say=said.append), said


def test_figures_are_those_of_the_measures(model, source, labelled):
    found, said = labelled
    cond = {"label": torch.arange(40) % 3}
    runs = [
        measure.straightness(model, 40, steps=9, seed=k, cond=cond, guidance=CFG(1.0), segments=[0, 0.3, 1])
        for k in (0, 1)
    ]
    totals = [run.total for run in runs]
    assert found.straightness == (statistics.fmean(totals), statistics.stdev(totals))
    assert [f.mean for f in found.per_segment] == pytest.approx(
        [statistics.fmean(v) for v in zip(*(run.per_segment for run in runs))]
    )
    assert found.per_sample == [s for run in runs for s in run.per_sample.tolist()]
    assert found.own.cost["squared"].mean == pytest.approx(
        statistics.fmean(measure.transport_cost(run.ends) / 2 for run in runs)
    )
    assert found.own.crossing_depth.std == pytest.approx(
        statistics.stdev(measure.crossing(run.ends).depth for run in runs)
    )
    assert found.independent.cost["squared"].mean > found.own.cost["squared"].mean
    reference = source.batch(torch.arange(120))
    ratios = [
        measure.within_class_spread(run.ends.data, cond["label"], reference["data"], reference["label"]).ratio
        for run in runs
    ]
    assert found.spread is not None
    assert found.spread.mean == pytest.approx(statistics.fmean(ratios), rel=1e-5)
    assert found.irreducible is not None
    assert found.drift is not None
    assert (found.drift.repeats, found.drift.n, len(found.drift_shares)) == (2, 40, 9)
    assert found.drift_shares == pytest.approx([k / 8 for k in range(9)])
    assert found.omitted == []
    assert any("seed 2 of 2" in line for line in said)


def test_irreducible_loss_knows_the_classes_and_the_units(source, labelled):
    rows = source.batch(torch.arange(120))
    expected = measure.irreducible_loss(rows["data"], n=4000, labels=rows["label"])
    found = labelled[0].irreducible
    assert abs(found.total - expected.total) < 3.0 * (found.total_error + expected.total_error)
    assert expected.total < 0.8 * measure.irreducible_loss(rows["data"], n=4000).total


def test_saved_cost_is_straightness_and_irreducible_loss(model):
    found = diagnose(model, n=400, steps=24, seeds=3)
    least = measure.irreducible_loss(mixture(), n=2000).total
    scatter = sum(c.cost["squared"].std for c in (found.own, found.independent))
    assert abs(found.saved - found.straightness.mean - least) < 3.0 * scatter
    assert scatter < 0.1 * least


def test_without_data_that_is_said(model):
    found = diagnose(model, **SMALL)
    assert (found.irreducible, found.drift, found.spread) == (None, None, None)
    assert len(found.omitted) == 1
    assert "no data are known" in found.omitted[0]
    plain = training.open_source(mixture().sample(30))
    assert "no classes in common" in diagnose(model, plain, **SMALL).omitted[0]


def test_one_class_is_compared_with_its_own_data(model, source):
    cond = {"label": torch.ones(40, dtype=torch.long)}
    found = diagnose(model, source, **SMALL, cond=cond)
    count = int((source.batch(torch.arange(120))["label"] == 1).sum())
    assert found.made["data"] == {"name": "tensors", "samples": count}
    assert found.made["classes"] == [1]
    with pytest.raises(OptionError, match="no sample of class 2"):
        diagnose(
            model,
            training.open_source({"data": torch.randn(9, 2), "label": torch.arange(9) % 2}),
            **SMALL,
            cond={"label": torch.full((40,), 2)},
        )


def test_a_straight_model_is_called_so():
    point = exact.Empirical(torch.ones(1, 2)).model(paths.Rectified())
    found = diagnose(point, **SMALL)
    assert found.straight
    assert "no segment bends" in found.bends
    bent = diagnose(mixture().model(paths.Rectified()), **SMALL, segments=[0, 1])
    assert not bent.straight
    assert f"t = {bent.split[1]:.2f}" in bent.bends


def test_what_does_not_fit_is_said(model):
    with pytest.raises(OptionError, match="seeds is 1"):
        diagnose(model, n=4, seeds=1)
    with pytest.raises(ShapeError, match="expected the model's"):
        diagnose(model, training.open_source("digits"), **SMALL)
    few = diagnose(model, training.open_source(torch.randn(3, 2)), **SMALL)
    assert "two or more disjoint pairs" in few.omitted[-1]


def test_report_is_one_file_with_the_figures(labelled, model, tmp_path):
    found = labelled[0]
    page = diagnose_report.write(tmp_path / "new", found, "a <run>").read_text()
    record = json.loads((tmp_path / "new" / "diagnosis.json").read_text())
    assert record["straightness"] == {"mean": found.straightness.mean, "std": found.straightness.std}
    assert record["made"]["seeds"] == [0, 1]
    assert record["drift"]["energy_floor"]["mean"] == found.drift.energy_floor.mean
    assert page.count("<svg") == 5
    assert "a &lt;run&gt;" in page
    assert f"{found.straightness.mean:.3g}" in page
    assert "0.3 to 1" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    # Of a single step, without data, there is little to plot; it is still a page.
    bare = diagnose(model, n=4, steps=1, seeds=2, segments=[0, 1])
    assert diagnose_report.write(tmp_path, bare, "b").read_text().count("<svg") == 3


def test_command_finds_the_data_of_the_training(tmp_path, capsys):
    folder = tmp_path / "moons"
    moons = training.open_source("moons")
    training.train(training.model_for(moons), moons, steps=2, batch_size=32, out=folder)
    options = ["-n", 12, "--seeds", 2, "--out", tmp_path / "d"]
    assert command("diagnose", folder, *options, "--steps", 8, "--weights", "raw", "--segments", "0,0.25,1") == 0
    record = json.loads((tmp_path / "d" / "diagnosis.json").read_text())
    made = record["made"]
    assert made["model"] == training.model_hash(folder, "raw")
    assert made["data"] == {"name": "moons", "samples": 5000}
    assert (made["weights"], made["nfe"], made["n"], made["classes"]) == ("raw", 15, 12, [0, 1])
    assert record["segments"] == [0.0, 0.25, 1.0]
    loaded = training.load(folder, weights="raw")
    cond = {"label": torch.arange(12) % 2}
    expected = [
        measure.straightness(loaded, 12, steps=8, seed=k, cond=cond, segments=[0, 0.25, 1]).total for k in (0, 1)
    ]
    assert record["straightness"]["mean"] == pytest.approx(statistics.fmean(expected))
    assert "report.html" in capsys.readouterr().out
    # A model that was saved and not trained here knows no data.
    training.save(loaded, tmp_path / "saved")
    assert command("diagnose", tmp_path / "saved", *options, "--steps", 2, "--label", 1) == 0
    record = json.loads((tmp_path / "d" / "diagnosis.json").read_text())
    assert record["irreducible"] is None
    assert record["made"]["classes"] == [1]
    assert "--data names the data" in capsys.readouterr().out.replace("\n", " ")
    assert command("diagnose", folder, *options, "--segments", "0,0.5") == 2
    assert "from 0 to 1" in capsys.readouterr().err
