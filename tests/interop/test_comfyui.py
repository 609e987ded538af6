"""Solvers as ComfyUI's samplers: k-diffusion's formulas, closed forms, masks, callbacks, seeds."""

from __future__ import annotations

import math
from itertools import pairwise

import comfy_stub as stub
import pytest
import torch
from comfy_stub import EPS, FLOW, MEAN, STD, column, curved, gaussian, levels, model, normal, spread_of

from fluvial.errors import NonFiniteError, OptionError
from fluvial.interop.comfyui import NAMES, FluvialSampler, sampler_function


@pytest.fixture
def comfy(monkeypatch):
    stub.install(monkeypatch)


# The methods of the same name, as k-diffusion and its papers write them.


def by_euler(denoised, x, sigmas, flow):
    for a, b in pairwise(sigmas):
        x = x + (b - a) * (x - denoised(x, a)) / a
    return x


def by_heun(denoised, x, sigmas, flow):
    for a, b in pairwise(sigmas):
        d = (x - denoised(x, a)) / a
        ahead = x + (b - a) * d
        x = x + (b - a) * (d + (ahead - denoised(ahead, b)) / b) / 2 if b else ahead
    return x


def by_dpmpp_2m(denoised, x, sigmas, flow):
    half_log_snr = [-torch.log(s / (1 - s if flow else 1.0)) for s in sigmas]
    before = None
    for i, (a, b) in enumerate(pairwise(sigmas)):
        now = denoised(x, a)
        if not b:
            return now
        mixed, alpha, h = now, 1 - b if flow else 1.0, half_log_snr[i + 1] - half_log_snr[i]
        if before is not None:
            # Pure noise, infinitely far, stands where data over noise is 1e-5.
            r = (half_log_snr[i] - half_log_snr[i - 1].clamp(min=math.log(1e-5))) / h
            mixed = now + (now - before) / (2 * r)
        x, before = b / a * x - alpha * torch.expm1(-h) * mixed, now
    return x


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["single", "double"])
@pytest.mark.parametrize(("solver", "method"), [("euler", by_euler), ("heun", by_heun), ("dpmpp_2m", by_dpmpp_2m)])
@FLOW
def test_methods_are_those_of_k_diffusion(flow, solver, method, dtype, close):
    model_k, sigmas = model(flow), levels(flow, 8)
    x = normal(2, 1, 4, 4) * sigmas[0]
    ours = sampler_function(model_k, x.to(dtype), sigmas, {"seed": 0}, solver=solver)
    assert ours.dtype == dtype
    # The formulas in double, from the same single-precision levels.
    theirs = method(lambda x, s: model_k(x, s.expand(len(x))), x.double(), sigmas.double(), flow)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=close)


