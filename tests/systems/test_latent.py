"""Latent diffusion: units, stages, notations, folders, and what is refused; the latents it is trained on."""

from __future__ import annotations

import os
import signal
import warnings

import numpy
import pytest
import torch

import fluvial as fl
from fluvial import sheets, systems
from fluvial.errors import DataError, OptionError, RunError, ShapeError
from fluvial.model import Normalisation
from fluvial.systems import Autoencoder, Latent
from fluvial.systems.autoencoder_networks import kl_network
from fluvial.systems.latent_source import Standardised
from fluvial.training.interrupts import RunInterrupted
from fluvial.training.source import Tensors
from problems import command

GREY = Normalisation((8.0,), (8.0,), 0.0, 16.0)
LABELS = torch.arange(5) % 3


def autoencoder(seed=0, shape=(1, 8, 8), normalisation=GREY):
    torch.manual_seed(seed)
    network = kl_network(1, 2, 2, 8)
    # One whose latents are far from standard, as real ones are.
    network.quant_conv.bias.data[:2] = torch.tensor([3.0, -1.0])
    network.quant_conv.weight.data[:2] *= 4
    return Autoencoder(network, normalisation, shape)


def images(n=11, side=8):
    return 16.0 * torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(1))


def rows(n=11):
    return {"data": images(n), "label": torch.arange(n) % 3}


def latent_model(z, path="rectified", prediction="velocity"):
    """An untrained model that all the same answers to its input."""
    model = fl.training.model_for(z, path=path, prediction=prediction, width=8)
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.network.eval()
    return model


@pytest.fixture(scope="module")
def system():
    z = systems.latents(autoencoder(), rows(), progress=False)
    return Latent(z.autoencoder, latent_model(z))


# Latents


def test_rows_are_samples_of_the_posterior_and_standardised_exactly():
    ae = autoencoder()
    z = systems.latents(ae, rows(), draws=200, batch_size=4, progress=False)
    posterior = ae.encode(images())
    mean, std = z.posterior(torch.tensor([7, 2]))
    torch.testing.assert_close(mean, posterior.mean[[7, 2]], rtol=0, atol=1e-5)
    torch.testing.assert_close(std, posterior.std[[7, 2]], rtol=1e-5, atol=0)
    assert (len(z), z.images, z.shape, z.conditions) == (2200, 11, (2, 4, 4), ("label",))
    every = z.batch(torch.arange(len(z)))
    assert every["label"].tolist() == (torch.arange(2200) % 11 % 3).tolist()
    # Draw k of image i is row 11 k + i: its law is the posterior's.
    drawn = every["data"].reshape(200, 11, 2, 4, 4)
    error = (drawn.mean(0) - posterior.mean) / (posterior.std / 200**0.5)
    assert float(error.square().mean()) == pytest.approx(1.0, abs=0.3)
    torch.testing.assert_close(z.batch(torch.tensor([1543]))["data"], every["data"][1543:1544], rtol=0, atol=0)
    # The deviation that is stored is that of the law, mean and noise together, in closed form.
    n, p = z.normalisation, [v.double() for v in posterior]
    shift, scale = p[0].mean((0, 2, 3)), (p[0].var((0, 2, 3), correction=0) + p[1].square().mean((0, 2, 3))).sqrt()
    torch.testing.assert_close(torch.tensor(n.shift).double(), shift, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(n.scale).double(), scale, rtol=1e-5, atol=0)
    x = n.apply(every["data"])
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(2), rtol=0, atol=0.02)
    assert fl.training.trainer.path_std(n, z.shape) == 1.0


def test_the_mean_alone_and_mirror_images():
    ae = autoencoder()
    z = systems.latents(ae, rows(), draws=0, flips=True, progress=False)
    assert len(z) == 22
    found = z.batch(torch.arange(22))
    torch.testing.assert_close(found["data"][11:], ae.encode(images().flip(-1)).mean, rtol=0, atol=1e-5)
    assert found["label"][11:].tolist() == found["label"][:11].tolist()
    torch.testing.assert_close(z.normalisation.apply(found["data"]).std((0, 2, 3), correction=0), torch.ones(2))


class Interrupting(Tensors):
    def __init__(self, at):
        super().__init__("images", rows())
        self.at, self.count = at, 0

    def batch(self, indices):
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().batch(indices)


