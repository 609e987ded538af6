"""Transport cost and crossing against closed forms, brute force and rank correlation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import kendalltau

from fluvial import paths, sample
from fluvial.convention import Normalisation
from fluvial.errors import OptionError, ShapeError
from fluvial.measure import crossing, straightness, transport_cost
from problems import gaussian, mixture, normal, one_line


def test_cost_is_a_sum_over_dimensions_and_a_mean_over_pairs():
    noise, data = torch.zeros(2, 1, 3), torch.tensor([[[1.0, -2.0, 0.0]], [[0.5, 0.5, 3.0]]])
    assert transport_cost((noise, data)) == (5.0 + 9.5) / 2
    assert transport_cost((noise, data), "absolute") == (3.0 + 4.0) / 2
    assert transport_cost((noise, data), lambda d: d.clamp(min=0.0)) == (1.0 + 4.0) / 2
    # A function sees the differences in their own shape, in float64.
    seen = []
    transport_cost((noise, data), lambda d: seen.append((d.shape, d.dtype)) or d)
    assert seen == [((2, 1, 3), torch.float64)]


def test_cost_keeps_small_differences():
    noise = torch.full((1000, 4), 1e4, dtype=torch.float64)
    assert transport_cost((noise, noise + 1e-3)) == pytest.approx(4e-6, rel=1e-6)


def test_data_of_stored_pairs_come_to_path_units():
    units = Normalisation(shift=(1.0, -1.0), scale=(2.0, 4.0))
    noise, x = normal(5, 2, 3), normal(5, 2, 3, seed=1)
    pairs = SimpleNamespace(noise=noise, data=units.invert(x), normalisation=units)
    assert transport_cost(pairs) == pytest.approx(float((x - noise).square().sum() / 5), rel=1e-12)
    assert crossing(pairs).depth == pytest.approx(crossing((noise, x)).depth, rel=1e-12)
    assert transport_cost(SimpleNamespace(noise=noise, data=x)) == transport_cost((noise, x))


@pytest.mark.parametrize("cost", ["squared", "absolute", lambda d: d.abs().pow(1.5)])
def test_the_ode_of_an_exact_model_lowers_every_convex_cost(cost):
    problem, n = mixture(), 2000
    own = straightness(problem.model(paths.Rectified()), n, steps=32).ends
    assert transport_cost(own, cost) < 0.95 * transport_cost((own.noise, problem.sample(n)), cost)


def test_crossing_on_the_line_is_the_share_in_opposite_order():
    noise, data = normal(300, 1, seed=1), normal(300, 1, seed=2)
    found = crossing((noise, data))
    tau = kendalltau(noise[:, 0].numpy(), data[:, 0].numpy()).statistic
    assert found.share == pytest.approx((1.0 - tau) / 2.0, rel=1e-12)
    assert found.depth == pytest.approx(found.share, abs=1e-6)
    assert found.n == 300


def test_crossing_agrees_with_brute_force():
    noise, data = normal(9, 3, seed=3), normal(9, 3, seed=4)
    inside, depths = [], []
    for i in range(9):
        for j in range(i):
            a, b = noise[i] - noise[j], data[i] - data[j]

            def apart(t, a=a, b=b):
                return float(((1.0 - t) * a + t * b).norm())

            least = minimize_scalar(apart, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-10})
            inside.append(least.fun < min(apart(0.0), apart(1.0)) - 1e-6)
            depths.append(max(0.0, 1.0 - least.fun / min(apart(0.0), apart(1.0))))
    found = crossing((noise, data))
    assert 0 < sum(inside) < len(inside)
    assert found.share == sum(inside) / len(inside)
    assert found.depth == pytest.approx(sum(depths) / len(depths), abs=1e-7)


def test_lines_that_keep_their_distance_do_not_cross():
    x = normal(50, 4, seed=5) + 1e3
    for data in (x + 7.0, 3.0 * x, x):
        assert (crossing((x, data)).share, crossing((x, data)).depth) == (0.0, 0.0)
    # All through one point, by turning over; with coinciding lines among them.
    turned = crossing((torch.cat([x, x[:1]]), -torch.cat([x, x[:1]])))
    assert turned.share == pytest.approx(1.0 - 2.0 / (51 * 50))
    assert turned.depth == pytest.approx(turned.share, abs=1e-5)


def test_an_ode_on_the_line_does_not_cross_and_independent_lines_do():
    ends = straightness(gaussian(0.3, 0.5).model(paths.Rectified()), normal(200, 1), steps=16).ends
    assert crossing(ends).share == 0.0
    noise = normal(4, 1000, seed=6)
    wide = crossing((noise, normal(4, 1000, seed=7)))
    assert wide.share == 1.0
    assert wide.depth == pytest.approx(1.0 - 0.5**0.5, abs=0.02)


def test_chunks_and_choice_of_lines(monkeypatch):
    pairs = normal(40, 2, seed=8), normal(40, 2, seed=9)
    whole = crossing(pairs)
    monkeypatch.setattr("fluvial.measure.transport._CHUNK_BYTES", 64 * 40 * 7)
    parts = crossing(pairs)
    assert (parts.share, parts.n) == (whole.share, whole.n)
    assert parts.depth == pytest.approx(whole.depth, rel=1e-12)
    some = crossing(pairs, most=20, seed=1)
    assert some.n == 20
    assert some != crossing(pairs, most=20, seed=2)
    assert some.share == pytest.approx(whole.share, abs=0.15)


def test_two_lines_are_the_least_there_can_be():
    ends = torch.tensor([[0.0], [1.0]])
    assert crossing((ends, ends.flip(0))).share == 1.0
    with pytest.raises(ShapeError, match="2 or more"):
        crossing((ends[:1], ends[:1]))


@pytest.mark.parametrize(
    ("pairs", "cost", "says"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 2)), "squared", "expected the same"),
        ((torch.zeros(2, 3), torch.full((2, 3), torch.nan)), "squared", "data has NaN"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), "huber", "unknown cost 'huber'"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), lambda d: d.sum(), "one number for each entry"),
        (torch.zeros(2, 3), "squared", "pairs is a Tensor"),
        ((torch.zeros(2, 3),), "squared", "pairs is a tuple"),
    ],
)
def test_what_does_not_fit_is_said(pairs, cost, says):
    with pytest.raises((OptionError, ShapeError), match=says) as raised:
        transport_cost(pairs, cost)
    one_line(raised.value)


def test_sampled_pairs_of_float32():
    problem = mixture().model(paths.Rectified())
    noise = normal(30, 2, dtype=torch.float32)
    data = sample(problem, noise, solver="rk4", steps=16)
    found = transport_cost((noise, data))
    assert found == pytest.approx(transport_cost((noise.double(), data.double())), rel=1e-14)
    with pytest.raises(OptionError, match="most is 1"):
        crossing((noise, data), most=1)
