"""Latents where a person meets them: sheets of training runs, folders opened again, commands by name, descriptions."""

from __future__ import annotations

import json
import shutil

import numpy
import pytest
import torch
from PIL import Image

import fluvial as fl
from fluvial import sheets, systems
from fluvial.errors import OptionError, RunError
from fluvial.model import Normalisation
from fluvial.systems import Autoencoder, StageSource, open_latents
from fluvial.systems.autoencoder_networks import kl_network
from fluvial.training import preview
from fluvial.training.mixed import Mixed
from problems import command

GREY = Normalisation((8.0,), (8.0,), 0.0, 16.0)
QUICK = {"batch_size": 8, "precision": "fp32", "progress": False}


def autoencoder(seed=0, shape: tuple[int, ...] | None = (1, 7, 7)):
    torch.manual_seed(seed)
    return Autoencoder(kl_network(1, 2, 2, 8), GREY, shape)


def rows(n=12, side=7):
    data = 16.0 * torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(1))
    return {"data": data, "label": torch.arange(n) % 3}


def pixels(picture):
    return numpy.asarray(picture.convert("RGB"))


def small(source):
    return fl.training.model_for(source, width=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A latent run of two steps, by Python: its folder."""
    folder = tmp_path_factory.mktemp("latent") / "run"
    z, inside = systems.begin_latent_run(autoencoder(), rows(), folder, draws=3, seed=5, progress=False)
    fl.train(small(z), z, steps=2, out=inside, **QUICK)
    return folder


# Sheets


@pytest.mark.parametrize("wrapped", [lambda z: z, lambda z: Mixed(z, z, 0.25)], ids=["latents", "mixed"])
def test_sheets_of_latents_show_the_images(tmp_path, wrapped):
    """7 x 7 images are padded to 8 x 8 for the encoder, and cropped again."""
    z = systems.latents(autoencoder(), rows(), progress=False)
    for name in ("a", "b"):
        run = fl.train(small(z), wrapped(z), steps=2, sheet_every=2, out=tmp_path / name, **QUICK)
    file = tmp_path / "a" / "sheets" / "step-000002.png"
    assert file.read_bytes() == (tmp_path / "b" / "sheets" / file.name).read_bytes()
    sampled = fl.sample(run.ema, 63, solver="heun", steps=10, seed=0, cond={"label": torch.arange(63) % 3})
    images = z.autoencoder.decode(sampled)
    assert images.shape == (63, 1, 7, 7)
    with Image.open(file) as drawn:
        numpy.testing.assert_array_equal(pixels(drawn), pixels(sheets.sheet(images, columns=3, normalisation=GREY)))
    assert sheets.read_info(file)["autoencoder"] == z.autoencoder.hash


@pytest.mark.parametrize(("side", "low", "picture"), [(4, 2, (1, 7, 7)), (2, None, (1, 4, 4))])
def test_sheets_of_a_cascade_of_latents_show_images_of_the_stage(tmp_path, side, low, picture):
    z = systems.latents(autoencoder(), {"data": rows()["data"]}, progress=False)
    stage = StageSource(z, side, low=low)
    model = systems.stage_model(stage, width=8)
    first = stage.batch(torch.arange(5))
    preview.draw(model, stage, first, 3, 0, tmp_path / "a.png")
    cond = {name: first[name] for name in stage.conditions}
    n = 5 if cond else 64
    sampled = fl.sample(model, (n, *stage.shape), solver="heun", steps=10, seed=3, cond=cond)
    images = z.autoencoder.decode(sampled, picture)
    with Image.open(tmp_path / "a.png") as drawn:
        numpy.testing.assert_array_equal(pixels(drawn), pixels(sheets.sheet(images, normalisation=GREY)))


def test_large_pictures_are_as_few_as_without_latents(tmp_path):
    z = systems.latents(autoencoder(shape=(1, 66, 2)), torch.rand(2, 1, 66, 2), progress=False)
    model, plain = small(z), tmp_path / "plain.png"
    preview.draw(model, z, z.batch(torch.arange(2)), 0, 0, tmp_path / "a.png")
    preview.draw(small(pixel := fl.training.open_source(torch.rand(2, 1, 66, 2))), pixel, {}, 0, 0, plain)
    with Image.open(tmp_path / "a.png") as drawn, Image.open(plain) as other:
        assert drawn.size == other.size == (2 + 4, 16 * 68 + 2)


def test_nothing_is_decoded_without_sheets_and_pixels_stay_as_they_were(tmp_path, monkeypatch):
    z = systems.latents(autoencoder(), rows(), progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(Autoencoder, "decode", lambda *_: pytest.fail("decoded"))
        fl.train(small(z), z, steps=2, sheet_every=None, out=tmp_path / "none", **QUICK)
        run = fl.train(small(plain := fl.training.open_source(rows())), plain, steps=1, out=tmp_path / "p", **QUICK)
    sampled = fl.sample(run.ema, 63, solver="heun", steps=10, seed=0, cond={"label": torch.arange(63) % 3})
    with Image.open(file := tmp_path / "p" / "sheets" / "step-000001.png") as drawn:
        own = sheets.sheet(sampled, columns=3, normalisation=run.ema.normalisation)
        numpy.testing.assert_array_equal(pixels(drawn), pixels(own))
    assert "autoencoder" not in sheets.read_info(file)


# Folders


@pytest.mark.parametrize("draws", [0, 1, 3])
def test_latents_are_opened_as_they_were_made(tmp_path, draws):
    made = systems.latents(autoencoder(), rows(), tmp_path / "z", draws=draws, seed=7, shard_size=5, progress=False)
    autoencoder().save(tmp_path / "autoencoder")
    index = torch.randint(len(made), (20,), generator=torch.Generator().manual_seed(0))
    for found in (open_latents(tmp_path / "z"), open_latents(tmp_path / "z", autoencoder())):
        assert (len(found), found.name, found.conditions) == (len(made), made.name, ("label",))
        assert (found.normalisation, found.normalisation.autoencoder) == (made.normalisation, autoencoder().hash)
        for name, values in made.batch(index).items():
            torch.testing.assert_close(found.batch(index)[name], values, rtol=0, atol=0)
    assert len(open_latents(tmp_path / "z", draws=2)) == 24
    # Shards do not depend on how they are read: other draws of the same folder are no other folder.
    again = systems.latents(autoencoder(), rows(), tmp_path / "z", draws=2, shard_size=5, progress=False)
    assert len(again) == 24
    # Of folders that do not say it, the defaults.
    manifest = json.loads((tmp_path / "z" / "manifest.json").read_text())
    (tmp_path / "z" / "manifest.json").write_text(
        json.dumps({name: value for name, value in manifest.items() if name not in ("draws", "seed")})
    )
    old = open_latents(tmp_path / "z")
    assert (len(old), old.seed) == (16 * 12, 0)


def test_an_autoencoder_that_knows_no_shape_gets_that_of_whole_latents(tmp_path):
    systems.latents(autoencoder(shape=(1, 8, 8)), rows(side=8), tmp_path / "z", progress=False)
    found = open_latents(tmp_path / "z", autoencoder(shape=None))
    assert found.autoencoder.shape == (1, 8, 8)


def test_what_is_no_folder_of_latents_is_refused_by_name(tmp_path):
    systems.latents(autoencoder(), rows(), tmp_path / "z", shard_size=5, progress=False)
    with pytest.raises(RunError, match=r"z has no autoencoder beside it"):
        open_latents(tmp_path / "z")
    autoencoder(1).save(tmp_path / "autoencoder")
    own, other = autoencoder().hash, autoencoder(1).hash
    for given, where in ((None, "autoencoder"), (autoencoder(1), "the one that is given")):
        with pytest.raises(RunError, match=f"of autoencoder {own}, and .*{where} is {other}"):
            open_latents(tmp_path / "z", given)
    with pytest.raises(RunError, match=r"holds latents \(2, 4, 4\), and those .* are \(2, 8, 8\)"):
        open_latents(tmp_path / "z", autoencoder(shape=(1, 16, 16)))
    with pytest.raises(OptionError, match="draws is -1"):
        open_latents(tmp_path / "z", autoencoder(), draws=-1)
    (tmp_path / "z" / "shard-000001.safetensors").unlink()
    with pytest.raises(RunError, match="lacks 1 of its 3 shards"):
        open_latents(tmp_path / "z", autoencoder())
    for folder, what in (("nowhere", "does not exist"), ("autoencoder", "is no folder of latents")):
        with pytest.raises(RunError, match=f"{folder} {what}"):
            open_latents(tmp_path / folder)


# Commands


def test_a_latent_run_is_distilled_by_its_name(run, tmp_path, capsys, monkeypatch):
    """On the latents beside it, without a name, and on the same by name; the student takes the model's place."""
    monkeypatch.setattr("fluvial.show.run_report.write", lambda folder: folder)  # slow, and tested elsewhere
    rest = ["--steps", 2, "--batch-size", 8]
    assert command("distill", run / "model", "--method", "mean-flow", "--out", run / "student", *rest) == 0
    named = ["--data", run / "latents", "--out", tmp_path / "named"]
    assert command("distill", run / "model", "--method", "mean-flow", *named, *rest) == 0
    ours, theirs = (folder / "ema.safetensors" for folder in (run / "student", tmp_path / "named"))
    assert ours.read_bytes() == theirs.read_bytes()
    system, student = fl.load(run), fl.load(run / "student")
    images = fl.sample(system.with_models({"model": student}), 3, steps=1, seed=0)
    z = fl.sample(student, 3, steps=1, seed=0)
    torch.testing.assert_close(images, system.autoencoder.decode(z), rtol=0, atol=0)
    data = ["--data", run / "latents", "--batch-size", 8]
    assert command("pairs", run / "model", "-n", 6, "--steps", 2, "--out", tmp_path / "pairs", *data) == 0
    pairs, latents = fl.training.open_pairs(tmp_path / "pairs"), open_latents(run / "latents")
    torch.testing.assert_close(pairs.data, latents.batch(torch.arange(6))["data"], rtol=0, atol=1e-5)
    more = ["-n", 8, "--steps", 2, "--solver", "euler", "--solver-steps", 2, "--out", tmp_path / "straight"]
    assert command("straighten", run / "model", *more, *data) == 0
    assert command("train", run / "latents", "--out", tmp_path / "fresh", "--precision", "fp32", *rest) == 0
    assert fl.load(tmp_path / "fresh").normalisation.scale == system.model.normalisation.scale
    capsys.readouterr()


def test_latents_that_are_not_found_or_not_the_model_s_are_refused(run, tmp_path, capsys):
    shutil.copytree(run / "model", tmp_path / "alone" / "model")
    systems.begin_latent_run(autoencoder(1), rows(), tmp_path / "other", progress=False)
    shutil.copytree(run / "model", tmp_path / "other" / "model")
    distill = ["distill", "--method", "mean-flow", "--steps", 2, "--out", tmp_path / "x"]
    own, other = autoencoder().hash, autoencoder(1).hash
    for arguments, says in (
        ([tmp_path / "alone" / "model"], "expected --data, a folder of these latents with their autoencoder beside it"),
        ([tmp_path / "other" / "model"], f"by autoencoder {own}, and {tmp_path}/other/latents holds latents"),
        ([run / "model", "--data", tmp_path / "other" / "latents"], f"{other}; expected that autoencoder's"),
        ([run / "model", "--pairs", run / "latents"], f"expected --data {run / 'latents'}"),
        ([run], f"expected one model: {run / 'model'}"),
    ):
        assert command(*distill, *arguments) == 2
        assert says in capsys.readouterr().err
    assert command("train", run / "latents", "--image-size", 4, "--out", tmp_path / "x") == 2
    assert "--image-size is 4" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_parts_say_what_they_are(run, tmp_path):
    ae = {
        "autoencoder": f"{autoencoder().hash}, an AutoencoderKL",
        "images": "1 x 7 x 7, from 0 to 16",
        "latents": "2 x 4 x 4, sides divided by 2",
    }
    assert fl.interop.describe(run / "autoencoder") == ae
    made, z = fl.interop.describe(run / "latents"), open_latents(run / "latents")
    assert made["latents"] == "2 x 4 x 4, of 12 images"
    assert (made["data"], made["autoencoder"]) == ("tensors", autoencoder().hash)
    assert (made["draws"], made["conditions"]) == ("3 of each image", "label (3 classes)")
    assert (made["shards"], made["written by"]) == ("1 of 1", f"Fluvial {fl.__version__}")
    n = z.normalisation
    for name, values in (("mean", n.shift), ("deviation", n.scale)):
        assert made[name] == f"{values[0]:.3g}, {values[1]:.3g}, by channel"
    trained = systems.train_autoencoder(
        rows(), tmp_path / "ae", 2, factor=2, width=8, latent_channels=2, log_every=2, **QUICK
    )
    said = fl.interop.describe(tmp_path / "ae")
    last = json.loads((tmp_path / "ae" / "metrics.jsonl").read_text().splitlines()[-1])
    assert said["autoencoder"] == f"{trained.hash}, an AutoencoderKL"
    assert said["rate"] == f"{last['rate']:.3g} bits/dim, of the batch of step 2"
    assert said["RMSE"] == f"{last['rmse'] / 2:.3g} of the range, of the batch of step 2"
    assert said["training"] == "2 of 2 steps of 8 samples, seed 0"
    (tmp_path / "ae" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"an autoencoder, and has no diffusion_pytorch_model.safetensors"):
        fl.interop.describe(tmp_path / "ae" / "vae")


def test_a_clip_says_what_it_is(tmp_path):
    rgb = {"data": torch.rand(8, 3, 8, 8), "caption": ["a bar", "the left bar"] * 4}
    given = {"dim": 8, "width": 32, "layers": 1, "batch_size": 4, "warmup": 1, "progress": False}
    clip = systems.train_clip(systems.open_captioned(rgb), tmp_path / "clip", steps=2, **given)
    said = fl.interop.describe(tmp_path / "clip")
    assert said["clip"] == f"{clip.hash}, a CLIP of transformers'"
    assert said["images"].startswith("3 x 8 x 8, from ")
    assert said["texts"] == f"up to {clip.length} token ids, of 8"  # four words, four marks
    assert said["embeddings"] == "8 numbers, of length 1"
    assert said["training"].startswith("2 of 2 steps, last loss ")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"a CLIP, and has no model.safetensors"):
        fl.interop.describe(tmp_path / "clip")


