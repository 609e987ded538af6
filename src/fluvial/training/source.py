"""Where training data comes from: what every source tells about itself, and the sources that are tensors.

A source gives samples in the data's own units, as float32, and has measured them: range, mean and std are
kept in its `normalisation`, which maps them to the units of the path. Images (C, H, W) are mapped linearly
from their range to [-1, 1], which is what diffusers' pipelines expect; everything else is standardised per
channel, the sample's first axis.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from fluvial.errors import DataError
from fluvial.model import Normalisation

Rows = dict[str, Tensor]

# What a pair has beside its data: the noise it came from, and states on the way. No conditions of a network.
COUPLED = ("noise", "states")

# Enough for a range and a mean, few enough to decode while somebody waits.
MEASURED = 2048


class Source(ABC):
    """Samples with their conditions, and what was measured of them.

    Attributes:
        name: what it was opened as.
        size: how many samples; None for a stream (then `len` is a TypeError).
        shape: of one sample, such as (1, 8, 8).
        conditions: names of the tensors beside `data`, such as ("label",).
        num_classes: labels are 0 … num_classes-1; None without labels.
        class_names: what the classes are called, where that is known.
        normalisation: the measured range, mean and std, and the map to path units that follows from them.
        measured: how many samples were measured: all of those in memory, else the first 2,048 at most.
        skipped: (file, reason) of every image that could not be read; it grows if one is found only later.
        waits: whether a batch waits for a disk: it is then read while the network computes. One that computes would
            only take a processor's threads from the network.
        kept: the conditions that training never drops, whatever the model's null condition says.
        autoencoder: of latents, what decodes them: sheets show the pictures. None: samples are shown as they are.
    """

    waits = True
    kept: tuple[str, ...] = ()
    autoencoder: Any = None

    def __init__(
        self,
        name: str,
        size: int | None,
        seen: Rows,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ):
        self.name, self.size, self.measured = name, size, len(seen["data"])
        self.shape = tuple(seen["data"].shape[1:])
        self.conditions = tuple(key for key in seen if key != "data")
        self.num_classes = num_classes
        if num_classes is None and "label" in seen:
            self.num_classes = len(class_names) if class_names else int(seen["label"].max()) + 1
        self.class_names = tuple(class_names) if class_names else None
        self.normalisation = measure(seen["data"])
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError(f"{self.name} is a stream: its length is not known")
        return self.size

    @abstractmethod
    def batch(self, indices: Tensor) -> Rows:
        """The samples at `indices` (n,): "data" (n, *shape), float32 in its own units, and conditions."""


class Tensors(Source):
    """Samples in memory: a tensor, or a dict of tensors with "data" and its conditions, batch first.

    uint8 images stay uint8 in memory, and come out as floats 0 … 1.

    Raises:
        DataError: for NaN or infinite values (says which row), labels that are not 0, 1, 2, …, different
            lengths.
    """

    waits = False

    def __init__(self, name: str, rows: Mapping[str, Any], class_names: Sequence[str] | None = None):
        self._rows = checked(rows, name)
        super().__init__(name, len(self._rows["data"]), self._rows, class_names=class_names)
        if self.num_classes is not None:
            check_range(self._rows, self.num_classes, name)

    def batch(self, indices: Tensor) -> Rows:
        rows = {key: values[indices] for key, values in self._rows.items()}
        return {**rows, "data": as_float(rows["data"])}


class Stream(Source):
    """An iterable of chunks, each a tensor, a (data, label) pair or a dict of tensors, batch first.

    It is read in its own order, again and again; chunks are cut and joined to whatever batch is asked for. To
    resume exactly it must give the same chunks each time it is iterated. Labels are counted in the first
    2,048 samples, unless the iterable has a `num_classes` of its own.

    Raises:
        DataError: for an iterator, which can be read only once; for an empty one; for chunks that do not fit
            together.
    """

    def __init__(self, chunks: Iterable[Any], name: str = "stream"):
        if iter(chunks) is chunks:
            raise DataError(
                f"{name} is an iterator, which can be read only once; "
                "give an iterable that starts afresh each time, such as a list or a DataLoader"
            )
        self._chunks = chunks
        head: list[Rows] = []
        for rows in self._pass(name):
            head.append(rows)
            if sum(len(rows["data"]) for rows in head) >= MEASURED:
                break
        if not head:
            raise DataError(f"{name} gave no samples")
        seen = {key: values[:MEASURED] for key, values in join(head).items()}
        super().__init__(name, None, seen, num_classes=getattr(chunks, "num_classes", None))

    def batch(self, indices: Tensor) -> Rows:
        raise DataError(f"{self.name} is a stream: it has no sample number {int(indices[0])}; read it with batches()")

    def rows(self, start: int) -> Iterator[Rows]:
        """Its chunks from row `start` of the endless repetition, the first cut to begin there."""
        skip, length = start, 0
        while True:
            for rows in self._pass(self.name):
                count = len(rows["data"])
                length += count
                if skip < count:
                    rows = {key: values[skip:] for key, values in rows.items()}
                    self._check(rows)
                    yield {**rows, "data": as_float(rows["data"])}
                skip = max(0, skip - count)
            if length == 0:
                raise DataError(f"{self.name} gave no samples when it was read again; is it used up?")
            # One whole pass tells how long it is: the rest of what is to be skipped needs no reading.
            skip, length = skip % length, 0

    def _pass(self, name: str) -> Iterator[Rows]:
        first: Rows | None = None
        row = 0
        for chunk in self._chunks:
            if isinstance(chunk, (tuple, list)) and len(chunk) == 2:
                chunk = {"data": chunk[0], "label": chunk[1]}
            rows = checked(chunk if isinstance(chunk, Mapping) else {"data": chunk}, name, row)
            first = first or rows
            if set(rows) != set(first) or rows["data"].shape[1:] != first["data"].shape[1:]:
                raise DataError(
                    f"{name}: the chunk at row {row} has {describe(rows)}, the first had {describe(first)}; "
                    "all chunks must be alike but for their length"
                )
            row += len(rows["data"])
            yield rows

    def _check(self, rows: Rows) -> None:
        if self.num_classes is not None:
            check_range(rows, self.num_classes, self.name)


def describe(rows: Rows) -> str:
    """Keys and shapes, for messages."""
    return ", ".join(f"{key} {tuple(values.shape)}" for key, values in rows.items())


def join(chunks: Sequence[Rows]) -> Rows:
    """Chunks, one after the other."""
    return {key: torch.cat([rows[key] for rows in chunks]) for key in chunks[0]}


def as_float(data: Tensor) -> Tensor:
    """Samples as float32; uint8 images (n, C, H, W) become 0 … 1."""
    if data.dtype == torch.uint8 and data.ndim == 4:
        return data.to(torch.float32) / 255.0
    return data.to(torch.float32)


def channels_first(data: Tensor) -> Tensor:
    """Images as they lie in files, (n, H, W) or (n, H, W, C), as (n, C, H, W); those already so stay.

    The last axis is taken for channels when it is 1, 3 or 4 long and the first is not.
    """
    if data.ndim == 3:
        return data[:, None]
    if data.ndim == 4 and data.shape[3] in (1, 3, 4) and data.shape[1] not in (1, 3, 4):
        return data.permute(0, 3, 1, 2).contiguous()
    return data


def checked(given: Mapping[str, Any], name: str, first_row: int = 0) -> Rows:
    """A dict of tensors fit for training, "data" first; `first_row` is its place in a stream, for messages."""
    if "data" not in given:
        raise DataError(f'{name} has {", ".join(map(str, given)) or "no tensors"}; the samples are expected as "data"')
    rows: Rows = {}
    for key in sorted(given, key=lambda key: key != "data"):
        values = given[key]
        if not isinstance(values, (Tensor, numpy.ndarray)):
            raise DataError(f"{name}: {key} is a {type(values).__name__}; expected a tensor, batch first")
        rows[key] = torch.as_tensor(values).detach().cpu()
    data = rows["data"]
    if data.ndim < 2 or data.numel() == 0 or data.is_complex():
        raise DataError(
            f"{name}: data is {tuple(data.shape)} of {data.dtype}; expected real numbers (n, …), "
            "one row a sample, such as (n, 2) or (n, C, H, W)"
        )
    if data.dtype == torch.uint8:
        rows["data"] = channels_first(data)
    elif data.dtype != torch.float32:
        rows["data"] = data.to(torch.float32)
    for key, values in rows.items():
        if values.ndim == 0 or len(values) != len(data):
            raise DataError(f"{name}: {key} has shape {tuple(values.shape)}, but there are {len(data)} samples")
        _check_finite(values, f"{name}: {key}", first_row)
    if "label" in rows:
        rows["label"] = _labels(rows["label"], name, first_row)
    return rows


def _check_finite(values: Tensor, what: str, first_row: int) -> None:
    if not values.is_floating_point():
        return
    bad = torch.cat([(~part.isfinite()).flatten(1).any(1) for part in values.reshape(len(values), -1).split(4096)])
    if bad.any():
        count, row = int(bad.sum()), first_row + int(bad.nonzero()[0])
        others = f", and in {count - 1} more of {len(values)} rows" if count > 1 else ""
        raise DataError(f"{what} is NaN or infinite in row {row}{others}; mend or drop them")


def _labels(label: Tensor, name: str, first_row: int) -> Tensor:
    if label.ndim != 1:
        raise DataError(f"{name}: label has shape {tuple(label.shape)}; expected (n,), one class number per sample")
    whole = label.to(torch.int64)
    bad = (whole != label) | (whole < 0)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(f"{name}: label is {label[row].item()} in row {first_row + row}; expected 0, 1, 2, …")
    return whole


def check_range(rows: Rows, num_classes: int, name: str) -> None:
    """Refuses labels past `num_classes`: the one after the last is the null class."""
    if "label" in rows and int(rows["label"].max()) >= num_classes:
        raise DataError(
            f"{name}: label is {int(rows['label'].max())}, but there are {num_classes} classes; "
            "where they were counted in its first samples, give the iterable a num_classes attribute"
        )


def measure(data: Tensor) -> Normalisation:
    """Range, mean and std of samples (n, *shape), in float64, and the map to path units that follows from
    them.

    Images (C, H, W) are mapped from [low, high] to [-1, 1]; those born as uint8 from their full scale, 0 … 1.
    Anything else is standardised per channel; a constant channel is only shifted.
    """
    each = data.numel() / data.shape[1]
    total, lows, highs = torch.zeros(data.shape[1], dtype=torch.float64), [], []
    for part in _by_channel(data):
        total += part.sum(1)
        lows.append(part.amin(1))
        highs.append(part.amax(1))
    mean, variance = total / each, torch.zeros_like(total)
    for part in _by_channel(data):
        variance += (part - mean[:, None]).square().sum(1) / each
    lows, highs = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
    low, high = float(lows.min()), float(highs.max())
    whole = float(mean.mean()), math.sqrt(float(variance.mean() + mean.var(unbiased=False)))
    if data.ndim == 4:
        if data.dtype == torch.uint8:
            low, high = 0.0, 1.0
        shift, scale = ((low + high) / 2,), ((high - low) / 2 or 1.0,)
    else:
        shift = tuple(mean.tolist())
        scale = tuple(torch.where(highs > lows, variance.sqrt(), 1.0).tolist())
    return Normalisation(shift, scale, low, high, *whole)


def _by_channel(data: Tensor) -> Iterator[Tensor]:
    """Float64 (C, n) of a few thousand samples at a time: the whole would be eight times uint8's memory."""
    for part in data.split(4096):
        yield as_float(part).double().movedim(1, 0).flatten(1)
