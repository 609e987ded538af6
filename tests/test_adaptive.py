"""Dopri5: error in proportion to the tolerance, a step of its own for every sample, landing, leaving, refusals."""

from __future__ import annotations

import math

import pytest
import torch

import fluvial as fl
from fluvial import adaptive, encode, random, sample
from fluvial.adaptive import AdaptiveRun
from fluvial.errors import NonFiniteError, OptionError, PathTimeError
from fluvial.model import Model, Normalisation
from fluvial.sampling import integrate
from fluvial.solvers import Dopri5
from problems import PATHS, Counter, Net, mixture, normal, one_line

NAMES = ["rectified", "cosine", "vp", "ve", "edm", "discrete"]
every_path = pytest.mark.parametrize("name", NAMES)


def tight(tolerance, **options):
    return Dopri5(rtol=tolerance, atol=tolerance, **options)


# Errors


@every_path
def test_error_follows_the_tolerance(name):
    """Largest over 32 samples, some of them close to where the flow parts: within 60 tolerances, falling with them."""
    model, noise = mixture().model(PATHS[name]), normal(32, 2)
    exact = sample(model, noise, solver=tight(1e-9))

    def error(tolerance, steps=1):
        return float((sample(model, noise, solver=tight(tolerance), steps=steps) - exact).abs().max())

    errors = [error(tolerance) for tolerance in (1e-3, 1e-5, 1e-7)]
    assert errors[0] < 60e-3
    assert errors[1] < min(60e-5, errors[0] / 5)
    # A table's cubic pieces are joined with kinks, where the error is not seen to fall with the fifth power.
    assert errors[2] < min(150e-7 if name == "discrete" else 20e-7, errors[1] / 5)
    assert error(1e-5, steps=3) < 60e-5


@pytest.mark.parametrize("name", ["rectified", "vp", "edm"])
def test_agrees_with_many_small_steps(name):
    model, path = mixture().model(PATHS[name]), PATHS[name]
    times = [path.time(-8.5 + 0.05 * k) for k in range(261)]
    x = math.hypot(*path(times[0])[:2]) * normal(16, 2)
    expected = integrate(model, x, times, solver="rk4")
    torch.testing.assert_close(
        integrate(model, x, [times[0], times[-1]], solver=tight(1e-9)), expected, rtol=0, atol=2e-5
    )


@every_path
def test_landing_error_is_within_the_tolerance(name):
    """One Gaussian, whose ODE is known: data = mean + std * noise, wherever the path ends at sigma = 0."""
    std = 0.5
    mix = fl.exact.GaussianMixture(torch.tensor([[0.3, -0.2]]), torch.tensor([std]), torch.ones(1))
    path, noise = PATHS[name], normal(32, 2)
    c, x = path(0.0), path(0.0).sigma * noise
    exact = mix.means + std * (x - c.alpha * mix.means) / math.hypot(c.sigma, c.alpha * std)
    for tolerance in (1e-3, 1e-5, 1e-7):
        found = sample(mix.model(path), noise, solver=tight(tolerance))
        # Landing from sigma multiplies the distance to the mean by 1 - sigma²/(2 std²).
        stop = path(1.0).sigma / path(1.0).alpha
        rest = float(noise.abs().max()) * stop**2 / (2 * std)
        assert float((found - exact).abs().max()) < 25 * tolerance + 1.1 * rest


