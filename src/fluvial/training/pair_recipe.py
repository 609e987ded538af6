"""How pairs are made: a function from sample numbers to pairs, the same for those stored and those made on the fly.

Forwards, the noise of sample i is what `fl.sample(model, …, seed=seed, first=i)` draws, and the ODE leads to its data.
Backwards, sample i is row i of some data, and the ODE leads to its noise. An ODE ties each noise to one data point: the
pair is a function of the model, the nodes and the number alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from fluvial import __version__, inputs, plans, random, sampling
from fluvial.errors import NonFiniteError, OptionError
from fluvial.model import Model
from fluvial.solvers import Dopri5, Solver
from fluvial.training.batch import dropped
from fluvial.training.checkpoints import model_hash
from fluvial.training.pairs import described
from fluvial.training.settings import plain
from fluvial.training.source import Rows, Source


@dataclass(frozen=True)
class Recipe:
    """What every pair is a function of, beside its number. Made by `pair_request.recipe`.

    Attributes:
        model: the model, guided.
        teacher: the same without guidance.
        nodes: the solver's times, the states' among them.
        states: the times of the states that are captured.
        given: the user's conditions, those of sample `first` first.
        classes: the number of classes that are taken in turn, where they are.
        source: the data, backwards.
    """

    model: Model
    teacher: Model
    guidance: Callable[[Model], Model] | None
    solver: Solver
    nodes: list[float]
    states: tuple[float, ...]
    seed: int
    first: int
    given: Mapping[str, Tensor]
    classes: int | None
    drop_cond: float
    source: Source | None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.model.shape if self.source is None else self.source.shape
        assert shape is not None
        return shape

    @property
    def conditions(self) -> tuple[str, ...]:
        """Their names."""
        if self.source is not None:
            return self.source.conditions
        return ("label",) if self.classes is not None else tuple(self.given)

    @property
    def num_classes(self) -> int | None:
        null = (self.model.null or {}).get("label")
        return null if "label" in self.conditions and isinstance(null, int) else None

    @property
    def nfe(self) -> int | None:
        """Network calls for each pair; None where the solver chooses its own steps."""
        if isinstance(self.solver, Dopri5):
            return None
        make = plans.plan if self.source is None else plans.plan_back
        return sum(len(step.stages) for step in make(self.model, self.solver, self.nodes))

    def start(self, numbers: Tensor) -> Rows:
        """What the network is not needed for: "noise" or "data" of these samples (B,), and their conditions."""
        if self.source is not None:
            rows = self.source.batch(numbers)
            begin = {"data": rows.pop("data")}
        else:
            device = self.model.device
            begin = {"noise": random.normal(numbers, self.shape, self.seed, stream=random.START, device=device)}
            rows = {name: value[numbers - self.first] for name, value in self.given.items()}
            if self.classes is not None:
                rows["label"] = numbers % self.classes
        return begin | dropped(rows, self.model, numbers, self.seed, self.drop_cond)

    def rows(self, numbers: Tensor, start: Rows | None = None) -> Rows:
        """The pairs of these samples (B,), on the CPU.

        Args:
            numbers: int64.
            start: what `start` gave for them, where that was asked for earlier.

        Raises:
            NonFiniteError: names the samples, the step and the culprit.
        """
        start = self.start(numbers) if start is None else start
        cond = {name: value for name, value in start.items() if name not in ("data", "noise")}
        seen = _Seen(self.states)
        options: dict[str, Any] = {"solver": self.solver, "times": self.nodes, "cond": cond, "callback": seen}
        try:
            if self.source is None:
                noise, c = start["noise"], self.model.path(self.nodes[0])
                seen.add(self.nodes[0], noise if c.sigma == 1.0 else noise * c.sigma)
                data = sampling.sample(self.model, noise, **options)
            else:
                data = start["data"].to(self.model.device)
                seen.add(1.0, self.model.normalisation.apply(data))
                noise = sampling.encode(self.model, data, **options)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"pairs {_listed(numbers[seen.lost()])} cannot be made: {error}; samples are counted there from pair "
                f"{int(numbers[0])}"
            ) from error
        pairs = {"data": data, "noise": noise} | ({"states": seen.stacked()} if self.states else {})
        return {name: value.cpu() for name, value in (pairs | cond).items()}

    def try_once(self) -> None:
        """One network call for the first sample: what does not fit is known before anything is written."""
        start = self.start(torch.tensor([self.first]))
        x = start.pop("data" if self.source is not None else "noise").to(self.model.device)
        with torch.no_grad():
            self.model.query(self.nodes[0]).call(x, inputs.conditions(self.model, start, x))

    def row_bytes(self, stored_noise: bool) -> int:
        """How much room a pair takes in a shard."""
        tensors = 1 + len(self.states) + stored_noise
        start = self.start(torch.tensor([self.first]))
        size = start.pop("data" if self.source is not None else "noise")[0].numel() * 4
        return tensors * size + sum(value.nbytes for value in start.values())

    def manifest(self, n: int) -> dict[str, Any]:
        """All of it as JSON, for n pairs."""
        model, source = self.model, self.source
        data = None
        if source is not None:
            data = {"name": source.name, "size": source.size, "measured": described(source.normalisation)}
        guidance = self.guidance if self.guidance is not None else getattr(self.teacher, "guidance", None)
        return {
            "fluvial": __version__,
            "model": model_hash(self.teacher),
            "direction": "forward" if source is None else "backward",
            "data": data,
            "path": _path(model),
            "solver": plain(self.solver),
            "guidance": _guidance(guidance),
            "states": list(self.states),
            "nodes": self.nodes,
            "nfe": self.nfe,
            "seed": self.seed,
            "first": self.first,
            "n": n,
            "drop_cond": self.drop_cond,
            "conditions": {name: self._origin(name, n) for name in self.conditions},
            "null": plain(model.null),
            "num_classes": self.num_classes,
            "shape": list(self.shape),
            "normalisation": described(model.normalisation),
        }

    def _origin(self, name: str, n: int) -> str:
        """Where a condition's values come from."""
        if self.source is not None:
            return "of the data"
        if self.classes is not None:
            return "every class in turn"
        values = self.given[name][:n].detach().cpu().contiguous()
        digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
        return f"given, {digest.hexdigest()[:12]}"


