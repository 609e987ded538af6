"""Flow maps: the exact one of a Gaussian, its boundary, and how it is sampled and converted."""

from __future__ import annotations

import math

import pytest
import torch

import fluvial as fl
from fluvial import paths
from fluvial.errors import DependenceError, OptionError
from fluvial.flow_maps import FlowMap
from problems import PATHS, one_line

MEAN, STD = 0.7, 0.4


def width(c):
    """The standard deviation of the state, for data Normal(MEAN, STD²)."""
    return torch.hypot(torch.as_tensor(c.alpha * STD), torch.as_tensor(c.sigma))


def truth(path, x, t, r):
    """Where the ODE leads from x at t to r: quantiles of one Gaussian are carried to those of another."""
    c, d = path(t), path(r)
    return d.alpha * MEAN + width(d) / width(c) * (x - c.alpha * MEAN)


def exact(kind="average"):
    """The Gaussian's flow map on the rectified path, as a network of (x, t, r) that gives the average velocity."""

    def average(x, t, r=None):
        t = t.double()[:, None]
        r = torch.ones_like(t) if r is None else r.double()[:, None]
        path = paths.Rectified()
        velocity = MEAN + (t * STD**2 - (1 - t)) / width(path(t)) ** 2 * (x.double() - t * MEAN)
        # In the limit r = t the average is the velocity itself; apart, the exact secant.
        secant = (truth(path, x.double(), t, r) - x.double()) / torch.where(r == t, 1.0, r - t)
        return torch.where(r == t, velocity, secant).to(x.dtype)

    return FlowMap(fl.Model(average, paths.Rectified()), kind)


TIMES = [(0.0, 1.0), (0.1, 0.9), (0.3, 0.31), (0.5, 0.2), (0.0, 0.5), (0.8, 0.8)]
ON = ["rectified", "cosine", "vp", "edm", "shifted"]


@pytest.mark.parametrize("name", ON)
@pytest.mark.parametrize(("t", "r"), TIMES)
def test_it_is_the_flow_in_every_notation(name, t, r):
    path, x = PATHS[name], torch.randn(7, 2, dtype=torch.float64)
    seen = fl.convert(exact(), path=path)
    scale = path(t).sigma if path(t).alpha < 1e-2 else 1.0  # where the state is all noise, its own size
    x = x * scale
    torch.testing.assert_close(seen(x, t, r), truth(path, x, t, r), rtol=1e-7, atol=1e-7)
    batch = torch.full((7,), t, dtype=torch.float64), torch.full((7,), r, dtype=torch.float64)
    torch.testing.assert_close(seen(x, *batch), seen(x, t, r), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen(x, batch[0], r), seen(x, t, r), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction", ["velocity", "data", "noise", "edm"])
@pytest.mark.parametrize("name", ["rectified", "vp"])
def test_the_boundary_holds_to_the_last_bit(name, prediction, dtype):
    """X(x, t -> t) = x, of any network, at any time, in any precision."""
    flow_map = FlowMap(fl.Model(lambda x, t, r: torch.sin(x) * 3, PATHS[name], prediction), "average")
    x = torch.randn(5, 3).to(dtype)
    for t in (0.2, 0.73, 0.99):
        assert torch.equal(flow_map(x, t, t), x)
        times = torch.tensor([t, 0.5, 0.1, t, 0.9], dtype=torch.float64)
        assert torch.equal(flow_map(x, times, times), x)


def test_a_jump_there_and_back_returns():
    flow_map, x = exact(), torch.randn(9, 2, dtype=torch.float64)
    there = flow_map(x, 0.15, 0.8)
    torch.testing.assert_close(flow_map(there, 0.8, 0.15), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow_map(flow_map(x, 0.15, 0.4), 0.4, 0.8), there, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["rectified", "vp", "edm"])
def test_any_number_of_jumps_ends_at_the_same_place(name, steps):
    noise = torch.randn(6, 2, dtype=torch.float64)
    seen = fl.convert(exact(), path=PATHS[name])
    calls = fl.sampling.nfe(seen, "jump", steps)
    x = fl.sample(seen, noise, solver="jump", steps=steps)
    assert calls == steps
    c = PATHS[name](0.0)  # VP and EDM begin with a little data in their noise
    end = MEAN + STD * (c.sigma * noise - c.alpha * MEAN) / width(c)
    torch.testing.assert_close(x, end, rtol=0, atol=1e-7)
    torch.testing.assert_close(fl.sample(seen, noise), end, rtol=0, atol=1e-7)  # without a solver: one jump


def test_the_way_to_the_data_is_its_estimate():
    flow_map, x = exact(), torch.randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(flow_map(x, 0.3).data, flow_map(x, 0.3, 1.0), rtol=0, atol=1e-12)
    # And near by it is the ODE's velocity.
    near = (flow_map(x, 0.3, 0.3 + 1e-6) - x) / 1e-6
    model = fl.exact.GaussianMixture(torch.full((1, 2), MEAN), torch.tensor([STD]), torch.ones(1)).model(
        paths.Rectified()
    )
    torch.testing.assert_close(near, model(x, 0.3).velocity, rtol=0, atol=1e-5)


def test_consistency_models_jump_to_the_data_and_noise_them_anew():
    """Multistep consistency sampling by hand: D, then alpha D + sigma xi, then D again."""
    flow_map, noise = exact("consistency"), torch.randn(5, 2, dtype=torch.float64)
    path = paths.Rectified()
    data = flow_map(noise, 0.0, 1.0)
    fresh = fl.random.normal(5, (2,), seed=4, draw=0, stream=fl.random.STEP, dtype=torch.float64)
    x = path(0.5).alpha * data + path(0.5).sigma * fresh
    by_hand = flow_map(x, 0.5, 1.0)
    got = fl.sample(flow_map, noise, solver=fl.solvers.Jump(renoise=1.0), steps=2, seed=4)
    torch.testing.assert_close(got, by_hand, rtol=0, atol=1e-12)


def test_renoised_jumps_keep_the_law():
    flow_map = exact("consistency")
    x = fl.sample(flow_map, (20000, 1), solver=fl.solvers.Jump(renoise=1.0), steps=4, seed=0)
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * STD / math.sqrt(20000))
    assert float(x.std()) == pytest.approx(STD, rel=0.02)
    with pytest.raises(DependenceError):
        fl.sample(flow_map.under(independent=False), (4, 1), solver=fl.solvers.Jump(renoise=1.0), steps=2)


