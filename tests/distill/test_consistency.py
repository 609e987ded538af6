"""Consistency models on a Gaussian, whose flow map is known: the loss at the truth, its slope there, and the schedules.

Slopes are expectations over data, noise and time, taken by quadrature: what is left is the method's own bias, which
must fall as its two times draw together, while a student that is wrong is moved much more.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy
import pytest
import torch
from oracles import BENDS, Gaussian, lognormal_shares, pull

import fluvial as fl
from fluvial import grids
from fluvial.distill import (
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousConsistency,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
    MeanFlow,
)
from fluvial.errors import OptionError, ShapeError
from fluvial.exact import GaussianMixture
from fluvial.flow_maps import FlowMap
from fluvial.objectives import PseudoHuber
from problems import normal, one_line

TRUTH = Gaussian((0.7,), 0.4)
WRONG = replace(TRUTH, std=0.44)  # 10 % too wide
PLANE = Gaussian((0.7, -0.3), 0.4)


def batch(n=7, shape=(2,), seed=3):
    """Data and noise (n, *shape)."""
    return normal(n, *shape, seed=seed), normal(n, *shape, seed=seed + 1)


def distilled(steps=8, truth=TRUTH, **options):
    return ConsistencyDistillation(teacher=truth.teacher(), steps=steps, **options)


def squared(error, t):
    """The mean squared error (B,) of where the student arrives, seen as one of its velocity."""
    return (error / (1 - t)[:, None]).square().mean(1)


# Distillation: the loss at the truth


def missed(solver, steps):
    """The root mean square loss of the exact student at the same times, in the middle of a uniform grid."""
    objective = distilled(steps, PLANE, solver=solver, grid="uniform")
    t = torch.arange(2, 6, dtype=torch.float64).repeat(100) / 8
    loss = objective(PLANE.flow_map(), PLANE.samples(400), t=t, noise=normal(400, 2), seed=0)
    return float(loss.detach().mean().sqrt())


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2s", 2), ("dpmpp_3s", 3), ("rk4", 4)]
)
def test_the_loss_at_the_truth_falls_with_the_order_of_the_solver(solver, order):
    """One step of order p errs by h^(p + 1)."""
    first, second = (missed(solver, steps) for steps in (64, 128))
    assert math.log2(first / second) == pytest.approx(order + 1, abs=0.1)


def test_heun_is_nearer_than_euler_at_equal_steps():
    for steps in (8, 16, 32):
        assert missed("heun", steps) < 0.2 * missed("euler", steps)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_where_trajectories_are_straight_one_step_is_exact(solver, steps):
    point = Gaussian((0.7, -0.3), 1e-9)
    objective = distilled(steps, point, solver=solver)
    times = objective.draw_times(point.flow_map(), torch.arange(50), 0)
    loss = objective(point.flow_map(), point.samples(50), t=times, seed=0)
    assert float((loss.detach() * (1 - times) ** 2).max()) < 1e-16


def test_a_wrong_student_has_a_loss():
    wrong, right = (distilled(18)(g.flow_map(), TRUTH.samples(400), seed=0).mean() for g in (WRONG, TRUTH))
    assert wrong > 3 * right


# Distillation: the loss by hand


def students(seed=0):
    """The student, and its average, bent each in its own way."""
    return [PLANE.flow_map(bend=0.1 * normal(BENDS, seed=seed + k)) for k in range(2)]


def on_the_way(student, x, t):
    """X(x, t -> 1) by the network alone."""
    return x + (1 - t)[:, None] * student.network(x, t)


@pytest.mark.parametrize("judge", ["own", "average"])
@pytest.mark.parametrize("coupling", ["independent", "pairs"])
def test_loss_and_gradient_are_those_by_hand(judge, coupling):
    student, average = students()
    data, noise = batch()
    objective = distilled(6, PLANE, judge=judge, coupling=coupling)
    levels = torch.tensor(fl.grids.Karras().times(fl.paths.Rectified(), 6), dtype=torch.float64)
    place = torch.tensor([0, 1, 2, 3, 4, 5, 2])
    t, s = levels[place], levels[place + 1]
    loss = objective.at(0, student, average)(student, data, t=t, noise=noise, seed=0)
    loss.sum().backward()
    (bend,) = student.parameters()
    found, bend.grad = bend.grad, None

    x = t[:, None] * data + (1 - t)[:, None] * noise
    steps = [
        fl.sample(PLANE.teacher(), state=x[k : k + 1], times=[float(t[k]), float(s[k])], solver="heun")
        for k in range(7)
    ]
    target = on_the_way({"own": student, "average": average}[judge], torch.cat(steps), s).detach()
    by_hand = squared(on_the_way(student, x, t) - target, t)
    by_hand.sum().backward()
    torch.testing.assert_close(loss, by_hand, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, bend.grad, rtol=1e-10, atol=1e-11)
    assert all(p.grad is None for p in average.parameters())


def test_pairs_need_their_noise():
    with pytest.raises(OptionError, match="noise"):
        distilled(coupling="pairs")(PLANE.flow_map(), batch()[0], seed=0)


def test_the_last_step_is_judged_by_the_teacher_alone():
    """At the data every student is right: the target is where the teacher lands."""
    objective, (data, noise) = distilled(4, PLANE), batch()
    t = objective.levels[3].expand(7)
    x = t[:, None] * data + (1 - t)[:, None] * noise
    student, average = students()
    landed = PLANE.teacher()(x, t).data
    loss = objective.at(0, student, average)(student, data, t=t, noise=noise)
    torch.testing.assert_close(loss, squared(on_the_way(student, x, t) - landed, t), rtol=1e-10, atol=0)


def test_conditions_reach_teacher_target_and_student():
    modes = GaussianMixture(torch.tensor([[2.0, 0.0], [-2.0, 1.0]]), torch.tensor([0.3, 0.5]), torch.ones(2))
    heard = []

    def network(x, t, label):
        heard.append(label)
        return x * (1 + label[:, None]) * t[:, None]

    student = FlowMap(fl.Model(network, "rectified", null={"label": 2}), "consistency")
    objective = ConsistencyDistillation(teacher=modes.model(fl.paths.Rectified()), steps=5, judge="own")
    (data, noise), label = batch(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    t, s = objective.levels[2], objective.levels[3]
    loss = objective(student, data, {"label": label}, t=t.expand(7), noise=noise)
    assert [given.tolist() for given in heard] == [label.tolist()] * 2
    x = t * data + (1 - t) * noise
    moved = fl.sample(objective.teacher, state=x, times=[float(t), float(s)], solver="heun", cond={"label": label})
    scale = 1 + label.double()[:, None]
    error = x + (1 - t) * t * scale * x - (moved + (1 - s) * s * scale * moved)
    torch.testing.assert_close(loss, squared(error, t.expand(7)), rtol=1e-10, atol=0)


class Watching:
    """A distance of images that keeps what it was shown."""

    def __call__(self, error):
        raise AssertionError

    def between(self, error, estimate, data):
        self.error, self.estimate, self.data = error, estimate, data
        return error.abs().flatten(1).sum(1)


def test_distances_of_images_compare_the_student_with_its_target():
    distance, student = Watching(), PLANE.flow_map(bend=0.1 * normal(BENDS))
    loss = distilled(5, PLANE, distance=distance)(student, batch()[0], seed=0)
    torch.testing.assert_close(distance.error, distance.estimate - distance.data, rtol=0, atol=1e-14)
    assert loss.requires_grad
    assert distance.estimate.requires_grad
    assert not distance.data.requires_grad
    with pytest.raises(ShapeError, match="images"):
        distilled(distance="lpips")(student, batch()[0], seed=0)
    for method in (ContinuousConsistency, MeanFlow):
        for images in ("lpips", distance):
            with pytest.raises(OptionError, match="of images"):
                method(distance=images)


# Training: the slope at the truth


def slope(objective, student, t, share, step):
    """E d loss / d bend (BENDS,), times t having these shares: by quadrature over data and noise."""
    nodes, weights = (torch.tensor(v) for v in numpy.polynomial.hermite_e.hermegauss(20))
    weights = weights / weights.sum()
    data, noise, at = (v.flatten() for v in torch.meshgrid(TRUTH.mean[0] + TRUTH.std * nodes, nodes, t, indexing="ij"))
    learner = student.flow_map(bend=torch.zeros(len(at), BENDS))
    now = objective.at(step, student.flow_map(), student.flow_map())
    now(learner, data[:, None], t=at, noise=noise[:, None], seed=0).sum().backward()
    (bend,) = learner.parameters()
    part = weights[:, None, None] * weights[None, :, None] * share
    return (part.flatten()[:, None] * bend.grad).sum(0)


def trained(steps, **options):
    """Consistency training on so many even steps, its times and their shares, and its own step."""
    objective = ConsistencyTraining(first=steps, last=steps, grid="uniform", **options)
    return objective, objective.levels[:-1], torch.full((steps,), 1 / steps, dtype=torch.float64), 0


def improved(steps, **options):
    """iCT on so many even steps; its shares by the error function."""
    objective = ImprovedConsistencyTraining(first=steps, last=steps, grid="uniform", mean=0.0, std=1.0, **options)
    return objective, objective.levels[:-2], lognormal_shares([80.0, *sigmas(steps)], 0.0, 1.0), 0


def easy(steps, **options):
    """ECT at the stage where 2^(stage + 1) is `steps`, its times in the middles of many equal shares."""
    objective = EasyConsistencyTuning(times=grids.LogNormal(0.0, 1.0), over=8, **options)
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    times = objective.times.quantile(u, fl.paths.Rectified())
    return objective, times, torch.full((400,), 1 / 400, dtype=torch.float64), int(math.log2(steps)) - 1


def sigmas(steps):
    """(1 - t)/t at the inner times of an even grid."""
    return [(steps - k) / k for k in range(1, steps)]


@pytest.mark.parametrize("distance", ["mse", PseudoHuber(0.1)])
@pytest.mark.parametrize(("make", "weighed"), [(trained, 0), (improved, 1), (easy, 1)])
def test_the_slope_at_the_truth_falls_with_the_step(make, weighed, distance):
    """The pull on the truth is of the second order in the step, on another student of the first.

    Where the loss is divided by the step, as in iCT and ECT, both have one order less.
    """
    sizes = {
        (name, steps): float(slope(objective, student, times, share, step).norm())
        for name, student in (("truth", TRUTH), ("wrong", WRONG))
        for steps in (32, 64)
        for objective, times, share, step in [make(steps, distance=distance)]
    }
    order = {name: math.log2(sizes[name, 32] / sizes[name, 64]) for name in ("truth", "wrong")}
    assert order["truth"] == pytest.approx(2 - weighed, abs=0.3)
    assert order["wrong"] == pytest.approx(1 - weighed, abs=0.3)
    assert sizes["wrong", 64] > 3 * sizes["truth", 64]


@pytest.mark.parametrize("student", [TRUTH, WRONG])
@pytest.mark.parametrize("make", [trained, improved, easy])
def test_what_is_drawn_has_that_slope(make, student):
    """The mean over 20,000 samples with their own times and noise is that by quadrature, within 4 standard errors."""
    objective, times, share, step = make(32)
    mean, error = pull(objective, student, TRUTH.samples(20000), step=step)
    expected = slope(objective, student, times, share, step)
    assert bool(((mean - expected).abs() < 4 * error).all()), (mean, expected, error)
    if student is TRUTH:
        assert bool((mean.abs() < 4 * error + expected.abs()).all())


def test_distillation_wants_to_move_a_wrong_student_only():
    """Heun's own error is left at the truth; another student is pulled harder by far."""
    data = TRUTH.samples(5000)
    (truth, _), (wrong, error) = (pull(distilled(64), student, data) for student in (TRUTH, WRONG))
    assert bool((wrong.abs()[1:] > 10 * error[1:]).all())
    assert float(wrong.norm()) > 20 * float(truth.norm())


# What is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConsistencyDistillation(), "no teacher"),
        (lambda: distilled(judge="nobody"), "nobody"),
        (lambda: distilled(solver="ddpm"), "stochastic"),
        (lambda: distilled(grid="circular"), "circular"),
        (lambda: distilled(0), "steps is 0"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(OptionError) as error:
        make()
    assert words in one_line(error.value)