def test_a_latent_run_is_evaluated_on_the_images_it_is_of(tmp_path, capsys, monkeypatch):
    """These are known by the name of its latents; or named, of its size or larger."""
    from fluvial.show import evaluate as job

    seen = []

    def looked_at(models, source, **options):
        seen.append((models, source))
        raise OptionError("enough")

    monkeypatch.setattr(job, "evaluate", looked_at)
    z, inside = systems.begin_latent_run(autoencoder(0, (1, 8, 8)), "digits", tmp_path / "run", progress=False)
    fl.train(small(z), z, steps=2, out=inside, **QUICK)
    numpy.savez(tmp_path / "large.npz", data=rows(side=16)["data"].numpy(), label=rows()["label"].numpy())
    for data in ([], ["--data", tmp_path / "large.npz"]):
        assert command("evaluate", tmp_path / "run", *data, "--out", tmp_path / "out") == 2
        assert "enough" in capsys.readouterr().err
    (models, digits), (_, large) = seen
    assert isinstance(models["run"], systems.Latent)
    assert (digits.name, digits.shape, len(digits)) == ("digits", (1, 8, 8), 1797)
    assert isinstance(large, StageSource)
    torch.testing.assert_close(
        large.batch(torch.arange(2))["data"],
        torch.nn.functional.avg_pool2d(rows(side=16)["data"][:2], 2), rtol=0, atol=1e-5
    )  # fmt: skip