@FLOW
def test_levels_are_asked_at_as_they_were_given(flow):
    model_k, sigmas = model(flow), levels(flow, 9)
    sampler_function(model_k, normal(1, 3), sigmas, solver="dpmpp_2m")
    assert model_k.inner_model.asked == sigmas[:-1].tolist()
    # Two steps of the table's own ends, which are the path's too.
    if not flow:
        ends = torch.tensor([float(EPS().sigma_max), float(EPS().sigma_min), 0.0])
        sampler_function(model_k, normal(1, 3), ends, solver="euler")
        assert model_k.inner_model.asked[-2:] == ends[:-1].tolist()


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "dpmpp_2s"])
@FLOW
def test_order_is_two_and_the_limit_the_closed_form(flow, solver):
    x, errors = 1.5 * normal(64, 1, dtype=torch.float64), []
    for steps in (40, 80):
        if flow:
            sigmas = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
        else:
            sigmas = torch.linspace(14.6 ** (1 / 7), 0.1 ** (1 / 7), steps + 1, dtype=torch.float64) ** 7
        (mean, std), (mean_end, std_end) = (spread_of(float(sigmas[k]), flow) for k in (0, -1))
        out = sampler_function(model(flow, gaussian(flow)), mean + std * x, sigmas, solver=solver)
        errors.append(float((out - (mean_end + std_end * x)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.25)
    assert errors[1] < 2e-3


@pytest.mark.parametrize("solver", NAMES)
@FLOW
def test_every_solver_runs(flow, solver):
    model_k, sigmas, seen = model(flow), levels(flow, 6), []
    x = normal(2, 1, 2, 3) * sigmas[0]
    kept = x.clone()
    out = sampler_function(model_k, x, sigmas, {"seed": 3}, seen.append, solver=solver)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert bool(torch.isfinite(out).all())
    assert torch.equal(x, kept)
    numbers = [step["i"] for step in seen]
    assert numbers == sorted(numbers)
    assert sorted(set(numbers)) == list(range(6))


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("ddpm", {}),
        ("langevin", {"gamma": 1.0}),
        ("overshoot", {"c": 2.0}),
        ("restart", {"intervals": [(0.1, 0.8, 2, 20)]}),
        ("sde_dpmpp_2m", {}),
        ("churn", {"s_churn": 40.0}),
    ],
)
@pytest.mark.parametrize("ends", [True, False], ids=["landed", "split"])
@FLOW
def test_noise_keeps_the_law(flow, solver, options, ends):
    steps = 400 if solver in ("ddpm", "overshoot") else 120  # those are off by one part in the number of steps
    sigmas = levels(flow, steps)
    sigmas = sigmas if ends else sigmas[: steps * 7 // 10]
    (mean, std), (mean_end, std_end) = (spread_of(float(sigmas[k]), flow) for k in (0, -1))
    x = mean + std * normal(20, 1, 1000)
    out = sampler_function(model(flow, gaussian(flow)), x, sigmas, {"seed": 1}, solver=solver, **options)
    assert float(out.mean()) == pytest.approx(mean_end, abs=0.02 * std_end + 0.005)
    assert float(out.std()) == pytest.approx(std_end, rel=0.03)
    assert float(((out - x) * std_end / std).abs().max()) > 0.01


@FLOW
def test_image_to_image_starts_at_its_level(flow, comfy):
    (sampler,) = FluvialSampler().get_sampler("dpmpp_2m")
    sigmas = levels(flow, 60, 0.4)
    latent, noise = MEAN + STD * normal(3, 1, 5), normal(3, 1, 5, seed=1)
    guider = model(flow, gaussian(flow)).inner_model
    out = sampler.sample(guider, sigmas, {"seed": 0}, None, noise, latent)
    start = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent)
    mean, std = spread_of(float(sigmas[0]), flow)
    torch.testing.assert_close(out, MEAN + STD * (start - mean) / std, rtol=0, atol=6e-3)
    assert guider.asked[0] == float(sigmas[0])


@pytest.mark.parametrize("solver", ["euler", "heun"])
@FLOW
def test_a_run_in_two_parts_is_the_run(flow, solver, comfy):
    (sampler,) = FluvialSampler().get_sampler(solver)
    guider, sigmas = model(flow).inner_model, levels(flow, 8)
    noise, nothing = normal(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)
    whole = sampler.sample(guider, sigmas, {"seed": 0}, None, noise, nothing)
    half = sampler.sample(guider, sigmas[:5], {"seed": 0}, None, noise, nothing)
    rest = sampler.sample(guider, sigmas[4:], {"seed": 0}, None, nothing, half)
    torch.testing.assert_close(rest, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "langevin", "heun"])
@FLOW
def test_what_is_masked_stays(flow, solver, comfy):
    (sampler,) = FluvialSampler().get_sampler(solver)
    latent, noise = normal(2, 1, 4, 4, seed=2), normal(2, 1, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., 2:] = 1.0
    out = sampler.sample(model(flow).inner_model, levels(flow, 5), {"seed": 0}, None, noise, latent, mask)
    torch.testing.assert_close(out[..., :2], latent[..., :2], rtol=0, atol=1e-6)
    assert float((out[..., 2:] - latent[..., 2:]).abs().min()) > 1e-4


@FLOW
def test_callback_is_told_what_the_model_saw(flow, comfy):
    model_k, sigmas, seen = model(flow), levels(flow, 4), []
    x = normal(2, 1, 3)
    out = sampler_function(model_k, x, sigmas, {"seed": 0}, seen.append, solver="heun")
    assert [set(step) for step in seen] == [{"x", "i", "sigma", "sigma_hat", "denoised"}] * 4
    assert [step["i"] for step in seen] == [0, 1, 2, 3]
    for step in seen:
        assert torch.equal(step["sigma"], sigmas[step["i"]])
        assert torch.equal(step["sigma_hat"], step["sigma"])
        assert torch.equal(step["denoised"], curved(step["x"], step["sigma"]))
    assert torch.equal(seen[0]["x"], x)
    torch.testing.assert_close(seen[-1]["denoised"], out)
    told = []
    (sampler,) = FluvialSampler().get_sampler("euler")
    sampler.sample(model_k.inner_model, sigmas, {"seed": 0}, lambda *a: told.append(a), x, torch.zeros_like(x))
    assert [(i, total) for i, _, _, total in told] == [(i, 4) for i in range(4)]


