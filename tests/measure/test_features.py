"""Feature networks: what reaches the network, what comes back, and what is said of it."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch import nn

from fluvial.errors import DataError, OptionError, ShapeError
from fluvial.measure import Features, Floor, dinov2, excess, excess_ratio, features, inception, train_classifier
from fluvial.measure.features import module_features, of


def images(n: int = 5, channels: int = 3, side: int = 6) -> torch.Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0)) * 16.0


class Means(nn.Module):
    """Mean of each channel, and what the batches were."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.gain, self.seen = nn.Parameter(torch.ones((), dtype=dtype)), []

    def forward(self, x):
        self.seen.append((self.training, tuple(x.shape), x.dtype))
        return (self.gain * x).mean((2, 3))


def test_module_sees_batches_in_its_own_dtype_and_without_gradients():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        network, x = Means(dtype), images(5)
        found = module_features(network, "channel means", batch_size=2)(x)
        torch.testing.assert_close(found, x.mean((2, 3)), rtol=0.02 if dtype == torch.bfloat16 else 1e-6, atol=0)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert network.seen == [(False, (2, 3, 6, 6), dtype)] * 2 + [(False, (1, 3, 6, 6), dtype)]


def test_images_are_resized_and_preprocessed_in_this_order():
    network = Means()
    found = module_features(network, "means", size=(8, 4), preprocess=lambda x: x / 2 + 1)
    torch.testing.assert_close(found(torch.full((2, 3, 6, 6), 4.0)), torch.full((2, 3), 3.0))
    assert network.seen[0][1] == (2, 3, 8, 4)
    assert found.description == "means; images resized to 8x4 (bicubic, antialiased)"
    # Made smaller, a fine pattern becomes its mean instead of whichever pixels are hit.
    stripes = torch.arange(32.0).remainder(2).expand(1, 1, 32, 32)
    small = features._resized(stripes, (4, 4))
    assert (small - 0.5).abs().max() < 0.03
    assert features._resized(stripes, (32, 32)) is stripes


def test_any_shape_of_output_is_flattened():
    found = module_features(nn.Identity(), "as they are")(images(3, 1, 2))
    assert torch.equal(found, images(3, 1, 2).reshape(3, 4))


class FakeInception(nn.Module):
    """Stands in for torch-fidelity's, with what it demands and what it returns."""

    def __init__(self, name, features_list):
        super().__init__()
        assert isinstance(name, str)
        assert features_list == ["2048"]
        self.weight = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return (x.flatten(1).float(),)


def install(monkeypatch, **modules):
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


def fake_fidelity(monkeypatch, network=FakeInception):
    inner = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    inner.FeatureExtractorInceptionV3 = network
    outer = types.ModuleType("torch_fidelity")
    install(monkeypatch, torch_fidelity=outer, torch_fidelity__feature_extractor_inceptionv3=inner)


def test_inception_gets_whole_numbers_of_three_channels(monkeypatch):
    fake_fidelity(monkeypatch)
    x = torch.tensor([-3.0, 0.0, 4.0, 8.02, 16.0, 99.0]).reshape(1, 1, 2, 3)
    found = inception(0.0, 16.0)
    assert found(x).tolist() == [[0.0, 0.0, 64.0, 128.0, 255.0, 255.0] * 3]
    assert "InceptionV3" in found.description
    assert "clamped to 0 to 16, as uint8, resized to 299x299" in found.description
    # Pictures that were born as bytes come back as those bytes.
    levels = torch.arange(256.0).reshape(1, 1, 16, 16) / 255
    assert inception()(levels)[0, :256].tolist() == list(range(256))


def test_missing_packages_are_named(monkeypatch):
    install(monkeypatch, torch_fidelity=None, transformers=None)
    with pytest.raises(DataError, match="pip install torch-fidelity"):
        inception()
    with pytest.raises(DataError, match="pip install transformers"):
        dinov2()


