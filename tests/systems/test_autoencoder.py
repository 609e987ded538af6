"""Autoencoders: their figures against closed forms, their sizes, their folders, and their training."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fluvial import random, systems
from fluvial.errors import OptionError, RunError, ShapeError
from fluvial.model import Model, Normalisation
from fluvial.systems import Autoencoder
from fluvial.systems.autoencoder import Posterior
from fluvial.systems.autoencoder_networks import KLAutoencoder, kl_network
from fluvial.systems.autoencoder_training import Reconstruction
from fluvial.training.interrupts import RunInterrupted
from fluvial.training.source import Tensors

SHARED = Path(__file__).parents[3] / "shared" / "data"
GREY = Normalisation((8.0,), (8.0,), 0.0, 16.0)
OPTIONS = {"factor": 2, "latent_channels": 2, "width": 8, "batch_size": 8, "precision": "fp32", "progress": False}


def network(channels=1, factor=2, latent_channels=2, seed=0):
    torch.manual_seed(seed)
    return kl_network(channels, factor, latent_channels, 8)


def images(n=20, side=8):
    return 16.0 * torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(1))


def test_kl_and_rate_are_those_of_the_closed_form():
    mean, std = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.rand(3, 2, 4, 4, dtype=torch.float64) + 0.1
    expected = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(Posterior(mean, std).kl(), expected, rtol=1e-12, atol=0)
    assert float(Posterior(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).kl()) == 0.0
    noise = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(Posterior(mean, std).sample(noise), mean + std * noise, rtol=0, atol=0)

    ae, x = Autoencoder(network(), GREY, (1, 8, 8)), images(3)
    own = ae.network.encode(x / 8 - 1).latent_dist
    torch.testing.assert_close(ae.rate(x), own.kl() / math.log(2) / 64, rtol=1e-5, atol=0)
    error = ae.decode(ae.encode(x).mean) - x
    torch.testing.assert_close(ae.distortion(x), error.flatten(1).norm(dim=1) / 8, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("factor", "size"), [(1, (5, 3)), (2, (8, 8)), (2, (7, 5)), (4, (28, 28)), (4, (9, 14)), (8, (1, 3))]
)
def test_any_size_comes_back_as_it_was(factor, size):
    ae = Autoencoder(network(3, factor))
    x = torch.rand(2, 3, *size)
    z = ae.encode(x)
    assert z.mean.shape[1:] == ae.latent_shape((3, *size)) == (2, -(-size[0] // factor), -(-size[1] // factor))
    assert ae.decode(z.mean, (3, *size)).shape == x.shape
    # Padding repeats the border: the padded image is encoded alike, and cropping takes its corner.
    high, wide = (side * factor for side in z.mean.shape[2:])
    whole = x[:, :, torch.arange(high).clamp(max=size[0] - 1)][..., torch.arange(wide).clamp(max=size[1] - 1)]
    torch.testing.assert_close(ae.encode(whole).mean, z.mean, rtol=0, atol=0)
    torch.testing.assert_close(
        ae.decode(z.mean)[..., : size[0], : size[1]], ae.decode(z.mean, (3, *size)), rtol=0, atol=0
    )


def test_a_saved_one_is_the_same_and_diffusers_own(tmp_path):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    ae, x = Autoencoder(network(), GREY, (1, 7, 7)), images(4, 7)
    again = systems.load_autoencoder(ae.save(tmp_path / "vae"))
    assert (again.hash, again.normalisation, again.shape) == (ae.hash, GREY, (1, 7, 7))
    torch.testing.assert_close(again.encode(x), ae.encode(x), rtol=0, atol=0)
    torch.testing.assert_close(again.decode(ae.encode(x).mean), ae.decode(ae.encode(x).mean), rtol=0, atol=0)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae", use_safetensors=True)
    padded = torch.nn.functional.pad(x / 8 - 1, (0, 1, 0, 1), mode="replicate")
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(padded).latent_dist.mean, ae.encode(x).mean, rtol=0, atol=0)
    # Without what this library adds, it is an autoencoder of images from 0 to 1, of any size.
    (tmp_path / "vae" / "fluvial.json").unlink()
    plain = systems.load_autoencoder(tmp_path)
    assert plain.shape is None
    torch.testing.assert_close(plain.encode(x / 16).mean, ae.encode(x).mean, rtol=0, atol=1e-5)
    assert plain.for_data(Tensors("x", {"data": x})).shape == (1, 7, 7)


def test_the_hash_names_weights_and_units():
    hashes = [Autoencoder(network(seed=s), n).hash for s in (0, 1) for n in (GREY, Normalisation())]
    assert len(set(hashes)) == 4
    assert hashes[0] == Autoencoder(network(seed=0), GREY, (1, 8, 8)).hash


def test_what_does_not_fit_is_one_clear_error(tmp_path):
    ae = Autoencoder(network(), GREY, (1, 8, 8))
    for call in (
        lambda: ae.encode(torch.rand(2, 3, 8, 8)), lambda: ae.encode(torch.rand(2, 1, 9, 8)),
        lambda: ae.decode(torch.rand(2, 2, 5, 4)), lambda: ae.decode(torch.rand(2, 3, 4, 4)),
        lambda: ae.for_data(Tensors("x", {"data": images(4, 9)})), lambda: ae.latent_shape((8, 8)),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match=r"expected|is for images"):
            call()
    with pytest.raises(OptionError, match="factor is 3"):
        kl_network(1, 3, 2, 8)
    with pytest.raises(OptionError, match="unknown autoencoder 'Linear'"):
        Autoencoder(torch.nn.Linear(2, 2))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [2**20]}))
    with pytest.raises(RunError, match="missing"):
        systems.load_autoencoder(tmp_path)
    folder = ae.save(tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"block_out_channels": [2**16, 2**16]}))
    with pytest.raises(RunError, match=r"numbers|should be"):
        systems.load_autoencoder(folder)


def test_the_loss_is_the_stated_sum():
    """distance + kl_weight KL / dims - adversarial D(made) + hinge, of the noise that belongs to the samples."""
    torch.manual_seed(0)
    net = KLAutoencoder(1, 2, 2, 8, adversarial=True)
    model, x = Model(net, "rectified", "data"), images(3) / 8 - 1
    index = torch.tensor([4, 9, 2])
    posterior = net.autoencoder.encode(x).latent_dist
    made = net.autoencoder.decode(
        posterior.mean + posterior.std * random.normal(index, (2, 4, 4), 7, stream=random.TRAIN)
    ).sample
    base = (made - x).square().flatten(1).mean(1) + 0.3 * posterior.kl() / 64
    assert net.discriminator is not None
    real, fake = net.discriminator(x), net.discriminator(made)
    hinge = 0.5 * ((1 - real).clamp(min=0) + (1 + fake).clamp(min=0)).flatten(1).mean(1)
    objective = Reconstruction(kl_weight=0.3, adversarial=0.2, start=5)
    early, late = (objective.at(step, model, model)(model, x, seed=7, index=index) for step in (4, 5))
    torch.testing.assert_close(early, base + hinge, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(late, base + hinge - 0.2 * fake.flatten(1).mean(1), rtol=1e-5, atol=1e-6)
    # The discriminator learns by the hinge loss alone, whatever the autoencoder wants of it.
    own, wanted = (
        torch.autograd.grad(loss.mean(), net.discriminator.layers[0].weight, retain_graph=True)[0]
        for loss in (late, hinge)
    )
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-7)
    hinged = torch.autograd.grad(hinge.mean(), net.autoencoder.decoder.conv_out.weight, retain_graph=True)[0]
    pushed = [
        torch.autograd.grad(loss.mean(), net.autoencoder.decoder.conv_out.weight, retain_graph=True)[0]
        for loss in (early, late)
    ]
    assert float(hinged.norm()) > 0
    assert not torch.allclose(*pushed, rtol=1e-3)
    watched = objective.watched(model, x, None, None, None, 7, index, None)
    assert watched["rate"] == pytest.approx(posterior.kl().mean().item() / 64 / math.log(2), rel=1e-5)
    assert watched["rmse"] == pytest.approx((made - x).square().mean().sqrt().item(), rel=1e-5)


class Interrupting(Tensors):
    def __init__(self, at, rows):
        super().__init__("images", {"data": rows})
        self.at, self.count = at, 0

    def batch(self, indices):
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().batch(indices)


def test_interrupted_and_resumed_it_is_the_same_run(tmp_path):
    options = OPTIONS | {"adversarial": 0.1, "checkpoint_every": 3, "log_every": 2, "sheet_every": 4}
    whole = systems.train_autoencoder(Interrupting(-1, images()), tmp_path / "whole", 6, **options)
    with pytest.raises(RunInterrupted):
        systems.train_autoencoder(Interrupting(3, images()), tmp_path / "parts", 6, **options)
    assert not (tmp_path / "parts" / "vae").exists()
    early = systems.load_autoencoder(tmp_path / "parts")
    parts = systems.train_autoencoder(Interrupting(-1, images()), tmp_path / "parts", 6, **options)
    assert parts.hash == whole.hash != early.hash
    names = ["model.safetensors", "ema.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    names += [f"state/step-000006/{name}" for name in ("model.safetensors", "optimizer.safetensors")]
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    assert [path.name for path in sorted((tmp_path / "parts" / "sheets").iterdir())] == [
        "step-000004.png",
        "step-000006.png",
    ]
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert {"rate", "rmse"} <= set(lines[-1])
    assert systems.load_autoencoder(tmp_path / "parts").hash == whole.hash
    with pytest.raises(RunError, match=r"objective.kl_weight = 0.01"):
        systems.train_autoencoder(Interrupting(-1, images()), tmp_path / "parts", 6, kl_weight=0.1, **options)


def test_training_learns_and_the_weight_of_the_kl_sets_the_rate():
    """Each quadrant dark or bright: 4 bits in 64 dimensions say it all, and without any the mean is left.

    They are 0.043 nats per dimension and take a squared error of 1 away: not worth it from a weight of 23 on.
    """
    code = torch.arange(16)[:, None].bitwise_right_shift(torch.arange(4)).bitwise_and(1).float()
    data = torch.nn.functional.interpolate(code.reshape(16, 1, 2, 2), scale_factor=4)
    rates, errors = [], []
    for weight in (1e-3, 100.0):
        options = OPTIONS | {"batch_size": 16, "lr": 3e-3, "warmup": 10, "ema_decay": 0.9}
        ae = systems.train_autoencoder(data, steps=100, kl_weight=weight, **options)
        rates.append(float(ae.rate(data).mean()))
        errors.append(float(ae.distortion(data).mean()))
    assert rates[0] > 4 / 64
    assert errors[0] < 0.1
    assert rates[1] < 0.01
    assert errors[1] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kl_weight": -1.0}, "kl_weight is -1"),
        ({"adversarial_start": 3}, "without adversarial"),
        ({"perceptual": "vgg"}, "perceptual is 'vgg'"),
        ({"distance": "l3"}, "unknown distance"),
        ({"width": 12}, "width is 12"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, options, says):
    with pytest.raises(OptionError, match=says):
        systems.train_autoencoder(images(), tmp_path / "x", **{**OPTIONS, "steps": 2, **options})
    assert not (tmp_path / "x").exists()
    with pytest.raises(ShapeError, match="expected images"):
        systems.train_autoencoder(torch.rand(9, 2))


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared weights")
def test_taef2_brings_photographs_back(tmp_path):
    """Weights of FLUX.2's tiny autoencoder; its blocks pool over the image, so larger images suit it better."""
    import numpy

    weights = SHARED / "weights"
    ae = systems.tiny_autoencoder(weights / "taef2_encoder.safetensors", weights / "taef2_decoder.safetensors")
    with numpy.load(SHARED / "cifar10_first4000.npz") as file:
        photos = torch.from_numpy(file["images"][:24]).permute(0, 3, 1, 2).float() / 255
    assert (ae.latent_channels, ae.factor) == (32, 8)
    psnr = []
    for scale in (1, 2):
        x = torch.nn.functional.interpolate(photos, scale_factor=scale, mode="bicubic").clamp(0, 1)
        psnr.append(float(-20 * ae.distortion(x).log10().mean()))
    assert 23.0 < psnr[0] < 25.0
    assert psnr[1] > 28.5
    with pytest.raises(OptionError, match="no posterior"):
        ae.rate(photos)
    again = systems.load_autoencoder(ae.save(tmp_path / "taef2"))
    torch.testing.assert_close(again.decode(ae.encode(photos).mean), ae.decode(ae.encode(photos).mean), rtol=0, atol=0)
    assert again.hash == ae.hash
