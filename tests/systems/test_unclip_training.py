"""unCLIP's models in training, and its commands."""

from __future__ import annotations

import pytest
import torch

import fluvial as fl
from fluvial import sheets, training
from fluvial.errors import DataError, OptionError
from fluvial.systems import CLIP, UnCLIP, embedded, open_captioned, train_clip, train_decoder, train_prior
from problems import command

ROWS = {
    "data": torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
    "caption": ["a one", "a two", "the three"] * 4,
}
QUIET = {"progress": False, "batch_size": 8}


@pytest.fixture(scope="module")
def clip():
    return train_clip(ROWS, steps=2, dim=8, width=32, layers=1, **QUIET)


@pytest.fixture(scope="module")
def data(clip):
    return embedded(ROWS, clip)


def test_embedded_is_what_clip_makes_of_each_image_and_caption(clip, data):
    torch.testing.assert_close(data.embedding[3:5], clip.images(ROWS["data"][3:5]), rtol=0, atol=1e-6)
    torch.testing.assert_close(data.text[5], clip.texts(["the three"])[0], rtol=0, atol=1e-6)
    prior, decoder = data.prior(), data.decoder(["text", "embedding"])
    rows = prior.batch(torch.tensor([2, 7]))
    assert rows["data"].equal(data.embedding[[2, 7]])
    assert rows["text"].equal(data.text[[2, 7]])
    unit = prior.normalisation.apply(data.embedding)
    torch.testing.assert_close(unit.mean(0), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(unit.std(0, correction=0), torch.ones(8), rtol=0, atol=1e-5)
    rows = decoder.batch(torch.tensor([2, 7]))
    assert rows["data"].equal(ROWS["data"][[2, 7]])
    assert rows["embedding"].equal(data.embedding[[2, 7]])
    assert set(decoder.conditions) == {"embedding", "text"}
    assert data.decoder().conditions == ("embedding",)


def test_images_without_captions_make_a_decoder_alone(clip):
    data = embedded(training.open_source(ROWS["data"]), clip)
    assert data.decoder().conditions == ("embedding",)
    with pytest.raises(DataError, match="no captions, which a prior learns from"):
        data.prior()
    with pytest.raises(DataError, match="sees the embedding alone"):
        data.decoder(["text"])
    with pytest.raises(OptionError, match="sees label"):
        data.decoder(["label"])


@pytest.mark.parametrize("train", [train_prior, train_decoder])
def test_a_run_that_goes_on_ends_with_the_same_bits(data, tmp_path, train):
    """Which conditions are left out is drawn inside the network, by the step."""
    size = {"width": 8, "sheet_every": None, **QUIET}
    size |= {"sees": ("embedding", "text")} if train is train_decoder else {"depth": 1}
    train(data, tmp_path / "whole", 4, seed=3, **size)
    train(data, tmp_path / "parts", 2, seed=3, **size)
    train(data, tmp_path / "parts", 4, seed=3, **size)
    for weights in ("raw", "ema"):
        assert training.model_hash(tmp_path / "parts", weights) == training.model_hash(tmp_path / "whole", weights)


def test_the_prior_learns_which_embedding_a_text_has(clip):
    """Three texts, three embeddings: the prior has nothing else to draw."""
    data = embedded(ROWS, clip)
    generator = torch.Generator().manual_seed(0)
    data.embedding = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=1).repeat(4, 1)
    run = train_prior(data, steps=250, width=64, depth=2, seed=0, progress=False, batch_size=64, lr=3e-3, ema_decay=0.9)
    told = fl.sample(run.ema, 6, cond={"text": data.text[:6]}, seed=0, steps=20)
    assert (told - data.embedding[:6]).norm(dim=1).max() < 0.2
    torch.testing.assert_close(run.ema.normalisation.invert(torch.zeros(1, 8))[0], data.embedding.mean(0))


def test_the_commands_from_data_to_a_drawing(tmp_path, capsys):
    data, clip = tmp_path / "data", tmp_path / "clip"
    data.mkdir()
    for i, (image, caption) in enumerate(zip(ROWS["data"], ROWS["caption"])):
        sheets.sheet(image[None], scale=1, low=0.0, high=1.0).crop((2, 2, 6, 6)).save(data / f"{i:02}.png")
        (data / f"{i:02}.txt").write_text(caption)
    few = ["--steps", 2, "--batch-size", 8]
    assert command("train-clip", data, "--out", clip, "--width", 32, "--layers", 1, "--dim", 8, *few) == 0
    assert "9 words, embeddings of 8 numbers" in capsys.readouterr().out  # five, and four marks
    assert command("train-prior", data, clip, "--out", tmp_path / "prior", *few) == 0
    assert command("train-decoder", data, clip, "--out", tmp_path / "decoder", "--width", 8, *few) == 0
    assert command("unclip", tmp_path / "prior", tmp_path / "decoder", clip, "--out", tmp_path / "system") == 0
    sheet = tmp_path / "sheet.png"
    given = ["a one", "the two", "-n", 2, "--steps", 2, "--guidance", 2, "--prior-guidance", 1.5, "--out", sheet]
    assert command("draw", tmp_path / "system", *given) == 0
    assert "2 x 2 images" in capsys.readouterr().out
    info = sheets.read_info(sheet)
    assert info["texts"] == ["a one", "the two"]
    assert info["model"]["clip"] == CLIP.load(clip).hash
    assert isinstance(fl.load(tmp_path / "system"), UnCLIP)
    assert command("draw", tmp_path / "prior", "a one") == 2
    assert "holds no unCLIP" in capsys.readouterr().err
    assert open_captioned(data).shape == (3, 4, 4)
