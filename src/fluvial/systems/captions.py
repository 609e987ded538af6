"""Captioned images: where they come from, and the words that captions are made of.

A source gives tensors, and captions are words: so a captioned source keeps its captions beside it, and gives whatever
tensors they were turned into, token ids or embeddings, as conditions.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fluvial import random
from fluvial.errors import DataError, OptionError
from fluvial.training.data import open_source
from fluvial.training.files import DATA_KEYS, SUFFIXES, Images
from fluvial.training.source import Rows, Source, Tensors, channels_first

CAPTION_KEYS = ("caption", "captions", "text")
DIGITS = ("zero/0", "one/1", "two/2", "three/3", "four/4", "five/5", "six/6", "seven/7", "eight/8", "nine/9")
DIGIT_TEMPLATES = ("a {}", "the digit {}", "a handwritten {}", "the number {}", "{}")
TEMPLATES = ("a {}", "the {}", "a picture of a {}", "{}")

PAD, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[BOS]", "[EOS]"
_WORDS = 4096


class Captioned(Source):
    """Images with a caption each, and whatever tensors were made of these.

    Args:
        images: any source of images; its labels are not given on.
        captions: one for each of them.
        conditions: tensors beside the images, batch first, such as {"text": token ids (n, L)}.
        name: what it is called; default: the images' name.

    Raises:
        DataError: for a stream, samples that are no images, captions or conditions that are not one for each.
    """

    def __init__(
        self, images: Source, captions: Sequence[str], conditions: Rows | None = None, name: str | None = None
    ) -> None:
        if images.size is None or len(images.shape) != 3:
            what = "a stream" if images.size is None else f"of samples {images.shape}"
            raise DataError(f"{images.name} is {what}; expected images (C, H, W) that can be counted")
        for key, values in {"caption": captions, **(conditions or {})}.items():
            if len(values) != images.size:
                raise DataError(f"{images.name} has {images.size} images and {len(values)} of {key}; expected one each")
        self.images, self.captions, self._told = images, list(captions), dict(conditions or {})
        self.name, self.size, self.measured = name or images.name, images.size, images.measured
        self.shape, self.normalisation = images.shape, images.normalisation
        # The networks that see these leave them out by themselves.
        self.conditions = self.kept = tuple(self._told)
        self.num_classes = self.class_names = None
        self.waits, self.skipped = images.waits, images.skipped

    def batch(self, indices: Tensor) -> Rows:
        told = {key: values[indices] for key, values in self._told.items()}
        return {"data": self.images.batch(indices)["data"], **told}

    def told(self, conditions: Rows, name: str | None = None) -> Captioned:
        """The same images and captions with these conditions."""
        return Captioned(self.images, self.captions, conditions, name or self.name)


def open_captioned(
    spec: Any, words: Sequence[str] | None = None, *, image_size: int | tuple[int, int] | None = None
) -> Captioned:
    """The captioned images that `spec` means.

    Args:
        spec: "digits"; a .npz file with "caption" beside its images, which may be "rgba"; a folder of images with a
            text of the same name beside each, cat.png and cat.txt; a dict of "data" and "caption"; or any labelled
            source that `open_source` opens.
        words: what the classes of a labelled source are called, one for each, synonyms divided by a slash, such as
            "three/3"; default: their own names.
        image_size: as for `open_source`.

    Raises:
        OptionError: for words that are not one for each class, or where captions are there already.
        DataError: for images without captions or labels; see `open_source` too.
    """
    found = _captioned(spec, image_size)
    if found is not None:
        if words is not None:
            raise OptionError(f"words are given, and {found.name} has captions of its own; expected none")
        return found
    source = open_source(spec, image_size=image_size)
    templates = TEMPLATES
    if source.name == "digits":
        words, templates = words or DIGITS, DIGIT_TEMPLATES
    words = words or source.class_names
    if source.num_classes is None or words is None:
        raise DataError(
            f"{source.name} has no captions, and no classes with names to make them of; expected a caption for each "
            "image, or words=(…) for the classes of labelled ones"
        )
    if len(words) < source.num_classes:
        raise OptionError(f"words are {len(words)}, and {source.name} has {source.num_classes} classes; expected each")
    label = torch.cat([source.batch(rows)["label"] for rows in torch.arange(len(source)).split(1024)])
    return Captioned(source, caption_labels(label, phrases(words, templates)))


def phrases(words: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[list[str]]:
    """All that each class may be called: every template with every synonym, ["a three", "a 3", …] for "three/3"."""
    return [[template.format(word) for template in templates for word in each.split("/")] for each in words]


def caption_labels(labels: Tensor, phrases: Sequence[Sequence[str]], seed: int = 0) -> list[str]:
    """A caption for each label (n,): one of the class's phrases, drawn by the seed and the row alone."""
    u = random.uniform(len(labels), (1,), seed, stream=random.DATA, dtype=torch.float64)[:, 0].tolist()
    return [str(phrases[k][int(at * len(phrases[k]))]) for k, at in zip(labels.tolist(), u)]


