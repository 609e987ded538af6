"""Progressive distillation: the two-step map by hand and by the source's formula, and the rounds."""

from __future__ import annotations

import json
import math

import pytest
import torch
from oracles import Gaussian
from torch import nn

import fluvial as fl
from fluvial import networks, paths
from fluvial.distill import progressive
from fluvial.distill.progressive import Halving
from fluvial.errors import OptionError, RunError
from fluvial.flow_maps import FlowMap
from fluvial.objectives import Given
from problems import normal, one_line

PLANE = Gaussian((0.5, -1.0), 0.6)
QUIET = {"progress": False, "precision": "fp32", "sheet_every": None, "batch_size": 16}


class TwoSteps(nn.Module):
    """The velocity (B, D) of two Euler steps of a rectified model, each 1/(2 steps) long."""

    def __init__(self, teacher, steps):
        super().__init__()
        self.teacher, self.length = teacher, 0.5 / steps

    def forward(self, x, t):
        first = self.teacher(x, t).velocity
        second = self.teacher(x + self.length * first, t + self.length).velocity
        return (first + second) / 2


def drawn(objective, n=256, seed=0):
    index, data = torch.arange(n), PLANE.samples(n)
    t = objective.draw_times(PLANE.flow_map("euler"), index, seed)
    return Given(data, normal(*data.shape, seed=3), t, {}, seed, index)


