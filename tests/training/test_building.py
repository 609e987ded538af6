"""A network is built from its description, for its weights, and from nothing else."""

from __future__ import annotations

import json
import time

import pytest
import torch

from fluvial import networks
from fluvial.errors import RunError
from fluvial.model import Model
from fluvial.training.building import HOMES
from fluvial.training.checkpoints import load, save


def saved(folder, network):
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = Model(network.eval(), "rectified", shape=(1, 8, 8) if hasattr(network, "unet") else (2,))
    save(model, folder)
    return model


def altered(folder, **changes):
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["network"] |= {"config": {**content["network"]["config"], **changes.pop("config", {})}, **changes}
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_come_back_in_the_type_they_had(dtype, tmp_path):
    model = saved(tmp_path / "m", networks.mlp(2, width=8).to(dtype))
    back = load(tmp_path / "m")
    x = torch.randn(3, 2)
    assert back.parameters()[0].dtype == dtype
    assert torch.equal(back.predict(x, 0.4), model.predict(x, 0.4))


def test_networks_of_edm_are_built_too(tmp_path):
    from fluvial.interop.edm import EDMNetwork

    torch.manual_seed(0)
    options = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1]}
    network = EDMNetwork("SongUNet", num_blocks=1, **options).eval()
    assert type(network).__module__ in HOMES
    model = Model(network, "edm", "edm", shape=(1, 8, 8))
    save(model, tmp_path / "m")
    back = load(tmp_path / "m")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(back.predict(x, 0.4), model.predict(x, 0.4))


WRONG = {
    "very wide": ({"config": {"width": 10**6}}, "numbers|does not fit"),
    "wider than numbers are": ({"config": {"width": 2**62}}, "cannot be built"),
    "without end": ({"config": {"depth": 10**12}}, "more than .* tensors"),
    "a width below 0": ({"config": {"width": -8}}, "cannot be built"),
    "a word": ({"config": {"width": "wide"}}, "cannot be built"),
    "another argument": ({"config": {"command": "ls"}}, "command"),
    "a module": ({"class": "os.system"}, "not known here"),
    "a class of elsewhere": ({"class": "torch.nn.Linear"}, "not known here"),
    "a name that it imports": ({"class": "fluvial.networks.nn"}, "not known here"),
    "a function of ours": ({"class": "fluvial.networks.told"}, "not known here"),
    "a class that it imports": ({"class": "fluvial.networks.Told"}, "not known here"),
    "a module below": ({"class": "fluvial.networks.torch.hub.load"}, "not known here"),
    "a number": ({"class": 3}, "cannot be built"),
    "a pipeline": ({"class": "fluvial.interop.diffusers_networks.UNet"}, "unknown diffusers network 'mlp'"),
}


@pytest.mark.parametrize(("change", "says"), WRONG.values(), ids=WRONG)
def test_a_hostile_description_is_refused_before_it_is_built(change, says, tmp_path):
    saved(tmp_path / "m", networks.mlp(2, width=8, depth=1))
    altered(tmp_path / "m", **change)
    begun = time.perf_counter()
    with pytest.raises(RunError, match=says) as caught:
        load(tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - begun < 5


def test_a_hostile_list_of_arguments_is_refused(tmp_path):
    saved(tmp_path / "m", networks.mlp(2, width=8, depth=1))
    file = tmp_path / "m" / "config.json"
    content = json.loads(file.read_text())
    content["network"]["config"] = ["mlp"]
    file.write_text(json.dumps(content))
    with pytest.raises(RunError, match="expected an object"):
        load(tmp_path / "m")


def test_images_are_built_without_a_trace_of_the_first_attempt(tmp_path):
    model = saved(tmp_path / "m", networks.unet(1, 8, 3, width=8))
    back = load(tmp_path / "m")
    assert {tensor.device.type for tensor in (*back.network.parameters(), *back.network.buffers())} == {"cpu"}  # type: ignore[attr-defined]
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    with torch.no_grad():
        assert torch.equal(back.predict(x, 0.3, label=label), model.predict(x, 0.3, label=label))
