"""Reflow: what it does to an exactly known mixture, from any notation, whole and piece by piece."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import fluvial as fl
from fluvial import measure, networks, paths, straighten
from fluvial.errors import DependenceError, OptionError, RunError
from fluvial.straighten.reflow import chosen, reread, student_of
from problems import one_line

QUIET = {"progress": False, "precision": "fp32", "sheet_every": None}


def ring():
    angle = torch.arange(6) * torch.pi / 3
    return fl.exact.GaussianMixture(
        2.0 * torch.stack([angle.cos(), angle.sin()], 1), torch.full((6,), 0.25), torch.ones(6)
    )


def learner(width=64, seed=0, depth=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return fl.Model(networks.mlp(2, width=width, depth=depth), "rectified", shape=(2,))


def one_step_error(model, teacher, n=2000):
    """The root mean square distance of one Euler step to where the teacher's ODE leads, from the same noise."""
    noise = fl.random.normal(n, (2,), seed=99)
    truth = fl.sample(teacher, noise, solver="heun", steps=48)
    return float((fl.sample(model, noise, solver="euler", steps=1) - truth).square().sum(1).mean().sqrt())


@pytest.fixture(scope="module")
def once():
    """One round on the exact mixture."""
    teacher = ring().model(paths.Rectified())
    pairs = straighten.make_pairs(teacher, 20000, solver="heun", steps=32, seed=1, cond={}, progress=False)
    student = straighten.reflow(teacher, pairs, 500, student=learner(), batch_size=512, lr=3e-3, **QUIET)
    return teacher, pairs, student


def test_one_reflow_straightens_and_keeps_the_marginal(once):
    """S falls by 4 and more, no convex cost rises, the samples stay within the floor of two exact sets."""
    teacher, _, student = once
    before = measure.straightness(teacher, 1000, steps=48, seed=5).total
    after = measure.straightness(student, 1000, steps=48, seed=5).total
    assert after < before / 20
    noise = fl.random.normal(10000, (2,), seed=7)
    mine, theirs = (fl.sample(m, noise, solver="heun", steps=24) for m in (student, teacher))
    for cost in ("squared", "absolute", lambda d: d.abs() ** 1.5):
        # The couplings share their noise, so what is left is the training's error: half a percent.
        assert measure.transport_cost((noise, mine), cost) < 1.005 * measure.transport_cost((noise, theirs), cost)
    exact = [ring().sample(10000, seed=s) for s in (11, 12, 13, 14)]
    floor = max(measure.sliced_wasserstein(a, b) for a, b in itertools.combinations(exact, 2))
    assert measure.sliced_wasserstein(mine, exact[0]) < 1.3 * floor


def test_one_euler_step_is_as_good_as_many(once):
    teacher, _, student = once
    assert one_step_error(student, teacher) < 0.25 < 1.0 < one_step_error(teacher, teacher)
    exact = [ring().sample(5000, seed=s) for s in (21, 22)]
    noise = fl.random.normal(5000, (2,), seed=8)
    one = fl.sample(student, noise, solver="euler", steps=1)
    spread = float(torch.cdist(exact[0][:2000], exact[1][:2000]).mean())
    floor = measure.energy_distance(*exact)
    assert measure.energy_distance(one, exact[0]) < floor + 0.1 * spread
    assert measure.energy_distance(one, exact[0]) < 0.01 * spread  # and far better than asked


def test_the_score_is_refused_after_it(once):
    _, _, student = once
    assert isinstance(student.path, paths.Rectified)
    assert (student.prediction.name, student.independent) == ("velocity", False)
    with pytest.raises(DependenceError, match="reflow"):
        _ = student(torch.zeros(1, 2), 0.5).score
    with pytest.raises(DependenceError, match="reflow"):
        fl.sample(student, (4, 2), solver="langevin", steps=4)
    assert fl.sample(student.assume_independent(), (4, 2), solver="langevin", steps=4, seed=0).isfinite().all()


@pytest.mark.parametrize("which", ["first", "second", "all"])
def test_piecewise_one_step_crosses_what_was_straightened(which):
    """Median distances to where the teacher's ODE leads: of the data's std, 1.4, the training misses a tenth."""
    teacher, nodes = ring().model(paths.Rectified()), [0.0, 0.5, 1.0]
    made = {"steps": 16, "states": [0.5], "seed": 2, "cond": {}, "progress": False}
    pairs = straighten.make_pairs(teacher, 4096, **made)
    student = straighten.reflow(
        teacher, pairs, 300, nodes, which, student=learner(depth=2), batch_size=256, lr=5e-3, **QUIET
    )
    straight = student.segments.straight
    assert straight == {"first": (True, False), "second": (False, True), "all": (True, True)}[which]
    noise = fl.random.normal(1000, (2,), seed=99)
    truth = fl.sample(teacher, noise, solver="heun", steps=32)
    budget = tuple(1 if yes else 16 for yes in straight)

    def error(model, **how):
        return float((fl.sample(model, noise, solver="euler", **how) - truth).norm(dim=1).median())

    assert error(student, steps=budget) < error(teacher, times=fl.grids.Split(nodes, budget)) / 2.5
    assert error(student, steps=(32, 32)) < 0.15


