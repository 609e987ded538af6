"""Regression on pairs, from every notation; and what all methods share: resuming, stopping, the boundary."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import Gaussian

import fluvial as fl
from fluvial import networks
from fluvial.distill import METHODS, Regression, regression
from fluvial.errors import NonFiniteError, OptionError, ShapeError
from fluvial.flow_maps import FlowMap
from fluvial.grids import level_of
from fluvial.objectives import Given
from fluvial.training.loop import Loop
from fluvial.training.pairs_at import PairsAt
from problems import PATHS, normal, one_line

PLANE = Gaussian((0.5, -1.0), 0.6)
BENT = torch.tensor([0.3, -0.2, 0.4, 0.25])
QUIET = {"progress": False, "precision": "fp32", "sheet_every": None, "batch_size": 16}


def made(path="rectified", states=(0.3, 0.6), n=256, solver="dopri5"):
    """Pairs of the exact model; this solver's are right to 1e-5."""
    return fl.training.make_pairs(
        PLANE.teacher(path), n, states=list(states), cond={}, seed=2, progress=False, solver=solver
    )


def given(objective, rows, seed=0):
    """As training makes them of a source's rows."""
    index, data = torch.arange(len(rows["data"])), rows["data"].double()
    states = rows["states"].double() if "states" in rows else None
    t = objective.draw_times(PLANE.flow_map(), index, seed)
    return Given(data, rows["noise"].double(), t, {}, seed, index, states)


@pytest.mark.parametrize("name", ["rectified", "vp", "edm"])
def test_the_truth_has_no_loss_on_pairs_of_any_path(name):
    """States are brought to the rectified path, where the exact map carries them to the data of their pair."""
    pairs = made(name)
    levels = [level_of(PATHS[name], t) for t in pairs.times]
    rows = PairsAt(pairs, levels).batch(torch.arange(256))
    # Where the path begins it has some data already, of which the noise that starts there knows nothing.
    first = level_of(PATHS[name], 0.0)
    begun = rows["noise"].double() * (1 - first)
    for k, level in enumerate(levels):
        expected = PLANE.carried(begun, first, level)
        torch.testing.assert_close(rows["states"][:, k].double(), expected, rtol=0, atol=5e-5)
        landed = PLANE.carried(rows["states"][:, k].double(), level, 1.0)
        torch.testing.assert_close(landed, rows["data"].double(), rtol=0, atol=5e-5)
    objective = Regression(starts=(0.0, *levels))
    some = given(objective, rows)
    asked = objective.ask(PLANE.flow_map(), some)
    loss = objective(PLANE.flow_map(), some.data, {}, some.t, some.noise, 0, some.index, some.states).detach()
    assert float(loss[some.t > 0].max()) < 1e-9
    assert float(loss[some.t == 0].max()) < (1e-9 if first == 0.0 else (4 * first) ** 2)
    bent = PLANE.flow_map(bend=BENT)
    wrong = objective(bent, some.data, {}, some.t, some.noise, 0, some.index, some.states).detach()
    assert float(wrong.mean()) > 1e-2
    for k, t in enumerate((0.0, *levels)):
        here = some.t == t
        assert int(here.sum()) > 20
        start = rows["noise"] if k == 0 else rows["states"][:, k - 1]
        assert torch.equal(asked.x[here], start[here].double())
    assert torch.equal(asked.target, some.data)


@pytest.mark.parametrize(("first", "others"), [(0.5, 3), (0.2, 1), (1.0, 2), (0.0, 2), (0.7, 0)])
def test_starts_and_their_shares(first, others):
    n, starts = 20000, (0.0, *(k / 4 for k in range(1, others + 1)))
    t = Regression(starts=starts, first=first).draw_times(PLANE.flow_map(), torch.arange(n), 3)
    for k, start in enumerate(starts):
        share = 1.0 if not others else first if k == 0 else (1 - first) / others
        assert float((t == start).double().mean()) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n))


