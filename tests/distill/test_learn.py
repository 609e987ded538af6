"""From a model to a student: what it starts as, what it learns from, and what is refused."""

from __future__ import annotations

import importlib

import pytest
import torch
from oracles import Gaussian
from torch import nn

import fluvial as fl
from fluvial import distill, networks
from fluvial.convention import Normalisation
from fluvial.errors import OptionError
from fluvial.flow_maps import FlowMap
from problems import Net, normal, one_line

PLANE = Gaussian((0.7, -0.3), 0.4)
QUIET = {"progress": False, "precision": "fp32", "sheet_every": None}


def points():
    return PLANE.samples(20).float()


# How a student begins


@pytest.fixture
def begun(monkeypatch):
    """What `learn` would train: (student, source, objective, options)."""
    given = []

    def train(*arguments, **options):
        given[:] = [*arguments, options]
        return None

    # The module, whose name in the package is the function's.
    learning = importlib.import_module("fluvial.distill.learn")
    monkeypatch.setattr(learning, "train", train)

    def begin(model, method=distill.ConsistencyDistillation, source=None, **rest):
        distill.learn(model, points() if source is None else source, method, 5, {}, **rest)
        return given

    return begin


def labelled(prediction="velocity", path="rectified"):
    """A trained network's stand-in: random weights, three classes."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = networks.mlp(2, num_classes=3, width=16, depth=2)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return fl.Model(network, path, prediction, null={"label": 3})


@pytest.mark.parametrize("path", ["rectified", "vp", "edm"])
@pytest.mark.parametrize("prediction", ["velocity", "v", "data", "edm"])
@pytest.mark.parametrize(
    "method", [distill.ConsistencyDistillation, distill.Shortcut, distill.Halving, distill.ContinuousConsistency]
)
def test_a_student_starts_as_its_teacher(begun, monkeypatch, method, prediction, path):
    """In the teacher's own notation, without retraining: its way to the data is the teacher's estimate of them."""
    monkeypatch.setattr(method, "blur", 0.0)
    teacher = labelled(prediction, path)
    student, _, objective, _ = begun(teacher, method)
    on = fl.convert(teacher, path=objective.path)
    x, label = normal(12, 2), torch.arange(12) % 4
    t = torch.linspace(0.05, 0.95, 12, dtype=torch.float64)
    data = on(x, t, label=label).data
    torch.testing.assert_close(student(x, t, label=label).data, data, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(objective.teacher(x, t, label=label).data, data, rtol=1e-4, atol=1e-4)
    assert (student.kind, student.path) == (method.kind, on.path)
    assert student.network is not teacher.network


def test_noise_is_read_as_v(begun):
    teacher = labelled("noise", "vp")
    student, *_ = begun(teacher)
    x, t = normal(8, 2), torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    out = fl.convert(teacher, path="rectified")(x, t).noise
    torch.testing.assert_close(student(x, t).v, on_rectified_v(out, t), rtol=1e-5, atol=1e-5)


def on_rectified_v(out, t):
    """Salimans' v of the rectified path from that of the VP path: both are of the same pair, scaled alike."""
    return out * (t.square() + (1 - t).square()).sqrt()[:, None]


@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_is_left_as_it_is(training):
    teacher = labelled()
    teacher.network.train(training)
    teacher.network.requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    data = {"data": PLANE.samples(20).float(), "label": torch.arange(20) % 3}
    convention = teacher.convention
    student = distill.consistency(teacher, data, 3, lr=0.1, batch_size=4, **QUIET)
    after = teacher.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not teacher.network.training
    assert teacher.convention is convention
    assert not any(p.requires_grad for p in teacher.parameters())
    moved = student.network.state_dict()
    assert any(not torch.equal(moved[name], value) for name, value in before.items())


def test_a_dependent_model_learns_from_its_own_pairs(begun):
    pairs = {"data": points(), "noise": normal(20, 2).float()}
    student, source, objective, _ = begun(labelled().under(independent=False), source=pairs)
    assert (objective.coupling, student.independent) == ("pairs", False)
    torch.testing.assert_close(source.batch(torch.tensor([3]))["noise"], pairs["noise"][3:4])
    assert begun(labelled())[2].coupling == "independent"


# Guidance


@pytest.mark.parametrize("guidance", [fl.guidance.CFG(2.5), 2.5])
def test_guidance_is_the_teachers(begun, guidance):
    teacher, x, label = labelled(), normal(6, 2), torch.arange(6) % 3
    student, _, objective, _ = begun(teacher, guidance=guidance)
    under = fl.guidance.CFG(2.5)(teacher)
    torch.testing.assert_close(objective.teacher(x, 0.3, label=label).data, under(x, 0.3, label=label).data)
    torch.testing.assert_close(student(x, 0.3, label=label).data, teacher(x, 0.3, label=label).data)
    assert objective.scales is None