@pytest.mark.parametrize("name", PATHS)
def test_exact_on_one_point(name):
    point = fl.exact.Empirical(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    found = sample(point.model(PATHS[name]), normal(8, 2), solver="dopri5")
    torch.testing.assert_close(found, point.points.expand(8, 2), rtol=1e-14, atol=1e-14)


def test_exact_on_a_straight_flow_in_few_calls():
    noise = normal(8, 2)
    shift = normal(8, 2, seed=1)
    model = Model(lambda x, t, shift: shift, "rectified")
    tr = sample(model, noise, solver="dopri5", cond={"shift": shift}, record=True)
    torch.testing.assert_close(tr.samples, noise + shift, rtol=1e-14, atol=1e-14)
    assert tr.nfe <= 26


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_precision_of_the_network(dtype):
    noise = random.normal(16, (2,), 1)
    exact = sample(Model(Net(dtype=torch.float64), "rectified"), noise.double(), solver=tight(1e-9))
    tr = sample(Model(Net(dtype=dtype), "rectified"), noise, solver="dopri5", record=True)
    assert tr.samples.dtype == torch.float32
    assert float((tr.samples - exact).abs().max()) < (0.1 if dtype == torch.bfloat16 else 5e-4)
    assert tr.nfe < 600


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("along", ["rectified", "cosine", "vp"])
def test_another_clock_gives_the_same_samples(name, along):
    """To the tolerance, and where the clock's path begins later than the model's, to the (alpha/sigma)² there."""
    model, noise, clock = mixture().model(PATHS[name]), normal(16, 2), PATHS[along]
    expected = sample(model, noise, solver=tight(1e-9), times=[0.0, 0.4, 1.0], record=True)
    found = sample(model, noise, solver=tight(1e-6, along=clock), times=[0.0, 0.4, 1.0], record=True)
    late = max(clock.log_snr(0.0) - PATHS[name].log_snr(0.0), 0.0)
    tolerance = 2e-5 + (4 * math.exp(clock.log_snr(0.0)) if late else 0.0)
    torch.testing.assert_close(found.x, expected.x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.data[1:], expected.data[1:], rtol=tolerance, atol=tolerance)


def test_clock_of_its_own_path_changes_nothing():
    model, noise = mixture().model(PATHS["vp"]), normal(4, 2)
    assert torch.equal(sample(model, noise, solver=Dopri5(along=fl.paths.VP())), sample(model, noise, solver="dopri5"))


# Every sample by itself


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", ["network", "exact"])
def test_sample_does_not_depend_on_its_batch(kind, dtype, tolerance):
    model = Model(Net(dtype=dtype), "rectified") if kind == "network" else mixture().model(PATHS["vp"])
    noise = random.normal(64, (2,), 9, dtype=dtype)
    whole = sample(model, noise, solver="dopri5", steps=2)
    for first, count in [(0, 1), (0, 7), (13, 7), (63, 1)]:
        part = sample(model, noise[first : first + count], solver="dopri5", steps=2, first=first)
        assert float((part - whole[first : first + count]).abs().max()) <= tolerance
    assert torch.equal(sample(model, noise, solver="dopri5", steps=2), whole)
    drawn = [sample(model, (n, 2), solver="dopri5", seed=9, record=True).x[0, 0] for n in (1, 7, 64)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_samples_that_have_arrived_cost_nothing():
    """Half of the samples are hard; the easy ones make as many calls as alone, and conditions go with them."""
    sizes = []

    def network(x, t, speed):
        sizes.append(len(x))
        return torch.sin(speed[:, None] * t[:, None]) + 0 * x

    model, noise = Model(network, "rectified"), normal(8, 2)
    speed = torch.tensor([0.5, 40.0] * 4, dtype=torch.float64)
    run = AdaptiveRun(model, Dopri5(), [0.0, 0.5, 1.0], {"speed": speed})
    *_, last = run.reports(noise)
    assert run.nfe == last.nfe == len(sizes)
    assert sum(sizes) == int(run.calls.sum())
    assert run.calls[1::2].min() > 2 * run.calls[::2].max()
    assert run.nfe / 2 < int(run.calls.max()) <= run.nfe
    alone = AdaptiveRun(model, Dopri5(), [0.0, 0.5, 1.0], {"speed": speed[:1]})
    *_, own = alone.reports(noise[:1])
    assert int(alone.calls[0]) == int(run.calls[0])
    torch.testing.assert_close(own.x, last.x[:1], rtol=1e-12, atol=1e-12)
    exact = noise + ((1 - torch.cos(speed)) / speed)[:, None]
    torch.testing.assert_close(last.x, exact, rtol=1e-3, atol=1e-3)


def test_guidance_and_labels_go_with_the_samples():
    model, noise = mixture().model(PATHS["cosine"]), normal(12, 2)
    given = {"cond": {"label": torch.arange(12) % 4}, "guidance": fl.guidance.CFG(1.5)}
    expected = sample(model, noise, solver="rk4", times="log_snr", steps=200, **given)
    torch.testing.assert_close(sample(model, noise, solver="dopri5", **given), expected, rtol=1e-3, atol=1e-3)


# Where it goes, and what is told


def test_times_are_visited_and_recorded():
    norm = Normalisation((1.0, 2.0), (0.5, 4.0))
    network = Counter(Net(dtype=torch.float64))
    model, noise = Model(network, "rectified", normalisation=norm), normal(5, 2)
    told = []
    times = [0.0, 0.3, 0.8, 1.0]
    tr = sample(model, noise, solver="dopri5", times=times, record=True, callback=lambda s: told.append(s.nfe))
    assert tr.times == times
    assert tr.nfe == network.calls == told[-1]
    assert told == sorted(told)
    assert max(network.times) < 1.0
    for k in range(3):
        if k < 2:
            data = norm.invert(model(tr.x[k], times[k]).data)
            torch.testing.assert_close(tr.data[k], data, rtol=1e-6, atol=1e-6)  # the network's clock is float32
        half = sample(model, state=tr.x[k], solver=tight(1e-9), times=times[k : k + 2])
        torch.testing.assert_close(half, norm.invert(tr.x[3]) if k == 2 else tr.x[k + 1], rtol=1e-3, atol=1e-3)
    assert torch.equal(tr.samples, norm.invert(tr.x[-1]))


@pytest.mark.parametrize("name", ["rectified", "vp", "edm"])
def test_lands_from_a_time_beyond_its_own_level(name):
    path = PATHS[name]
    network = Counter(lambda x, t: torch.zeros_like(x))
    model = Model(network, path, "data")
    late = path.time(18.0)
    if late < 1.0:
        assert sample(model, normal(2, 2), solver="dopri5", times=[late, 1.0]).tolist() == [[0.0, 0.0]] * 2
        assert network.times == [pytest.approx(late)]


@pytest.mark.parametrize("name", NAMES)
def test_way_back_is_the_way_there_reversed(name):
    model, path = mixture().model(PATHS[name]), PATHS[name]
    x = math.hypot(*path(0.2)[:2]) * normal(8, 2)
    there = integrate(model, x, [0.2, 0.5, 0.9], solver=tight(1e-8))
    torch.testing.assert_close(integrate(model, there, [0.9, 0.2], solver=tight(1e-8)), x, rtol=1e-6, atol=1e-6)


@every_path
def test_encode_and_back(name):
    """The typical error of the way there and back is the tolerance."""
    model, data = mixture().model(PATHS[name]), mixture().sample(64, seed=1, dtype=torch.float64)
    for tolerance in (1e-3, 1e-5):
        noise = encode(model, data, solver=tight(tolerance))
        error = (sample(model, noise, solver=tight(tolerance)) - data).abs()
        assert float(error.median()) < 3 * tolerance
    times = [0.0, 0.5, path_end(name), 1.0]
    again = encode(model, data, solver=tight(1e-5), times=times)
    assert float((again - noise).abs().median()) < 1e-4


def path_end(name):
    """A time beyond the level the solver would land from, where the path has one."""
    return min(PATHS[name].time(18.0), 0.999)


def test_noise_of_a_gaussian_is_known():
    mix = fl.exact.GaussianMixture(torch.tensor([[3.0]]), torch.tensor([0.5]), torch.ones(1))
    data = mix.sample(50, seed=0, dtype=torch.float64)
    noise = encode(mix.model(PATHS["rectified"]), data, solver="dopri5")
    torch.testing.assert_close(noise, (data - 3.0) / 0.5, rtol=1e-4, atol=1e-4)


def test_gradient_goes_through_the_run():
    model = Model(lambda x, t, gain: gain * x, "rectified")
    noise, gain = normal(3, 2), torch.full((3, 1), 0.7, dtype=torch.float64, requires_grad=True)
    samples = sample(model, noise, solver="dopri5", cond={"gain": gain}, differentiable=True)
    (grad,) = torch.autograd.grad(samples.sum(), gain)
    # data = noise exp(gain), up to the landing.
    torch.testing.assert_close(grad, (noise * math.exp(0.7)).sum(1, keepdim=True), rtol=1e-3, atol=1e-3)


def test_progress_changes_nothing(capsys):
    model, noise = mixture().model(PATHS["vp"]), normal(3, 2)
    assert torch.equal(sample(model, noise, solver="dopri5", progress=True), sample(model, noise, solver="dopri5"))
    assert "100%" in capsys.readouterr().out


# Refusals


def test_start_that_cannot_be_is_refused_before_the_first_call():
    network = Counter(lambda x, t: x)
    with pytest.raises(PathTimeError, match="noise end"):
        sample(Model(network, "rectified", "noise"), (2, 2), solver="dopri5")
    with pytest.raises(PathTimeError, match="data end"):
        integrate(Model(network, "vp", "noise"), normal(2, 2), [0.0, 1.0], solver="dopri5")
    assert network.calls == 0


def test_count_of_calls_is_not_known_before():
    with pytest.raises(OptionError, match="depend on the samples"):
        fl.sampling.nfe(mixture().model(PATHS["vp"]), "dopri5")


def test_ode_that_cannot_be_solved_ends_with_the_time(monkeypatch):
    wall = Model(lambda x, t: (t - 0.5).abs()[:, None] ** -1.5 + 0 * x, "rectified")
    with pytest.raises(OptionError, match=r"needs steps below 1e-12 at t = 0\.5") as caught:
        sample(wall, normal(2, 2), solver="dopri5")
    one_line(caught.value)
    monkeypatch.setattr(adaptive, "_MOST_CALLS", 500)
    rough = Model(lambda x, t: 1e4 * torch.sign(torch.sin(1e6 * x)), "rectified")
    with pytest.raises(OptionError, match=r"made 5\d\d calls at t ="):
        sample(rough, normal(2, 2), solver=tight(1e-7))


def test_numbers_that_are_not_finite_are_traced():
    def breaks(x, t):
        return torch.where(((t > 0.5) & (x[:, 0] > 0))[:, None], torch.nan, x)

    noise = torch.tensor([[-1.0, 1.0], [1.0, 2.0], [-1.0, 0.0]])
    model = Model(breaks, "rectified")
    with pytest.raises(NonFiniteError, match=r"the network returned nan in samples 1 near t = 0\.5") as caught:
        sample(model, noise, solver="dopri5")
    one_line(caught.value)
    assert sample(model, noise, solver="dopri5", check=False).isfinite().all(1).tolist() == [True, False, True]
    noise[2, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the start holds nan in 1 of 3 samples \(2\)"):
        sample(mixture().model(PATHS["vp"]), noise, solver="dopri5")


def test_tolerances_must_be_positive():
    with pytest.raises(OptionError, match="positive"):
        Dopri5(rtol=0.0)