class _Seen:
    """A sampler's callback that keeps the states at the times asked for, and the last one."""

    def __init__(self, times: Sequence[float]) -> None:
        self.times, self.states = times, dict[float, Tensor]()

    def add(self, t: float, x: Tensor) -> None:
        self.last = x
        if t in self.times:
            self.states[t] = x

    def __call__(self, report: sampling.StepReport) -> None:
        self.add(report.t, report.x)

    def stacked(self) -> Tensor:
        """(B, J, …)"""
        return torch.stack([self.states[t] for t in self.times], dim=1)

    def lost(self) -> Tensor:
        """Which samples (B,) ended as numbers that are not finite."""
        return (~self.last.isfinite()).flatten(1).any(1).cpu()


def _path(model: Model) -> Any:
    try:
        return model.path.config()
    except OptionError:
        return repr(model.path)  # a path made of functions, in a set that is kept in memory


def _guidance(guidance: Any) -> Any:
    """A guidance as JSON; a model in it by its hash."""
    found = plain(guidance)
    if is_dataclass(guidance) and isinstance(found, dict):
        models = {f.name: getattr(guidance, f.name) for f in fields(guidance)}
        found |= {name: model_hash(value) for name, value in models.items() if isinstance(value, Model)}
    return found


def _listed(numbers: Tensor) -> str:
    return ", ".join(map(str, numbers[:5].tolist())) + (", …" if len(numbers) > 5 else "")
