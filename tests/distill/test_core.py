"""What all distillations share: what is drawn, what is watched and written down, and in which precision."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from oracles import BENDS, Gaussian, seen
from torch import nn

import fluvial as fl
from fluvial import distill, grids, networks
from fluvial.distill.core import SCALE
from fluvial.distill.scaled import Scaled
from fluvial.errors import OptionError, ShapeError
from fluvial.flow_maps import FlowMap
from fluvial.training.settings import plain
from problems import PATHS, Net, mixture, normal

PLANE = Gaussian((0.7, -0.3), 0.4)


def methods(teacher=None):
    """One objective of each method, with a teacher wherever there may be one."""
    on = {path: teacher or PLANE.teacher(path) for path in ("rectified", "cosine")}
    return {
        "distillation": distill.ConsistencyDistillation(teacher=on["rectified"], steps=5),
        "training": distill.ConsistencyTraining(first=5, last=5),
        "improved": distill.ImprovedConsistencyTraining(first=5, last=5),
        "easy": distill.EasyConsistencyTuning(),
        "continuous": distill.ContinuousConsistency(teacher=on["cosine"]),
        "mean_flow": distill.MeanFlow(teacher=on["rectified"], share=0.7),
        "shortcut": distill.Shortcut(teacher=on["rectified"], steps=8, share=0.7),
        "halving": distill.Halving(teacher=on["rectified"], steps=4),
        "regression": distill.Regression(),
    }


def asked(objective, student, data, noise, **options):
    """The loss (B,), with stored noise where the method needs it."""
    given = {"noise": noise} if isinstance(objective, distill.Regression) else {}
    return objective(student, data, **given, **options)


def bent(objective, seed=0):
    return seen(objective, PLANE.flow_map(objective.kind, 0.1 * normal(BENDS, seed=seed), steps=4))


# What is drawn


@pytest.mark.parametrize("name", methods())
def test_the_loss_of_a_batch_is_that_of_its_halves(name):
    """A sample's loss depends on the seed and its own number alone."""
    objective, data, noise, index = methods()[name], PLANE.samples(10), normal(10, 2), torch.arange(40, 50)
    student = bent(objective)
    whole, other = (asked(objective, student, data, noise, seed=seed, index=index) for seed in (5, 6))
    halves = [
        asked(objective, student, data[rows], noise[rows], seed=5, index=index[rows])
        for rows in (slice(0, 3), slice(3, 10))
    ]
    torch.testing.assert_close(whole, torch.cat(halves), rtol=1e-12, atol=1e-14)
    assert name == "regression" or not bool((whole == other).any())


class Dropping(nn.Module):
    """A network with dropout, which keeps its masks."""

    def __init__(self):
        super().__init__()
        self.dropout, self.weight, self.masks = nn.Dropout(0.5), nn.Parameter(torch.ones(2).double()), []

    def forward(self, x, t, r=None):
        mask = self.dropout(torch.ones_like(x))
        self.masks.append(mask)
        return x * mask * self.weight


@pytest.mark.parametrize("name", ["distillation", "training", "improved", "easy", "halving"])
def test_target_and_student_drop_the_same(name):
    network = Dropping().train()
    objective = methods()[name]
    if objective.teacher is not None and name == "halving":
        objective = replace(objective, teacher=fl.Model(network, "rectified"))
    student = seen(objective, FlowMap(fl.Model(network, "rectified"), objective.kind))
    torch.manual_seed(0)
    objective.at(0, student, student)(student, PLANE.samples(50), seed=0)
    after = torch.rand(3)
    masks = network.masks
    assert len(masks) == (3 if name == "halving" else 2)
    assert torch.equal(masks[0], masks[-1])
    assert 0.3 < float((masks[0] == 0).double().mean()) < 0.7
    # And what comes after is as if the student alone had been asked.
    torch.manual_seed(0)
    network(normal(50, 2), None)
    assert torch.equal(after, torch.rand(3))


def test_a_drawn_scale_reaches_teacher_target_and_student():
    heard = []

    def network(x, t, guidance):
        heard.append(guidance)
        return x

    problem = mixture()
    teacher = Scaled()(problem.model(PATHS["rectified"]))
    objective = distill.ConsistencyDistillation(teacher=teacher, scales=(1.5, 4.0), judge="own", steps=5)
    student, index = FlowMap(fl.Model(network, "rectified"), "consistency"), torch.arange(2000)
    data, noise = normal(2000, 2), normal(2000, 2, seed=1)
    loss = objective(student, data, seed=3, index=index, noise=noise, t=objective.levels[2].expand(2000))
    u = fl.random.uniform(index, (1,), 3, SCALE, fl.random.TIME, torch.float64)[:, 0]
    for given in heard:
        torch.testing.assert_close(given, 1.5 + 2.5 * u, rtol=0, atol=0)
    assert len(heard) == 2
    assert float(heard[0].mean()) == pytest.approx(2.75, abs=4 * 2.5 / (12 * 2000) ** 0.5)
    assert bool(loss.isfinite().all())
    # A scale that is given is left as it is.
    heard.clear()
    objective(student, data, {"guidance": torch.full((2000,), 2.0).double()}, seed=3)
    assert all(bool((given == 2.0).all()) for given in heard)


# What is watched, kept and written down


