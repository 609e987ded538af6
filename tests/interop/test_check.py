"""Which convention is it: exact networks of every one, small trained ones, and a released one that hides its range."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from foreign_nets import NETS, bare, problem
from hostile import WEIGHTS, mnist, scale_blind
from torch import nn

from fluvial import paths
from fluvial.convention import Clock, Normalisation
from fluvial.errors import DataError, OptionError, ShapeError
from fluvial.flow_maps import FlowMap
from fluvial.interop import check_convention, from_callable
from fluvial.model import Model, convert
from fluvial.objectives import Objective
from problems import Net, mixture, normal, one_line

A_LIST: Any = [1.0]
A_NUMBER: Any = 3
LINEAR, STEPS = "linear betas, a table of 1000", "steps 0 … 999 from the data"
UP, DOWN = "t from noise 0 to data 1", "u from data 0 to noise 1"
ANSWERS = {
    "ddpm": ("noise", LINEAR, STEPS),
    "ddpm v": ("v", LINEAR, STEPS),
    "ddpm_cosine": ("noise", "cosine table of 1000", STEPS),
    "score_sde_vp": ("noise", LINEAR, STEPS),
    "score_sde_vp function": ("score", LINEAR, DOWN),
    "score_sde_ve": ("score", "data + sigma noise", "sigma"),
    "edm": ("data", "data + sigma noise", "sigma"),
    "flow_matching": ("velocity", "rectified", UP),
    "sit gvp": ("velocity", "cosine path", UP),
    "sd3_flux": ("flow", "rectified", "1000 u from the data"),
}


def samples(n: int = 512):
    """Data in [0, 1], although the networks of `NETS` know them in [-1, 1]: both ends are touched."""
    data = problem().sample(n).clamp(-1.0, 1.0)
    data[0], data[1] = -1.0, 1.0
    return (data + 1.0) / 2.0


@pytest.mark.parametrize("name", ANSWERS)
def test_the_right_one_of_all_is_named(name):
    report = check_convention(NETS[name][0], samples())
    best = report.best
    assert (best.prediction, best.schedule, best.time, best.data) == (*ANSWERS[name], "[-1, 1]")
    assert report.alike == (best,), "the data tell it from all others"
    assert report.blind == ()
    assert report.fits
    assert report.agrees is None
    assert report.verdict.startswith(f"looks like: {best.prediction}, {best.schedule}, {best.time}, data in [-1, 1]; ")
    assert "x worse" in report.verdict
    ratios = [c.ratio for c in report.candidates]
    assert ratios[0] == 1.0
    assert ratios == sorted(ratios)
    # Every reading but the last few is far off.
    assert ratios[len(ratios) // 2] > 2.0
    json.dumps(report.config(), allow_nan=False)


def test_an_inner_network_behind_its_preconditioning():
    """EDM's F sees x/√(sigma² + 1/4) and log(sigma)/4, and puts out (sigma data/.5 - .5 noise)/√(sigma² + 1/4)."""

    def level(t):
        return torch.ones_like(t), (4 * t).exp()

    f = bare(level, lambda a, s, data, noise: (2 * s * data - noise / 2) / (s * s + 0.25).sqrt())

    def inner(y, t):
        return f(y.double() * (level(t.double())[1].square() + 0.25).sqrt()[:, None], t).to(y.dtype)

    report = check_convention(inner, samples())
    assert (report.best.prediction, report.best.data, report.blind) == ("edm", "[-1, 1]", ())
    assert report.told["prediction"] == ("edm",)


def test_the_error_is_the_irreducible_one():
    """An exact network's error is its problem's: E |E[data | x] - data|², which another path's exact model has too."""
    found = [check_convention(NETS[name][0], samples()).best.levels for name in ("ddpm", "edm", "flow_matching")]
    for levels in found[1:]:
        torch.testing.assert_close(torch.tensor(levels), torch.tensor(found[0]), rtol=0.1, atol=0)
    model = problem().model(paths.Rectified())
    data, noise = problem().sample(20000, dtype=torch.float64), normal(20000, 2)
    t = model.path.time(-4.0 - 2.0 * float(data.std().log()))
    c = model.path(t)
    error = (model(c.alpha * data + c.sigma * noise, t).data - data).square().mean() / data.var()
    assert found[0][0] == pytest.approx(float(error), rel=0.25)


