"""Certificates: exact models keep every law on every path, misread ones do not, and ranges are those of the paths."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from foreign_nets import NETS, problem
from hostile import WEIGHTS, mnist, scale_blind

from fluvial import paths
from fluvial.convention import Clock, Normalisation
from fluvial.errors import DataError, OptionError, ShapeError
from fluvial.exact import Empirical, GaussianMixture
from fluvial.flow_maps import FlowMap
from fluvial.interop import certify, foreign, from_callable
from fluvial.model import Model, convert
from problems import PATHS, PREDICTIONS, Net, mixture, normal, odd_mixture, one_line


def figure(certificate, start):
    (found,) = [f for f in certificate.figures if f.what.startswith(start)]
    return found


@pytest.mark.parametrize("name", PATHS)
def test_exact_models_keep_every_law(name):
    for gm in (mixture(), odd_mixture()):
        certificate = certify(gm.model(PATHS[name]))
        assert certificate.ok, str(certificate)
        assert len(certificate.figures) == 17
        trips = [f.found for f in certificate.figures if f.what.startswith("round trip")]
        assert max(trips) < 1e-4, "rounding of float32"
        # The closed form: the posterior mean of the one Gaussian is near that of the mixture in much noise.
        assert figure(certificate, "distance from the fitted Gaussian").found < 0.02
        json.dumps(certificate.config(), allow_nan=False)


def test_one_gaussian_is_its_own_fit():
    """D is linear, so the distance is that of the measured mean and variance from the true; errors are 1/(1 + r²)."""
    gm = GaussianMixture(torch.full((1, 4), 0.3), torch.tensor([0.5]), torch.ones(1))
    certificate = certify(gm.model(paths.VP()), gm.sample(20000), n=20000)
    assert figure(certificate, "distance from the fitted Gaussian").found < 1e-4
    for words, level in (("much noise", -3.0), ("as much noise as data", 0.0), ("little noise", 3.0)):
        r2 = math.exp(level)
        found = figure(certificate, f"denoising error, {words}").found
        assert found == pytest.approx(max(1.0, r2) / (1.0 + r2), rel=0.03)
        assert figure(certificate, f"slope of data on estimate, {words}").found == pytest.approx(1.0, abs=0.1)


def test_an_empirical_model_brings_its_points():
    points = problem().sample(300)
    assert certify(Empirical(points).model(paths.Rectified())).ok


@pytest.mark.parametrize("name", NETS)
def test_foreign_networks_keep_the_convention_they_came_under(name):
    net, options = NETS[name]
    data = (problem().sample(400) + 1.0) / 2.0
    normalisation = Normalisation((0.5,), (0.5,))
    model = from_callable(net, name.split()[0], normalisation=normalisation, **options)
    certificate = certify(model, data)
    assert certificate.ok, str(certificate)


WRONG = {
    "prediction": lambda net: Model(net, "rectified", "flow"),
    "clock": lambda net: Model(net, "rectified", clock=Clock.noise_level(1.0)),
    "path": lambda net: Model(net, "ve"),
    "range": lambda net: Model(net, "rectified", normalisation=Normalisation((0.0,), (3.0,))),
    "offset": lambda net: Model(net, "rectified", normalisation=Normalisation((1.5,), (1.0,))),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_misread_network_fails(what):
    net, _ = NETS["flow_matching"]
    data = problem().sample(512)
    assert certify(Model(net, "rectified"), data).ok
    certificate = certify(WRONG[what](net), data)
    assert not certificate.ok
    assert certificate.failed
    assert all("round trip" not in f.what for f in certificate.failed)
    assert str(certificate).startswith(f"fails in {len(certificate.failed)} of 17 figures: ")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_round_trips_of_every_prediction_need_no_data(prediction):
    model = Model(Net(), "cosine", PREDICTIONS[prediction], shape=(2,))
    certificate = certify(model)
    assert certificate.ok
    assert len(certificate.figures) == 7
    # Of the network's own output through another prediction: exact to float32.
    assert max(f.found for f in certificate.figures) < 1e-4


def test_ranges_and_warnings():
    def said(model):
        return " | ".join(certify(model, n=16).warnings)

    gm = mixture()
    ddpm, rectified = gm.model(PATHS["discrete"]), gm.model(PATHS["rectified"])
    assert certify(rectified, n=16).log_snr == (-math.inf, math.inf)
    assert certify(rectified, n=16).config()["log_snr"] == [None, None]
    table: Any = PATHS["discrete"]
    wanted = [math.log(a / (1 - a)) for a in (table.alphas_cumprod[-1], table.alphas_cumprod[0])]
    assert certify(ddpm, n=16).log_snr == pytest.approx(wanted, rel=1e-9)
    assert said(ddpm) == said(rectified) == ""
    seen = convert(ddpm, "rectified")
    assert certify(seen, n=16).log_snr == pytest.approx(wanted, rel=1e-9), "the range of its training, not of the view"
    assert "below log-SNR -10.1" in said(seen)
    assert "above log-SNR 9.21" in said(seen)
    short = gm.model(foreign("ddpm", beta_end=0.01).convention.path)
    assert "(log-SNR -5.06) the state still has 8 % of data" in said(short)
    assert "still has 30 % of noise" in said(gm.model(paths.VE(0.3, 50.0)))
    assert "no score" in said(ddpm.under(independent=False))
    assert "cannot be saved" in said(Model(Net(), "rectified", clock=lambda t: t, shape=(2,)))


def test_conditions_reach_the_network():
    gm = problem()
    data, label = gm.sample_with_labels(400)
    found = [certify(gm.model(paths.Rectified()), data, cond=c) for c in (None, {"label": label})]
    errors = [figure(c, "denoising error, as much").found for c in found]
    assert errors[1] < 0.5 * errors[0]
    assert all(c.ok for c in found)


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_samples(n, dtype):
    """Bounds leave room for chance, and float64 weights are measured in float64."""
    net = Net(dtype=dtype)
    certificate = certify(Model(net, "rectified", "v", shape=(2,)), normal(3, 2), n=n)
    trips = [f.found for f in certificate.figures if f.what.startswith("round trip")]
    assert max(trips) < (1e-4 if dtype == torch.float32 else 1e-11)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs the shared weights")
def test_a_released_network():
    """Right under the range it was trained on; wrong under another, although it is blind to its input's scale."""
    net, images = scale_blind(), mnist(64)
    normalisation = Normalisation((0.5,), (0.5,))
    right = from_callable(net, "ddpm", whole=True, shape=(1, 28, 28), normalisation=normalisation)
    assert certify(right, images, n=64).ok
    assert not certify(right.under(normalisation=Normalisation()), images, n=64).ok


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: certify(Model(Net(), "rectified")), OptionError, "does not know its shape; expected data, or"),
        (lambda: certify(Model(Net(), "rectified"), torch.ones(4)), ShapeError, r"data has shape \(4,\)"),
        (lambda: certify(Model(Net(), "rectified"), torch.ones(4, 2)), DataError, "standard deviation of 0.0"),
        (lambda: certify(Model(Net(), "rectified"), normal(4, 2), n=1), OptionError, "n is 1; expected"),
        (
            lambda: certify(Model(Net(), "rectified"), normal(4, 2), cond={"y": torch.ones(3)}),
            ShapeError,
            "condition 'y' does not fit",
        ),
        (lambda: certify(FlowMap(mixture().model(paths.Rectified()))), OptionError, "is a flow map"),
    ],
)
def test_bad_input_has_one_clear_error(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    one_line(caught.value)