@pytest.mark.parametrize(
    ("path", "prediction"), [("vp", "noise"), ("edm", "edm"), ("cosine", "v"), ("rectified", "data")]
)
def test_the_student_starts_as_the_model_itself(path, prediction):
    """Before the first step: the same function, in another notation; the teacher's weights are its own."""
    network = networks.mlp(2, width=16, depth=1).double()
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.3)
    model = fl.Model(network, path, prediction)
    student = student_of(model)
    x, t = torch.randn(6, 2, dtype=torch.float64), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    torch.testing.assert_close(student(x, t).velocity, fl.convert(model, path="rectified")(x, t).velocity)
    assert student.prediction.name == "velocity"
    with torch.no_grad():
        next(student.network.parameters()).add_(1.0)
    assert not torch.allclose(student(x, t).velocity, fl.convert(model, path="rectified")(x, t).velocity)


def test_a_prediction_of_the_noise_starts_as_v():
    """At the data they agree, (alpha, sigma) = (1, 0); at the noise v says what the data are and noise cannot."""
    network = networks.mlp(2, width=16, depth=1).double()
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.3)
    vp = fl.Model(network, "vp", "noise")
    for model in (vp, fl.convert(vp, path="rectified", prediction="velocity")):
        read = reread(model)
        x = torch.randn(6, 2, dtype=torch.float64)
        torch.testing.assert_close(fl.convert(read, path="vp", prediction="v").predict(x, 0.4), vp.predict(x, 0.4))
        assert read.path == model.path
    near = paths.VP().time(12.0)
    torch.testing.assert_close(reread(vp)(x, near).data, vp(x, near).data, rtol=0, atol=2e-2)
    other = fl.Model(network, "vp", "data")
    assert reread(other) is other


def test_rounds_write_folders_that_load_and_resume(tmp_path):
    network = networks.mlp(2, num_classes=3, width=16, depth=1)
    model = fl.Model(network, "vp", "v", null={"label": 3}, shape=(2,))
    options = {"n": 96, "rounds": 2, "segments": [0, 0.5, 1], "straighten": "first", "solver_steps": 4, "steps": 3}
    options |= {"batch_size": 16, **QUIET}
    run = straighten.rounds(model, out=tmp_path / "straight", **options)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"straight", "straight-pairs-1", "straight-pairs-2", "straight-round-1"}
    loaded = fl.load(tmp_path / "straight")
    assert loaded.segments == chosen([0, 0.5, 1], "first")
    assert not loaded.independent
    cond = {"label": torch.tensor([0, 1, 2, 3])}
    mine, theirs = (fl.sample(m, (4, 2), steps=(1, 3), solver="euler", seed=1, cond=cond) for m in (run.ema, loaded))
    torch.testing.assert_close(mine, theirs)
    again = straighten.rounds(model, out=tmp_path / "straight", **options)
    assert again.step == 3
    config = json.loads((tmp_path / "straight" / "config.json").read_text())
    assert config["training"]["objective"]["segments"]["straight"] == [True, False]
    with pytest.raises(RunError, match="straight-pairs-1"):
        straighten.rounds(model, out=tmp_path / "straight", **{**options, "solver_steps": 5})


def test_guided_pairs_need_their_guidance_where_segments_are_kept():
    model = fl.Model(networks.mlp(2, num_classes=2, width=8, depth=1), "rectified", null={"label": 2}, shape=(2,))
    guidance = fl.guidance.CFG(3.0)
    pairs = straighten.make_pairs(model, 32, steps=2, states=[0.5], guidance=guidance, progress=False)
    with pytest.raises(OptionError) as error:
        straighten.reflow(model, pairs, 1, [0, 0.5, 1], "first", batch_size=8, **QUIET)
    assert "expected guidance=" in one_line(error)
    with pytest.raises(OptionError, match="under guidance"):
        straighten.reflow(fl.convert(guidance(model), path="vp"), pairs, 1, batch_size=8, **QUIET)
    straighten.reflow(model, pairs, 1, [0, 0.5, 1], "first", guidance=guidance, batch_size=8, **QUIET)
    straighten.reflow(model, pairs, 1, batch_size=8, **QUIET)


def test_online_and_mixed_pairs_train_too():
    model = fl.Model(networks.mlp(2, num_classes=2, width=8, depth=1), "rectified", null={"label": 2}, shape=(2,))
    online = straighten.Online(model, 64, steps=2, states=[0.5], seed=0)
    straight = straighten.reflow(model, online, 2, [0, 0.5, 1], batch_size=8, **QUIET)
    assert straight.segments.straight == (True, True)
    made = {"steps": 3, "drop_cond": 0.0, "progress": False}
    pairs = straighten.make_pairs(model, 32, **made)
    data = {"data": torch.randn(20, 2), "label": torch.arange(20) % 2}
    real = straighten.make_pairs(model, data=data, **made)
    assert straighten.reflow(model, pairs, 2, real=real, share=0.25, batch_size=8, **QUIET).segments is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"straighten": "first"}, "without segments"),
        ({"segments": [0, 0.5, 1], "straighten": "third"}, "unknown"),
        ({"segments": [0, 1], "straighten": "second"}, "there are 1 segments"),
        ({"segments": [0, 0.5, 1], "straighten": [False, False]}, "no segment is to be straightened"),
        ({"segments": [0, 0.7, 1]}, "asked for at 0.7"),
    ],
)
def test_bad_input_is_one_clear_line(given, words):
    model = learner(8)
    pairs = straighten.make_pairs(model, 8, steps=2, states=[0.5], progress=False)
    with pytest.raises(OptionError) as error:
        straighten.reflow(model, pairs, 1, **given, batch_size=4, **QUIET)
    assert words in one_line(error)
    with pytest.raises(OptionError, match="without weights"):
        straighten.reflow(ring().model(paths.Rectified()), pairs, 1, batch_size=4, **QUIET)
