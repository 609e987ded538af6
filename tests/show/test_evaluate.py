"""Evaluations: perfect samples are at the floor, figures are the library's, and the folder explains itself."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image

from fluvial import FlowMap, Model, convert, grids, measure, paths, sample, sheets, solvers, training
from fluvial.errors import DependenceError, OptionError, ShapeError
from fluvial.exact import GaussianMixture
from fluvial.grids import Segments
from fluvial.show import evaluate as module
from fluvial.show import evaluate_real, evaluate_report
from fluvial.show.evaluate import Entry, Evaluation, Figure, evaluate
from problems import command

MIXTURE = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), torch.tensor([0.5, 0.8]), torch.ones(2))
N = 400
EULER = solvers.named("euler")


def points(n: int = 2000, seed: int = 5):
    data, label = MIXTURE.sample_with_labels(n, seed)
    return training.open_source({"data": data, "label": label})


@pytest.fixture(scope="module")
def exact():
    """The exact model of the data, and a conversion of it, at a few steps and at many."""
    model = MIXTURE.model(paths.Rectified())
    return evaluate({"exact": model, "as vp": convert(model, path="vp")}, points(), steps=(1, 32), solver="heun", n=N)


def test_flow_maps_are_sampled_by_jumps_and_others_by_euler():
    """One network as a flow map of each kind: each is sampled as it was made to be, whatever stands beside it."""

    def network(x, t, label, r=None):
        return 0.5 * x + label[:, None] + (0.0 if r is None else r[:, None])

    model = Model(network, "rectified", null={"label": 2}, shape=(2,))
    average = FlowMap(model, "average")
    models = {"flow": model, "average": average, "consistency": FlowMap(model)}
    found = evaluate(models, points(400), steps=(1, 2), n=60, seeds=1)
    used = {run: record["solver"] for run, record in found.runs.items()}
    assert used == {"flow": repr(EULER), "average": "Jump(renoise=0.0)", "consistency": "Jump(renoise=1.0)"}
    assert found.shared["solver"] == ", ".join(used.values())
    cond = {"label": torch.arange(60) % 2}
    for run, solver in (("flow", EULER), ("average", "jump"), ("consistency", solvers.Jump(renoise=1.0))):
        assert entry(found, run, "2").nfe == 2
        expected = sample(models[run], 60, solver=solver, steps=2, seed=0, cond=cond)
        torch.testing.assert_close(entry(found, run, "2").x, expected, rtol=0, atol=1e-6)
    named = evaluate({"flow": model}, points(400), steps=(1,), n=20, seeds=1, solver="heun")
    assert named.shared["solver"] == repr(solvers.Heun())


def entry(found: Evaluation, run: str, steps: str) -> Entry:
    return next(e for e in found.entries if (e.run, e.steps) == (run, steps))


def test_samples_of_the_law_of_the_data_are_at_every_floor(exact):
    for run in ("exact", "as vp"):
        good = entry(exact, run, "32").figures
        for name, floor in exact.floors.items():
            noise = math.hypot(floor.std, good[name].std)
            assert good[name].mean == pytest.approx(floor.mean, abs=3 * noise), name
        assert good["recognised"].mean == pytest.approx(exact.accuracy, abs=0.02)
        assert good["spread"].mean == pytest.approx(1.0, abs=0.08)


def test_one_step_is_told_from_the_data_by_every_measure(exact):
    # One Euler step from noise gives the mean of each class.
    bad = entry(exact, "exact", "1").figures
    for name in ("frechet", "sliced_wasserstein", "energy_distance", "mmd"):
        assert bad[name].mean > exact.floors[name].mean + 10 * exact.floors[name].std
    assert bad["recall"].mean < 0.02
    assert bad["spread"].mean < 1e-3
    assert [e.nfe for e in exact.entries] == [1, 63, 1, 63]


def test_figures_are_the_library_s(exact):
    model, source = MIXTURE.model(paths.Rectified()), points()
    label = torch.arange(N) % 2
    real = evaluate_real.Real(source, N, label, None)
    values = []
    for seed in range(3):
        x = sample(model, N, solver="heun", steps=32, seed=seed, cond={"label": label})
        values.append(measure.frechet(real.data[real.chosen], x))
    assert entry(exact, "exact", "32").figures["frechet"].values == pytest.approx(values, rel=1e-9)
    assert torch.equal(label.bincount(), real.labels[real.chosen].bincount())
    assert len(real.kept) == N
    # The floor is of the same counts and the same mix of classes.
    assert {floor.n for floor in real.floors.values()} == {N}


def test_ratios_are_of_the_excess_over_the_floor():
    floors = {"frechet": measure.Floor(2.0, 0.1, 50)}
    figures = [(1, (6.0, 8.0)), (8, (4.1, 3.9)), (4, (4.2, 4.0))]
    entries = [
        Entry("a", str(n), n, 0.0, {"frechet": Figure(values)}, torch.zeros(2, 1, 4, 4)) for n, values in figures
    ]
    found = Evaluation(entries, floors, None, entries[0].x, {}, {"a": {}})
    assert found.reference.steps == "8"
    assert [found.ratio(e, "frechet") for e in entries] == pytest.approx([2.5, 1.0, 1.05])
    assert entries[0].figures["frechet"].std == pytest.approx(math.sqrt(2))
    header, rows = found.table(["frechet"])
    assert header == ["run", "steps", "NFE", "FD", "over floor", "x reference"]
    assert rows[0] == ["a", "1", "1", "7 ± 1", "5", "2.5"]
    assert rows[-1] == ["real data", "", "", "2 ± 0.1", "", ""]
    assert "a at 8 NFE (FD 4, real to real 2); a at 4 NFE cannot be told from it" in found.finding
    # A reference that cannot be told from real data gives no ratio.
    floors["frechet"] = measure.Floor(3.9, 0.1, 50)
    assert found.table(["frechet"])[0][-1] == "over floor"
    assert found.record()["entries"][0]["frechet"]["excess_ratio"] is None


@pytest.mark.parametrize(
    ("known", "asked", "counts", "pool"),
    [
        ([50, 50], [10, 10], [10, 10], [50, 50]),
        ([50, 30], [10, 10], [10, 10], [30, 30]),
        # Class 1 has too few, and class 2 none: the same is left of them on both sides.
        ([50, 6, 0], [10, 10, 10], [10, 3, 0], [20, 6, 0]),
    ],
)
def test_classes_are_compared_in_equal_numbers(known, asked, counts, pool):
    known, asked = (torch.repeat_interleave(torch.arange(len(c)), torch.tensor(c)) for c in (known, asked))
    known, asked = known.flip(0), asked[torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))]
    kept, real, spare = evaluate_real._matched(known, asked)
    for labels, expected in ((asked[kept], counts), (known[real], counts), (known[spare], pool)):
        assert labels.bincount(minlength=len(counts)).tolist() == expected
    assert all(len(set(part.tolist())) == len(part) for part in (kept, real, spare))


def test_budgets_for_segments():
    model = MIXTURE.model(paths.VP())
    options = {"solver": "euler", "seed": 0, "cond": {"label": torch.arange(8) % 2}}
    found = evaluate({"vp": model}, points(100), steps=[(1, 3), (2, 1, 1)], n=8, seeds=1)
    plain = convert(model, path="rectified")
    for one, nodes, budgets in zip(found.entries, ([0, 0.5, 1], [0, 1 / 3, 2 / 3, 1]), ((1, 3), (2, 1, 1))):
        assert (one.steps, one.nfe) == ("+".join(map(str, budgets)), 4)
        assert torch.equal(one.x, sample(plain, 8, times=grids.Split(nodes, budgets), **options))
    # A model with segments of its own is given the budgets as they are.
    pieces = model.under(segments=Segments([0.0, 0.25, 1.0], [True, False]))
    found = evaluate({"pieces": pieces}, points(100), steps=[(1, 3), 4], n=8, seeds=1)
    assert torch.equal(found.entries[0].x, sample(pieces, 8, steps=(1, 3), **options))
    assert torch.equal(found.entries[1].x, sample(pieces, 8, steps=4, **options))


def test_batches_are_bounded_and_do_not_matter(monkeypatch):
    seen = []

    def network(x, t, label):
        seen.append(len(x))
        return (2.0 - x) * (1.0 + label[:, None])

    model = Model(network, "rectified", null={"label": 2}, shape=(2,))
    whole = evaluate({"m": model}, points(100), steps=[2], n=20, seeds=1)
    monkeypatch.setattr(module, "_BATCH_NUMBERS", 15)
    seen.clear()
    parts = evaluate({"m": model}, points(100), steps=[2], n=20, seeds=1)
    assert max(seen) == 7
    torch.testing.assert_close(parts.entries[0].x, whole.entries[0].x)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(120) % 2
    data = torch.rand(120, 1, 8, 8, generator=generator) * 4 + 6.0 * label[:, None, None, None]
    return training.open_source({"data": data, "label": label})


def constant(value: float, shape, **options) -> Model:
    """Its samples are this number everywhere, plus a little of the noise."""
    return Model(lambda x, t, **cond: value - x * 0.9, "rectified", "velocity", shape=shape, **options)


def test_images_are_clamped_to_the_data_s_range(images):
    high, low = images.normalisation.high, images.normalisation.low
    real = evaluate_real.Real(images, 20, torch.arange(20) % 2, None)
    x = torch.linspace(low, high, 20)[:, None, None, None].expand(20, 1, 8, 8)
    outside = torch.where(x == x.max(), x + 50.0, torch.where(x == x.min(), x - 50.0, x))
    assert real(outside, torch.arange(20) % 2) == real(x, torch.arange(20) % 2)
    assert real.record()["clamped_to"] == [low, high]
    assert "sliced_wasserstein" not in real(x, None)


def test_models_without_classes_share_a_comparison_without_classes(images):
    asked = constant(5.0, images.shape, null={"label": 2})
    blind = constant(5.0, images.shape)
    found = evaluate({"asked": asked, "blind": blind}, images, steps=[1], n=30, seeds=2)
    first, second = found.entries
    for name in found.floors:
        assert first.figures[name].values == second.figures[name].values
    assert "recognised" in first.figures
    assert "recognised" not in second.figures
    assert found.table(["recognised"])[1][1][-1] == ""
    # Without any labels the figures are of the numbers.
    found = evaluate({"blind": blind}, training.open_source(images.batch(torch.arange(120))["data"]), steps=[1], n=30)
    assert found.shared["features"] == "the numbers themselves"
    assert {"sliced_wasserstein", "energy_distance", "mmd"} <= set(found.measured)


def test_folder_explains_itself(exact, images, tmp_path):
    one_class = constant(5.0, images.shape, null={"label": 2})
    pictures = evaluate({"runs/a & b": one_class}, images, steps=[1, (1, 2)], n=24, seeds=1, label=1, guidance=2.0)
    cloud = replace(exact, entries=exact.entries[1::2])
    for name, found, source in (("points", cloud, points()), ("images", pictures, images)):
        folder = tmp_path / name
        page = evaluate_report.write(folder, found, source.normalisation).read_text()
        assert not re.search(r"(src|href)=.?http", page)
        assert all(e.run.replace("&", "&amp;") in page for e in found.entries)
        record = json.loads((folder / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(name))
        assert len(list((folder / "sheets").glob("*.png"))) == len(found.entries)
        assert record["features"] == found.shared["features"]
        for told, one in zip(record["entries"], found.entries):
            assert told["frechet"]["by_seed"] == list(one.figures["frechet"].values)
            assert told["frechet"]["excess"] == pytest.approx(told["frechet"]["mean"] - found.floors["frechet"].mean)
    assert (record["labels"], record["guidance"], record["samples"], record["seeds"]) == (1, 2.0, 24, [0])
    sheet = folder / "sheets" / "runs-a-b-steps-1+2.png"
    info = sheets.read_info(sheet)
    assert (info["steps"], info["nfe"], info["seed"]) == ("1+2", 3, 0)
    assert info["model"] == record["runs"]["runs/a & b"]["model"]
    drawn = numpy.asarray(sheets.sheet(pictures.entries[1].x, columns=10, normalisation=images.normalisation))
    with Image.open(sheet) as picture:
        assert numpy.array_equal(numpy.asarray(picture), drawn)


def test_errors_come_before_anything_is_measured(exact, monkeypatch):
    model, source = MIXTURE.model(paths.Rectified()), points(100)
    monkeypatch.setattr(module, "Real", lambda *a: pytest.fail("measured"))
    bad = [
        (ShapeError, r"shape \(2,\); expected m's, \(3,\)", {"m": model.under(shape=(3,))}, {}),
        (OptionError, "2 classes; expected m's, 7", {"m": model.under(null={"label": 7})}, {}),
        (OptionError, "label is 2 for m; expected 0 to 1", {"m": model}, {"label": 2}),
        (OptionError, "label is 0 for m; expected a model with classes", {"m": model.under(null=None)}, {"label": 0}),
        (OptionError, "0 models", {}, {}),
        (OptionError, "n = 0", {"m": model}, {"n": 0}),
        (DependenceError, "needs the score", {"m": model, "d": model.under(independent=False)}, {"solver": "ddpm"}),
    ]
    for kind, message, models, options in bad:
        with pytest.raises(kind, match=message):
            evaluate(models, source, **options)
    with pytest.raises(OptionError, match="is a stream"):
        evaluate({"m": model}, training.open_source([torch.randn(8, 2)]))
    monkeypatch.undo()
    with pytest.raises(OptionError, match="3 samples and 100 real ones make 3 pairs"):
        evaluate({"m": model}, source, n=3, steps=[1])


# The command


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "moons"
    assert command("train", "moons", "--out", folder, "--steps", 4, "--batch-size", 64) == 0
    return folder


def test_command_measures_prints_and_writes(moons, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_real, "MOST_REAL", 300)
    vp = tmp_path / "vp"
    assert command("convert", moons, "--path", "vp", "--out", vp) == 0
    given = ["--steps", "1,2+1", "-n", 60, "--seeds", 2, "--solver", "ddim", "--features", "pixels"]
    assert command("evaluate", moons, vp, *given, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [(e["run"], e["steps"], e["nfe"]) for e in record["entries"]] == [
        ("moons", "1", 1), ("moons", "2+1", 3), ("vp", "1", 1), ("vp", "2+1", 3),
    ]  # fmt: skip
    assert record["data"]["name"] == "moons"
    assert record["runs"]["vp"]["folder"] == str(vp)
    assert record["runs"]["vp"]["model"] == training.model_hash(vp)
    for one in record["entries"]:
        assert f"{one['sliced_wasserstein']['mean']:.3g}" in said
    assert record["finding"] in said.replace("\n", " ")
    # By segments both are sampled on the rectified path, from the same noise: one network, the same samples.
    first, second = (e["sliced_wasserstein"]["mean"] for e in record["entries"][1::2])
    assert first == pytest.approx(second, rel=1e-4)


def test_command_refuses_in_one_line(moons, tmp_path, capsys):
    vp = tmp_path / "vp"
    assert command("convert", moons, "--path", "vp", "--out", vp) == 0
    bad = {
        "expected whole numbers": [moons, "--steps", "1,two"],
        "such as 1+9": [moons, "--steps", "1,3+0"],
        "is a run folder": [moons, "--out", moons],
        "given twice": [moons, moons],
        "did you mean 'classifier'": [moons, "--features", "clasifier"],
        "unknown grid": [moons, "--grid", "karas"],
        "--data digits": [vp],
        "expected moons's": [moons, "--data", "digits"],
    }
    for message, arguments in bad.items():
        out = [] if "--out" in arguments else ["--out", tmp_path / "none"]
        assert command("evaluate", *arguments, *out) == 2, message
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert not (tmp_path / "none").exists()
