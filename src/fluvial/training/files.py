"""Data in files: folders of images, numpy's arrays, Hugging Face datasets."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fluvial.errors import DataError
from fluvial.training.source import MEASURED, Rows, Source, Tensors, as_float, channels_first

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
DATA_KEYS = ("data", "images", "x", "train_x")
LABEL_KEYS = ("label", "labels", "y", "train_y")

_GREY = {"1", "L", "I", "I;16", "I;16B", "I;16L", "F"}
# Small sets are decoded once: 512 MiB of pixels stay in memory, the rest is decoded whenever it is asked for.
_KEEP = 512 * 2**20


class Images(Source):
    """Images decoded when they are asked for, all cut to one size: scaled to cover it, then cropped at the
    centre.

    RGB, or one channel when every image is grey; transparent ones are laid on white. An image that cannot be
    read is named in `skipped`. If that shows only while decoding, the next readable one stands in for it,
    always the same.

    Raises:
        DataError: when none can be read.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        read: Callable[[int], Path | io.BytesIO],
        labels: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        looked_at: int | None = None,
    ):
        self._files, self._read, self._broken = list(files), read, {}
        self._kept: dict[int, Tensor] = {}
        headers = {i: header for i in range(len(files))[:looked_at] if (header := self._header(i))}
        if not headers:
            raise DataError(f"{name}: none of {len(files)} images can be read{self._first_reason()}")
        self._mode = "L" if all(mode in _GREY for mode, _ in headers.values()) else "RGB"
        asked = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._height, self._width = asked or next(iter(headers.values()))[1]

        seen = [image for i in list(headers)[:MEASURED] if (image := self._decoded(i)) is not None]
        if not seen:
            raise DataError(f"{name}: none of {len(files)} images can be read{self._first_reason()}")
        self._good = [i for i in range(len(files)) if i not in self._broken]
        self._labels = None if labels is None else torch.as_tensor(labels)
        rows = {"data": torch.stack(seen)}
        if labels is not None:
            rows["label"] = torch.zeros(len(seen), dtype=torch.int64)
        count = None if labels is None else max(labels) + 1
        super().__init__(name, len(self._good), rows, num_classes=count, class_names=class_names)
        self.skipped = [(self._files[i], reason) for i, reason in sorted(self._broken.items())]

    def batch(self, indices: Tensor) -> Rows:
        found = [self._readable(int(index)) for index in indices]
        rows = {"data": as_float(torch.stack([image for _, image in found]))}
        if self._labels is not None:
            rows["label"] = self._labels[[i for i, _ in found]]
        return rows

    def _readable(self, index: int) -> tuple[int, Tensor]:
        """The image at `index`, or the next that can be read: its number among the files, and its pixels."""
        for step in range(len(self._good)):
            i = self._good[(index + step) % len(self._good)]
            known = i in self._broken
            image = None if known else self._decoded(i)
            if image is not None:
                return i, image
            if not known:
                self.skipped.append((self._files[i], self._broken[i]))
        raise DataError(f"{self.name}: no image can be read any more{self._first_reason()}")

    def _header(self, i: int) -> tuple[str, tuple[int, int]] | None:
        """Mode, height and width without decoding; None, and a reason kept, if it is no image."""
        try:
            with Image.open(self._read(i)) as image:
                width, height = image.size
                turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 … 8 lie on their side
                return image.mode, (width, height) if turned else (height, width)
        except Exception as error:  # Pillow's readers fail on damaged files with almost any exception
            self._broken[i] = _reason(error)
            return None

    def _decoded(self, i: int) -> Tensor | None:
        """Pixels (C, H, W) uint8; None, and a reason kept, if they cannot be had."""
        if i in self._kept:
            return self._kept[i]
        try:
            with Image.open(self._read(i)) as image:
                image = _flat(ImageOps.exif_transpose(image), self._mode)
            image = ImageOps.fit(image, (self._width, self._height), Image.Resampling.LANCZOS)
        except Exception as error:  # as above
            self._broken[i] = _reason(error)
            return None
        pixels = torch.from_numpy(numpy.array(image))
        pixels = pixels[None] if self._mode == "L" else pixels.permute(2, 0, 1).contiguous()
        if (len(self._kept) + 1) * pixels.numel() <= _KEEP:
            self._kept[i] = pixels
        return pixels

    def _first_reason(self) -> str:
        if not self._broken:
            return ""
        i = min(self._broken)
        return f"; {self._files[i]}: {self._broken[i]}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """The image in this mode, laid on white where it is transparent, 16 bits scaled to 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((numpy.asarray(image).astype(numpy.float64) / 257).clip(0, 255).astype(numpy.uint8))
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.new("RGBA", above.size, "white")
        image.alpha_composite(above)
    return image.convert(mode)