def test_cached_in_pieces_they_are_the_same_bytes(tmp_path):
    options = {"batch_size": 2, "shard_size": 4, "progress": False}
    whole = systems.latents(autoencoder(), Interrupting(-1), tmp_path / "whole", **options)
    with pytest.raises(RunInterrupted, match="1 of 3 shards"):
        systems.latents(autoencoder(), Interrupting(2), tmp_path / "parts", **options)
    parts = systems.latents(autoencoder(), Interrupting(-1), tmp_path / "parts", **options)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == ["manifest.json", "measured.json", *(f"shard-00000{k}.safetensors" for k in range(3))]
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    index = torch.tensor([30, 1, 170])
    torch.testing.assert_close(parts.batch(index), whole.batch(index), rtol=0, atol=0)
    assert parts.normalisation == whole.normalisation
    counting = Interrupting(-1)
    systems.latents(autoencoder(), counting, tmp_path / "parts", **options)
    assert counting.count == 0, "what is there is not made again"
    for changed, says in (({"flips": True}, "is of 11 images"), ({"batch_size": 3}, "batch_size = 2")):
        with pytest.raises(RunError, match=says):
            systems.latents(autoencoder(), Interrupting(-1), tmp_path / "parts", **{**options, **changed})
    with pytest.raises(RunError, match="autoencoder = "):
        systems.latents(autoencoder(1), Interrupting(-1), tmp_path / "parts", **options)


def test_what_cannot_be_encoded_is_refused(tmp_path):
    with pytest.raises(DataError, match="is a stream"):
        systems.latents(autoencoder(), [images(4)], tmp_path / "x")
    with pytest.raises(OptionError, match=r"expected images"):
        systems.latents(autoencoder(), torch.rand(5, 2), tmp_path / "x")
    with pytest.raises(ShapeError, match="is for images"):
        systems.latents(autoencoder(), images(4, 9), tmp_path / "x")
    assert not (tmp_path / "x").exists()


# The system


def test_stages_are_the_model_s_latents_and_their_images(system):
    made = system.stages(5, seed=3, steps=4, cond={"label": LABELS})
    z = fl.sample(system.model, 5, seed=3, steps=4, cond={"label": LABELS})
    torch.testing.assert_close(made["latent"], z, rtol=0, atol=0)
    torch.testing.assert_close(made["image"], system.autoencoder.decode(z), rtol=0, atol=0)
    x = fl.sample(system, 5, seed=3, steps=4, cond={"label": LABELS})
    torch.testing.assert_close(x, made["image"], rtol=0, atol=0)
    # The raw latents are the standardised ones, times the deviation, plus the mean.
    n = system.model.normalisation
    plain = fl.sample(system.model.under(normalisation=Normalisation()), 5, seed=3, steps=4, cond={"label": LABELS})
    by_hand = plain * torch.tensor(n.scale)[:, None, None] + torch.tensor(n.shift)[:, None, None]
    torch.testing.assert_close(z, by_hand, rtol=0, atol=1e-6)
    for start in ((5, 1, 8, 8), (5, 2, 4, 4)):
        torch.testing.assert_close(fl.sample(system, start, seed=3, steps=4, cond={"label": LABELS}), x, rtol=0, atol=0)
    guided = fl.sample(system, 5, seed=3, nfe=4, cond={"label": LABELS}, guidance=fl.guidance.CFG(3.0))
    assert not torch.allclose(guided, x)


def test_a_record_shows_images(system):
    run = fl.sample(system, 3, seed=0, steps=4, record=True)
    torch.testing.assert_close(run.samples, fl.sample(system, 3, seed=0, steps=4), rtol=0, atol=0)
    own = fl.sample(system.model, 3, seed=0, steps=4, record=True)
    torch.testing.assert_close(run.x, own.x, rtol=0, atol=0)
    torch.testing.assert_close(run.data[1], system.autoencoder.decode(own.data[1]), rtol=0, atol=0)


def test_images_are_changed_by_their_latents_and_encoded_to_noise(system):
    x = images(3)
    z = system.autoencoder.encode(x).mean
    changed = fl.sample(system, init=x, strength=0.4, seed=0, steps=3)
    wanted = fl.sample(system.model, init=z, strength=0.4, seed=0, steps=3)
    torch.testing.assert_close(changed, system.autoencoder.decode(wanted), rtol=0, atol=0)
    faint = fl.sample(system, init=x, strength=1e-4, seed=0, steps=1, solver="ddim")
    torch.testing.assert_close(faint, system.autoencoder.decode(z), rtol=0, atol=0.02)
    noise = system.encode(x, solver="heun", steps=60)
    torch.testing.assert_close(fl.sample(system.model, noise, steps=60), z, rtol=0, atol=0.02)


