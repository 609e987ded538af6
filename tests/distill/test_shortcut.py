"""Shortcut models: two short steps in one, of which lengths, from where, and by whose judgement."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import Gaussian, pull

from fluvial.distill.shortcut import Shortcut
from fluvial.errors import OptionError
from fluvial.objectives import Given
from problems import normal, one_line

TRUTH = Gaussian()
PLANE = Gaussian((0.5, -1.0), 0.6)
BENT = torch.tensor([0.3, -0.2, 0.4, 0.25])


def drawn(objective, truth, n=512, seed=0):
    """Samples as training draws them, and the length 2d of each."""
    index, data = torch.arange(n), truth.samples(n)
    t = objective.draw_times(truth.flow_map("average"), index, seed)
    some = Given(data, normal(*data.shape, seed=seed + 1), t, {}, seed, index)
    return some, objective.ask(truth.flow_map("average"), some).arrival


@pytest.mark.parametrize("truth", [TRUTH, PLANE])
def test_the_truth_has_no_loss(truth):
    """Two exact jumps are one. Only the shortest steps are Euler's: their error falls with their length."""
    missed = []
    for steps in (16, 32, 64):
        objective = Shortcut(teacher=truth.teacher(), steps=steps, share=0.9)
        some, length = drawn(objective, truth)
        loss = objective(truth.flow_map("average"), some.data, t=some.t, noise=some.noise, seed=0).detach()
        shortest = length == 2 / steps
        assert float(loss[~shortest].max()) < 1e-24
        missed.append(float(loss[shortest].mean().sqrt()))
    assert 1.6 < missed[0] / missed[1] < 2.4, missed
    assert 1.6 < missed[1] / missed[2] < 2.4, missed
    bent = truth.flow_map("average", BENT)
    assert float(objective(bent, some.data, t=some.t, noise=some.noise, seed=0).detach().mean()) > 1e-3


@pytest.mark.parametrize("teacher", [None, PLANE.teacher()])
@pytest.mark.parametrize("whose", ["own", "average"])
def test_the_target_is_two_steps_of_the_judge_by_hand(whose, teacher):
    steps = 8
    own, average = PLANE.flow_map("average", BENT), PLANE.flow_map("average", -BENT)
    objective = Shortcut(teacher=teacher, steps=steps, share=0.6, judge=whose).at(3, own, average)
    some, length = drawn(objective, PLANE, 64)
    judge = own if whose == "own" else average
    asked = objective.ask(own, some)
    for k in range(len(length)):
        t, d, x = float(some.t[k]), float(length[k]) / 2, asked.x[k : k + 1]
        torch.testing.assert_close(x[0], t * some.data[k] + (1 - t) * some.noise[k], rtol=1e-14, atol=1e-14)
        if d == 0:
            v = some.data[k] - some.noise[k] if teacher is None else teacher(x, t).velocity[0]
            torch.testing.assert_close(asked.target[k], v, rtol=1e-12, atol=1e-12)
            continue
        first, second = (t + d, t + 2 * d) if d > 1 / steps else (t, t + d)
        u = judge.network(x, torch.tensor([t]).double(), torch.tensor([first]).double())
        w = judge.network(x + d * u, torch.tensor([t + d]).double(), torch.tensor([second]).double())
        torch.testing.assert_close(asked.target[k], ((u + w) / 2)[0].detach(), rtol=1e-12, atol=1e-12)
        # Where two steps lead, one of the target's velocity leads.
        landed = x + d * u + d * w
        torch.testing.assert_close(x + 2 * d * asked.target[k], landed.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(asked.r, some.t + length, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("steps", "share"), [(2, 0.25), (8, 0.5), (128, 0.25)])
def test_all_lengths_occur_alike_and_fit_into_the_way(steps, share):
    n, objective = 20000, Shortcut(steps=steps, share=share)
    some, length = drawn(objective, TRUTH, n)
    own = length > 0
    assert float(own.double().mean()) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n))
    lengths = [2.0**-k for k in range(steps.bit_length() - 1)]
    assert sorted(set(length[own].tolist()), reverse=True) == lengths
    assert lengths[-1] == 2 / steps
    part = share / len(lengths)
    for each in lengths:
        rows = length == each
        assert float(rows.double().mean()) == pytest.approx(part, abs=4 * math.sqrt(part / n))
        places = some.t[rows] / each
        assert torch.equal(places, places.round())
        assert bool((some.t[rows] + each <= 1.0).all())
        assert set(places.tolist()) >= {0.0, 1 / each - 1} or each < 0.1
    rest = some.t[~own]
    assert float(rest.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(rest)))


@pytest.mark.parametrize("truth", [TRUTH, PLANE])
def test_without_a_teacher_the_truth_is_not_pulled_away(truth):
    objective, data = Shortcut(steps=128, share=0.5), truth.samples(20000)
    mean, error = pull(objective, truth, data)
    assert bool((mean.abs() < 4 * error).all()), mean / error
    for wrong in (Gaussian(truth.mean, truth.std + 0.2), Gaussian(tuple(m + 0.2 for m in truth.mean), truth.std)):
        mean, error = pull(objective, wrong, data)
        assert float((mean.abs() / error).max()) > 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_sample_is_a_function_of_its_number(n, dtype):
    objective, student = Shortcut(steps=8, share=0.5), PLANE.flow_map("average", BENT)
    data, index = PLANE.samples(9), torch.arange(9) + 40
    whole = objective(student, data, seed=1, index=index).detach()
    some = torch.tensor([7, 2, 5])[:n]
    loss = objective(student, data[some].to(dtype), seed=1, index=index[some])
    assert (loss.dtype, loss.shape) == (dtype, (n,))
    close = {"rtol": 1e-4, "atol": 1e-9} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(loss.detach().double(), whole[some], **close)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 96}, "steps is 96"),
        ({"steps": 1}, "steps is 1"),
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 1.0}, "share is 1.0"),
        ({"judge": "teacher"}, "teacher"),
    ],
)
def test_bad_input_is_one_clear_line(given, words):
    with pytest.raises(OptionError) as error:
        Shortcut(**given)
    assert words in one_line(error.value)