def folder(path: Path, image_size: int | tuple[int, int] | None) -> Images:
    """The images below `path`; with two or more subfolders, those are the classes, in alphabetical order.

    Raises:
        DataError: without any image; with images both beside and inside class folders.
    """
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in file.relative_to(path).parts)
    )
    if not files:
        raise DataError(f"no images in {path}; expected files ending in {' '.join(sorted(SUFFIXES))}")
    inside = [file.relative_to(path).parts for file in files]
    classes = sorted({parts[0] for parts in inside if len(parts) > 1})
    loose = sum(len(parts) == 1 for parts in inside)
    labels = None
    if len(classes) > 1:
        if loose:
            raise DataError(
                f"{path} has {loose} images beside its {len(classes)} folders; put all into class folders, or none"
            )
        labels = [classes.index(parts[0]) for parts in inside]
    names = ["/".join(parts) for parts in inside]
    return Images(str(path), names, lambda i: files[i], labels, classes if labels is not None else None, image_size)


def array(path: Path) -> Tensors:
    """The samples in a .npy or .npz file, read without pickle.

    Images are (n, H, W) or (n, H, W, C) or (n, C, H, W), points (n, D), series (n, C, L). Three axes are
    images when they are uint8 or square, else series. In a .npz, samples are called data, images, x or
    train_x, or are the only array there besides labels; labels are called label, labels, y or train_y, and
    may be words.

    Raises:
        DataError: for a file that is not numpy's, or holds pickled objects; when no array can be told to be
            the samples.
    """
    try:
        loaded = numpy.load(path, allow_pickle=False)
        arrays = {"data": loaded} if isinstance(loaded, numpy.ndarray) else {key: loaded[key] for key in loaded}
    except Exception as error:  # zip, header and pickle errors are all different
        raise DataError(f"{path} cannot be read as numpy's: {_reason(error)}") from error
    label_key = next((key for key in LABEL_KEYS if key in arrays), None)
    others = [key for key in arrays if key != label_key]
    data_key = next((key for key in DATA_KEYS if key in arrays), others[0] if len(others) == 1 else None)
    if data_key is None:
        raise DataError(
            f"{path} has {', '.join(arrays) or 'no arrays'}; expected the samples as one of {', '.join(DATA_KEYS)}"
        )
    data = arrays[data_key]
    if data.dtype.kind not in "fiub":
        raise DataError(f"{path}: {data_key} holds {data.dtype}; expected numbers")
    if data.dtype.kind == "u" and data.dtype != numpy.uint8:
        data = data.astype(numpy.int64)  # torch does little with wider unsigned numbers
    rows = {"data": _arranged(torch.from_numpy(numpy.ascontiguousarray(data)), data_key)}
    class_names = None
    if label_key is not None:
        label = arrays[label_key]
        if label.dtype.kind in "US":
            words, label = numpy.unique(label.astype(str), return_inverse=True)
            class_names = [str(word) for word in words]
        rows["label"] = torch.from_numpy(label.astype(numpy.int64) if label.dtype.kind == "u" else label)
    return Tensors(str(path), rows, class_names)


def _arranged(data: Tensor, key: str) -> Tensor:
    square = data.ndim == 3 and data.shape[1] == data.shape[2]
    if data.ndim == 4 or (data.ndim == 3 and (square or data.dtype == torch.uint8 or key == "images")):
        return channels_first(data)
    return data


def hugging_face(spec: str, image_size: int | tuple[int, int] | None) -> Images:
    """ "hf:name[:split]" (split "train"): the image column of a dataset, and its class labels if it has them.

    Raises:
        DataError: without the datasets package; for a dataset that cannot be loaded, or has no images.
    """
    name, _, split = spec.removeprefix("hf:").partition(":")
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError as error:
        raise DataError(f"{spec} needs the datasets package: pip install datasets") from error
    try:
        table: Any = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the network, the hub, the name, the split
        raise DataError(f"{spec} cannot be loaded: {_reason(error)}") from error
    features = table.features
    column = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise DataError(f"{spec} has no images; its columns are {', '.join(features)}")
    # Encoded bytes or a path: decoded here like any file, so that a damaged one can be named and skipped.
    table = table.cast_column(column, datasets.Image(decode=False))

    def read(i: int) -> Path | io.BytesIO:
        cell = table[i][column]
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"])

    label_key = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    labels = None if label_key is None else list(table[label_key])
    class_names = None if label_key is None else features[label_key].names
    names = [f"row {i}" for i in range(len(table))]
    return Images(spec, names, read, labels, class_names, image_size, looked_at=MEASURED)
