"""MeanFlow: the identity of the average velocity, what it is without a teacher, and its two times."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import Gaussian, pull

import fluvial as fl
from fluvial.distill.mean_flow import Adaptive, MeanFlow
from fluvial.errors import OptionError
from fluvial.objectives import Given
from problems import normal, one_line

TRUTH = Gaussian()
PLANE = Gaussian((0.5, -1.0), 0.6)
BENT = torch.tensor([0.3, -0.2, 0.4, 0.25])


def drawn(objective, truth, n=256, seed=0):
    """Samples as training draws them, with r."""
    index, data = torch.arange(n), truth.samples(n)
    own = truth.flow_map("average", BENT)
    noise = fl.random.normal(index, data.shape[1:], seed, 0, fl.random.TRAIN, torch.float64)
    some = Given(data, noise, objective.draw_times(own, index, seed), {}, seed, index)
    return own, some, objective.ends(own, some)


@pytest.mark.parametrize("truth", [TRUTH, PLANE])
def test_the_truth_has_no_loss(truth):
    """u = v + (r - t) du/dt for the exact average velocity, all ends apart."""
    objective = MeanFlow(teacher=truth.teacher(), distance="mse", share=1.0)
    data = truth.samples(256)
    assert float(objective(truth.flow_map("average"), data, seed=3).detach().max()) < 1e-22
    assert float(objective(truth.flow_map("average", BENT), data, seed=3).detach().mean()) > 1e-3


@pytest.mark.parametrize("teacher", [None, PLANE.teacher()])
def test_the_target_is_the_identity_by_hand(teacher):
    """Of a student that is wrong, its slope by differences along v, r held."""
    objective = MeanFlow(teacher=teacher, share=0.5)
    own, some, r = drawn(objective, PLANE)
    asked, h = objective.ask(own, some), 1e-5
    t = some.t[:, None]
    x = t * some.data + (1 - t) * some.noise
    v = some.data - some.noise if teacher is None else teacher(x, some.t).velocity
    ahead, behind = (own.on_the_way(x + e * v, some.t + e, r).velocity.detach() for e in (h, -h))
    by_hand = v + (r[:, None] - t) * (ahead - behind) / (2 * h)
    torch.testing.assert_close(asked.target.detach(), by_hand, rtol=1e-7, atol=1e-8)
    assert torch.equal(asked.r, r)
    assert torch.equal(asked.arrival, r - some.t)
    together = r == some.t
    assert 0 < int(together.sum()) < len(r)
    assert torch.equal(asked.target[together], v[together])


@pytest.mark.parametrize("distance", ["mse", Adaptive()])
@pytest.mark.parametrize("truth", [TRUTH, PLANE])
def test_without_a_teacher_the_truth_is_not_pulled_away(truth, distance):
    """The target is linear in v, whose mean is the ODE's; for a Gaussian, v is symmetric about it too."""
    objective, data = MeanFlow(distance=distance, share=0.5), truth.samples(20000)
    mean, error = pull(objective, truth, data)
    assert bool((mean.abs() < 4 * error).all()), mean / error
    for wrong in (Gaussian(truth.mean, truth.std + 0.2), Gaussian(tuple(m + 0.2 for m in truth.mean), truth.std)):
        mean, error = pull(objective, wrong, data)
        assert float((mean.abs() / error).max()) > 6


@pytest.mark.parametrize("share", [0.25, 0.6, 1.0])
def test_times_and_ends_are_two_draws_in_order(share):
    n, seed = 20000, 7
    objective = MeanFlow(share=share, times=fl.grids.LogitNormal(0.4, 1.0))
    _, some, r = drawn(objective, TRUTH, n, seed)
    assert bool((some.t <= r).all())
    apart = r > some.t
    assert float(apart.double().mean()) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n))
    # Undone, the times are two independent logit-normal draws; t = r is one.
    for times, count in ((torch.cat([some.t, r])[torch.cat([apart, apart])], 2), (some.t[~apart], 1)):
        if len(times):
            error = 4 / math.sqrt(len(times))
            assert float(times.logit().mean()) == pytest.approx(0.4, abs=error), count
            assert float(times.logit().std()) == pytest.approx(1.0, abs=error), count
    product = (some.t[apart].logit() - 0.4) * (r[apart].logit() - 0.4)
    assert float(product.mean()) == pytest.approx(0.0, abs=4 / math.sqrt(len(product)))


def test_ends_agree_with_the_times_of_a_float32_device():
    """A time that was rounded on the way still is no later than its end."""
    objective = MeanFlow(share=0.5)
    own, some, r = drawn(objective, TRUTH, 2000)
    rounded = objective.ends(own, some._replace(t=some.t.float()))
    assert bool((some.t.float() <= rounded).all())
    torch.testing.assert_close(rounded.double(), r, rtol=1e-6, atol=0)


def test_adaptive_is_its_formula_with_a_constant_divisor():
    c, p = 0.01, 0.75
    error = normal(6, 3).requires_grad_()
    loss = Adaptive(c, p)(error)
    e = error.detach().square().mean(1)
    torch.testing.assert_close(loss.detach(), e / (e + c) ** p, rtol=1e-14, atol=0)
    loss.sum().backward()
    by_hand = 2 * error.detach() / 3 / ((e + c) ** p)[:, None]
    torch.testing.assert_close(error.grad, by_hand, rtol=1e-14, atol=0)
    assert Adaptive() == Adaptive(1e-3, 1.0)
    assert MeanFlow().distance == Adaptive()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_sample_is_a_function_of_its_number(n, dtype):
    """In a batch of any size and order; in float32 the same to rounding."""
    objective, student = MeanFlow(share=0.7, distance="mse"), PLANE.flow_map("average", BENT)
    data, index = PLANE.samples(9), torch.arange(9) + 40
    whole = objective(student, data, seed=1, index=index).detach()
    some = torch.tensor([7, 2, 5])[:n]
    loss = objective(student, data[some].to(dtype), seed=1, index=index[some])
    assert (loss.dtype, loss.shape) == (dtype, (n,))
    torch.testing.assert_close(
        loss.detach().double(), whole[some], rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=0
    )
    assert not torch.allclose(objective(student, data, seed=2, index=index).detach(), whole)


def test_the_gap_is_where_the_ways_end():
    """(r - t) times the error of the velocity, over the data's standard deviation."""
    objective = MeanFlow(teacher=PLANE.teacher(), share=0.5)
    own, some, r = drawn(objective, PLANE)
    asked = objective.ask(own, some)
    error = (own.on_the_way(asked.x, some.t, r).velocity - asked.target).detach() * (r - some.t)[:, None]
    told = objective.watched(own, some.data, {}, some.t, some.noise, 0, some.index, None)
    assert told["gap"] == pytest.approx(float(error.square().mean().sqrt() / some.data.std()), rel=1e-9)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MeanFlow(share=0.0), "share is 0.0"),
        (lambda: MeanFlow(share=1.5), "share is 1.5"),
        (lambda: Adaptive(c=0.0), "c is 0.0"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(OptionError) as error:
        make()
    assert words in one_line(error.value)
