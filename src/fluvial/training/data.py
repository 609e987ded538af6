"""Open any data, and read it in batches whose order is a function of the seed alone.

There is no state to save: step k of a run always reads the same samples, whether it was resumed or not, and
however many processes share the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fluvial import random
from fluvial.errors import DataError, OptionError, one_of
from fluvial.training.files import array, folder, hugging_face
from fluvial.training.source import Rows, Source, Stream, Tensors, join
from fluvial.training.toys import TOYS, digits, toy

__all__ = ["Source", "batches", "open_source"]


def open_source(spec: object, *, image_size: int | tuple[int, int] | None = None) -> Source:
    """The source that `spec` means.

    Args:
        spec: a name (digits, moons, checkerboard, eight_gaussians, spiral); a folder of images, whose
            subfolders are the classes; a .npy or .npz file; "hf:name[:split]"; a tensor (n, …) or an array; a
            dict of them, with the samples as "data" and conditions such as "label"; an iterable of chunks of
            those, read as a stream; or a Source. uint8 means images, with or without a channel axis, first or
            last.
        image_size: what images of a folder or a Hugging Face dataset are resized to: a number, or (height,
            width). Default: the size of the first one.

    Raises:
        OptionError: for a name that is not known, or `image_size` where images already have one.
        DataError: for data that cannot be read, or is not fit for training: the message says where.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if sides is not None and (len(sides) != 2 or min(sides) < 1):
        raise OptionError(f"image_size is {image_size}; expected pixels from 1, one number or (height, width)")
    if isinstance(spec, (str, Path)):
        source = _named(spec, sides)
    else:
        source = _given(spec)
    if sides is not None and source.shape[1:] != tuple(sides):
        raise OptionError(
            f"image_size is {image_size}, but the samples of {source.name} have shape {source.shape}; "
            "only image folders and Hugging Face datasets are resized"
        )
    return source


def _named(spec: str | Path, sides: tuple[int, int] | None) -> Source:
    name, path = str(spec), Path(spec).expanduser()
    if name == "digits":
        return digits()
    if name in TOYS:
        return toy(name)
    if name.startswith("hf:"):
        return hugging_face(name, sides)
    if path.is_dir():
        return folder(path, sides)
    if path.is_file() and path.suffix in (".npy", ".npz"):
        return array(path)
    if path.is_file():
        raise DataError(f"{name} is neither a .npy or .npz file nor a folder of images")
    if isinstance(spec, Path) or path.suffix or len(path.parts) != 1:
        raise DataError(f"{name} does not exist; expected a folder of images, or a .npy or .npz file")
    raise one_of("data", name, ["digits", *TOYS, "hf:name", "a folder of images", "file.npz", "file.npy"])


def _given(spec: object) -> Source:
    if isinstance(spec, Source):
        return spec
    if isinstance(spec, Tensor):
        return Tensors("tensor", {"data": spec})
    if isinstance(spec, numpy.ndarray):
        return Tensors("array", {"data": spec})
    if isinstance(spec, Mapping):
        return Tensors("tensors", spec)
    if isinstance(spec, Dataset) and not isinstance(spec, IterableDataset):
        raise DataError(
            f"a {type(spec).__name__} gives single samples; "
            "wrap it: torch.utils.data.DataLoader(dataset, batch_size=256)"
        )
    if isinstance(spec, Iterable):
        return Stream(spec, type(spec).__name__)
    raise DataError(
        f"data is a {type(spec).__name__}; expected a name, a path, a tensor, a dict of tensors, or an iterable of them"
    )


def batches(
    source: Source, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Rows]:
    """Endless batches: step k reads rows k*B … (k+1)*B-1 of all epochs' permutations, one after the other.

    Args:
        source: what `open_source` gave. A stream is read in its own order instead.
        batch_size: B, over all processes together.
        seed: of the permutations, one per epoch.
        start: the step to begin at; what comes is what an uninterrupted iteration gives from there.
        rank: which process this is; it gets its contiguous share of each batch.
        world: how many processes there are.

    Yields:
        "data" (B/world, *shape) in the data's own units, its conditions, and "index" (B/world,) int64, the numbers
        k*B + j of these rows in the run, which seed their noise.

    Raises:
        OptionError: for a batch that cannot be shared equally, or numbers out of range; at the call, not at
            the first step.
    """
    if batch_size < 1 or start < 0:
        raise OptionError(f"batch_size is {batch_size}, start is {start}; expected batch_size from 1, start from 0")
    if not 0 <= rank < world or batch_size % world:
        raise OptionError(f"batch_size {batch_size} cannot be shared by rank {rank} of {world} in equal parts")
    share = batch_size // world
    if source.size is None:
        assert isinstance(source, Stream)
        return _streamed(source, batch_size, start, rank * share, share)
    return _shuffled(source, source.size, batch_size, seed, start, rank * share, share)


def _shuffled(
    source: Source, size: int, batch_size: int, seed: int, step: int, offset: int, share: int
) -> Iterator[Rows]:
    epoch, order = -1, torch.empty(0, dtype=torch.int64)
    while True:
        first = step * batch_size + offset
        index = torch.arange(first, first + share)
        parts = []
        at = first
        while at < first + share:
            if at // size != epoch:
                epoch = at // size
                order = random.permutation(size, seed, draw=epoch)
            end = min(first + share, (epoch + 1) * size)
            parts.append(order[at - epoch * size : end - epoch * size])
            at = end
        yield {**source.batch(torch.cat(parts)), "index": index}
        step += 1


def _streamed(source: Stream, batch_size: int, step: int, offset: int, share: int) -> Iterator[Rows]:
    waiting: list[Rows] = []
    count = 0
    for rows in source.rows(step * batch_size):
        waiting.append(rows)
        count += len(rows["data"])
        if count < batch_size:
            continue
        joined, begin = join(waiting), 0
        while count - begin >= batch_size:
            mine = slice(begin + offset, begin + offset + share)
            first = step * batch_size + offset
            part = {key: values[mine] for key, values in joined.items()}
            yield {**part, "index": torch.arange(first, first + share)}
            begin += batch_size
            step += 1
        waiting = [{key: values[begin:] for key, values in joined.items()}]
        count -= begin
