"""CLIP: its loss, its words, its unit vectors, its folders, and a training that can be stopped."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from torch.nn import functional as F

from fluvial.convention import Normalisation
from fluvial.errors import DataError, OptionError, RunError, ShapeError
from fluvial.systems import CLIP, clip_training, train_clip
from fluvial.systems.clip import contrastive, equal_rows
from fluvial.training import RunInterrupted
from problems import one_line

WORDS = ["a left bar", "a right bar", "the left bar", "the right bar"]


def bars(n=32):
    """4x4 images whose left or right half is lit, and what they are called."""
    side = torch.arange(n) % 2
    data = 0.1 * torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for i, s in enumerate(side.tolist()):
        data[i, 0, :, 2 * s : 2 * s + 2] += 0.8
    return {"data": data, "caption": [WORDS[i % 4] for i in range(n)]}, side


SMALL = {"dim": 8, "width": 32, "layers": 1, "batch_size": 16, "progress": False}


@pytest.fixture(scope="module")
def clip():
    return train_clip(bars()[0], steps=40, warmup=1, **SMALL)


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_loss_is_infonce_with_shared_targets():
    images, texts, scale = unit(4, 3, seed=0), unit(4, 3, seed=1), torch.tensor(3.0, dtype=torch.float64)
    captions = ["a", "b", "a", "a"]
    same = torch.tensor([[p == q for q in captions] for p in captions])
    s = [[3.0 * float(images[i] @ texts[j]) for j in range(4)] for i in range(4)]
    by_hand = []
    for i in range(4):
        loss = 0.0
        for j in range(4):
            if captions[i] == captions[j]:
                to_text = math.log(math.exp(s[i][j]) / sum(math.exp(s[i][k]) for k in range(4)))
                to_image = math.log(math.exp(s[j][i]) / sum(math.exp(s[k][i]) for k in range(4)))
                loss -= 0.5 * (to_text + to_image) / captions.count(captions[i])
        by_hand.append(loss)
    expected = torch.tensor(by_hand, dtype=torch.float64)
    torch.testing.assert_close(contrastive(images, texts, same, scale), expected, rtol=0, atol=1e-12)


def test_without_duplicates_the_loss_is_the_mean_of_two_cross_entropies():
    images, texts, scale = unit(5, 3, seed=2), unit(5, 3, seed=3), torch.tensor(7.0, dtype=torch.float64)
    logits, own = 7.0 * images @ texts.T, torch.arange(5)
    expected = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
    found = contrastive(images, texts, torch.eye(5, dtype=torch.bool), scale).mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert float(contrastive(images[:1], texts[:1], torch.ones(1, 1, dtype=torch.bool), scale)) == 0.0


def test_an_equal_caption_is_no_negative():
    """Where all captions are equal nothing is better than to treat all alike: there the loss is log B, its least."""
    same = equal_rows(torch.tensor([[2, 4, 3], [2, 4, 3], [2, 4, 3]]))
    assert bool(same.all())
    one = unit(1, 3, seed=0).expand(3, -1)
    loss = contrastive(one, one, same, torch.tensor(5.0, dtype=torch.float64)).mean()
    assert float(loss) == pytest.approx(math.log(3), abs=1e-12)
    assert equal_rows(torch.tensor([[1, 2], [1, 3]])).tolist() == [[True, False], [False, True]]


def test_embeddings_have_length_one_and_do_not_depend_on_the_batch(clip):
    data = bars()[0]["data"]
    images, texts = clip.images(data), clip.texts(WORDS)
    for found in (images, texts):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)), rtol=0, atol=1e-6)
    torch.testing.assert_close(clip.images(data[3:4])[0], images[3], rtol=0, atol=1e-6)
    torch.testing.assert_close(clip.texts(clip.tokens(WORDS))[1], texts[1], rtol=0, atol=0)
    nothing = clip.texts(torch.zeros(2, clip.length, dtype=torch.long))
    assert nothing.abs().max() == 0.0


def test_images_are_seen_in_their_own_range_size_and_channels(clip):
    data = bars()[0]["data"][:6]
    own = Normalisation(low=clip.low, high=clip.high)
    scaled = Normalisation(low=10 * clip.low - 3, high=10 * clip.high - 3)
    torch.testing.assert_close(clip.images(10 * data - 3, scaled), clip.images(data, own), rtol=0, atol=1e-4)
    torch.testing.assert_close(clip.images(data.expand(-1, 3, -1, -1)), clip.images(data), rtol=0, atol=1e-6)
    # Twice the size by repeated pixels is the same image, to the resampling; a border beside the square is cut off.
    large = data.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (clip.pixels(large) - clip.pixels(data)).abs().max() < 0.35
    wide = F.pad(data, (3, 3, 0, 0))
    torch.testing.assert_close(clip.pixels(wide), clip.pixels(data), rtol=0, atol=0)
    with pytest.raises(ShapeError, match="expected"):
        clip.images(data[0])


def test_a_text_of_another_length_is_an_error(clip):
    with pytest.raises(ShapeError, match=rf"\(B, {clip.length}\)"):
        clip.texts(torch.zeros(2, clip.length + 1, dtype=torch.long))
    with pytest.raises(OptionError, match="a list of them"):
        clip.tokens("a left bar")


def test_it_learns_what_is_where(clip):
    rows, side = bars(64)
    classes = [["a left bar", "the left bar"], ["a right bar", "the right bar"]]
    assert clip.accuracy(rows["data"], side, classes) == 1.0
    assert clip.accuracy(rows["data"], 1 - side, classes) == 0.0
    assert clip.zero_shot(rows["data"][:2], ["a left bar", "a right bar"]).tolist() == [0, 1]


def test_saved_and_loaded_it_is_the_same_and_transformers_reads_it(clip, tmp_path):
    from transformers import CLIPModel

    folder, data = clip.save(tmp_path / "clip"), bars()[0]["data"]
    again = CLIP.load(folder)
    assert (again.hash, again.low, again.high, again.mean) == (clip.hash, clip.low, clip.high, clip.mean)
    torch.testing.assert_close(again.images(data), clip.images(data), rtol=0, atol=0)
    torch.testing.assert_close(again.texts(WORDS), clip.texts(WORDS), rtol=0, atol=0)
    theirs = CLIPModel.from_pretrained(folder)
    tokens = clip.tokens(WORDS)
    made = theirs(input_ids=tokens, pixel_values=clip.pixels(data[:4]))
    torch.testing.assert_close(made.text_embeds, clip.texts(WORDS), rtol=0, atol=1e-6)
    torch.testing.assert_close(made.image_embeds, clip.images(data[:4]), rtol=0, atol=1e-6)
    with torch.no_grad():
        again.model.logit_scale.add_(1e-6)
    assert CLIP(again.model, again.tokenizer, mean=again.mean, std=again.std).hash != clip.hash


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, monkeypatch):
    given = {**SMALL, "steps": 8, "log_every": 3, "checkpoint_every": 5, "seed": 4}
    whole = train_clip(bars()[0], tmp_path / "whole", **given)
    step = clip_training._Training._step

    def stopped(self, rows):
        step(self, rows)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(clip_training._Training, "_step", stopped)
        with pytest.raises(RunInterrupted, match="step 4 of 8 and saved"):
            train_clip(bars()[0], tmp_path / "stopped", **given)
    again = train_clip(bars()[0], tmp_path / "stopped", **given)
    assert again.hash == whole.hash
    lines = [
        [json.loads(t) for t in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("whole", "stopped")
    ]
    for line in (*lines[0], *lines[1]):
        line.pop("samples_per_second")
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [3, 6, 8]
    assert train_clip(bars()[0], tmp_path / "stopped", **given).hash == whole.hash  # finished: it is read
    with pytest.raises(RunError, match=r"trained with lr = 0\.001, and lr = 0\.01"):
        train_clip(bars()[0], tmp_path / "stopped", **given, lr=0.01)


def test_what_cannot_be_trained_or_read_is_one_clear_error(tmp_path):
    rows = bars(4)[0]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(RunError, match="something else"):
        train_clip(rows, tmp_path / "notes", **SMALL)
    with pytest.raises(OptionError, match="multiple of 32"):
        train_clip(rows, **{**SMALL, "width": 48})
    with pytest.raises(DataError, match="two or more to tell apart"):
        train_clip({"data": rows["data"], "caption": ["a bar"] * 4}, **SMALL)
    for text in (None, "{}", '{"model_type": "bert"}'):
        folder = tmp_path / "other"
        folder.mkdir(exist_ok=True)
        if text is not None:
            (folder / "config.json").write_text(text)
        with pytest.raises(RunError, match="CLIP of transformers'") as caught:
            CLIP.load(folder)
        one_line(caught.value)
    folder = train_clip(rows, steps=1, **SMALL).save(tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(RunError, match="cut cannot be read as a CLIP of transformers'") as caught:
        CLIP.load(folder)
    one_line(caught.value)
