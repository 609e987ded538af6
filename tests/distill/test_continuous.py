"""Continuous-time consistency: its tangent by finite differences, its zero, its warm-up, and where it leads."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import Gaussian, pull, seen

import fluvial as fl
from fluvial.distill.continuous import ContinuousConsistency
from fluvial.errors import OptionError
from fluvial.objectives import Given
from fluvial.predictions import V
from problems import normal, one_line

TRUTH = Gaussian()
BENT = torch.tensor([0.3, -0.2, 0.4, 0.25])
WIDE = [Gaussian(), Gaussian((0.5, -1.0), 0.6), Gaussian((0.1, 0.2, -0.4, 0.9, -2.0), 1.3)]


def given(truth, n=64, seed=0):
    """Samples at all kinds of times."""
    t = torch.linspace(0.02, 0.98, n, dtype=torch.float64)
    data = truth.samples(n)
    return Given(data, normal(*data.shape, seed=seed), t, {}, 0, torch.arange(n))


def tangent(asked, own):
    """g (B, D) of a question: what was added to the student's own answer, times what divided it."""
    answer = own.on_the_way(asked.x, asked.t).predict(V()).detach()
    return (asked.target.detach() - answer) * asked.arrival.detach()[:, None]


@pytest.mark.parametrize("truth", WIDE)
def test_the_truth_has_no_loss(truth):
    objective = ContinuousConsistency(teacher=truth.teacher("cosine"), warmup=0)
    student = seen(objective, truth.flow_map())
    assert float(objective(student, truth.samples(256), seed=3).detach().max()) < 1e-20
    bent = seen(objective, truth.flow_map(bend=BENT))
    assert float(objective(bent, truth.samples(256), seed=3).detach().mean()) > 1e-2


@pytest.mark.parametrize("truth", WIDE)
def test_the_tangent_is_the_change_of_the_data_along_the_trajectory(truth):
    """g = cos(angle) dD/dangle at r = 1, for a student that is wrong, by differences along the exact trajectory."""
    objective = ContinuousConsistency(teacher=truth.teacher("cosine"), warmup=10).at(
        10, own := seen(ContinuousConsistency(), truth.flow_map(bend=BENT)), own
    )
    some = given(truth)
    asked, angle, h = objective.ask(own, some), (1 - some.t) * math.pi / 2, 1e-5

    def data_at(other):
        # The trajectory on the rectified path, where it is known, and back: the states there are shorter.
        size, far = (a.cos() + a.sin() for a in (angle, other))
        x = truth.carried(asked.x / size[:, None], angle.cos() / size, other.cos() / far) * far[:, None]
        return own.on_the_way(x, 1 - other * 2 / math.pi).data.detach()

    change = (data_at(angle + h) - data_at(angle - h)) / (2 * h)
    torch.testing.assert_close(tangent(asked, own), angle.cos()[:, None] * change, rtol=1e-5, atol=1e-7)


def test_the_tangent_is_divided_by_its_length():
    truth, c = Gaussian((0.5, -1.0), 0.6), 0.3
    objective = ContinuousConsistency(teacher=truth.teacher("cosine"), warmup=0, c=c)
    own = seen(objective, truth.flow_map(bend=BENT))
    asked = objective.ask(own, given(truth))
    g = tangent(asked, own)
    length = g.norm(dim=1)
    torch.testing.assert_close(asked.arrival, length + c, rtol=1e-12, atol=0)
    step = (asked.target - own.on_the_way(asked.x, asked.t).v).detach().norm(dim=1)
    torch.testing.assert_close(step, length / (length + c), rtol=1e-10, atol=1e-12)
    assert asked.r is asked.weight is None


