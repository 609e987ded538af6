"""Captioned images from everywhere, and the words of captions."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image

from fluvial.errors import DataError, OptionError
from fluvial.systems import open_captioned
from fluvial.systems.captions import DIGIT_TEMPLATES, DIGITS, caption_labels, on_white, phrases, tokenizer_for


def test_digits_are_called_what_they_are():
    source = open_captioned("digits")
    rows = source.images.batch(torch.arange(200))
    for caption, label in zip(source.captions, rows["label"].tolist()):
        assert set(DIGITS[label].split("/")) & set(caption.split())
    assert len(set(source.captions)) == 10 * 2 * len(DIGIT_TEMPLATES)
    assert source.batch(torch.tensor([3]))["data"].equal(rows["data"][3:4])
    assert (source.conditions, source.num_classes, len(source)) == ((), None, 1797)


def test_phrases_are_drawn_by_the_row_alone_and_evenly():
    names = phrases(["cat/kitten", "dog"], ["a {}", "the {}"])
    assert names == [["a cat", "a kitten", "the cat", "the kitten"], ["a dog", "the dog"]]
    labels = torch.zeros(4000, dtype=torch.long)
    found = caption_labels(labels, names, seed=1)
    assert found[:50] == caption_labels(labels[:50], names, seed=1)
    assert found != caption_labels(labels, names, seed=2)
    for name in names[0]:
        assert abs(found.count(name) / 4000 - 0.25) < 0.03


def test_tokens_are_words_and_come_back(tmp_path):
    from transformers import AutoTokenizer

    made = tokenizer_for(["a Red hat2", "the red hat 12", "a"])
    rows = made(["A red hat2", "a blue hat"], padding="max_length", max_length=10)["input_ids"]
    assert made.decode([i for i in rows[0] if i > 3]) == "a red hat 2"
    unknown = made.unk_token_id
    assert rows[1].count(unknown) == 1
    assert rows[1][0] == made.bos_token_id
    assert rows[1][4:] == [made.eos_token_id, 0, 0, 0, 0, 0]
    assert made.model_max_length == 10  # the longest, of four words, its ends, and four more
    cut = made(["a red hat a red hat a red hat a red hat"], truncation=True)["input_ids"][0]
    assert (len(cut), cut[-1]) == (10, made.eos_token_id)
    made.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(["a red hat2"])["input_ids"] == made(["a red hat2"])["input_ids"]
    with pytest.raises(DataError, match="no word"):
        tokenizer_for(["", " "])


def test_the_most_frequent_words_are_kept():
    letters = [chr(97 + i) for i in range(26)]
    made = tokenizer_for([a + b + c for a in letters[:8] for b in letters for c in letters] + ["a"] * 2)
    assert len(made) == 4096
    assert made(["a"])["input_ids"][0][1] == 4  # the first after the marks


def test_an_archive_with_captions(tmp_path):
    rgba = numpy.zeros((3, 4, 4, 4), dtype=numpy.uint8)
    rgba[0, ..., 0], rgba[0, ..., 3] = 200, 255
    numpy.savez(tmp_path / "a.npz", rgba=rgba, path=numpy.array(["x", "y", "z"]), caption=numpy.array(["r", "w", "w"]))
    source = open_captioned(tmp_path / "a.npz")
    assert source.captions == ["r", "w", "w"]
    data = source.batch(torch.arange(2))["data"]
    torch.testing.assert_close(data[0, :, 0, 0], torch.tensor([200 / 255, 0, 0]), rtol=0, atol=1e-6)
    assert data[1].min() == 1.0
    half = torch.tensor([100, 0, 255, 51], dtype=torch.uint8)[None, :, None, None]
    assert on_white(half).flatten().tolist() == [224, 204, 255]
    numpy.savez(tmp_path / "b.npz", caption=numpy.array(["r"]), other=numpy.zeros(1))
    with pytest.raises(DataError, match="captions and no images"):
        open_captioned(tmp_path / "b.npz")


def test_a_folder_with_texts(tmp_path):
    for name, colour in (("one", 10), ("two", 200), ("three", 90)):
        Image.new("RGB", (4, 4), (colour, 0, 0)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a  {name}\n")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.txt").write_text("nothing")
    source = open_captioned(tmp_path)
    rows = source.batch(torch.arange(3))["data"]
    assert source.captions == ["a one", "a three", "a two"]
    assert [round(float(255 * row[0, 0, 0])) for row in rows] == [10, 90, 200]
    (tmp_path / "two.txt").unlink()
    with pytest.raises(DataError, match=r"no two.txt beside it \(1 of 4"):
        open_captioned(tmp_path)


def test_what_has_no_captions_is_one_clear_error():
    images = torch.zeros(4, 1, 4, 4)
    labels = torch.tensor([0, 1, 2, 0])
    with pytest.raises(DataError, match="no captions"):
        open_captioned({"data": images})
    with pytest.raises(DataError, match="no captions"):
        open_captioned({"data": images, "label": labels})
    with pytest.raises(OptionError, match="words are 2, and tensors has 3"):
        open_captioned({"data": images, "label": labels}, words=["a", "b"])
    assert open_captioned({"data": images, "label": labels}, words=["x", "y", "z"]).captions[2].endswith("z")
    with pytest.raises(OptionError, match="captions of its own"):
        open_captioned({"data": images, "caption": ["a"] * 4}, words=["a"])
    with pytest.raises(DataError, match="4 images and 3 of caption"):
        open_captioned({"data": images, "caption": ["a"] * 3})
    with pytest.raises(DataError, match="expected images"):
        open_captioned({"data": torch.zeros(4, 2), "caption": ["a"] * 4})
