"""Straightness against closed forms: of one Gaussian Z_t = √(t² s² + (1 - t)²) z + t m, and of what is straight."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

from fluvial import Model, convert, exact, grids, guidance, measure, paths, sample
from fluvial.errors import OptionError, ShapeError
from fluvial.measure import straightness
from fluvial.measure.straightness import even_split
from problems import Net, gaussian, mixture, normal

STD = 0.5
NOISE = normal(7, 1, seed=1)
SQUARE = float(NOISE.square().mean())


def size(t: float) -> float:
    """Z_t = size(t) z, of Gaussian data with mean 0."""
    return math.hypot(t * STD, 1.0 - t)


def speed(t: float) -> float:
    return (STD**2 * t - (1.0 - t)) / size(t)


def bend(t: float) -> float:
    return STD**2 / size(t) ** 3


def model(path=None, mean: float = 0.0):
    return gaussian(mean, STD).model(path or paths.Rectified())


def orders(errors: list[float]) -> list[float]:
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 2)], ids=lambda v: str(v)
)
def test_total_converges_to_the_closed_form(solver, order):
    # ∫ (s - 1 - g')² dt = s (2 - π/2), for the whole and for every sample.
    errors = []
    for steps in (32, 64, 128):
        found = straightness(model(), NOISE, steps=steps, solver=solver)
        expected = STD * (2.0 - math.pi / 2) * NOISE[:, 0].square()
        errors.append(float((found.per_sample / expected - 1.0).abs().max()))
        assert found.total == pytest.approx(float(found.per_sample.mean()), rel=1e-14)
    assert orders(errors) == pytest.approx([order, order], abs=0.2)
    assert errors[-1] < 2.0 ** (1 - 5 * order)


def test_the_mean_of_the_data_adds_nothing_but_a_straight_line():
    plain, moved = (straightness(model(mean=mean), NOISE, steps=20) for mean in (0.0, 3.0))
    torch.testing.assert_close(moved.per_sample, plain.per_sample, rtol=1e-9, atol=0)
    assert moved.curvature == pytest.approx(plain.curvature, rel=1e-9)


def test_per_t_converges_in_every_interval_and_by_order_one_in_the_landing():
    inner, landing = [], []
    for steps in (32, 64, 128):
        found = straightness(model(), NOISE, steps=steps)
        expected = [quad(lambda t: (STD - 1.0 - speed(t)) ** 2, a, b)[0] * steps * SQUARE for a, b in _cells(found)]
        off = [abs(x - y) for x, y in zip(found.per_t, expected)]
        inner.append(max(off[:-1]))
        landing.append(off[-1])
        widths = torch.tensor(found.times).diff()
        assert float(widths @ torch.tensor(found.per_t)) == pytest.approx(found.total, rel=1e-5)
    assert orders(inner) == pytest.approx([2, 2], abs=0.2)
    assert orders(landing) == pytest.approx([1, 1], abs=0.2)


def test_curvature_converges_at_every_node():
    inner, last = [], []
    spread = float(NOISE.abs().mean())
    for steps in (32, 64, 128):
        found = straightness(model(), NOISE, steps=steps)
        assert len(found.curvature) == steps - 1
        off = [abs(c - bend(t) * spread) for c, t in zip(found.curvature, found.times[1:])]
        inner.append(max(off[:-1]))
        last.append(off[-1])
    assert orders(inner) == pytest.approx([2, 2], abs=0.2)
    assert orders(last) == pytest.approx([1, 1], abs=0.2)


def test_segments_have_their_own_chords_and_are_nodes():
    nodes = [0.0, 0.3, 0.7, 1.0]
    errors = []
    for steps in (40, 80, 160):
        found = straightness(model(), NOISE, steps=steps, segments=nodes)
        assert set(nodes) <= set(found.times)
        assert len(found.times) == steps + 1
        expected = []
        for a, b in pairwise(nodes):
            chord = (size(b) - size(a)) / (b - a)
            expected.append(quad(lambda t: (chord - speed(t)) ** 2, a, b)[0] / (b - a) * SQUARE)  # noqa: B023
        errors.append(max(abs(x - y) for x, y in zip(found.per_segment, expected)))
    assert orders(errors) == pytest.approx([2, 2], abs=0.25)
    assert errors[-1] < 1e-4
    whole = straightness(model(), NOISE, steps=10)
    assert whole.per_segment == pytest.approx([whole.total], rel=1e-14)
    assert whole.segments == [0.0, 1.0]


def test_split_shares_the_bending_evenly():
    # g'' > 0, so that ∫₀ᵗ |g''| = g'(t) + 1.
    found = straightness(model(), NOISE, steps=256)
    for k in (2, 3):
        expected = [brentq(lambda t: speed(t) + 1.0 - (STD + 1.0) * j / k, 0.0, 1.0) for j in range(1, k)]  # noqa: B023
        assert found.split(k) == pytest.approx([0.0, *expected, 1.0], abs=1e-4)
    assert found.split(1) == [0.0, 1.0]


def test_even_split_interpolates_within_a_step():
    # Curvature 1 on [0, 0.5] and 3 on [0.5, 1], the middles of three steps.
    times, curvature = [0.0, 0.25, 0.75, 1.0], [1.0, 3.0]
    assert even_split(times, curvature, 2) == pytest.approx([0.0, 2 / 3, 1.0])
    assert even_split(times, curvature, 4) == pytest.approx([0.0, 0.5, 2 / 3, 5 / 6, 1.0])
    assert even_split(times, [0.0, 0.0], 4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert even_split([0.0, 1.0], [], 2) == [0.0, 0.5, 1.0]
    with pytest.raises(OptionError, match="k is 0"):
        even_split(times, curvature, 0)


def test_straight_models_are_at_zero():
    translation = Model(lambda x, t: torch.full_like(x, 2.0), paths.Rectified(), independent=False)
    noise = normal(5, 3, 2, seed=3)
    assert straightness(translation, noise, steps=9).total < 1e-28
    point = exact.Empirical(normal(1, 4, seed=4)).model(paths.Rectified())
    found = straightness(point, normal(5, 4), steps=9, segments=[0, 0.2, 1])
    assert max(found.total, *found.per_segment, *found.per_t) < 1e-26
    assert max(found.curvature) < 1e-11


def test_one_step_is_its_own_chord():
    for steps in (1, 2, 3):
        found = straightness(model(), 4, steps=steps, solver="euler")
        assert len(found.per_t) == found.nfe == steps
        assert len(found.curvature) == steps - 1
    assert straightness(model(), 4, steps=1).total == 0.0
    # Two steps have velocities g' and D - x apart from their chord.
    two = straightness(model(), NOISE, steps=2, solver="euler")
    x = sample(model(), NOISE, steps=2, solver="euler", record=True).x
    v = 2.0 * x.diff(dim=0)
    assert two.total == pytest.approx(float((v - (x[2] - x[0])).square().mean()), rel=1e-12)
    assert two.curvature == pytest.approx([float((v[1] - v[0]).abs().mean() * 2.0)])


@pytest.mark.parametrize("path", [paths.VP(), paths.EDM(), paths.Cosine()], ids=lambda p: type(p).__name__)
def test_the_notation_does_not_matter(path):
    expected = straightness(mixture().model(paths.Rectified()), NOISE.expand(7, 2), steps=64)
    found = straightness(mixture().model(path), NOISE.expand(7, 2), steps=64)
    assert found.total == pytest.approx(expected.total, rel=2e-3)
    # VP and EDM have no pure noise: what they are asked there is their own first level.
    first = 0 if path == paths.Cosine() else 1
    assert found.curvature[first:] == pytest.approx(expected.curvature[first:], rel=2e-2)


def test_the_cost_saved_is_straightness_and_irreducible_loss():
    # E|data - noise|² - E|Z_1 - Z_0|² = S + V, of one Gaussian: (s² + 1) - (s - 1)² = 2 s.
    found = straightness(model(), NOISE, steps=256)
    own = measure.transport_cost(found.ends) / SQUARE
    assert own == pytest.approx((STD - 1.0) ** 2, rel=2e-4)
    least = measure.irreducible_loss(gaussian(0.0, STD), n=2).total
    assert found.total / SQUARE + least == pytest.approx(STD**2 + 1.0 - own, rel=2e-4)


def test_chunks_conditions_and_guidance_change_nothing(monkeypatch):
    problem = mixture().model(paths.Rectified())
    label, scale = torch.arange(5) % 3, guidance.CFG(2.0)
    whole = straightness(problem, normal(5, 2), cond={"label": label}, guidance=scale, steps=6)
    monkeypatch.setattr(sys.modules[straightness.__module__], "_CHUNK_BYTES", 2 * 2 * 7 * 16)
    parts = straightness(problem, normal(5, 2), cond={"label": label}, guidance=scale, steps=6)
    torch.testing.assert_close(parts.per_sample, whole.per_sample, rtol=1e-12, atol=0)
    assert parts.curvature == pytest.approx(whole.curvature, rel=1e-12)
    expected = sample(problem, normal(5, 2), cond={"label": label}, guidance=scale, steps=6)
    torch.testing.assert_close(parts.ends.data, expected, rtol=1e-12, atol=1e-12)


def test_ends_are_in_path_units_and_of_the_seed():
    from fluvial.convention import Normalisation

    units = Normalisation(shift=(3.0,), scale=(2.0,))
    net = Model(Net(dtype=torch.float64), paths.Rectified(), normalisation=units, shape=(2,))
    found = straightness(net, 6, steps=5, seed=4)
    expected = sample(net, 6, steps=5, seed=4)
    torch.testing.assert_close(units.invert(found.ends.data), expected, rtol=1e-6, atol=1e-6)
    assert (found.n, found.seed, found.nfe) == (6, 4, 9)
    assert found.per_sample.dtype == torch.float64


def test_any_solver_of_the_ode_and_no_other():
    accurate = straightness(model(), NOISE, steps=32, solver="dopri5")
    assert accurate.total == pytest.approx(SQUARE * STD * (2.0 - math.pi / 2), rel=5e-3)
    with pytest.raises(OptionError, match="stochastic; straightness is of the ODE"):
        straightness(model(), NOISE, solver="ddpm")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"segments": [0, 0.5]}, OptionError, "from 0 to 1"),
        ({"segments": [0, 0.5, 0.4, 1]}, OptionError, "rise strictly"),
        ({"segments": [0, 0.5, 1], "steps": 1}, OptionError, "2 or more"),
        ({"steps": 0}, OptionError, "steps is 0"),
        ({"cond": {"label": torch.zeros(3)}}, ShapeError, "expected a tensor with 7"),
    ],
)
def test_what_does_not_fit_is_said(options, error, says):
    with pytest.raises(error, match=says):
        straightness(model(), NOISE, **options)


def test_steps_are_shared_by_length():
    assert grids.Split.shared([0.0, 0.5, 1.0], 64) == grids.Split((0.0, 0.5, 1.0), (32, 32))
    assert grids.Split.shared([0.0, 0.25, 1.0], 8).steps == (2, 6)
    assert grids.Split.shared([0.0, 0.001, 1.0], 3).steps == (1, 2)
    converted = convert(model(), path=paths.VP())
    assert straightness(converted, NOISE, steps=8).times == [k / 8 for k in range(9)]


def _cells(found):
    return list(pairwise(found.times))