def test_callback_knows_of_raised_noise_and_of_going_back():
    sigmas, churned, restarted = levels(False, 10), [], []
    sampler_function(model(False), normal(1, 3), sigmas, {"seed": 0}, churned.append, solver="churn", s_churn=4.0)
    raised = [float(step["sigma_hat"] / step["sigma"]) for step in churned]
    # The first would go beyond the model's highest level, and the landing adds no noise.
    assert raised[1:-1] == pytest.approx([1.4] * 8, rel=1e-5)
    assert 1.0 <= raised[0] < 1.01
    assert raised[-1] == 1.0
    # A run that starts below that level has room above it.
    sampler_function(model(False), normal(1, 3), sigmas[4:], {"seed": 0}, churned.append, solver="churn", s_churn=2.4)
    assert float(churned[10]["sigma_hat"] / churned[10]["sigma"]) == pytest.approx(1.4, rel=1e-5)
    options = {"solver": "restart", "intervals": [(0.3, 2.0, 2, 3)]}
    sampler_function(model(False), normal(1, 3), sigmas, {"seed": 0}, restarted.append, **options)
    numbers = [step["i"] for step in restarted]
    assert len(numbers) == 10 + 2 * 3
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(10))


@pytest.mark.parametrize("solver", ["ddpm", "langevin", "sde_dpmpp_2m"])
def test_seeds_are_a_samples_own(solver):
    sigmas, x = levels(True, 5), normal(4, 1, 3)

    def run(seed, x):
        return sampler_function(model(True), x, sigmas, {"seed": seed}, solver=solver)

    whole = run(7, x)
    assert torch.equal(run(7, x), whole)
    torch.testing.assert_close(run(7, x[:2]), whole[:2], rtol=0, atol=1e-6)
    assert not torch.allclose(run(8, x), whole, atol=1e-2)
    assert torch.equal(run(2**64 - 1, x), run(2**64 - 1, x))
    torch.manual_seed(0)
    unseeded = sampler_function(model(True), x, sigmas, solver=solver)
    assert not torch.allclose(unseeded, whole, atol=1e-2)


def test_noise_of_another_scale():
    # x = (1 - sigma) data + sigma * 2 noise: the same law, and the same ODE.
    sigmas = levels(True, 400)
    mean, std = spread_of(1.0, True, 2.0)
    for solver in ("dpmpp_2m", "ddpm"):
        model_k = model(True, gaussian(True, 2.0), noise_scale=2.0)
        out = sampler_function(model_k, mean + std * normal(20, 1, 1000), sigmas, {"seed": 1}, solver=solver)
        assert float(out.mean()) == pytest.approx(MEAN, abs=0.015)
        assert float(out.std()) == pytest.approx(STD, rel=0.04)


def test_the_kind_can_be_named_and_is_found_without_a_wrapper():
    sigmas, x = levels(True, 6), normal(2, 4)
    plain = lambda x, sigma: curved(x, column(sigma, x))  # noqa: E731
    # One step of Euler is the same on both, and two of Heun are not.
    as_flow, as_eps = (sampler_function(plain, x, sigmas, solver="dpmpp_2m", flow=f) for f in (True, False))
    assert not torch.allclose(as_flow, as_eps, atol=1e-4)
    assert torch.equal(as_flow, sampler_function(model(True), x, sigmas, solver="dpmpp_2m"))
    assert torch.equal(sampler_function(plain, x, sigmas, solver="dpmpp_2m"), as_eps)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([0.0, 0.5, 1.0], "fall strictly"),
        ([1.0, 0.5, 0.5, 0.0], "fall strictly"),
        ([1.0, 0.5, -0.1], "none below 0"),
        ([1.0], "two or more"),
        ([], "two or more"),
        ([1.0, math.nan, 0.0], "fall strictly"),
        ([math.inf, 1.0, 0.0], "fall strictly"),
        ([14.6, 1.0, 0.0], "shares of noise, at most 1"),
    ],
    ids=str,
)
def test_bad_sigmas_are_one_clear_error(sigmas, message):
    with pytest.raises(OptionError, match=message) as raised:
        sampler_function(model(True), normal(1, 3), torch.tensor(sigmas), {"seed": 0})
    assert "\n" not in str(raised.value)


def test_a_broken_model_is_named():
    with pytest.raises(NonFiniteError, match="network returned nan"):
        sampler_function(model(True, lambda x, s: x * math.nan), normal(1, 3), levels(True), solver="euler")