def test_the_report_gives_the_model():
    """What was found, used as found: its estimates are the exact ones, in the data's own units."""
    model = check_convention(NETS["ddpm v"][0], samples()).best.model()
    assert model.normalisation.shift == (0.5,)
    assert model.normalisation.scale == (0.5,)
    x, t = normal(4, 2), 1 - 600 / 999
    torch.testing.assert_close(model(x, t).data, problem().model(model.path)(x, t).data, rtol=0, atol=1e-9)


def test_loss_is_the_training_loss():
    net, _ = NETS["flow_matching"]
    report = check_convention(net, samples(4096), n=4096, candidates=["flow_matching"])
    model = Model(net, "rectified", "velocity")
    data = report.best.convention.normalisation.apply(samples(4096))
    wanted = Objective(times="uniform")(model, data, seed=1).mean()
    assert report.loss == pytest.approx(float(wanted), rel=0.06)


@pytest.mark.parametrize("n", [8, 9, 33])
def test_few_samples_and_few_data(n):
    named = ["ddpm", "torchcfm", "sit", "sd3_flux"]
    best = check_convention(NETS["flow_matching"][0], samples(40), n=n, candidates=named).best
    assert (best.prediction, best.schedule, best.data) == ("velocity", "sit", "[-1, 1]")
    assert len(check_convention(NETS["flow_matching"][0], samples(2), n=n, candidates=named).candidates) >= 6


# Trained networks