@pytest.mark.parametrize("notation", ["rectified", "vp", "edm"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_the_two_step_map_has_no_loss(steps, notation):
    """And sampled in N jumps it ends where its teacher does in 2 N steps of DDIM."""
    teacher = fl.convert(PLANE.teacher(notation), path="rectified")
    student = FlowMap(fl.Model(TwoSteps(teacher, steps), "rectified"), "euler")
    objective = Halving(teacher=teacher, steps=steps)
    some = drawn(objective)
    loss = objective(student, some.data, t=some.t, noise=some.noise, seed=0)
    assert float(loss.max()) < 1e-20
    worse = FlowMap(fl.Model(TwoSteps(teacher, steps + 1), "rectified"), "euler")
    assert float(objective(worse, some.data, t=some.t, noise=some.noise, seed=0).mean()) > 1e-7
    noise = normal(20, 2, seed=7)
    mine = fl.sample(student, noise, steps=steps)
    torch.testing.assert_close(mine, fl.sample(teacher, noise, solver="ddim", steps=2 * steps), rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_the_target_is_the_formula_of_the_source(steps):
    """x~ = (z'' - (sigma''/sigma) z) / (alpha'' - (sigma''/sigma) alpha), on the source's own path, the cosine.

    Its noise levels are those of the rectified grid, its states as much longer as that path's are.
    """
    objective = Halving(teacher=PLANE.teacher(), steps=steps)
    some, cosine, teacher = drawn(objective), paths.Cosine(), PLANE.teacher("cosine")
    asked = objective.ask(PLANE.flow_map("euler"), some)
    levels = [some.t, some.t + 0.5 / steps, some.t + 1 / steps]
    angles = [torch.atan2(1 - t, t) for t in levels]  # of alpha = cos, sigma = sin
    alpha, sigma = ([f(a)[:, None] for a in angles] for f in (torch.cos, torch.sin))
    z = alpha[0] * some.data + sigma[0] * some.noise
    state = z
    for k in (0, 1):
        time = 1 - angles[k] * 2 / math.pi
        torch.testing.assert_close(cosine(time).alpha, alpha[k][:, 0], rtol=1e-12, atol=1e-12)
        estimate = teacher(state, time).data
        state = alpha[k + 1] * estimate + sigma[k + 1] / sigma[k] * (state - alpha[k] * estimate)
    ratio = sigma[2] / sigma[0]
    target = (state - ratio * z) / (alpha[2] - ratio * alpha[0])
    got = asked.x + (1 - some.t)[:, None] * asked.target
    torch.testing.assert_close(got, target, rtol=1e-9, atol=1e-9)
    last = some.t == (steps - 1) / steps
    # The last step lands on the data: what it predicts is where its teacher's two steps end.
    torch.testing.assert_close(got[last], state[last], rtol=1e-9, atol=1e-9)
    assert asked.r is asked.weight is None


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_times_are_those_of_the_grid_alike(steps):
    n = 20000
    t = Halving(teacher=PLANE.teacher(), steps=steps).draw_times(PLANE.teacher(), torch.arange(n), 4)
    for k in range(steps):
        share = float((t == k / steps).double().mean())
        assert share == pytest.approx(1 / steps, abs=4 / math.sqrt(n))
    assert set(t.tolist()) == {k / steps for k in range(steps)}


NAMES = ("run-steps-4", "run-steps-2", "run")


def labelled(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = networks.mlp(2, num_classes=2, width=16, depth=1)
    return fl.Model(network, "vp", "v", null={"label": 2}, shape=(2,))


@pytest.mark.parametrize("guidance", [None, 2.0, (1.0, 3.0)])
def test_rounds_halve_in_folders_that_resume(tmp_path, guidance):
    """Each round's student is the next one's teacher; a guidance that is told is drawn in every round."""
    data = fl.training.open_source("moons")
    options = {"halvings": (4, 2, 1), "guidance": guidance, "out": tmp_path / "run", **QUIET}
    student = progressive(labelled(), data, 8, **options)
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in NAMES]
    trained = [config["training"]["objective"] for config in configs]
    assert [one["steps_of_student"] for one in trained] == [4, 2, 1]
    assert len({one["teacher"] for one in trained}) == 3
    scales = list(guidance) if isinstance(guidance, tuple) else None
    assert [one["scales"] for one in trained] == [scales] * 3
    counters = [json.loads(next((tmp_path / name / "state").glob("*/counters.json")).read_text()) for name in NAMES]
    assert [one["step"] for one in counters] == [2, 2, 4]
    again = progressive(labelled(), data, 8, **options)
    loaded = fl.load(tmp_path / "run")
    assert isinstance(loaded, FlowMap)
    cond = {"label": torch.tensor([0, 1, 2])} | ({"guidance": torch.tensor([1.0, 2.0, 3.0])} if scales else {})
    kept = fl.sample(student, (3, 2), seed=1, cond=cond)
    assert torch.equal(fl.sample(again, (3, 2), seed=1, cond=cond), kept)
    assert torch.equal(fl.sample(loaded, (3, 2), seed=1, cond=cond), kept)
    with pytest.raises(RunError, match="run-steps-4"):
        progressive(labelled(seed=1), data, 8, **options)


@pytest.mark.parametrize("guidance", [None, (1.0, 3.0)])
def test_a_student_of_another_kind_is_taught_through_all_rounds(tmp_path, guidance):
    """It begins the first round; each later one begins with the student before, which has its architecture."""
    other = fl.Model(networks.mlp(2, num_classes=2, width=24, depth=1), "rectified", null={"label": 2}, shape=(2,))
    options = {"halvings": (2, 1), "student": other, "guidance": guidance, "lr": 1e-9, **QUIET}
    student = progressive(labelled(), "moons", 4, out=tmp_path / "run", **options)
    assert student.network.width == 24
    first = fl.load(tmp_path / "run-steps-2")
    for name, value in first.network.named_parameters():
        torch.testing.assert_close(dict(student.network.named_parameters())[name], value, rtol=0, atol=1e-7)
    names = ("label", "guidance") if guidance else ("label",)
    assert set(student.null) == set(names)


@pytest.mark.parametrize("halvings", [(), (4, 1), (1, 2), (2, 1, 0), (1, 0.5)])
def test_wrong_halvings_are_refused_before_anything_is_done(tmp_path, halvings):
    with pytest.raises(OptionError) as error:
        progressive(labelled(), "moons", 4, halvings=halvings, out=tmp_path / "run", **QUIET)
    assert "each the half" in one_line(error.value)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_clear_line():
    for given, words in (({}, "no teacher"), ({"teacher": PLANE.teacher(), "steps": 0}, "steps is 0")):
        with pytest.raises(OptionError) as error:
            Halving(**given)
        assert words in one_line(error.value)
