"""Brownian paths: increments with the right law at any times, each sample's own, the same at any number of steps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import fluvial as fl
from fluvial import random
from fluvial.brownian import Brownian
from problems import PATHS, gaussian, normal

ODD = [0.0, 0.013, 0.1, 0.1000001, 0.25, 0.4, 0.61, 0.6171, 0.99, 1.0]


def increments(times, n=2000, seed=0, shape=(), dtype=torch.float64, samples=None):
    path = Brownian(times, range(n) if samples is None else samples, shape, seed, dtype)
    return torch.stack([path.increment(*leg) for leg in pairwise(times)])


@pytest.mark.parametrize("times", [ODD, [k / 16 for k in range(17)], [0.3, 0.5, 0.7], [0.0, 1e-4, 1.0]], ids=len)
def test_increments_are_standard_normal_and_independent(times):
    n = 20_000
    found = increments(times, n)
    moments = found @ found.T / n
    torch.testing.assert_close(moments, torch.eye(len(found), dtype=found.dtype), rtol=0, atol=5 / math.sqrt(n) * 1.5)
    assert float(found.mean(1).abs().max()) < 4.5 / math.sqrt(n)
    assert float((found.pow(4).mean(1) - 3).abs().max()) < 5 * math.sqrt(96 / n)


def coefficients(times, monkeypatch):
    """W at these times as combinations of the cells' normal numbers: exact covariances, without any sample."""
    cells = {}

    def unit(samples, shape, seed, cell, stream, dtype, device):
        row = torch.zeros(64, dtype=dtype)
        row[cells.setdefault(cell, len(cells))] = 1.0
        return row

    monkeypatch.setattr(random, "normal", unit)
    path = Brownian(times, range(1), (64,), 0, torch.float64)
    return torch.stack([path._at(t) for t in times])


@pytest.mark.parametrize("times", [ODD[1:], [0.5], [0.25, 0.5, 0.75], [1 / 3, 1 / 3 + 1e-5, 0.9]], ids=len)
def test_covariance_is_exactly_the_lesser_time(times, monkeypatch):
    rows = coefficients(times, monkeypatch)
    expected = torch.minimum(*torch.meshgrid(*[torch.tensor(times, dtype=torch.float64)] * 2, indexing="ij"))
    torch.testing.assert_close(rows @ rows.T, expected, rtol=0, atol=1e-12)


def test_paths_are_each_samples_own():
    whole = increments(ODD, 64, shape=(2, 3), dtype=torch.float32)
    for samples in (range(1), range(20, 27), torch.tensor([63, 5])):
        part = increments(ODD, shape=(2, 3), dtype=torch.float32, samples=samples)
        assert torch.equal(part, whole[:, list(samples)])
    assert torch.equal(whole, increments(ODD, 64, shape=(2, 3), dtype=torch.float32))
    assert not (whole == increments(ODD, 64, seed=1, shape=(2, 3), dtype=torch.float32)).any()
    torch.testing.assert_close(whole.double(), increments(ODD, 64, shape=(2, 3)), rtol=1e-3, atol=1e-3)


def test_other_times_see_nearly_the_same_path():
    def at_fifths(steps):
        found = increments([k / steps for k in range(steps + 1)], 500) / math.sqrt(steps)
        return found.cumsum(0)[steps // 5 - 1 :: steps // 5]

    one, two, three = at_fifths(20), at_fifths(40), at_fifths(45)
    for other in (two, three):
        assert float((one - other).square().mean().sqrt()) < 0.25
        assert float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) > 0.95


def test_it_takes_few_numbers_for_each_time(monkeypatch):
    drawn = []
    normal_numbers = random.normal
    monkeypatch.setattr(random, "normal", lambda *given: drawn.append(given[3]) or normal_numbers(*given))
    increments([k / 250 for k in range(251)], 1)
    assert len(drawn) == len(set(drawn))
    assert len(drawn) < 4 * 250


# In a run


def noise_part(solver, steps, path, noise):
    """The samples without what the start explains of them: what the steps' noise did."""
    start = normal(512, 1)
    x = fl.sample(gaussian().model(path), start, noise=noise, solver=solver, steps=steps, seed=1)
    return (x - start * (x * start).sum() / start.square().sum()).flatten()


@pytest.mark.parametrize(
    "solver", ["langevin", "euler_maruyama", "ddpm", "sde_dpmpp_2m", "seeds", "churn", "overshoot"]
)
@pytest.mark.parametrize("name", ["rectified", "vp"])
def test_twice_the_steps_do_nearly_the_same(solver, name):
    def correlation(noise):
        parts = [noise_part(solver, steps, PATHS[name], noise) for steps in (20, 40)]
        return float(torch.corrcoef(torch.stack(parts))[0, 1])

    assert correlation("brownian") > 0.93
    assert correlation("independent") < 0.75


@pytest.mark.parametrize("solver", ["langevin", "seeds", "predictor_corrector"])
def test_law_is_the_same(solver):
    path, n = PATHS["rectified"], 8000
    stds = [
        float(fl.sample(gaussian().model(path), (n, 1), noise=noise, solver=solver, steps=30, seed=2).double().std())
        for noise in ("brownian", "independent")
    ]
    assert stds[0] == pytest.approx(stds[1], rel=5 / math.sqrt(n))


def test_a_run_is_deterministic_and_its_noise_depends_on_the_seed():
    model, start = gaussian().model(PATHS["vp"]), normal(8, 1)
    runs = [fl.sample(model, start, noise="brownian", solver="ddpm", steps=9, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not (runs[0] == runs[2]).any()
