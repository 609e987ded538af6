"""Pairs of noise and data that a model's ODE ties together: what a set of them is, and how it is read.

    manifest.json                how the pairs are made, and how many there are; written first
    shard-000000.safetensors …   the pairs themselves, `shard_size` to a file

Pair k of a set is sample number first + k: its noise is a function of the seed and that number, and is drawn again when
it is read, unless it was stored. Shards are mapped into memory, so that a batch reads its own rows and no others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluvial import paths, random
from fluvial.errors import RunError
from fluvial.model import Normalisation
from fluvial.training import atomic
from fluvial.training.source import COUPLED, Rows, Source

MANIFEST = "manifest.json"


class PairSource(Source):
    """A source of pairs of one model.

    Attributes:
        path: the model's path, which `states` lie on.
        times: when the states were captured; () without states.
    """

    waits = False

    def __init__(
        self,
        name: str,
        size: int,
        shape: tuple[int, ...],
        conditions: tuple[str, ...],
        num_classes: int | None,
        normalisation: Normalisation,
        path: paths.Path,
        times: tuple[float, ...],
    ) -> None:
        self.name, self.size, self.shape, self.num_classes = name, size, shape, num_classes
        self.conditions = ("noise", *(["states"] if times else []), *conditions)
        # The model's own units: what a few of its samples happen to span is no better.
        self.normalisation, self.measured = normalisation, 0
        self.class_names, self.skipped = None, []
        self.path, self.times = path, times


class Pairs(PairSource):
    """A set of pairs; made by `make_pairs`, opened by `open_pairs`.

    As a source it gives "data" (n, *shape), float32 in the data's own units; "noise" (n, *shape), of unit variance;
    "states" (n, J, *shape) at `times`, in path units, where they were captured; and the conditions that each pair was
    made under, the null one where it was dropped.

    Attributes:
        manifest: how the pairs were made.
        path: the model's path.
        times: when the states were captured.
    """

    def __init__(self, name: str, manifest: Mapping[str, Any], path: paths.Path, load: Callable[[int], Rows]) -> None:
        super().__init__(
            name,
            manifest["n"],
            tuple(manifest["shape"]),
            tuple(manifest["conditions"]),
            manifest["num_classes"],
            _normalisation(manifest["normalisation"]),
            path,
            tuple(manifest["states"]),
        )
        self.manifest = dict(manifest)
        self.shards = Shards(manifest["n"], manifest["shard_size"])
        self._load, self._loaded = load, dict[int, Rows]()

    def batch(self, indices: Tensor) -> Rows:
        indices = indices.to(torch.int64)
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= len(self)):
            raise IndexError(f"pairs {int(indices.min())} to {int(indices.max())} are asked of {len(self)}")
        shard = indices // self.shards.size
        order = torch.argsort(shard, stable=True)
        which, counts = torch.unique_consecutive(shard[order], return_counts=True)
        pieces: dict[str, list[Tensor]] = {}
        for k, local in zip(which.tolist(), (indices % self.shards.size)[order].split(counts.tolist())):
            for name, values in self._rows(k).items():
                pieces.setdefault(name, []).append(values[local])
        # `order` sorted them by shard: its inverse brings them back.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        rows = {name: torch.cat(parts)[back] for name, parts in pieces.items()}
        if "noise" not in rows:
            rows["noise"] = self._drawn(indices)
        return {name: rows[name] for name in ("data", *self.conditions)}

    @property
    def data(self) -> Tensor:
        """All data (n, *shape), in their own units."""
        return self._all("data")

    @property
    def noise(self) -> Tensor:
        """All noise (n, *shape), of unit variance."""
        stored = self.manifest["noise"] == "stored"
        return self._all("noise") if stored else self._drawn(torch.arange(len(self)))

    @property
    def states(self) -> Tensor | None:
        """All states (n, J, *shape) at `times`, in path units; None where none were captured."""
        return self._all("states") if self.times else None

    @property
    def cond(self) -> Rows:
        """The conditions of all pairs, by name."""
        return {name: self._all(name) for name in self.conditions if name not in COUPLED}

    def _drawn(self, indices: Tensor) -> Tensor:
        return random.normal(indices + self.manifest["first"], self.shape, self.manifest["seed"], stream=random.START)

    def _all(self, name: str) -> Tensor:
        return torch.cat([self._rows(k)[name] for k in range(len(self.shards))])

    def _rows(self, k: int) -> Rows:
        if k not in self._loaded:
            self._loaded[k] = self._load(k)
        return self._loaded[k]

    def __repr__(self) -> str:
        return f"Pairs({self.name}, {len(self)} of shape {self.shape})"


def open_pairs(folder: str | os.PathLike[str]) -> Pairs:
    """The set of pairs that `make_pairs` wrote into a folder.

    Raises:
        RunError: for another folder; for a set that is not finished, or a shard that is damaged: says how to go on.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        problem = "is empty" if folder.is_dir() else "does not exist"
        raise RunError(f"{folder} {problem}; expected a folder of pairs, as fl.straighten.make_pairs writes it")
    shards = Shards(manifest["n"], manifest["shard_size"])
    missing = [k for k in range(len(shards)) if not shards.complete(folder, k)]
    if missing:
        raise RunError(
            f"{folder} lacks {len(missing)} of its {len(shards)} shards; expected all {len(shards)}: "
            f'fl.straighten.make_pairs(…, n={manifest["n"]}, out="{folder}") or fluvial pairs … -n {manifest["n"]} '
            f"--out {folder}, with the settings it was begun with, makes only those"
        )
    return Pairs(
        str(folder), manifest, paths.from_config(manifest["path"]), lambda k: read_shard(shards.file(folder, k))
    )