def _captioned(spec: Any, image_size: Any) -> Captioned | None:
    """What has captions of its own; None for everything else."""
    if isinstance(spec, Captioned):
        return spec
    if isinstance(spec, Mapping) and "caption" in spec:
        captions = [str(caption) for caption in spec["caption"]]
        rest = {key: value for key, value in spec.items() if key != "caption"}
        return Captioned(Tensors("tensors", rest), captions)
    path = Path(spec).expanduser() if isinstance(spec, (str, os.PathLike)) else None
    if path is None:
        return None
    if path.is_file() and path.suffix == ".npz":
        return _npz(path)
    if path.is_dir() and any(path.rglob("*.txt")):
        return _folder(path, image_size)
    return None


def _npz(path: Path) -> Captioned | None:
    try:
        with numpy.load(path, allow_pickle=False) as file:
            key = next((key for key in CAPTION_KEYS if key in file.files and file[key].dtype.kind in "US"), None)
            if key is None:
                return None
            name = next((name for name in (*DATA_KEYS, "rgba") if name in file.files), None)
            captions, pixels = file[key].astype(str).tolist(), None if name is None else file[name]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read as numpy's: {error}") from error
    if pixels is None:
        raise DataError(f"{path} has captions and no images; expected them as one of {', '.join(DATA_KEYS)}, rgba")
    data = torch.from_numpy(numpy.ascontiguousarray(pixels))
    # Small transparent images might be taken for images of many channels.
    data = data.movedim(-1, 1) if name == "rgba" and data.ndim == 4 else channels_first(data)
    return Captioned(Tensors(str(path), {"data": on_white(data) if data.shape[1] == 4 else data}), captions)


def on_white(rgba: Tensor) -> Tensor:
    """uint8 images with transparency (n, 4, H, W), laid on white: (n, 3, H, W)."""
    opacity = rgba[:, 3:].float() / 255.0
    return (rgba[:, :3] * opacity + 255.0 * (1.0 - opacity)).round().to(torch.uint8)


def _folder(path: Path, image_size: int | tuple[int, int] | None) -> Captioned:
    """Images with a text beside each; those that cannot be read are left out, with their captions."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    silent = [file for file in files if not file.with_suffix(".txt").is_file()]
    if silent:
        raise DataError(
            f"{silent[0]} has no {silent[0].stem}.txt beside it ({len(silent)} of {len(files)} images); expected a "
            "caption for each image, or none at all"
        )
    names = [str(file.relative_to(path)) for file in files]
    images = Images(str(path), names, lambda i: files[i], image_size=image_size)
    broken = {name for name, _ in images.skipped}
    kept = [file for file, name in zip(files, names) if name not in broken]
    return Captioned(images, [" ".join(file.with_suffix(".txt").read_text("utf-8").split()) for file in kept])


def tokenizer_for(captions: Sequence[str], length: int | None = None) -> Any:
    """A tokenizer of the words in these captions, as transformers saves them: lower case, numbers apart from words.

    Its first id, 0, fills the end of short captions; words it does not have, beyond the 4,096 most frequent ones too,
    are one unknown word.

    Args:
        captions: all of them.
        length: of its rows of ids, both ends' marks among them; longer captions are cut. Default: four words more than
            the longest caption has, at most 77.

    Raises:
        DataError: for captions without a word.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = {name: i for i, name in enumerate((PAD, UNKNOWN, BEGIN, END))}
    made = Tokenizer(models.WordLevel(dict(marks), unk_token=UNKNOWN))
    made.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits()])  # type: ignore[assignment]
    rows = [[word for word, _ in made.pre_tokenizer.pre_tokenize_str(caption.lower())] for caption in captions]
    counts = Counter(word for row in rows for word in row)
    if not counts:
        raise DataError(f"{len(captions)} captions have no word in them; expected captions such as 'a three'")
    known = sorted(counts, key=lambda word: (-counts[word], word))[: _WORDS - len(marks)]
    made.model = models.WordLevel(marks | {word: len(marks) + i for i, word in enumerate(known)}, unk_token=UNKNOWN)  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, marks[BEGIN]), (END, marks[END])]
    )
    longest = min(77, 2 + 4 + max(map(len, rows)))
    names = {"pad_token": PAD, "unk_token": UNKNOWN, "bos_token": BEGIN, "eos_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length or longest, **names)
