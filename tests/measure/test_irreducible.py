"""The least velocity loss: closed forms, quadrature over the posterior, and the exact model's own loss."""

from __future__ import annotations

import math

import pytest
import torch

from fluvial import Objective, exact, paths
from fluvial.errors import OptionError, ShapeError
from fluvial.measure import irreducible_loss
from problems import gaussian, mixture, normal, odd_mixture


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_of_one_gaussian_it_is_in_closed_form(std):
    found = irreducible_loss(gaussian(1.0, std), n=3)
    expected = [std**2 / ((t * std) ** 2 + (1.0 - t) ** 2) for t in found.times]
    assert found.per_t == pytest.approx(expected, rel=1e-12)
    assert found.total == pytest.approx(std * math.pi / 2.0, rel=2e-5)
    assert max(found.per_t_error) < 1e-12


def test_simpson_s_rule_converges():
    errors = [abs(irreducible_loss(gaussian(), times, n=2).total - math.pi / 4.0) for times in (9, 17, 33)]
    assert errors[0] / errors[1] > 12.0
    assert errors[1] / errors[2] > 12.0


@pytest.mark.parametrize("problem", [mixture(), odd_mixture()], ids=["plane", "odd"])
@pytest.mark.parametrize("t", [0.0, 0.4, 0.9, 1.0])
def test_of_a_mixture_it_is_the_exact_model_s_loss(problem, t):
    n = 20_000
    found = irreducible_loss(problem, [0.0, t, 1.0] if 0 < t < 1 else 2, n=n)
    at = found.times.index(t)
    loss = Objective()(
        problem.model(paths.Rectified()), problem.sample(n, seed=5, dtype=torch.float64),
        t=torch.full((n,), t, dtype=torch.float64), seed=6,
    )  # fmt: skip
    error = math.hypot(float(loss.std()) / n**0.5, found.per_t_error[at])
    assert abs(float(loss.mean()) - found.per_t[at]) < 3.0 * error
    assert error < 0.03 * found.per_t[at]


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 0.97])
def test_of_points_it_is_the_exact_model_s_loss(t):
    n = 20_000
    emp = exact.Empirical(normal(40, 3, seed=1))
    found = irreducible_loss(emp, [t, 1.0], n=n)
    own = torch.randint(40, (n,), generator=torch.Generator().manual_seed(2))
    loss = Objective()(emp.model(paths.Rectified()), emp.points[own], t=torch.full((n,), t).double(), seed=4)
    error = math.hypot(float(loss.std()) / n**0.5, found.per_t_error[0])
    assert abs(float(loss.mean()) - found.per_t[0]) < 3.0 * error
    # At t = 0 nothing is known of the data: their whole variance.
    if t == 0.0:
        assert found.per_t[0] == pytest.approx(float(emp.points.var(0, unbiased=False).mean()), rel=1e-12)
        assert found.per_t_error[0] < 1e-12


def test_two_points_by_quadrature():
    # d = ±1 on the line: Var(d | x) = 1 - tanh²(t x / (1-t)²), x = t d + (1-t) noise.
    found = irreducible_loss(torch.tensor([[1.0], [-1.0]]), [0.2, 0.5, 0.65, 0.999, 1.0], n=50_000)
    z = torch.linspace(-9.0, 9.0, 20_001, dtype=torch.float64)
    density = (-z.square() / 2).exp() / math.sqrt(2.0 * math.pi)
    for t, value, error in zip(found.times[:3], found.per_t, found.per_t_error):
        x = t + (1.0 - t) * z
        variance = 1.0 - (t * x / (1.0 - t) ** 2).tanh().square()
        expected = float(torch.trapezoid(density * variance, z)) / (1.0 - t) ** 2
        assert abs(value - expected) < 3.0 * error
        assert error < 0.02 * expected
    assert found.per_t[3:] == [0.0, 0.0]


def test_nothing_cancels_near_the_data():
    # Two points at 2e-3 from each other, a million away, and at a noise level of that distance.
    far = irreducible_loss(torch.tensor([[1e6], [1e6 + 2e-3]], dtype=torch.float64), [0.9, 0.999], n=2000)
    near = irreducible_loss(torch.tensor([[-1e-3], [1e-3]], dtype=torch.float64), [0.9, 0.999], n=2000)
    assert far.per_t == pytest.approx(near.per_t, rel=1e-5)
    assert near.per_t[1] > 0.1


def test_a_large_sample_of_a_law_has_that_law_s_loss():
    law, n = mixture(), 1000
    points = law.sample(3000, seed=4, dtype=torch.float64)
    times = [0.0, 0.3, 0.6]
    expected, found = irreducible_loss(law, times, n=20_000), irreducible_loss(points, times, n=n)
    for a, b, error in zip(found.per_t, expected.per_t, found.per_t_error):
        assert abs(a - b) < 3.0 * error + 0.03 * b
    # Known by heart in the end: the law's own loss tends to 1.
    assert irreducible_loss(points, [0.0, 1.0], n=10).per_t[1] == 0.0
    assert irreducible_loss(law, [0.0, 1.0], n=10).per_t[1] == pytest.approx(1.0)


def test_labels_take_away_what_they_tell():
    points, labels = normal(60, 2, seed=7) + 3.0 * (torch.arange(60) % 2)[:, None], torch.arange(60) % 2
    found = irreducible_loss(points, 9, n=4000, labels=labels)
    parts = [irreducible_loss(points[labels == k], 9, n=4000) for k in (0, 1)]
    for at, error in enumerate(found.per_t_error):
        expected = sum(part.per_t[at] for part in parts) / 2
        spread = math.hypot(error, *(part.per_t_error[at] / 2 for part in parts))
        assert abs(found.per_t[at] - expected) <= 3.0 * spread + 1e-12
    assert found.total < 0.7 * irreducible_loss(points, 9, n=4000).total


def test_chunks_change_nothing(monkeypatch):
    points, law = normal(30, 2, seed=8), mixture()
    whole = [irreducible_loss(data, 5, n=50, seed=3) for data in (points, law)]
    monkeypatch.setattr("fluvial.measure.irreducible._CHUNK_BYTES", 32 * 30 * 7)
    for data, before in zip((points, law), whole):
        assert irreducible_loss(data, 5, n=50, seed=3).per_t == pytest.approx(before.per_t, rel=1e-12)


def test_one_point_leaves_nothing_open():
    found = irreducible_loss(torch.ones(1, 3, 2), 3, n=2)
    assert found.per_t == [0.0, 0.0, 0.0]
    assert found.times == [0.0, 0.5, 1.0]
    assert found.total == found.total_error == 0.0


@pytest.mark.parametrize(
    ("data", "options", "error", "says"),
    [
        (torch.zeros(3, 2), {"n": 1}, OptionError, "n is 1"),
        (torch.zeros(3, 2), {"times": 1}, OptionError, "times is 1"),
        (torch.zeros(3, 2), {"times": [0.5, 0.2]}, OptionError, "rise strictly"),
        (torch.zeros(3, 2), {"labels": torch.zeros(2)}, ShapeError, r"expected \(3,\)"),
        (torch.full((3, 2), torch.nan), {}, OptionError, "NaN"),
        (mixture(), {"labels": torch.zeros(2)}, OptionError, "a mixture was given"),
    ],
)
def test_what_does_not_fit_is_said(data, options, error, says):
    with pytest.raises(error, match=says):
        irreducible_loss(data, **options)
