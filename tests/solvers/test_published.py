"""Named methods in their papers' own words, on EDM's path: x + noise levels sigma, the last of them 0."""

from __future__ import annotations

import math

import pytest
import torch

import fluvial as fl
from problems import PATHS, mixture, normal

PATH = PATHS["edm"]


def run(solver, steps, **options):
    """Ours, the levels, the start and the data estimate at a level."""
    model, noise = mixture().model(PATH), normal(16, 2)
    times = fl.grids.Karras(sigma_min=0.02).times(PATH, steps)
    x = fl.sample(model, noise, solver=fl.solvers.named(solver, **options), times=times)
    sigmas = [c.sigma for c in PATH.table(times[:-1])]
    return x, sigmas, sigmas[0] * noise, lambda y, k: model(y, times[k]).data


steps = pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])


@steps
def test_dpmpp_2m(steps):
    """DPM-Solver++ (2022), algorithm 2."""
    found, sigmas, x, denoise = run("dpmpp_2m", steps)
    before = None
    for k, sigma in enumerate(sigmas):
        data = denoise(x, k)
        if k + 1 == len(sigmas):
            x = data
            break
        h = math.log(sigma / sigmas[k + 1])
        guess = data
        if before is not None:
            r = math.log(sigmas[k - 1] / sigma) / h
            guess = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * before
        x = sigmas[k + 1] / sigma * x - math.expm1(-h) * guess
        before = data
    torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-8)


@steps
def test_dpmpp_3m(steps):
    """DPM-Solver++ (2022), with the three terms of the appendix."""
    found, sigmas, x, denoise = run("dpmpp_3m", steps)
    data, h = [], []
    for k, sigma in enumerate(sigmas):
        data.insert(0, denoise(x, k))
        if k + 1 == len(sigmas):
            x = data[0]
            break
        h.insert(0, math.log(sigma / sigmas[k + 1]))
        phi1 = math.expm1(-h[0])
        phi2 = phi1 / h[0] + 1
        x = sigmas[k + 1] / sigma * x - phi1 * data[0]
        if k == 1:
            x = x + phi2 * (data[0] - data[1]) * h[0] / h[1]
        elif k > 1:
            r0, r1 = h[1] / h[0], h[2] / h[0]
            d0, d1 = (data[0] - data[1]) / r0, (data[1] - data[2]) / r1
            x = x + phi2 * (d0 + (d0 - d1) * r0 / (r0 + r1)) - (phi2 / h[0] - 0.5) * (d0 - d1) / (r0 + r1)
    torch.testing.assert_close(found, x, rtol=1e-7, atol=1e-7)


@steps
def test_ipndm(steps):
    """Adams-Bashforth's fixed weights on the slope (x - data)/sigma, Zhang and Chen (2023)."""
    found, sigmas, x, denoise = run("ipndm", steps)
    weights = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    slopes = []
    for k, sigma in enumerate(sigmas):
        slopes.insert(0, (x - denoise(x, k)) / sigma)
        slope = sum(w * d for w, d in zip(weights[min(k, 3)], slopes))
        x = x + ([*sigmas, 0.0][k + 1] - sigma) * slope
    torch.testing.assert_close(found, x, rtol=1e-7, atol=1e-7)


@steps
def test_unipc(steps):
    """UniPC (2023), algorithms 5 to 8 with B(h) = e^h - 1 and two values; the order falls to 1 for the landing."""
    found, sigmas, x, denoise = run("unipc", steps)
    data, last = [], None
    for k, sigma in enumerate(sigmas):
        data.insert(0, denoise(x, k))
        if k:
            h = math.log(sigmas[k - 1] / sigma)
            b = math.expm1(-h)
            after = data[0] - data[1]
            change = 0.5 * after
            if k > 1:
                # Two differences to the value before, at r and at 1, so that both moments of the integral are met.
                r = -math.log(sigmas[k - 2] / sigmas[k - 1]) / h
                moments = [(b / -h - 1) / b, 2 * ((b / -h - 1) / -h - 0.5) / b]
                matrix = torch.tensor([[1.0, 1.0], [r, 1.0]], dtype=torch.float64)
                on_past, on_new = torch.linalg.solve(matrix, torch.tensor(moments, dtype=torch.float64)).tolist()
                change = on_past * (data[2] - data[1]) / r + on_new * after
            last = sigma / sigmas[k - 1] * last - b * (data[1] + change)
        else:
            last = x
        if k + 1 == len(sigmas):
            x = data[0]
            break
        h = math.log(sigma / sigmas[k + 1])
        guess = data[0]
        if k:
            guess = guess + 0.5 * (data[0] - data[1]) * h / math.log(sigmas[k - 1] / sigma)
        x = sigmas[k + 1] / sigma * last - math.expm1(-h) * guess
    torch.testing.assert_close(found, x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "unipc"])
def test_pure_noise_stands_at_a_level_on_the_clock_of_log_snr(solver):
    """On a flow the first value lies at minus infinity: a run from there is a run from 1e-5, and not another method."""
    model, noise = mixture().model(PATHS["rectified"]), normal(64, 2)
    later = [k / 8 for k in range(1, 9)]
    whole = fl.sample(model, noise, solver=solver, times=[0.0, *later])
    close = fl.sample(model, noise, solver=solver, times=[1e-5 / (1 + 1e-5), *later])
    far = fl.sample(model, noise, solver=solver, times=[1e-3, *later])
    assert float((whole - close).abs().max()) < 1e-4
    assert float((whole - far).abs().max()) > 1e-3


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "unipc", "deis", "vabm", "dpmpp_2s"])
def test_levels_beyond_where_pure_noise_stands_are_levels_all_the_same(solver):
    """Almost nothing happens at such noise, so nearly the same samples come out with or without steps there."""
    model, noise = mixture().model(PATHS["rectified"]), normal(64, 2)
    later = [k / 40 for k in range(1, 41)]
    plain = fl.sample(model, noise, solver=solver, times=[0.0, *later])
    more = fl.sample(model, noise, solver=solver, times=[0.0, 1e-7, 1e-6, 1e-5, 1e-4, *later])
    assert float((more - plain).square().mean().sqrt()) < 0.02