def test_states_are_of_the_times_that_were_said():
    pairs = made(n=8, solver="euler")
    with pytest.raises(OptionError) as error:
        PairsAt(pairs, [0.3, 0.5])
    assert "asked for at 0.5" in one_line(error.value)
    assert "[0.3, 0.6]" in one_line(error.value)
    rows = pairs.batch(torch.arange(8))
    for starts, count in (((0.0, 0.3), 2), ((0.0,), 2), ((0.0, 0.3, 0.6), 0)):
        objective = Regression(starts=starts)
        some = given(objective, rows)
        with pytest.raises(ShapeError) as error:
            objective.ask(PLANE.flow_map(), some if count else some._replace(states=None))
        assert f"states at {count} times" in one_line(error.value)
    with pytest.raises(OptionError) as error:
        Regression(first=1.5)
    assert "first is 1.5" in one_line(error.value)
    plain = given(Regression(), made(n=8, solver="euler", states=()).batch(torch.arange(8)))
    assert torch.equal(Regression().ask(PLANE.flow_map(), plain).x, plain.noise)


# What all methods share


def learner(kind="rectified", prediction="velocity"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = networks.mlp(2, num_classes=2, width=8, depth=1)
        torch.nn.init.normal_(network.leave[1].weight, std=0.1)
    return fl.Model(network, kind, prediction, null={"label": 2}, shape=(2,))


VARIANTS = [(name, {}) for name in METHODS]
VARIANTS += [("mean-flow", {"guidance": (1.0, 3.0)}), ("continuous", {"taught": False})]


def of(name, model):
    """The data of a method, and options that make it small."""
    if name == "pairs":
        pairs = fl.training.make_pairs(model, 64, steps=4, states=[0.5], progress=False)
        return pairs, {}
    return fl.training.open_source("moons"), {"halvings": (2, 1)} if name == "progressive" else {}


def tensors(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_killed_run_ends_as_one_that_never_was(tmp_path, monkeypatch, name, options):
    """Bit by bit, in all methods; and what it ends with stays where it is when it is led nowhere."""
    model = learner()
    source, small = of(name, model)
    options = {**QUIET, **small, **options, "log_every": 5, "checkpoint_every": 4}
    whole = METHODS[name](model, source, 10, out=tmp_path / "whole", **options)
    calls, step = [0], Loop._step

    def killed(self, rows):
        calls[0] += 1
        if calls[0] == 7:
            raise RuntimeError("killed")
        return step(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            METHODS[name](model, source, 10, out=tmp_path / "parts", **options)
    METHODS[name](model, source, 10, out=tmp_path / "parts", **options)
    assert len(tensors(tmp_path / "whole")) == 2
    assert tensors(tmp_path / "parts") == tensors(tmp_path / "whole")
    loaded = fl.load(tmp_path / "parts")
    assert isinstance(loaded, FlowMap)
    for dtype in (torch.bfloat16, torch.float32):
        x = normal(5, 2, dtype=dtype)
        times = torch.tensor([0.0, 0.1, 0.37, 0.9, 1.0], dtype=torch.float64)
        for flow_map in (whole, loaded):
            assert torch.equal(flow_map(x, times, times), x)
            assert all(torch.equal(flow_map(x, t, t), x) for t in times.tolist())
    moved = (loaded(x, 0.1, 0.9) - learner()(x, 0.1).at(0.9)).abs().max()
    assert float(moved.detach()) > 1e-4  # it did learn something


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_finite_stops_it_at_once(tmp_path, name):
    model = learner()
    source, small = of(name, model)
    with torch.no_grad():
        model.network.enter.bias[0] = math.nan
    with pytest.raises(NonFiniteError) as error:
        METHODS[name](model, source, 4, out=tmp_path / "run", **QUIET, **small)
    assert one_line(error.value).startswith("step 1: ")
    assert list(tmp_path.rglob("nonfinite/*.safetensors"))


@pytest.mark.parametrize(("path", "prediction"), [("vp", "noise"), ("edm", "edm"), ("cosine", "data")])
def test_pairs_of_other_notations_train_too(path, prediction):
    model = learner(path, prediction)
    times = [PATHS[path].time(2 * math.log(level / (1 - level))) for level in (0.25, 0.5)]
    pairs = fl.training.make_pairs(model, 64, steps=4, states=times, progress=False)
    student = regression(model, pairs, 3, **QUIET)
    assert student.kind == "consistency"
    assert fl.sample(student, (4, 2), steps=2, seed=0).isfinite().all()
