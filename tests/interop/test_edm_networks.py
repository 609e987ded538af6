"""The networks of EDM and EDM2 against NVlabs' own, and the call that the library makes of them."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from edm_files import NETWORKS, SMALL, SONG, filled, formula, inputs

from fluvial.errors import OptionError
from fluvial.interop.edm import EDMNetwork
from fluvial.interop.edm2_network import Weight, beside, silu, total, unit
from fluvial.interop.edm_networks import Conv, attend
from problems import one_line

# Measured with NVlabs' own code in float64, weights and inputs of `edm_files`: a digest of the names and shapes in the
# state dict; the first, the 78th and the last number of the output, and the mean of its squares. Their attention of EDM
# rounds to float32.
MEASURED = {
    "ddpmpp": ("3e2767d5efe9", [-0.71215510, -0.42002104, -0.32387086, 0.12557300]),
    "ncsnpp": ("3ed6ad27f820", [-0.68418825, -0.47892803, -0.24326772, 0.15231005]),
    "skips": ("079c760680b5", [-0.76356189, -1.19434059, -0.45079792, 0.51300087]),
    "adm": ("929fdaa996a1", [-0.84110390, -0.50485196, -0.25070371, 0.23003350]),
    "adm_variance": ("8ee274ba7b0d", [-0.08960208, 0.22665252, -0.60718169, 0.61914990]),
    "edm2": ("7cfc8666144e", [-6.00507953, 5.92107849, 0.01827969, 132.30939407]),
    "edm2_plain": ("b81a99c61808", [0.25225622, 2.72303313, 2.09804675, 4.13084362]),
}


def network(name: str) -> EDMNetwork:
    found = EDMNetwork(**NETWORKS[name])
    filled(found.model)
    return found.eval().requires_grad_(False)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_those_of_nvlabs(name):
    net, given = network(name).model.double(), inputs(NETWORKS[name])
    words = " ".join(f"{key}{tuple(value.shape)}" for key, value in sorted(net.state_dict().items()))
    digest, numbers = MEASURED[name]
    assert hashlib.sha256(words.encode()).hexdigest()[:12] == digest
    out = net(**given)
    flat = out.flatten()
    measured = torch.stack([flat[0], flat[77], flat[-1], flat.square().mean()])
    torch.testing.assert_close(measured, torch.tensor(numbers, dtype=torch.float64), rtol=2e-7, atol=2e-8)
    single = net.float()(**{key: value.float() for key, value in given.items()})
    assert (single - out).norm() < 1e-5 * out.norm()
    # One at a time is the same.
    alone = net.double()(**{key: value[1:] for key, value in given.items()})
    torch.testing.assert_close(alone, out[1:], rtol=1e-9, atol=1e-9)


# The call


@pytest.mark.parametrize("name", ["ddpmpp", "adm", "edm2"])
def test_classes_are_counted_and_the_last_is_none(name):
    net, given = network(name).double(), inputs(NETWORKS[name])
    x, t = given["x"], given["t"]
    expected = net.model(x, t, given["label"])  # one-hot of class 1; zeros
    torch.testing.assert_close(net(x, t, torch.tensor([1, 2])), expected, rtol=0, atol=0)
    torch.testing.assert_close(net(x, t, torch.tensor([1, 2], dtype=torch.int32)), expected, rtol=0, atol=0)
    none = net(x, t)
    torch.testing.assert_close(none, net(x, t, torch.tensor([2, 2])), rtol=0, atol=0)
    assert (none[0] - expected[0]).abs().max() > 1e-3
    torch.testing.assert_close(none[1], expected[1], rtol=1e-12, atol=1e-12)


def test_augmentation_left_out_is_zeros():
    net, given = network("ddpmpp"), inputs(NETWORKS["ddpmpp"])
    x, t, augment = (given[name].float() for name in ("x", "t", "augment"))
    torch.testing.assert_close(net(x, t), net(x, t, augment_labels=torch.zeros(2, 9)))
    assert (net(x, t) - net(x, t, augment_labels=augment)).abs().max() > 1e-3


def test_variance_is_dropped_and_the_sign_kept():
    net, given = network("adm_variance"), inputs(NETWORKS["adm_variance"])
    x, t = given["x"].float(), given["t"].float()
    whole = net.model(x, t)
    assert whole.shape[1] == 6
    torch.testing.assert_close(net(x, t), whole[:, :3], rtol=0, atol=0)
    turned = EDMNetwork(**NETWORKS["adm_variance"], sign=-1).eval()
    turned.load_state_dict(net.state_dict())
    torch.testing.assert_close(turned(x, t), -whole[:, :3], rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_config_makes_the_same_network(name):
    net = network(name)
    again = EDMNetwork.from_config(json.loads(json.dumps(net.config())))
    again.load_state_dict(net.state_dict())
    assert again.config() == net.config()
    assert again.sample_shape() == (NETWORKS[name].get("in_channels", NETWORKS[name].get("img_channels")), 8, 8)
    given = inputs(NETWORKS[name])
    x, t = given["x"].float(), given["t"].float()
    torch.testing.assert_close(again.eval()(x, t), net(x, t), rtol=0, atol=0)


EDM2 = {"kind": "EDM2UNet", **SMALL, "img_channels": 3}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "UNet", **SONG}, "unknown kind of EDM network 'UNet'"),
        ({"kind": "SongUNet", **SMALL, "in_channels": 3}, "lacks out_channels"),
        ({"kind": "SongUNet", **SONG, "width": 3}, "unknown option of a SongUNet 'width'"),
        ({"kind": "DhariwalUNet", **SONG, "encoder_type": "skip"}, "unknown option of a DhariwalUNet"),
        ({"kind": "SongUNet", **SONG, "encoder_type": "skipped"}, "did you mean 'skip'"),
        ({"kind": "SongUNet", **SONG, "num_blocks": 10**12}, "num_blocks is 1000000000000; expected a whole number, 1"),
        ({"kind": "SongUNet", **SONG, "num_blocks": True}, "num_blocks is True"),
        ({"kind": "SongUNet", **SONG, "label_dim": -1}, "label_dim is -1; expected a whole number, 0"),
        ({"kind": "SongUNet", **SONG, "channel_mult": [1] * 99}, "expected 1 to 32 whole numbers"),
        ({"kind": "SongUNet", **SONG, "channel_mult": [0.5]}, "expected 1 to 32 whole numbers"),
        ({"kind": "SongUNet", **SONG, "channel_mult": []}, "channel_mult is []; expected"),
        ({"kind": "SongUNet", **SONG, "resample_filter": [1]}, "expected 2 to 32 numbers"),
        ({"kind": "SongUNet", **SONG, "dropout": "0.1"}, "dropout is '0.1'; expected a number"),
        ({"kind": "SongUNet", **SONG, "channel_mult_noise": None}, "channel_mult_noise is None"),
        ({**EDM2, "res_balance": math.nan}, "res_balance is nan"),
        ({**EDM2, "sign": 2}, "sign is 2; expected 1 or -1"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(OptionError) as caught:
        EDMNetwork(**options)
    one_line(caught.value)
    assert words in str(caught.value)


def test_conditions_that_cannot_be():
    x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    with pytest.raises(OptionError, match="was given a label; expected none"):
        network("ncsnpp")(x, t, torch.tensor([0, 1]))
    with pytest.raises(OptionError, match="was given augment_labels; expected none"):
        network("adm")(x, t, augment_labels=torch.zeros(2, 9))
    with pytest.raises(OptionError, match="the config has width; expected one of an EDMNetwork"):
        EDMNetwork.from_config({"width": 3})


# The pieces


def test_attention_is_its_formula():
    """softmax(q·k/√d) v within each head, whose channels hold query, key and value side by side."""
    qkv = 3.0 * formula("qkv", (2, 6, 3, 5))
    out = attend(qkv, 2)
    for b in range(2):
        for head in (slice(0, 3), slice(3, 6)):
            q, k, v = qkv[b, head].unbind(1)
            expected = v @ (q.T @ k / math.sqrt(3)).softmax(1).T
            torch.testing.assert_close(out[b, head], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_halving_and_doubling_keep_a_constant_image(taps):
    x = torch.full((1, 2, 8, 8), 3.0)
    for mode, size in (("down", 4), ("up", 16)):
        out = Conv(2, 2, 0, mode, taps)(x)
        assert out.shape[-1] == size
        inside = out[..., 1:-1, 1:-1]
        torch.testing.assert_close(inside, torch.full_like(inside, 3.0))


def test_magnitudes_are_kept():
    """Two independent inputs of magnitude 1 give 1, in the limit of many numbers, whatever the share."""
    a, b = torch.randn(2, 2, 64, 100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    for share in (0.0, 0.3, 0.5, 1.0):
        assert float(total(a, b, share).square().mean()) == pytest.approx(1, abs=5e-3)
        assert float(beside(a, b[:, :7], share).square().mean()) == pytest.approx(1, abs=1e-2)
    assert float(silu(a).square().mean()) == pytest.approx(1, abs=5e-3)
    assert float(unit(5 * a, [1]).square().mean()) == pytest.approx(1, abs=1e-4)
    layer = Weight(64, 16, 3).double()
    with torch.no_grad():
        layer.weight.mul_(7.0)
        assert float(layer(a[:, :, :40, :40])[..., 1:-1, 1:-1].square().mean()) == pytest.approx(1, abs=0.05)
    # In training the weights themselves are brought to magnitude 1; outside they are left.
    torch.testing.assert_close(layer.weight.square().mean((1, 2, 3)).sqrt().mean().item(), 1.0, rtol=1e-3, atol=0)
    before = layer.eval().weight.clone()
    with torch.no_grad():
        layer.weight.mul_(2.0)
        layer(a[:1, :, :8, :8])
    assert torch.equal(layer.weight, 2 * before)
