"""Comparisons: the figures are the library's, the cells share their noises, and the sheet can be read."""

from __future__ import annotations

import json

import numpy
import pytest
import torch

from fluvial import measure, sample, solvers, training
from fluvial.errors import DependenceError, OptionError
from fluvial.show import compare, compare_sheet, settings

N = 12


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """A reference that is made quickly, and still far better than the cells."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "REFERENCE_STEPS", 64)
        yield


@pytest.fixture(scope="module")
def moons():
    """A network that is not trained but makes curved paths: points with two classes."""
    return nonzero(training.model_for(training.open_source("moons")))


@pytest.fixture(scope="module")
def digits():
    return nonzero(training.model_for(training.open_source("digits")))


def nonzero(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def start(model, n=N, **options):
    return settings.Start(n, 3, {"label": torch.arange(n) % model.null["label"]}, **options)


def found(model, *texts, base=None, **options):
    base = base or settings.Setting(solvers.named("heun"))
    return compare.compare(model, base, settings.axes(texts), start(model), **options)


def test_rms_is_the_distance_to_the_exact_solution_from_the_same_noise(moons):
    result = found(moons, "solver=euler,vabm", "steps=4,16")
    exact = sample(moons, N, solver=solvers.Dopri5(1e-6, 1e-6), seed=3, cond=start(moons).cond)
    assert [cell.at for cell in result.cells] == [("euler", "4"), ("euler", "16"), ("vabm", "4"), ("vabm", "16")]
    for cell in result.cells:
        solver, steps = cell.at
        x = sample(moons, N, solver=solver, steps=int(steps), seed=3, cond=start(moons).cond)
        assert torch.equal(cell.drawn.x, x)
        true = float((x - exact).square().mean().sqrt())
        assert cell.values["rms"] == pytest.approx(true, abs=cell.reference_error + 1e-5)
        assert cell.reference_error < 0.3 * cell.values["rms"]
    assert result.shown == ["rms"]
    best = min(result.cells, key=lambda cell: cell.values["rms"])
    assert "solver {}, steps {}".format(*best.at) in result.finding


def test_noise_makes_all_be_measured_in_distribution(moons):
    result = found(moons, "solver=euler,ddpm", base=settings.Setting(solvers.named("heun"), steps=4))
    reference = {"solver": "vabm", "steps": 64, "times": "log_snr", "seed": 3, "cond": start(moons).cond}
    same, other = sample(moons, N, **reference), sample(moons, N, first=N, **reference)
    labels = start(moons).cond["label"].repeat(2)
    floor = measure.real_floor(measure.sliced_wasserstein, torch.cat([same, other]), N, labels=labels)
    for cell in result.cells:
        x = sample(moons, N, solver=cell.at[0], steps=4, seed=3, cond=start(moons).cond)
        assert cell.values["sliced_wasserstein"] == pytest.approx(measure.sliced_wasserstein(x, other))
        assert cell.floors["sliced_wasserstein"] == floor
    assert [sorted(cell.values) for cell in result.cells] == [["rms", "sliced_wasserstein"], ["sliced_wasserstein"]]
    assert result.shown == ["sliced_wasserstein"]


def test_each_path_and_guidance_has_its_own_reference(moons):
    result = found(moons, "path=rectified,vp", "guidance=1,3", base=settings.Setting(solvers.named("heun"), steps=128))
    for cell in result.cells:
        assert cell.values["rms"] < 0.02
    x = [cell.drawn.x for cell in result.cells]
    assert float((x[1] - x[0]).abs().max()) > 0.05


def test_a_budget_is_used_up_by_as_many_steps_as_fit(moons):
    result = found(moons, "solver=euler,heun,rk4", "nfe=3,8")
    steps = [cell.setting.steps for cell in result.cells]
    assert steps == [3, 8, 2, 4, 1, 2]
    assert [cell.drawn.nfe for cell in result.cells] == [3, 8, 3, 7, 3, 7]
    with pytest.raises(OptionError, match="nfe is 2; expected 3 or more"):
        found(moons, "nfe=2", base=settings.Setting(solvers.named("rk4")))


def test_real_data_are_a_measure_with_a_floor(digits, monkeypatch):
    monkeypatch.setattr(compare, "MOST_REAL", 400)
    source = training.open_source("digits")
    result = found(digits, "steps=1,2", data=source)
    rows = source.batch(torch.arange(len(source)))
    floors = {tuple(vars(cell.floors["frechet"]).values()) for cell in result.cells}
    assert len(floors) == 1
    assert {floor[2] for floor in floors} == {N}
    # A network that was never trained is far from all digits; real digits in its place are at the floor.
    judge = compare.Judge(source, digits, start(digits))
    real = torch.cat([rows["data"][rows["label"] == label][5:6] for label in start(digits).cond["label"].tolist()])
    assert result.cells[0].values["frechet"] == judge(result.cells[0].drawn.x)
    assert judge(real) < judge.floor.mean + 3 * judge.floor.std < result.cells[0].values["frechet"]
    assert result.shown == ["frechet", "rms"]
    assert judge.description in result.said["frechet"]


def test_data_without_labels_are_compared_by_their_numbers(moons):
    points = torch.randn(400, 2, generator=torch.Generator().manual_seed(1))
    judge = compare.Judge(training.open_source(points), moons, start(moons))
    assert "the numbers themselves" in judge.description
    assert judge(points[-N:]) < 1.0 < judge(points[-N:] + 5.0)


def test_record_holds_every_figure_and_is_json(moons):
    result = found(moons, "steps=1,2")
    record = json.loads(json.dumps(result.record()))
    assert record["compared"] == {"steps": ["1", "2"]}
    assert (record["samples"], record["seed"]) == (N, 3)
    for told, cell in zip(record["cells"], result.cells):
        assert told["rms"] == cell.values["rms"]
        assert told["nfe"] == cell.drawn.nfe
        assert told["ms_per_sample"] == pytest.approx(1000 * cell.drawn.seconds / N)
        assert told["setting"]["solver"] == repr(solvers.named("heun"))
    header, rows = result.table()
    assert header == ["steps", "RMS", "NFE", "ms/sample"]
    assert [row[0] for row in rows] == ["1", "2"]


@pytest.mark.parametrize("texts", [["steps=1,2"], ["solver=euler,heun,ddim", "steps=1,2"]])
def test_sheet_has_a_cell_for_each_setting(texts, moons, digits):
    for model in (moons, digits):
        result = found(model, *texts)
        picture = compare_sheet.draw(result)
        assert picture.width < 1000
        ink = numpy.asarray(picture.convert("L")) < 200
        rows, columns = len(result.axes[texts[0].split("=")[0]]), len(texts)
        # Below the words each cell's part of the sheet has something on it.
        body = ink[-rows * (ink.shape[0] // (rows + 2)) :, 100:]
        for band in numpy.array_split(body, rows):
            for cell in numpy.array_split(band, columns, axis=1):
                assert cell.any()


def test_equal_samples_are_drawn_alike(digits):
    result = found(digits, "solver=euler,ddim", base=settings.Setting(solvers.named("heun"), steps=2))
    first, second = compare_sheet._pictures(result)
    # On the rectified path these two are one method.
    assert numpy.abs(numpy.asarray(first).astype(int) - numpy.asarray(second)).max() <= 1


def test_series_and_single_numbers_are_drawn_too():
    from fluvial.exact import GaussianMixture
    from fluvial.paths import Rectified

    for shape in ((1,), (2, 16)):
        size = torch.Size(shape).numel()
        mixture = GaussianMixture(torch.zeros(2, size), torch.ones(2), torch.ones(2))
        exact = mixture.model(Rectified())
        if len(shape) == 1:
            model = exact.under(shape=shape)
        else:
            from fluvial import Model

            model = Model(lambda x, t: -x, Rectified(), shape=shape)
        options = settings.axes(["steps=1,2"])
        result = compare.compare(model, settings.Setting(solvers.named("euler")), options, settings.Start(6))
        assert compare_sheet.draw(result).height > 200


def test_errors_come_before_the_first_network_call(moons):
    calls = []
    counted = moons.with_network(lambda x, t, **cond: calls.append(1))
    for texts, message in [
        (["grid=uniform,fitted"], "no grid of its own"),
        (["solver=dopri5", "nfe=4"], "chooses its own steps"),
    ]:
        with pytest.raises(OptionError, match=message):
            found(counted, *texts)
    with pytest.raises(OptionError, match="expected an end at 1"):
        found(counted, "solver=euler", base=settings.Setting(solvers.named("heun"), times=[0.0, 0.5]))
    assert not calls
    with pytest.raises(DependenceError):
        found(moons.under(independent=False), "solver=ddpm", base=settings.Setting(solvers.named("heun"), steps=2))


@pytest.mark.parametrize("name", solvers.names())
def test_every_solver_can_be_typed(name):
    solver = solvers.named(name)
    assert settings.solver(*split(settings.spelled(solver))) == solver
    facts = next(facts for facts in solvers.table() if facts.name == name)
    assert (facts.kind == "SDE") == solver.stochastic
    assert (facts.order, facts.calls, facts.memory) == (solver.order, solver.stages, solver.memory)
    assert 0 < len(facts.summary) < 60


def split(text):
    name, *options = text.split(" -O ")
    return name, options


@pytest.mark.parametrize(
    ("name", "options"),
    [("dpmpp_2m", {"steps": 3}), ("vabm", {"steps": 2}), ("langevin", {"gamma": 2.0}), ("unipc", {"start": "single"})],
)
def test_spelling_reads_back(name, options):
    solver = solvers.named(name, **options)
    assert settings.solver(*split(settings.spelled(solver))) == solver


def test_options_that_no_text_can_hold_are_refused():
    with pytest.raises(OptionError, match="made in Python"):
        settings.solver("churn", ["base=heun"])
    assert settings.solver("euler", ["along=vp"]).along == settings.solver("heun", ["along=vp"]).along