@pytest.mark.parametrize("teacher", [None, TRUTH.teacher("cosine")])
def test_the_derivative_is_let_in_slowly(teacher):
    """g = (1 - r) g(0) + r g(1), and g(0) = -cos² (F - dx/dangle), the gradient of a flow's own loss."""
    objective = ContinuousConsistency(teacher=teacher, warmup=8)
    own, some = seen(objective, TRUTH.flow_map(bend=BENT)), given(TRUTH)
    found = {step: tangent(objective.at(step, own, own).ask(own, some), own) for step in (0, 2, 4, 8, 100)}
    angle = ((1 - some.t) * math.pi / 2)[:, None]
    x = angle.cos() * some.data + angle.sin() * some.noise
    motion = angle.cos() * some.noise - angle.sin() * some.data if teacher is None else teacher(x, some.t).v
    by_hand = -(angle.cos() ** 2) * (own.on_the_way(x, some.t).v.detach() - motion)
    torch.testing.assert_close(found[0], by_hand, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found[0], found[8], rtol=0.1)
    for step, r in ((2, 0.25), (4, 0.5), (100, 1.0)):
        torch.testing.assert_close(found[step], (1 - r) * found[0] + r * found[8], rtol=1e-9, atol=1e-11)
    plain = ContinuousConsistency(teacher=teacher, warmup=0)
    torch.testing.assert_close(tangent(plain.ask(own, some), own), found[8], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("truth", WIDE[:2])
def test_without_a_teacher_the_truth_is_not_pulled_away(truth):
    """The noise of dx/dangle is symmetric for a Gaussian, so that the division by |g| leaves its mean at 0."""
    objective, data = ContinuousConsistency(warmup=0), truth.samples(20000)
    mean, error = pull(objective, truth, data)
    assert bool((mean.abs() < 4 * error).all()), mean / error
    for wrong in (Gaussian(truth.mean, truth.std + 0.2), Gaussian(tuple(m + 0.2 for m in truth.mean), truth.std)):
        mean, error = pull(objective, wrong, data)
        assert float((mean.abs() / error).max()) > 10


@pytest.mark.parametrize("teacher", [None, TRUTH.teacher("cosine")])
def test_training_leads_to_the_truth(teacher):
    """Not away from it, which no loss at the truth could tell."""
    objective = ContinuousConsistency(teacher=teacher, warmup=0)
    student = seen(objective, TRUTH.flow_map(bend=BENT))
    (bend,) = student.parameters()
    optimiser = torch.optim.Adam([bend], lr=0.07)
    for step in range(40):
        optimiser.param_groups[0]["lr"] = 0.07 * (1 - step / 40)
        optimiser.zero_grad()
        data, index = TRUTH.samples(512, seed=step), torch.arange(512) + 512 * step
        objective(student, data, seed=0, index=index).mean().backward()
        optimiser.step()
    noise = normal(500, 1, seed=5)
    truth = TRUTH.carried(noise, 0.0, 1.0)
    before, after = (
        float((TRUTH.flow_map(bend=b)(noise, 0.0, 1.0).detach() - truth).square().mean().sqrt())
        for b in (BENT, bend.detach())
    )
    assert after < before / 5


def test_the_gap_is_the_tangent():
    truth = Gaussian((0.5, -1.0), 0.6)
    objective = ContinuousConsistency(teacher=truth.teacher("cosine"), warmup=0)
    own, some = seen(objective, truth.flow_map(bend=BENT)), given(truth)
    g = tangent(objective.ask(own, some), own)
    told = objective.watched(own, some.data, {}, some.t, some.noise, 0, some.index, None)
    assert told["gap"] == pytest.approx(float(g.square().mean().sqrt() / some.data.std()), rel=1e-9)
    made = own.on_the_way(some.noise, 0.0).data.detach()
    assert told["spread"] == pytest.approx(float(made.std() / some.data.std()), rel=1e-9)


def test_times_are_lognormal_in_the_tangent_of_the_angle():
    n, objective = 20000, ContinuousConsistency(times=fl.grids.LogNormal(-1.0, 1.4))
    t = objective.draw_times(seen(objective, TRUTH.flow_map()), torch.arange(n), 0)
    level = ((1 - t) * math.pi / 2).tan().log()
    assert float(level.mean()) == pytest.approx(-1.0, abs=4 * 1.4 / math.sqrt(n))
    assert float(level.std()) == pytest.approx(1.4, rel=4 / math.sqrt(2 * n))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_of_few_and_of_either_precision(n, dtype):
    """Each sample's loss is its own, whatever the batch; in float32 it is the same to rounding."""
    objective = ContinuousConsistency(teacher=TRUTH.teacher("cosine"), warmup=0)
    student = seen(objective, TRUTH.flow_map(bend=BENT))
    data, index = TRUTH.samples(5), torch.arange(5)
    whole = objective(student, data, seed=1, index=index).detach()
    loss = objective(student, data[:n].to(dtype), seed=1, index=index[:n])
    assert (loss.dtype, loss.shape) == (dtype, (n,))
    torch.testing.assert_close(
        loss.detach().double(), whole[:n], rtol=1e-3 if dtype == torch.float32 else 1e-12, atol=0
    )


@pytest.mark.parametrize(("given", "words"), [({"c": 0.0}, "c is 0.0"), ({"warmup": -1}, "warmup is -1")])
def test_bad_input_is_one_clear_line(given, words):
    with pytest.raises(OptionError) as error:
        ContinuousConsistency(**given)
    assert words in one_line(error.value)