def trained(prediction: str, clock, path, steps: int = 500) -> nn.Module:
    """A small network trained for a second on `problem` under this convention."""
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(12, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

        def forward(self, x, t):
            part = t[:, None] / clock.scale if clock.scale > 0 else 1 + t[:, None] / clock.scale
            angles = part * torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
            return self.layers(torch.cat((x, angles.sin(), angles.cos()), 1))

    net = Small()
    model, objective = Model(net, path, prediction, clock=clock), Objective(times="uniform")
    data, optimizer = problem().sample(4096), torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(steps):
        loss = objective(model, data[(step * 256) % 4096 :][:256], seed=step).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def test_a_trained_network_is_recognised():
    net = trained("v", Clock.noise_level(1.0), "cosine").train()
    report = check_convention(net, samples())
    assert net.training, "it is left as it was"
    assert report.best.reading == {"prediction": "v", "schedule": "cosine path", "time": DOWN, "data": "[-1, 1]"}
    assert report.told["prediction"] == ("v",)


# What a model states


def test_a_model_is_held_to_what_it_states():
    net, _ = NETS["flow_matching"]
    normalisation = Normalisation((0.5,), (0.5,))
    right = from_callable(net, "flow_matching", normalisation=normalisation)
    report = check_convention(right, samples())
    assert report.agrees
    assert report.stated is not None
    assert report.stated.ratio < 1.05
    for wrong in (
        from_callable(net, "flow_matching"),
        from_callable(net, "sd3_flux", normalisation=normalisation),
        convert(from_callable(net, "sit", path="gvp", normalisation=normalisation), "vp", "noise"),
    ):
        report = check_convention(wrong, samples())
        assert report.agrees is False
        assert report.best.prediction == "velocity"
        assert report.best.schedule == "rectified"
        assert "what the model states is" in report.verdict


def test_conditions_reach_the_network():
    """With its label the exact network of a mixture knows more; the null condition stands in where none is given."""
    gm = problem()
    exact = gm.model(paths.Rectified())
    data, label = gm.sample_with_labels(512)
    model = Model(exact.network, "rectified", "v", null={"label": 3})
    errors = [check_convention(model, data, cond=c, candidates=[model.convention]) for c in (None, {"label": label})]
    assert errors[1].best.error < 0.7 * errors[0].best.error
    assert all(report.agrees for report in errors)


# What cannot be told


def test_the_same_in_two_names_cannot_be_told():
    report = check_convention(NETS["ddpm"][0], samples(), candidates=["score_sde_vp", "ddpm", "sd3_flux"])
    assert set(report.told["schedule"]) == {"ddpm", "score_sde_vp"}
    assert "schedule cannot be told: " in report.verdict
    assert "runner-up" in report.verdict


def test_blindness_is_noticed():
    exact = NETS["flow_matching"][0]

    def normalised(x, t):
        y = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        return exact(y, t)

    report = check_convention(normalised, samples())
    assert report.blind == ("scale", "offset")
    timeless = check_convention(lambda x, t: exact(x, torch.full_like(t, 0.5)), samples())
    assert timeless.blind == ("time",)
    assert "does not depend on its time" in timeless.verdict


@pytest.mark.parametrize(
    "net", [lambda x, t: torch.zeros_like(x), lambda x, t: torch.full_like(x, float("nan")), Net()]
)
def test_what_knows_nothing_fits_nothing(net):
    report = check_convention(net, samples(), n=64)
    assert not report.fits
    assert report.verdict.startswith("fits no candidate: ")
    json.dumps(report.config(), allow_nan=False)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs the shared weights")
def test_a_released_network_that_is_blind_to_its_input_scale():
    """noise, 1000 steps of linear betas, mean squared error .030: that is what its source says of it."""
    net, images = scale_blind(), mnist(256)
    report = check_convention(net, images, candidates=["ddpm", "sd3_flux"])
    assert (report.best.prediction, report.best.schedule, report.best.data) == ("noise", "ddpm", "[-1, 1]")
    assert report.blind == ("scale", "offset")
    assert "blind to the scale and offset of its input" in report.verdict
    assert "untestable" in report.verdict
    assert report.loss == pytest.approx(0.030, abs=0.004)
    model = from_callable(net, "ddpm", whole=True, normalisation=Normalisation((0.5,), (0.5,)))
    wanted = Objective(times="uniform", target="noise")(model, model.normalisation.apply(images), seed=1).mean()
    assert report.loss == pytest.approx(float(wanted), rel=0.2)


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_convention(lambda x, t: x, torch.ones(9, 2)), DataError, "standard deviation of 0.0"),
        (lambda: check_convention(lambda x, t: x, torch.full((9, 2), float("nan"))), DataError, "deviation of nan"),
        (lambda: check_convention(lambda x, t: x, torch.ones(9)), ShapeError, r"data has shape \(9,\)"),
        (lambda: check_convention(lambda x, t: x, A_LIST), ShapeError, "data has list"),
        (lambda: check_convention(lambda x, t: x, normal(9, 2), n=3), OptionError, "n is 3; expected"),
        (lambda: check_convention(A_NUMBER, normal(9, 2)), OptionError, "the network is int"),
        (
            lambda: check_convention(lambda x, t: x, normal(9, 2), cond={"y": torch.ones(3)}),
            ShapeError,
            "condition 'y' does not fit; expected a tensor with 9 entries",
        ),
        (
            lambda: check_convention(lambda x, t, y: x, normal(9, 2)),
            OptionError,
            "cannot be called under any.*TypeError",
        ),
        (lambda: check_convention(lambda x, t: x[:, :1], normal(9, 2)), OptionError, r"it returned shape \(64, 1\)"),
        (
            lambda: check_convention(lambda x, t: x, normal(9, 2), candidates=["sdxl"]),
            OptionError,
            "unknown convention",
        ),
        (
            lambda: check_convention(FlowMap(mixture().model(paths.Rectified())), normal(9, 2)),
            OptionError,
            "is a flow map and does not denoise",
        ),
    ],
)
def test_bad_input_has_one_clear_error(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    one_line(caught.value)
