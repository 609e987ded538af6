"""Running a plan: the one loop. It calls the network, multiplies and adds, and never waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fluvial import random
from fluvial.brownian import Brownian
from fluvial.errors import NonFiniteError
from fluvial.model import Model
from fluvial.paths import Path
from fluvial.plans import Plan
from fluvial.solvers.rows import Step


@dataclass(slots=True)
class StepReport:
    """What a callback is told after each step.

    Attributes:
        index: the step, from 0.
        t: the time reached.
        x: (B, …) the state there, in path units.
        data: (B, …) the data estimate made in this step, in the data's own units: what a preview should show.
        nfe: network evaluations per sample so far.
    """

    index: int
    t: float
    x: Tensor
    nfe: int
    _data: Callable[[], Tensor] = field(repr=False)

    @property
    def data(self) -> Tensor:
        return self._data()


Callback = Callable[[StepReport], None]

_NOISES = 1 << 12  # a step draws no more than these


@dataclass
class Drawn:
    """The noise of a run's steps: that of samples first, first + 1, … of a seed.

    Independent noise is numbered by the step. Brownian noise is an increment of one path over a clock that all paths
    share, alpha/(alpha + sigma), so that it does not depend on the number of steps.
    """

    seed: int
    first: int
    path: Path
    brownian: bool = False

    def source(self, plan: Plan, x: Tensor) -> Callable[[int, Step], list[Tensor]]:
        """What draws the noises of step number `index`."""
        samples = range(self.first, self.first + len(x))
        tree = self._tree(plan, samples, x) if self.brownian else None

        def draw(index: int, step: Step) -> list[Tensor]:
            drawn = []
            for k, (_, stretch) in enumerate(step.noises):
                if tree is not None and stretch is not None:
                    drawn.append(tree.increment(*(self._clock(t) for t in stretch)))
                else:
                    number = index * _NOISES + k
                    shape = x.shape[1:]
                    drawn.append(random.normal(samples, shape, self.seed, number, random.STEP, x.dtype, x.device))
            return drawn

        return draw

    def _tree(self, plan: Plan, samples: range, x: Tensor) -> Brownian:
        stretches = [noise.stretch for step in plan for noise in step.noises if noise.stretch is not None]
        times = sorted({self._clock(t) for stretch in stretches for t in stretch})
        return Brownian(times, samples, x.shape[1:], self.seed, x.dtype, x.device)

    def _clock(self, t: float) -> float:
        if t == 1.0:
            return 1.0
        c = self.path(t)
        return c.alpha / (c.alpha + c.sigma)


class Noises(Protocol):
    """Where the noises of a run's steps come from."""

    def source(self, plan: Plan, x: Tensor) -> Callable[[int, Step], list[Tensor]]:
        """What gives the noises of step number `index`, for a run from the state x."""
        ...


class Run:
    """A plan with what it is run on.

    Args:
        model: for its units, and to name what went wrong.
        plan: the steps.
        cond: the conditions, checked.
        drawn: the steps' noise; None where there is none.
    """

    def __init__(self, model: Model, plan: Plan, cond: Mapping[str, Tensor], drawn: Noises | None = None) -> None:
        self.model, self.plan, self.cond, self.drawn = model, plan, cond, drawn

    def reports(self, x: Tensor, progress: bool = False) -> Iterator[StepReport]:
        """Goes through the plan, with a report after every step."""
        invert, nfe = self.model.normalisation.invert, 0
        for index, (step, after, slots) in enumerate(self._steps(x, progress)):
            nfe += len(step.stages)
            yield StepReport(index, step.s, after, nfe, lambda step=step, slots=slots: invert(step.data(slots)))

    def _steps(self, x: Tensor, progress: bool = False) -> Iterator[tuple[Step, Tensor, list[Any]]]:
        noisy = self.drawn is not None and any(step.noises for step in self.plan)
        draw = self.drawn.source(self.plan, x) if noisy and self.drawn is not None else None
        memory: Sequence[Tensor] = ()
        last = len(self.plan) - 1
        for index, step in enumerate(_tracked(self.plan, progress)):
            noises = draw(index, step) if draw is not None and step.noises else ()
            x, kept, slots = step(x, memory, noises, self.cond)
            if index < last:
                memory = [*kept, *memory][: self.plan[index + 1].memory]
            yield step, x, slots

    def check(self, start: Tensor, end: Tensor) -> None:
        """Raises, naming the step and the culprit, if the end of the run holds a number that is not finite.

        Only then is the run repeated, looking at everything on the way.

        Raises:
            NonFiniteError: so it is.
        """
        if finite(end):
            return
        with torch.no_grad():
            raise NonFiniteError(self._culprit(start) or "the end of the run is not finite, yet a second pass was")

    def _culprit(self, x: Tensor) -> str | None:
        if said := bad_input(x, self.cond):
            return said
        for index, (step, after, slots) in enumerate(self._steps(x)):
            where = f"step {index} (t = {step.t:.4g} to {step.s:.4g})"
            for stage in step.stages:
                state, out = stage.state(slots), slots[stage.slot]
                if not bool(torch.isfinite(out).all()):
                    who = caller(self.model, stage.t, state, self.cond)
                    return f"{where}: {who} returned {what(out)} at t = {stage.t:.4g}, " + (
                        f"for states up to {float(state.abs().max()):.3g}"
                    )
            if not bool(torch.isfinite(after).all()):
                largest = max(float(slots[stage.slot].abs().max()) for stage in step.stages)
                return f"{where}: the state became {what(after)}, by network outputs up to {largest:.3g}"
        return None


def finite(x: Tensor) -> bool:
    """Whether all of it is."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def bad_input(x: Tensor, cond: Mapping[str, Tensor]) -> str | None:
    """What to say of a start or a condition that is not finite, if there is one."""
    for name, value in [("the start", x), *((f"condition {name!r}", value) for name, value in cond.items())]:
        if not bool(torch.isfinite(value).all()):
            return f"{name} holds {what(value)}; expected finite numbers"
    return None


def caller(model: Model, t: float | Tensor, state: Tensor, cond: Mapping[str, Tensor]) -> str:
    """Who returned numbers that are not finite: the network, or the guidance around a network that did not."""
    source = getattr(model, "source", None)
    if source is None or not hasattr(model, "guidance"):
        return "the network"
    plain = source.query(t).call(state, cond)
    return "the guidance" if bool(torch.isfinite(plain).all()) else "the network (under guidance)"


def what(x: Tensor, numbers: Tensor | None = None) -> str:
    """What in x (B, …) is not finite, and in which samples; `numbers` (B,) are theirs where x is a part of a batch."""
    bad = ~torch.isfinite(x)
    samples = bad.flatten(1).any(1) if x.ndim > 1 else bad
    kind = "nan" if bool(torch.isnan(x).any()) else "inf"
    which = samples.nonzero().flatten()
    which = (which if numbers is None else numbers[which]).tolist()
    shown = ", ".join(map(str, which[:5])) + (", …" if len(which) > 5 else "")
    return f"{kind} in {len(which)} of {len(x)} samples ({shown})" if numbers is None else f"{kind} in samples {shown}"


def _tracked(plan: Plan, progress: bool) -> Any:
    if not progress:
        return plan
    from rich.progress import track

    return track(plan, description="sampling")