def test_weights_that_cannot_be_had_are_one_line(monkeypatch):
    def offline(name, features_list):
        raise OSError("no route to host\nand more")

    fake_fidelity(monkeypatch, offline)
    with pytest.raises(DataError, match=r"InceptionV3 cannot be loaded: no route to host$"):
        inception()


@pytest.fixture(scope="module")
def tiny_dino(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("dino")
    model = transformers.Dinov2Model(config)
    model.save_pretrained(folder)
    return folder, model.eval()


def test_dinov2_is_the_class_token_of_standardised_images(tiny_dino):
    folder, model = tiny_dino
    x = images(3, 1, 224)
    found = dinov2(str(folder), 0.0, 16.0, batch_size=2)
    rgb = (x / 16.0).repeat(1, 3, 1, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        out = model(pixel_values=(rgb - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(found(x), out.pooler_output, rtol=1e-4, atol=1e-5)
    assert "class token of 16 numbers; images clamped to 0 to 16, resized to 224x224" in found.description
    assert found(images(2, 3, 20)).shape == (2, 16)


def test_a_name_that_is_no_model_is_one_line(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(DataError, match="cannot be loaded") as told:
        dinov2(str(tmp_path))
    assert "\n" not in str(told.value)


def test_what_is_meant(monkeypatch):
    x, labels = images(40, 1, 8), torch.arange(40) % 2
    classifier = train_classifier(x, labels)
    for given in (None, "classifier", classifier):
        found = of(given, x, labels)
        assert torch.equal(found(x), classifier.features(x))
        assert found.description == classifier.description
        assert found.classifier is not None
    for given, data, known in [
        ("pixels", x, labels),
        (None, x, None),
        (None, x[:, 0, 0], labels),
        (None, x, 0 * labels),
    ]:
        found = of(given, data, known)
        assert torch.equal(found(data), data.flatten(1))
        assert found.description == "the numbers themselves"
    assert of(found, x, labels) is found
    assert torch.equal(of(nn.Flatten(), x)(x), x.flatten(1))
    assert "Flatten" in of(nn.Flatten(), x).description
    fake_fidelity(monkeypatch)
    assert of("inception", x)(x).max() == 255.0
    assert of("inception", x, low=0.0, high=32.0)(x).max() == pytest.approx(float(x.max()) / 32 * 255, abs=0.5)


def test_excess_is_over_the_floor():
    floor = Floor(2.0, 0.5, 100)
    assert excess(5.0, floor) == 3.0
    assert excess(1.5, floor) == -0.5
    assert excess_ratio(5.0, 3.5, floor) == 2.0
    assert excess_ratio(1.5, 3.5, floor) == pytest.approx(-1 / 3)
    assert math.isnan(excess_ratio(5.0, 3.0, floor))


def test_bad_input_is_named():
    x = images()
    with pytest.raises(OptionError, match=r"unknown features 'inceptoin'.*did you mean 'inception'"):
        of("inceptoin", x)
    with pytest.raises(OptionError, match="'classifier' for data of 0 classes"):
        of("classifier", x)
    with pytest.raises(ShapeError, match=r"'dinov2' for data of shape \(5, 3, 6\)"):
        of("dinov2", x[..., 0])
    with pytest.raises(OptionError, match="range is 1 to 1"):
        inception(1.0, 1.0)
    with pytest.raises(OptionError, match="batch_size is 0"):
        module_features(nn.Flatten(), "", batch_size=0)
    with pytest.raises(OptionError, match="NaN or infinity in 1 of 5"):
        of("pixels", x)(torch.cat([x[:4], x[4:] / 0.0]))
    with pytest.raises(ShapeError, match=r"\(0, 3, 6, 6\); expected \(N, ...\)"):
        of("pixels", x)(x[:0])
    with pytest.raises(ShapeError, match="which have a size"):
        module_features(nn.Flatten(), "", size=8)(x[..., 0])
    with pytest.raises(ShapeError, match="of 1 or 3 channels"):
        features._three_channels(images(channels=4), 0.0, 1.0)
    assert isinstance(of(None, x), Features)