@pytest.mark.parametrize("path", ["rectified", "vp"])
def test_a_student_of_many_scales_is_told_its_own(begun, path):
    teacher, x, label = labelled("v", path), normal(6, 2), torch.arange(6) % 3
    student, _, objective, _ = begun(teacher, guidance=(1.0, 4.0))
    assert objective.scales == (1.0, 4.0)
    assert student.null == {"label": 3, "guidance": 1.0}
    assert student.network.numbers == ("guidance",)
    scale = torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0, 4.0], dtype=torch.float64)
    found = objective.teacher(x, 0.3, label=label, guidance=scale).data
    for k, value in enumerate(scale.tolist()):
        under = fl.convert(fl.guidance.CFG(value)(teacher), path="rectified")
        one = under(x[k : k + 1], 0.3, label=label[k : k + 1]).data
        torch.testing.assert_close(found[k : k + 1], one, rtol=1e-5, atol=1e-5)
    # It starts as the teacher without guidance, whatever it is told.
    plainly = fl.convert(teacher, path="rectified")(x, 0.3, label=label).data
    torch.testing.assert_close(student(x, 0.3, label=label, guidance=scale).data, plainly, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", [True, False])
def test_a_student_has_the_units_of_its_teacher(begun, known):
    """Data far from 0 are standardised by a source; a teacher that was never told of it is asked in their own units."""
    units = Normalisation((5.0, 5.0), (2.0, 3.0)) if known else Normalisation()
    student, _, objective, _ = begun(labelled().under(normalisation=units), source=5.0 + 2.0 * points())
    assert student.normalisation != Normalisation()  # so that training does not take the source's
    assert (student.normalisation.shift, student.normalisation.scale) == (units.shift, units.scale)
    assert objective.teacher.normalisation == units


# What is refused


def own_network():
    return fl.Model(Net(), "rectified")


REFUSED = {
    "guidance without a teacher": (lambda: distill.easy_consistency(labelled(), points(), 2, guidance=2.0), "follows"),
    "guidance of velocities of the data": (
        lambda: distill.mean_flow(labelled(), points(), 2, taught=False, guidance=2.0),
        "follows none",
    ),
    "scales that fall": (lambda: distill.consistency(labelled(), points(), 2, guidance=(4.0, 1.0)), "rise"),
    "three scales": (lambda: distill.consistency(labelled(), points(), 2, guidance=(1.0, 2.0, 3.0)), "rise"),
    "a dependent model": (lambda: distill.consistency(labelled().under(independent=False), points(), 2), "pairs"),
    "a flow map": (lambda: distill.consistency(FlowMap(labelled()), points(), 2), "flow map already"),
    "a plain callable": (lambda: distill.consistency(PLANE.teacher(), points(), 2), "without weights"),
    "a guided model": (lambda: distill.consistency(fl.guidance.CFG(2.0)(labelled()), points(), 2), "guidance="),
    "a network that cannot be told r": (lambda: distill.mean_flow(own_network(), points(), 2), "cannot be told r"),
    "a student that takes no r": (
        lambda: distill.shortcut(labelled(), points(), 2, student=own_network(), drop_cond=0.0),
        "does not take 'r'",
    ),
    "a network that cannot be told a scale": (
        lambda: distill.consistency(own_network(), points(), 2, guidance=(1.0, 2.0)),
        "cannot be told guidance",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_one_clear_line(name):
    make, words = REFUSED[name]
    with pytest.raises(OptionError) as error:
        make()
    assert words in one_line(error.value)


# The whole


@pytest.mark.slow
def test_a_student_of_an_exact_mixture_reaches_its_flow_map():
    """One call from the noise ends where the ODE of six modes does, but for few that start between two basins."""
    angle = torch.arange(6) * torch.pi / 3
    modes = torch.stack([angle.cos(), angle.sin()], 1)
    problem = fl.exact.GaussianMixture(1.25 * modes, torch.full((6,), 0.3), torch.ones(6))
    teacher, data = problem.model(fl.paths.Rectified()), problem.sample(50000, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = networks.mlp(2, width=128, depth=3)
    student = fl.Model(network, "rectified", shape=(2,))
    options = {"lr": 2e-3, "batch_size": 256, "ema_decay": 0.99, "grid_steps": 12, **QUIET}
    flow_map = distill.consistency(teacher, data, 2000, student=student, **options)

    noise = fl.random.normal(4000, (2,), seed=99)
    truth = fl.sample(teacher, noise.double(), solver="heun", steps=200).float()
    error, spread = (fl.sample(flow_map, noise, steps=1) - truth).norm(dim=1), float(data.std())
    assert float(error.median()) < 0.05 * spread
    assert float(error.quantile(0.9)) < 0.1 * spread
    # A step of the teacher itself ends at the mean of all modes.
    one = fl.sample(teacher, noise, solver="euler", steps=1)
    assert float((one - truth).norm(dim=1).median()) > spread
