"""Pairs on request: `make_pairs`, what it was asked for, and the manifest that says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluvial.errors import OptionError, RunError
from fluvial.model import Model
from fluvial.sampling import DEFAULT_SOLVER
from fluvial.solvers import Solver
from fluvial.training import atomic
from fluvial.training.data import open_source
from fluvial.training.pair_maker import Maker
from fluvial.training.pair_recipe import Recipe
from fluvial.training.pair_request import Conditions, Steps, recipe
from fluvial.training.pairs import MANIFEST, Pairs, Shards, open_pairs, read_manifest, require_same
from fluvial.training.settings import whole
from fluvial.training.source import Source

# Of a file, at most; and of files, so that little is lost with one that was not finished.
SHARD_BYTES, LEAST_SHARDS = 1 << 26, 16


def make_pairs(
    model: Model,
    n: int | None = None,
    *,
    data: Any = None,
    solver: str | Solver = DEFAULT_SOLVER,
    steps: Steps | None = None,
    times: Any = None,
    states: Sequence[float] | None = None,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    first: int = 0,
    cond: Conditions = None,
    drop_cond: float = 0.1,
    guidance: Callable[[Model], Model] | None = None,
    batch_size: int = 256,
    shard_size: int | None = None,
    store_noise: bool = False,
    progress: bool = True,
) -> Pairs:
    """Pairs (noise, data) that the model's ODE ties together: of drawn noise, or of real data.

        forward:   data = ODE(noise of sample i)          backward:   noise = ODE backwards (row i of the data)

    Forward pair i is `fl.sample(model, …, seed=seed, first=i)`, in the data's own units. Run again on the same folder,
    only the shards that are not there are made, bit-identical to those of a run that was never stopped; n may grow. The
    network is put in eval mode. Launched on several processes (`accelerate launch`, torchrun), each moves the model to
    its own device and makes every so-many-th shard; without a folder each makes all of them.

    Args:
        model: any model, in any notation.
        n: how many pairs. Backwards, default: all of the data from row `first` on.
        data: a `Source`, or what `open_source` takes: its samples are encoded, under their own conditions, and their
            noise is stored beside them.
        solver, steps, times: as for `fl.sample`: heun in 18 steps where nothing else is named. An ODE solver, ending on
            the data.
        states: times, on the model's own path, at which the state is captured too, in path units. They become nodes of
            the solver (one within 1e-9 of a node replaces it).
        out: the folder. None: the pairs are kept in memory.
        seed: of the noise, and of which conditions are dropped.
        first: the number of the first sample.
        cond: tensors by name with n entries; None or "all": every class of the model in turn, i mod classes.
        drop_cond: the share of the samples that are made under the null condition, which is then what is stored.
        guidance: such as `fl.guidance.CFG(3.0)`.
        batch_size: samples at a time; the results depend on it in the last digits, so it belongs to the set.
        shard_size: pairs in a file. Default: whole batches of 64 MiB at most, and 16 files or more where there are as
            many batches. A set that is gone on with keeps its own.
        store_noise: store the noise of forward pairs too; otherwise it is drawn again from the seed.
        progress: show a bar, and say at the end how fast it went.

    Raises:
        OptionError, ShapeError, DataError: for arguments that do not fit, before anything is written.
        RunError: for a folder under other settings, or of something else; for a damaged shard; for a full disk.
        NonFiniteError: names the samples; their shard is not written.
        RunInterrupted: a KeyboardInterrupt, after Ctrl-C or SIGTERM, when the batch at hand is done: complete shards
            are kept, the one that was begun is not.

    Source: Liu, Gong, Liu: Flow straight and fast (2022), https://arxiv.org/abs/2209.03003, algorithm 1; with encoded
    data, Lee, Lin, Fanti: Improving the training of rectified flows (2024), https://arxiv.org/abs/2405.20320
    """
    source = None if data is None else open_source(data)
    for name, value, least in (("first", first, 0), ("batch_size", batch_size, 1), ("shard_size", shard_size, 1)):
        if value is not None:
            whole(name, value, least)
    n = _count(n, source, first)
    team = _Team() if out is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    if team is not None:
        model.to(team.accelerator.device)
    made = recipe(
        model, n, solver=solver, steps=steps, times=times, states=states, cond=cond, drop_cond=drop_cond,
        guidance=guidance, seed=seed, first=first, source=source,
    )  # fmt: skip
    asked = _Asked(made, n, batch_size, shard_size, source is not None or store_noise)
    if out is None:
        made.try_once()
        return _in_memory(made, asked.manifest(), progress)
    return _in_folder(made, asked, Path(out), team, progress)


def _in_memory(made: Recipe, manifest: dict[str, Any], progress: bool) -> Pairs:
    maker = Maker(made, manifest, None)
    maker.run(range(len(Shards(manifest["n"], manifest["shard_size"]))), progress)
    return Pairs(f"pairs of model {manifest['model']}", manifest, made.model.path, maker.kept.__getitem__)


def _in_folder(made: Recipe, asked: _Asked, folder: Path, team: _Team | None, progress: bool) -> Pairs:
    if team is None:
        manifest, rank, world = _begin(made, asked, folder, True), 0, 1
    else:
        rank, world = team.accelerator.process_index, team.accelerator.num_processes
        # What the folder was until now nobody reads any more; the first process writes what the others then read.
        team.accelerator.wait_for_everyone()
        with team.accelerator.main_process_first():
            manifest = _begin(made, asked, folder, rank == 0)
    shards = Shards(manifest["n"], manifest["shard_size"])
    Maker(made, manifest, folder).run(range(rank, len(shards), world), progress and rank == 0)
    if team is not None:
        team.accelerator.wait_for_everyone()
    return open_pairs(folder)


def _begin(made: Recipe, asked: _Asked, folder: Path, writes: bool) -> dict[str, Any]:
    """Begins the set in its folder, or makes sure that the one there is the same; returns its manifest.

    Raises:
        RunError: where it is not the same, or something else.
    """
    made.model.path.config()  # a path that cannot be written is refused at once
    before = read_manifest(folder)
    if before is None:
        made.try_once()
        manifest = asked.manifest()
    else:
        require_same(folder, before, asked.manifest(before["shard_size"], min(asked.n, before["n"])))
        if asked.n < before["n"]:
            raise RunError(
                f"{folder} is a set of {before['n']} pairs, and n is {asked.n}; expected {before['n']} or more"
            )
        manifest = before if asked.n == before["n"] else asked.manifest(before["shard_size"])
    if writes:
        with atomic.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            atomic.sweep(folder)
            if manifest != before:
                atomic.write_json(folder / MANIFEST, manifest)
    return manifest


class _Team:
    """The processes that share the work."""

    def __init__(self) -> None:
        from fluvial.training.opening import accelerator  # slow to import, and needed by several processes only

        self.accelerator = accelerator()


def _count(n: int | None, source: Source | None, first: int) -> int:
    if source is None:
        if n is None:
            raise OptionError("n is missing; expected how many pairs to make")
    elif source.size is None:
        raise OptionError(f"{source.name} is a stream: its rows have no numbers; expected data that can be read by row")
    else:
        left = source.size - first
        n = max(left, 0) if n is None else n
        if n > left or left < 1:
            raise OptionError(f"n is {n} from row {first}; {source.name} has {source.size} samples")
    whole("n", n, 1)
    return n


@dataclass(frozen=True)
class _Asked:
    """What was asked for beside the recipe."""

    recipe: Recipe
    n: int
    batch_size: int
    shard_size: int | None
    store_noise: bool

    def manifest(self, shard_size: int | None = None, n: int | None = None) -> dict[str, Any]:
        """The manifest: of a new set, or of one that has its own size of shards, and maybe fewer pairs so far."""
        return self.recipe.manifest(n or self.n) | {
            "batch_size": self.batch_size,
            "shard_size": self.shard_size or shard_size or self._default(),
            "noise": "stored" if self.store_noise else "from seed",
        }

    def _default(self) -> int:
        fit = SHARD_BYTES // self.recipe.row_bytes(self.store_noise) // self.batch_size
        several = -(-self.n // (LEAST_SHARDS * self.batch_size))
        return max(1, min(fit, several)) * self.batch_size