def test_other_notations_make_the_same_latents(system):
    """VP and EDM, from the same state on the same noise levels, by steps that are exact in all notations."""
    model = system.model
    for path in (fl.paths.VP(), fl.paths.EDM()):
        seen = fl.convert(system, path=path)
        assert isinstance(seen, Latent)
        assert seen.autoencoder is system.autoencoder
        times = [0.05, 0.3, 0.6, 0.9, 1.0]
        theirs = [float(seen.model.path.time(model.path.log_snr(t))) for t in times[:-1]] + [1.0]
        own, other = model.path(times[0]), seen.model.path(theirs[0])
        # The state of one noise level: a path may only scale it.
        state = torch.randn(4, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        size = (own.alpha**2 + own.sigma**2) ** 0.5
        theirs_size = (other.alpha**2 + other.sigma**2) ** 0.5
        z = system.stages(state=state, times=times, solver="ddim")
        y = seen.stages(state=state * theirs_size / size, times=theirs, solver="ddim")
        torch.testing.assert_close(y["latent"], z["latent"], rtol=0, atol=1e-5)
        torch.testing.assert_close(y["image"], z["image"], rtol=0, atol=1e-4)


def test_saved_and_loaded_it_is_the_same(system, tmp_path):
    folder = fl.save(system, tmp_path / "a")
    assert sorted(path.name for path in folder.iterdir()) == ["autoencoder", "model", "system.json"]
    again = fl.load(folder)
    assert again.shape == (1, 8, 8)
    assert again.model.normalisation.autoencoder == system.autoencoder.hash
    torch.testing.assert_close(
        fl.sample(again, 4, seed=1, steps=3), fl.sample(system, 4, seed=1, steps=3), rtol=0, atol=0
    )
    converted = fl.load(fl.save(fl.convert(again, path="vp"), tmp_path / "b"))
    torch.testing.assert_close(
        fl.sample(converted, 4, seed=1, steps=3),
        fl.sample(fl.convert(system, path="vp"), 4, seed=1, steps=3),
        rtol=0,
        atol=0,
    )


def test_another_autoencoder_is_refused_by_name(system, tmp_path):
    other = autoencoder(1)
    for call in (
        lambda: Latent(other, system.model),
        lambda: Latent(other, fl.convert(system.model, path="vp")),
        lambda: Latent(other, system.model.under(normalisation=GREY), latents_of=system.autoencoder.hash),
    ):
        with pytest.raises(OptionError, match=f"{system.autoencoder.hash}, and this is {other.hash}"):
            call()
    with pytest.raises(ShapeError, match="expected the autoencoder that it was trained with"):
        Latent(autoencoder(shape=(1, 16, 16)), system.model.under(normalisation=GREY))
    folder = fl.save(system, tmp_path / "a")
    other.save(folder / "autoencoder")
    with pytest.raises(RunError, match=f"{system.autoencoder.hash}, and .* holds {other.hash}"):
        fl.load(folder)
    with pytest.raises(OptionError, match="times end before 1"):
        fl.sample(system, 2, times=[0.0, 0.5])
    assert Standardised((1.0,), (2.0,)).autoencoder is None


@pytest.mark.parametrize("path", ["cosine", "rectified"])
def test_the_parts_are_diffusers_own(system, tmp_path, path):
    """The standardisation is written into the autoencoder: its latents are the model's path units."""
    z = systems.latents(system.autoencoder, {"data": images()}, progress=False)
    own = Latent(z.autoencoder, latent_model(z, path, "noise" if path == "cosine" else "velocity"))
    vae, x = systems.standardising_vae(own), images(4)
    n, posterior = own.model.normalisation, own.autoencoder.encode(x)
    theirs = vae.encode(x / 8 - 1).latent_dist
    torch.testing.assert_close(theirs.mean, n.apply(posterior.mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.std, posterior.std / torch.tensor(n.scale)[:, None, None], rtol=1e-5, atol=0)
    state = torch.randn(4, 2, 4, 4)
    torch.testing.assert_close(
        8 * vae.decode(state).sample + 8, own.autoencoder.decode(n.invert(state)), rtol=0, atol=1e-4
    )
    if path == "rectified":
        with pytest.raises(OptionError, match="the parts alone"):
            systems.diffusers_pipe(own)
        _drawn_by_parts(own, vae, tmp_path)
        return
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        folder = fl.to_diffusers(own.model, tmp_path / "pipe", pipe=systems.diffusers_pipe(own))
        pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(batch_size=3, generator=torch.Generator().manual_seed(5), num_inference_steps=10, output_type="np")
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    times = fl.interop.diffusers.sampling_times(pipe.scheduler, 10)
    # A pipeline starts from pure noise, though its first level is not the last one.
    mine = fl.sample(own, state=noise, solver="ddim", times=times) / 16
    theirs = torch.from_numpy(numpy.asarray(drawn.images)).permute(0, 3, 1, 2)
    torch.testing.assert_close(theirs, mine.clamp(0, 1), rtol=0, atol=1e-4)


@torch.no_grad()
def _drawn_by_parts(own, vae, folder):
    """A rectified flow's parts, each loaded by diffusers alone, put together by hand."""
    import diffusers

    vae.save_pretrained(folder / "vae")
    fl.to_diffusers(own.model, folder / "model")
    network = diffusers.UNet2DModel.from_pretrained(folder / "model" / "unet", use_safetensors=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "model" / "scheduler")
    decoder = diffusers.AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True)
    scheduler.set_timesteps(5)
    times = fl.interop.diffusers.sampling_times(scheduler, 5)
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x).prev_sample
    made = own.stages(noise, solver="euler", times=times)
    torch.testing.assert_close(x, own.model.normalisation.apply(made["latent"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(8 * decoder.decode(x).sample + 8, made["image"], rtol=0, atol=1e-4)


def test_from_data_to_images_by_commands(tmp_path, capsys):
    numpy.savez(tmp_path / "d.npz", data=images(24, 7).numpy(), label=numpy.arange(24) % 3)
    data, ae, run = tmp_path / "d.npz", tmp_path / "ae", tmp_path / "run"
    given = ["--factor", 2, "--width", 8, "--latent-channels", 2, "--batch-size", 8, "--precision", "fp32"]
    assert command("train-autoencoder", data, "--out", ae, "--steps", 4, *given) == 0
    assert "Latents 2 x 4 x 4" in capsys.readouterr().out
    rest = ["--steps", 3, "--batch-size", 8, "--precision", "fp32"]
    assert command("train", data, "--latent", ae, "--out", run, *rest) == 0
    assert sorted(path.name for path in run.iterdir()) == [
        "autoencoder",
        "latents",
        "model",
        "samples.png",
        "system.json",
    ]
    sheet, numbers = tmp_path / "s.png", tmp_path / "s.npz"
    assert command("sample", run, "-n", 6, "--steps", 3, "--seed", 2, "--out", sheet, "--npz", numbers) == 0
    assert "latent: " in capsys.readouterr().out
    expected = fl.sample(fl.load(run), 6, seed=2, steps=3, cond={"label": torch.arange(6) % 3})
    with numpy.load(numbers) as file:
        torch.testing.assert_close(torch.from_numpy(file["samples"]), expected, rtol=0, atol=0)
        assert file["latent"].shape == (6, 2, 4, 4)
    assert sheets.read_info(sheet)["nfe"] == [5]
    assert (tmp_path / "s-latent.png").exists()
    before = (run / "model" / "model.safetensors").read_bytes()
    assert command("train", data, "--latent", ae, "--out", run, *rest) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == before
    other = tmp_path / "other"
    assert command("train-autoencoder", data, "--out", other, "--steps", 2, *given) == 0
    for arguments, says in (
        (("train", data, "--latent", other, "--out", run, *rest), "run on latents of autoencoder"),
        (("train", "moons", "--latent", ae, "--out", tmp_path / "x", *rest), "images"),
        (("train", data, "--latent", tmp_path, "--out", tmp_path / "x", *rest), "no config.json"),
        (("sample", run, "--compare", "steps=1,2"), "--compare is for single models"),
        (("sample", ae), "is an autoencoder"),
    ):
        capsys.readouterr()
        assert command(*arguments) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    with pytest.raises(RunError, match="holds a training run, model"):
        fl.save(fl.load(run), run)