def describe_pairs(folder: str | os.PathLike[str]) -> dict[str, str]:
    """A set of pairs in words, finished or not: what each thing is called, and what it is."""
    manifest = read_manifest(Path(folder))
    assert manifest is not None
    shards = Shards(manifest["n"], manifest["shard_size"])
    there = sum(shards.file(Path(folder), k).exists() for k in range(len(shards)))
    backwards = manifest["direction"] == "backward"
    words = {
        "pairs": f"{manifest['n']:,} of shape {' x '.join(map(str, manifest['shape']))}, the noise {manifest['noise']}",
        "made": f"noise from the data {manifest['data']}" if backwards else f"data from noise, seed {manifest['seed']}",
        "by": f"model {manifest['model']} on {manifest['path']['name']}, {manifest['nfe']} NFE each",
        "solver": _options(manifest["solver"]),
        "guidance": "none" if manifest["guidance"] is None else _options(manifest["guidance"]),
        "shards": f"{there} of {len(shards)}",
    }
    if manifest["states"]:
        words["states"] = f"at t = {', '.join(f'{t:g}' for t in manifest['states'])}"
    if manifest["conditions"]:
        words["conditions"] = ", ".join(f"{name}: {value}" for name, value in manifest["conditions"].items())
        words["dropped"] = f"{manifest['drop_cond']:g} of them"
    return words | {"written by": f"Fluvial {manifest['fluvial']}"}


def _options(config: Mapping[str, Any]) -> str:
    """{"name": "Heun", "along": None} -> Heun(along=None)."""
    return f"{config['name']}({', '.join(f'{key}={value}' for key, value in config.items() if key != 'name')})"


@dataclass(frozen=True)
class Shards:
    """How n pairs are cut into files of `size`; the last may hold fewer."""

    n: int
    size: int

    def __len__(self) -> int:
        return -(-self.n // self.size)

    def rows(self, k: int) -> range:
        """The pairs of shard k."""
        return range(k * self.size, min((k + 1) * self.size, self.n))

    def file(self, folder: Path, k: int) -> Path:
        return folder / f"shard-{k:06d}.safetensors"

    def complete(self, folder: Path, k: int) -> bool:
        """Whether shard k is there with all its pairs: one that ended a smaller set has fewer.

        Raises:
            RunError: for a file that is damaged.
        """
        file = self.file(folder, k)
        return file.exists() and len(read_shard(file)["data"]) == len(self.rows(k))


def read_shard(file: Path) -> Rows:
    """The tensors of a shard, as views of the file: what is not looked at is not read.

    Raises:
        RunError: for a file that is missing, damaged or cut short.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in [*opened.keys()]}
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"{file} is damaged or cut short ({reason}); expected a whole shard: delete the file, and what made the "
            "pairs, run again, makes it anew"
        ) from error


def write_shard(file: Path, rows: Rows) -> None:
    """A shard, whole or not at all.

    Raises:
        RunError: for a disk that is full.
    """
    with atomic.writing(file, "; the shards that are there are kept"):
        atomic.replace(file, lambda unfinished: atomic.write_tensors(unfinished, rows))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the set in this folder; None where there is nothing yet.

    Raises:
        RunError: for a folder that holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; expected a folder of pairs")
    if not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir()):
        return None
    if not (folder / MANIFEST).is_file():
        found = min(path.name for path in folder.iterdir())
        raise RunError(f"{folder} is not empty and no set of pairs (it holds {found}); expected another folder")
    manifest = atomic.read_json(folder / MANIFEST)
    lacking = [name for name in ("n", "shard_size", "states", "conditions", "noise", "path") if name not in manifest]
    if lacking:
        raise RunError(
            f"{folder / MANIFEST} lacks {', '.join(lacking)}; expected the manifest that Fluvial wrote there"
        )
    return manifest


def require_same(folder: Path, before: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuses to go on with a set under other settings.

    Raises:
        RunError: names the first setting that differs, with both values.
    """
    for part in asked:
        if part in ("fluvial", "n"):
            continue
        old, new = _flat(before.get(part), part), _flat(asked[part], part)
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                raise RunError(
                    f"{folder} was made with {name} = {old.get(name)!r}, and {name} = {new.get(name)!r} is asked for; "
                    "expected the same settings to go on with it, or another folder"
                )


def _flat(value: Any, name: str) -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"name.a.b[0]": 1}, and how long lists are."""
    if isinstance(value, Mapping):
        return {key: leaf for k, v in value.items() for key, leaf in _flat(v, f"{name}.{k}").items()}
    if isinstance(value, list):
        items = {key: leaf for k, v in enumerate(value) for key, leaf in _flat(v, f"{name}[{k}]").items()}
        return {f"the number of {name}": len(value), **items}
    return {name: value}


def described(normalisation: Normalisation) -> dict[str, Any]:
    """As JSON holds it."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(normalisation).items()}


def _normalisation(plain: Mapping[str, Any]) -> Normalisation:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
    return Normalisation(**values)