def test_guidance_reaches_the_jump():
    """Guidance acts on the pair of the jump that is asked for, not on that of another."""
    asked = []

    def network(x, t, r, label):
        asked.append(float(r[0]))
        return x * 0 + label[:, None]

    flow_map = FlowMap(fl.Model(network, "rectified", null={"label": 3}), "average")
    x = fl.sample(
        flow_map, torch.zeros(2, 1), steps=2, cond={"label": torch.tensor([1, 2])}, guidance=fl.guidance.CFG(2.0)
    )
    assert set(asked) == {0.5, 1.0}
    torch.testing.assert_close(x, torch.tensor([[3.0 + 2 * (1 - 3.0)], [3.0 + 2 * (2 - 3.0)]]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FlowMap(fl.Model(lambda x, t: x, "rectified"), "teleport"), "teleport"),
        (lambda: FlowMap(exact()), "already"),
        (lambda: fl.solvers.Jump(renoise=2.0), "from 0 to 1"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(OptionError) as error:
        make()
    assert words in one_line(error)


def test_its_own_way_of_several_steps():
    """Named or not, "jump" is one step unless told otherwise, renoised for a consistency model that may be."""
    noise = torch.randn(5, 2, dtype=torch.float64)
    consistency, average = exact("consistency"), exact("average")
    assert fl.sample(consistency, noise, solver="jump", seed=1, record=True).nfe == 1
    for flow_map, renoise in ((consistency, 1.0), (average, 0.0), (consistency.under(independent=False), 0.0)):
        own = fl.sample(flow_map, noise, solver="jump", steps=3, seed=1)
        said = fl.sample(flow_map, noise, solver=fl.solvers.Jump(renoise=renoise), steps=3, seed=1)
        assert torch.equal(own, said)


def test_it_has_no_score():
    flow_map, x = exact("consistency"), torch.randn(4, 2, dtype=torch.float64)
    with pytest.raises(DependenceError):
        _ = flow_map(x, 0.4).score
    with pytest.raises(OptionError) as error:
        fl.sample(flow_map, x, solver="ddpm", steps=3)
    assert "a flow map has none" in one_line(error)
    with pytest.raises(OptionError) as error:
        fl.straighten.make_pairs(flow_map, 4, steps=2)
    assert "no ODE to follow" in one_line(error)
