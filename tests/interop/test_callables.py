"""Foreign functions in and out: exact networks of every convention, and the solvers of other libraries."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from foreign_nets import NETS, problem
from torch import nn

from fluvial import paths
from fluvial.convention import Clock, Convention, Normalisation
from fluvial.errors import OptionError, PathTimeError, ShapeError
from fluvial.interop import as_denoiser, as_velocity, from_callable
from fluvial.model import Model, convert
from fluvial.predictions import Noise, named
from fluvial.sampling import sample
from problems import PATHS, PREDICTIONS, Net, mixture, normal, odd_mixture, one_line, pair, state

NOT_CALLABLE: Any = 3

all_paths = pytest.mark.parametrize("name", PATHS)


def brought_in(name):
    net, options = NETS[name]
    return from_callable(net, name.split()[0], shape=(2,), **options)


# In


@pytest.mark.parametrize("name", NETS)
def test_every_convention_gives_the_exact_pair(name):
    """The networks know nothing of the library: each computes its own alpha and sigma from the time it is given."""
    model, gm = brought_in(name), problem()
    # At the steps of a table, if it is one: between them everybody's interpolation is its own.
    cells = len(getattr(model.path, "alphas_cumprod", range(1001))) - 1
    for part in (0.05, 0.3, 0.5, 0.8, 0.97):
        t = round(part * cells) / cells
        c, x = model.path(t), state(gm, model.path, t)
        data, noise = pair(gm, x, c.alpha, c.sigma)
        est = model(x, t)
        scale = max(1.0, c.sigma / max(c.alpha, 1e-9))
        torch.testing.assert_close(est.data, data, rtol=0, atol=1e-9 * scale)
        torch.testing.assert_close(est.noise, noise, rtol=0, atol=1e-9 * max(1.0, c.alpha / c.sigma))


def test_a_model_brought_in_samples_the_law():
    """The mean of its exact problem within four standard errors of 512 samples, and the spread within 12 %."""
    gm = problem()
    wanted = gm.sample(20000, seed=5)
    for name in ("ddpm", "edm", "sd3_flux", "torchcfm"):
        x = sample(brought_in(name), 512, solver="dpmpp_2m", steps=20, seed=0)
        error = (x.mean(0) - wanted.mean(0)).abs() / (wanted.std(0) / 512**0.5)
        assert float(error.max()) < 4.0, name
        assert float((x.std(0) / wanted.std(0) - 1).abs().max()) < 0.12, name


def test_what_is_beside_the_network():
    seen = []

    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x, t, label, text):
            seen.append((t, label, text))
            return torch.cat((self.weight * x, x + 9.0), 1)

    net = Labelled().eval()
    normalisation = Normalisation((0.5,), (0.5,))
    model = from_callable(
        net,
        "ddpm",
        null={"label": 10},
        shape=(2, 3),
        normalisation=normalisation,
        whole=True,
        learned_variance=True,
        prediction="data",
    )
    x = normal(4, 2, 3, dtype=torch.float32)
    out = model(x, 0.5004, text=torch.arange(4))
    time, label, text = seen[0]
    assert torch.equal(time, torch.full((4,), 499))
    assert time.dtype == torch.int64
    assert torch.equal(label, torch.full((4,), 10))
    assert torch.equal(text, torch.arange(4))
    assert torch.equal(out.data, x), "the second half of the channels is a variance"
    assert (model.shape, model.normalisation) == ((2, 3), normalisation)
    assert [p is net.weight for p in model.parameters()] == [True]
    assert not model.network.training  # type: ignore[union-attr]
    assert from_callable(net, "sit").network is net


def test_a_convention_of_your_own():
    own = Convention(paths.VP(), Noise(), Clock.noise_level(7.0), shape=(2,))
    model = from_callable(lambda x, t: x * t[:, None], own)
    assert model.convention == own
    x = normal(3, 2)
    torch.testing.assert_close(model(x, 0.25).noise, 5.25 * x)


# Out: the denoiser


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@all_paths
def test_denoiser_is_the_posterior_mean(name, dtype):
    """For x = data + sigma noise, alpha = 1, from a model on any path; a float, a () and a (B,) sigma alike."""
    path, gm = PATHS[name], mixture()
    denoise = as_denoiser(gm.model(path))
    tolerance = 1e-9 if dtype == torch.float64 else 3e-4
    sigmas = [0.05, 0.3, 1.0, 4.0]
    x = torch.cat([state(gm, paths.EDM(), paths.EDM().time(-2 * torch.tensor(s).log().item()), 1) for s in sigmas])
    for n in (1, 3):
        for sigma in sigmas:
            given, wanted = x[:n].to(dtype), pair(gm, x[:n], 1.0, sigma)[0]
            found = denoise(given, sigma)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)
            torch.testing.assert_close(denoise(given, torch.tensor(sigma, dtype=dtype)), found, rtol=0, atol=tolerance)
    wanted = torch.cat([pair(gm, x[i : i + 1], 1.0, s)[0] for i, s in enumerate(sigmas)])
    found = denoise(x.to(dtype), torch.tensor(sigmas, dtype=dtype))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)


def test_denoiser_of_every_prediction_and_shape():
    gm = odd_mixture()
    x = 2.0 * normal(5, 3, 1, 2)
    wanted = pair(gm, x, 1.0, 1.7)[0]
    for path in ("rectified", "discrete", "ve"):
        for prediction in [*PREDICTIONS.values(), named("flow")]:
            model = convert(gm.model(PATHS[path]), prediction=prediction)
            torch.testing.assert_close(as_denoiser(model)(x, 1.7), wanted, rtol=0, atol=1e-9)
    label = torch.tensor([0, 1, 2, 0, 1])
    conditional = as_denoiser(gm.model(PATHS["vp"]))(x, 1.7, label=label)
    expected = as_denoiser(gm.model(PATHS["edm"]))(x, 1.7, label=label)
    torch.testing.assert_close(conditional, expected, rtol=0, atol=1e-9)
    assert float((conditional - wanted).abs().max()) > 0.01


def test_denoiser_goes_round():
    """A foreign denoiser that comes in and goes out again is the same function; nothing is lost at no noise."""
    net, _ = NETS["edm"]
    denoise = as_denoiser(brought_in("edm"))
    x = normal(6, 2)
    for sigma in (0.01, 0.5, 20.0):
        torch.testing.assert_close(
            denoise(x, sigma), net(x, torch.full((6,), sigma, dtype=x.dtype)), rtol=0, atol=1e-12
        )
    torch.testing.assert_close(as_denoiser(brought_in("flow_matching"))(x, 0.0), x, rtol=0, atol=1e-12)
    # A table stops short of the data: past its last entry its estimate there stays, of the state rescaled to it.
    path = brought_in("ddpm").path
    last = path(1.0)
    wanted = pair(problem(), x * (last.alpha**2 + last.sigma**2) ** 0.5, last.alpha, last.sigma)[0]
    torch.testing.assert_close(as_denoiser(brought_in("ddpm"))(x, 0.0), wanted, rtol=0, atol=1e-9)


def test_denoiser_is_differentiable():
    """Its gradient is that of the closed form."""
    gm = mixture()
    x = normal(4, 2).requires_grad_()
    out = as_denoiser(gm.model(PATHS["discrete"]))(x, 0.8)
    wanted = pair(gm, x, 1.0, 0.8)[0]
    cotangent = normal(4, 2, seed=3)
    (found,) = torch.autograd.grad(out, x, cotangent)
    (expected,) = torch.autograd.grad(wanted, x, cotangent)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_denoiser_keeps_half_precision_and_the_network_its_own():
    model = from_callable(Net(), "flow_matching")
    x = normal(4, 2, dtype=torch.float32)
    found = as_denoiser(model)(x.half(), 0.5)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), as_denoiser(model)(x.half().float(), 0.5), rtol=1e-3, atol=1e-3)


def test_a_sampler_of_denoisers_takes_it():
    """k-diffusion's Euler, x + (sigma' - sigma) (x - D)/sigma, is our natural Euler step (DDIM) on the EDM path."""
    path = paths.EDM(0.05, 20.0)
    times = [0.0, 0.3, 0.5, 0.8, 1.0]
    sigmas = [*(path(t).sigma for t in times[:-1]), 0.0]  # both end on the data
    noise = normal(8, 2)
    for source in ("rectified", "discrete", "edm"):
        model, x = problem().model(PATHS[source]), sigmas[0] * noise
        denoise = as_denoiser(model)
        for sigma, after in itertools.pairwise(sigmas):
            x = x + (after - sigma) * (x - denoise(x, sigma * torch.ones(8).double())) / sigma
        ours = sample(convert(model, path), noise, solver="ddim", times=times)
        torch.testing.assert_close(x, ours, rtol=0, atol=1e-9)


# Out: the velocity


@all_paths
def test_velocity_is_that_of_the_rectified_path(name):
    gm, field = mixture(), as_velocity(mixture().model(PATHS[name]))
    for t in (0.05, 0.5, 0.95):
        x = state(gm, paths.Rectified(), t)
        data, noise = pair(gm, x, t, 1 - t)
        torch.testing.assert_close(field(t, x), data - noise, rtol=0, atol=1e-8)


def test_velocity_takes_either_order():
    """A time is what has no dimension but the batch; names and `order` say it too."""
    model = from_callable(Net(dtype=torch.float64), "flow_matching")
    field, x = as_velocity(model), normal(3, 2)
    wanted = model(x, 0.25).velocity
    times = [0.25, torch.tensor(0.25).double(), torch.full((1,), 0.25).double(), torch.full((3,), 0.25).double()]
    for t in times:
        for found in (field(t, x), field(x, t), field(x=x, t=t), field(x, t=t)):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(as_velocity(model, order="t, x")(t, x), wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(as_velocity(model, order="x, t")(x, t), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", ["data", "noise", "velocity"])
def test_velocity_is_finite_at_and_beyond_the_ends(prediction):
    model = convert(problem().model(PATHS["rectified"]), prediction=prediction)
    bare = Model(lambda x, t: model(x, t).predict(named(prediction)), "rectified", prediction)
    field, x = as_velocity(bare), normal(4, 2)
    for t in (-0.1, 0.0, 1.0, 1.2):
        found = field(torch.tensor(t), x)
        assert bool(found.isfinite().all()), (prediction, t)
        assert torch.equal(found, field(torch.tensor(min(max(t, 0.0), 1.0)), x))
    if prediction == "velocity":
        torch.testing.assert_close(field(0.0, x), problem().model(PATHS["rectified"])(x, 0.0).velocity)


def test_solvers_of_others_take_it():
    """torchdiffeq's dopri5 and flow_matching's solver follow our flow; past a table's end to its noise."""
    odeint = pytest.importorskip("torchdiffeq").odeint
    noise, ends = normal(6, 2), torch.tensor([0.0, 1.0]).double()
    for name, tolerance in (("vp", 1e-4), ("discrete", 5e-3)):
        model = problem().model(PATHS[name])
        wanted = sample(convert(model, "rectified"), noise, solver="rk4", steps=100)
        field = as_velocity(model)
        found = odeint(field, noise, ends, rtol=1e-6, atol=1e-6, method="dopri5")[-1]
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    solver = pytest.importorskip("flow_matching.solver").ODESolver(as_velocity(problem().model(PATHS["rectified"])))
    theirs, x = solver.sample(noise, step_size=0.125, method="midpoint", time_grid=ends), noise
    for t in torch.arange(8) / 8:
        data, eps = pair(problem(), x, float(t), 1 - float(t))
        middle = x + (data - eps) / 16
        data, eps = pair(problem(), middle, float(t) + 1 / 16, 15 / 16 - float(t))
        x = x + (data - eps) / 8
    torch.testing.assert_close(theirs, x, rtol=0, atol=1e-9)


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: from_callable(NOT_CALLABLE, "ddpm"), OptionError, "net is int; expected a callable"),
        (lambda m: from_callable(Net(), "sdxl"), OptionError, "unknown convention 'sdxl'; expected one of ddpm"),
        (lambda m: as_denoiser(m)(normal(3, 2), -1.0), PathTimeError, "sigma is -1.0; expected a finite noise level"),
        (lambda m: as_denoiser(m)(normal(3, 2), float("nan")), PathTimeError, "sigma is nan"),
        (lambda m: as_denoiser(m)(normal(3, 2), torch.ones(2)), ShapeError, r"sigma has shape \(2,\) for a batch of 3"),
        (lambda m: as_velocity(m, "xt"), OptionError, "unknown order 'xt'; expected one of t, x, x, t"),
        (lambda m: as_velocity(m)(normal(3, 2), normal(3, 2)), ShapeError, r"was given \(3, 2\) and \(3, 2\)"),
        (lambda m: as_velocity(m)(0.5, 0.5), ShapeError, "was given float and float; expected a state"),
        (lambda m: as_velocity(m)(x=normal(3, 2)), OptionError, "no state or no time"),
    ],
)
def test_bad_input_has_one_clear_error(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(problem().model(PATHS["vp"]))
    one_line(caught.value)