@pytest.mark.parametrize("name", ["distillation", "halving"])
def test_gap_and_spread_are_those_by_hand(name):
    objective, student = methods()[name], bent(methods()[name])
    objective = objective.at(7, student, bent(objective, seed=1))
    data, index = PLANE.samples(30), torch.arange(30)
    t = objective.draw_times(student, index, 5)
    found = objective.watched(student, data, {}, t, None, 5, index, None)
    noise = fl.random.normal(30, (2,), 5, stream=fl.random.TRAIN, dtype=torch.float64)
    loss = objective(student, data, t=t, seed=5).detach()
    # Both losses are of a velocity, which a step of 1/4 follows for that long, and consistency to the data.
    length = 0.25 if name == "halving" else 1 - t
    gap = (loss * length**2).mean().sqrt()
    made = student(noise, 0.0).data.detach()
    assert found["gap"] == pytest.approx(float(gap / data.std()), rel=1e-12)
    assert found["spread"] == pytest.approx(float(made.std() / data.std()), rel=1e-12)


def test_watching_moves_nothing():
    objective, student = methods()["training"], bent(methods()["training"])
    torch.manual_seed(3)
    objective.watched(student, PLANE.samples(5), {}, torch.full((5,), 0.3).double(), None, 0, torch.arange(5), None)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert all(p.grad is None for p in student.parameters())


def test_another_step_keeps_what_was_computed_once():
    objective, student = methods()["distillation"], bent(methods()["distillation"])
    later = objective.at(9, student, student)
    assert later.follow is objective.follow
    assert (later.step, later.own, objective.step, objective.own) == (9, student, 0, None)
    assert later == objective
    assert plain(later.described()) == plain(objective.described())


OTHERS = {
    "target": "noise",
    "times": grids.LogitNormal(0.2, 0.7),
    "weight": "edm",
    "distance": "pseudo_huber",
    "scales": (1.0, 2.0),
    "grid": "uniform",
    "solver": "euler",
    "judge": "other",
    "first": 3,
    "last": 77,
    "over": 123,
    "mean": -0.3,
    "std": 1.7,
    "q": 3.0,
    "stages": 3,
    "k": 5.0,
    "b": 0.5,
    "warmup": 17,
    "c": 0.7,
    "share": 0.35,
    "steps": 16,
    "starts": (0.0, 0.5),
}


@pytest.mark.parametrize("name", methods())
def test_every_choice_is_written_down(name):
    """A run goes on under no other settings: whatever changes the loss must change what is written of it."""
    objective = methods()[name]
    said = json.dumps(plain(objective.described()))
    assert json.loads(said)["method"] == type(objective).__name__
    for option in (f.name for f in fields(objective) if f.name not in ("teacher", "own", "average", "step")):
        if option == "coupling":
            value = "pairs" if name != "regression" else "independent"
        elif option == "judge":
            value = "own" if objective.judge == "average" else "average"
        elif option == "first" and name == "regression":
            value = 0.9
        else:
            value = OTHERS[option]
        assert json.dumps(plain(replace(objective, **{option: value}).described())) != said, option
    if objective.teacher is not None:
        network = Net(dtype=torch.float64)
        one = replace(objective, teacher=fl.Model(network, objective.path)).described()
        with torch.no_grad():
            network.outer.weight.mul_(2.0)
        assert replace(objective, teacher=fl.Model(network, objective.path)).described()["teacher"] != one["teacher"]


# Precision and shapes


def small(shape, kind, dtype):
    """A network of random weights that is told what the kind needs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = networks.mlp(shape, width=16, depth=1)
        nn.init.normal_(network.leave.get_parameter("1.weight"), std=0.3)
    names = ["r"] if kind == "average" else []
    network = networks.told(network, names) if names else network
    return FlowMap(fl.Model(network.to(dtype), "rectified"), kind)


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7)])
@pytest.mark.parametrize(
    ("network", "data"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("name", methods())
def test_precisions_and_shapes(name, network, data, shape):
    teacher = small(shape, "euler", network).inner
    on_cosine = fl.convert(teacher, path="cosine")
    objective = methods(on_cosine if name == "continuous" else teacher)[name]
    student = seen(objective, small(shape, objective.kind, network))
    loss = asked(objective, student, normal(5, *shape).to(data), normal(5, *shape, seed=1).to(data), seed=0)
    assert (loss.dtype, loss.shape) == (data, (5,))
    assert bool(loss.isfinite().all())
    loss.sum().backward()
    slopes = [p.grad for p in student.parameters() if p.grad is not None]
    assert slopes
    assert all(bool(slope.isfinite().all()) for slope in slopes)


def test_single_precision_has_the_loss_of_double():
    for name, objective in methods().items():
        student, data, noise = bent(objective), PLANE.samples(20), normal(20, 2)
        double = asked(objective, student, data, noise, seed=0)
        single = asked(objective, student, data.float(), noise.float(), seed=0)
        torch.testing.assert_close(single.double(), double, rtol=2e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_loss_wants_a_flow_map():
    with pytest.raises(OptionError, match="student"):
        methods()["training"](PLANE.teacher(), PLANE.samples(20))
    with pytest.raises(ShapeError):
        methods()["training"](PLANE.flow_map(), PLANE.samples(20), noise=normal(20, 3))
