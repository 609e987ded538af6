"""What all distillations share: where the student is asked, what it should have answered, and how that is measured.

    E w distance(answer(x, t -> r), target)

A method is stated on one path, most on the rectified one, x = t data + (1 - t) noise, where a flow map is
X(x, t -> r) = x + (r - t) u. The student keeps its own notation: it is seen there by an exact conversion. A method says
only what to `ask`; targets are made without gradients, with the dropout that the student then has.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from fluvial import predictions, random
from fluvial.errors import OptionError, one_of
from fluvial.flow_maps import FlowMap
from fluvial.model import Model
from fluvial.objectives import Given, Objective, mean_square
from fluvial.predictions import spread
from fluvial.training import model_hash

JUDGES = ("own", "average")

# Numbers of what is drawn for a sample beside its time, which is number 0.
END, CHOICE, LEVEL, SCALE = 1, 2, 3, 4


class Asked(NamedTuple):
    """A question to the student, and its answer.

    Attributes:
        x, t, r: states (B, …) on the path of the student, times (B,), and ends (B,) or None for the data.
        target: (B, …) what the student should predict there.
        weight: (B,) of the error; None is 1.
        arrival: (B,) what an error of 1 in the target is in the state where the way ends; None is 1.
    """

    x: Tensor
    t: Tensor
    r: Tensor | None
    target: Tensor
    weight: Tensor | None = None
    arrival: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    """The loss of a flow map; each method says what to `ask`, on which `path`, and of what `kind` the flow map is.

    Args:
        teacher: the model whose ODE is followed, on the method's path and under its guidance; None: the data's own,
            the straight line from the noise to the data.
        scales: (low, high): the teacher's guidance scale is drawn anew for each sample, and told to the student.
        judge: whose answers are the targets, where a student's are: "own", its present ones; "average", those of its
            averaged weights.
        target, times, weight, coupling, distance: as for `Objective`.
        own, average, step: see `Objective.at`; without them, the model that is asked and the first step.
    """

    path: ClassVar[str] = "rectified"
    kind: ClassVar[str] = "consistency"
    blur: ClassVar[float] = 0.0  # of the student's times, where its derivative in time is asked for
    teacher: Model | None = field(default=None, repr=False)
    scales: tuple[float, float] | None = None
    judge: str = "own"
    own: FlowMap | None = field(default=None, repr=False, compare=False)
    average: FlowMap | None = field(default=None, repr=False, compare=False)
    step: int = field(default=0, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.judge not in JUDGES:
            raise one_of("judge", self.judge, JUDGES)
        if self.target != "data" and (self.distance == "lpips" or hasattr(self.distance, "between")):
            raise OptionError(f"distance is {self.distance!r}, of images; expected another for a {self.target}")

    @property
    def independent(self) -> bool:
        """A student's states have the law that its teacher's have, whatever it learns from."""
        return True

    def ask(self, own: FlowMap, given: Given) -> Asked:
        """The question for these samples; `own` is the student with the weights it has now."""
        raise NotImplementedError

    def at(self, step: int, own: Model, average: Model) -> Self:
        # A shallow copy, because what was computed once, such as a teacher's plan, holds for every step.
        now = copy.copy(self)
        now.__dict__.update(step=step, own=own, average=average)
        return now

    def described(self) -> dict[str, Any]:
        teacher, guidance = self.teacher, None
        while teacher is not None and hasattr(teacher, "source"):
            guidance, teacher = getattr(teacher, "guidance", guidance), teacher.source  # type: ignore[attr-defined]
        return {
            "method": type(self).__name__,
            **super().described(),
            "teacher": None if teacher is None else model_hash(teacher),
            "guidance": guidance,
            "scales": self.scales,
            "judge": self.judge,
        }

    # What methods are made of

    def draw(self, given: Given, number: int) -> Tensor:
        """Uniform numbers (B,), float64, of these samples; `number` says what for."""
        return uniform(given.index, given.seed, number)

    def judge_of(self, own: FlowMap) -> FlowMap:
        """Whose answers are targets: `own`, or the averaged weights where these were asked for and are known."""
        return (self.average or own) if self.judge == "average" else own

    def velocity(self, given: Given, x: Tensor) -> Tensor:
        """dx/dt (B, …) on the rectified path, at the states x of the samples: the teacher's, or data - noise."""
        if self.teacher is None:
            return given.data - given.noise
        return self.teacher(x, given.t, **given.cond).velocity

    # The loss

    def _loss(self, model: Model, given: Given) -> Tensor:
        if not isinstance(model, FlowMap):
            raise OptionError(f"a {type(model).__name__} is no student; expected a fl.FlowMap")
        given = self._with_scale(given)
        with _apart(given.data.device):
            asked = self._asked(model, given)
        way = model.on_the_way(asked.x, asked.t, asked.r, **given.cond)
        error = way.predict(predictions.named(self.target)) - asked.target
        loss = self.measured(error, lambda: way.data, asked.target)
        return loss if asked.weight is None else asked.weight.to(loss.dtype) * loss

    def watched(self, model: Model, data: Tensor, *batch: Any) -> dict[str, float]:
        """`gap`: how far the student is from its target, where its way ends; `spread`: of what it makes of noise.

        Both are root mean squares, in units of the data's own standard deviation in this batch. A gap that grows, or a
        spread that leaves 1 far behind, is a run that fails.
        """
        assert isinstance(model, FlowMap)
        cond, t, noise, seed, index, states = batch
        if noise is None:
            noise = random.normal(index, data.shape[1:], seed, 0, random.TRAIN, data.dtype, data.device)
        given, unit = self._with_scale(Given(data, noise, t, dict(cond or {}), seed, index, states)), float(data.std())
        with _apart(data.device):
            asked = self._asked(model, given)
            way = model.on_the_way(asked.x, asked.t, asked.r, **given.cond)
            error = mean_square(way.predict(predictions.named(self.target)) - asked.target)
            missed = error if asked.arrival is None else error * asked.arrival.square().to(error.dtype)
            made = model.on_the_way(noise, 0.0, **given.cond).data
        return {"gap": float(missed.mean().sqrt()) / unit, "spread": float(made.std()) / unit}

    def _asked(self, model: FlowMap, given: Given) -> Asked:
        if self.teacher is not None and self.teacher.device != given.data.device:
            self.teacher.to(given.data.device)
        return self.ask(self.own or model, given)

    def _with_scale(self, given: Given) -> Given:
        if self.scales is None or "guidance" in given.cond:
            return given
        low, high = self.scales
        scale = (low + (high - low) * self.draw(given, SCALE)).to(given.data.dtype)
        return given._replace(cond={**given.cond, "guidance": scale})


def uniform(index: Tensor, seed: int, number: int = 0) -> Tensor:
    """Uniform numbers (B,), float64, of the samples with these numbers; those of number 0 make their times."""
    return random.uniform(index, (1,), seed, number, random.TIME, torch.float64, index.device)[:, 0]


def mixed(given: Given, t: Tensor | None = None) -> Tensor:
    """The state (B, …) of the samples at their time, or at another: t data + (1 - t) noise."""
    t = given.t if t is None else t
    return spread(t, given.data) * given.data + spread(1.0 - t, given.data) * given.noise


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Without gradients, and so that what is drawn within is drawn again after: the dropout of target and student."""
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
