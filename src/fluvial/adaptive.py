"""Adaptive runs: dopri5, where every sample has its own time, its own step and its own estimate of the error.

A step of size h is taken by a formula of order 5; the difference e to a formula of order 4 on the same stages says
how wrong it was. With r the root mean square over a sample of e / (atol + rtol |x|), the step stands where r <= 1, and
the next one is

    0.8 h r^-0.17 r_before^0.04        (between a fifth and ten times h).

The last stage of a step is the first of the next, so that a step costs six calls, whether it stands or not. Samples
that have reached the next of the given times wait there, out of the batch.

A run that lands on the data does not go to sigma = 0, where no network is asked, but to the time at which the data
estimate is as good as the tolerance: its error is of the order of (sigma/alpha)², so sigma/alpha = 0.3 √(atol + rtol),
0.002 at most. The last stage has the estimate already. (Where a path ends at a larger sigma it lands from there, with
the error that has.) A run that leaves the data solves x = alpha data + sigma noise(x) at the same level.

Sources: Dormand, Prince: A family of embedded Runge-Kutta formulae (1980),
https://doi.org/10.1016/0771-050X(80)90013-3; Hairer, Norsett, Wanner: Solving ordinary differential equations I (1993),
II.4 (first step) and IV.2 of volume II (1996; step control), https://doi.org/10.1007/978-3-540-78862-1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fluvial import running
from fluvial.errors import NonFiniteError, OptionError
from fluvial.model import Model, convert
from fluvial.paths import Coefficients, Path
from fluvial.predictions import Estimate, solve, spread
from fluvial.running import StepReport
from fluvial.solvers import Dopri5

# Stages two to seven: (c_i, (a_i1, a_i2, …)). The seventh is at the step's end, and its weights are the method's own.
_TABLEAU = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1.0, (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

_SAFETY, _SMALLEST_STEP, _MOST_CALLS = 0.8, 1e-12, 10_000


class _Flow(NamedTuple):
    """Where every sample is: all are (B, …).

    `x`, and the `slope` and the `data` estimate there; the time `t`, the next step `h` (signed), the `error` of the
    last one that stood, and the `calls` made so far.
    """

    x: Tensor
    slope: Tensor
    data: Tensor
    t: Tensor
    h: Tensor
    error: Tensor
    calls: Tensor

    def take(self, index: Tensor) -> Self:
        return self._make(value.index_select(0, index) for value in self)

    def put(self, index: Tensor, part: Self) -> Self:
        return self._make(value.index_copy(0, index, new) for value, new in zip(self, part))

    def moved(self, where: Tensor, new: Self) -> Self:
        """The new values where that holds, (B,), and these elsewhere."""
        return self._make(torch.where(where.reshape(-1, *[1] * (b.ndim - 1)), a, b) for a, b in zip(new, self))


class AdaptiveRun:
    """A run of `Dopri5` along these times, rising or falling, each of which is visited exactly.

    Args:
        model: any model.
        solver: the tolerances, and the path in whose clock to integrate.
        times: two or more.
        cond: the conditions, checked.
        land: whether an end at t = 1 is the data itself; otherwise it is a noise level like others.

    Attributes:
        nfe: the calls made at the network so far.
        calls: (B,) how many of them each sample took part in.

    Raises:
        PathTimeError: where the velocity does not exist at one of the ends.
    """

    def __init__(
        self, model: Model, solver: Dopri5, times: Sequence[float], cond: Mapping[str, Tensor], land: bool = True
    ) -> None:
        self.model, self.solver, self.cond, self.times = model, solver, cond, [float(t) for t in times]
        self.frame = _Frame(model, solver.along)
        self.lands, self.leaves = land and self.times[-1] == 1.0, land and self.times[0] == 1.0
        self.visited = list(self.times)
        level = min(0.002, 0.3 * math.sqrt(solver.rtol + solver.atol))
        near = model.path.time(-2.0 * math.log(level))
        if self.lands:
            self.visited[-1] = max(near, self.times[-2])
        if self.leaves:
            self.visited[0] = max(near, self.times[1])
        for t in (self.visited[0], self.visited[-1]):
            self.frame.check(t)
        self.nfe, self.calls = 0, torch.zeros(0, dtype=torch.long)
        self._lost: str | None = None

    def reports(self, x: Tensor, progress: bool = False) -> Iterator[StepReport]:
        """Goes along the times, with a report at each but the first.

        Raises:
            OptionError: when a sample would need more than 10,000 calls, or steps below 1e-12.
        """
        invert, frame = self.model.normalisation.invert, self.frame
        self.nfe, self._lost = 0, None
        times = [frame.time(t) for t in self.visited]
        flow = self._start(x, times)
        with _bar(progress, times[0], times[-1]) as show:
            for index, (target, t) in enumerate(zip(times[1:], self.times[1:])):
                before, flow = flow.data, self._go(flow, target, show)
                if self.lands and index == len(times) - 2:
                    before = after = flow.data
                else:
                    after = frame.leave(flow, target, self.visited[index + 1])
                self.calls = flow.calls
                yield StepReport(index, t, after, self.nfe, lambda data=before: invert(data))

    def _start(self, x: Tensor, times: Sequence[float]) -> _Flow:
        """The flow at the first time, with its first slope and its first step."""
        t = self.visited[0]
        if self.leaves:
            c, data = self.model.path(t), x
            x = c.alpha * data
            for _ in range(4):
                x = c.alpha * data + c.sigma * self._estimate(self.model, x, t, self.cond).noise
        if not self.frame.shares(t):
            x = self.frame.mixed(self._estimate(self.model, x, t, self.cond), t)
        else:
            x = self.frame.scale(t) * x
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        clock = torch.full((len(x),), times[0], dtype=exact, device=x.device)
        slope, data = self._ask(x, clock, self.cond)
        calls = torch.full((len(x),), self.nfe, device=x.device)
        flow = _Flow(x, slope, data, clock, torch.zeros_like(clock), torch.full_like(clock, 1e-4), calls)
        target = next((s for s in times if s != times[0]), None)
        return flow if target is None else self._first_step(flow, target - times[0])

    def _first_step(self, flow: _Flow, span: float) -> _Flow:
        """The step that makes the error of an explicit Euler step, and then of the method, about a hundredth."""
        x, slope, sign = flow.x, flow.slope, math.copysign(1.0, span)
        scale = self._scale(x)
        size, speed = _rms(x / scale), _rms(slope / scale)
        small = (size < 1e-5) | (speed < 1e-5)
        h = torch.where(small, 1e-6, 0.01 * size / speed).clamp(max=abs(span))
        ahead, _ = self._ask(x + spread(sign * h, x) * slope, flow.t + sign * h, self.cond)
        bend = _rms((ahead - slope) / scale) / h
        largest = torch.maximum(speed, bend)
        own = torch.where(largest <= 1e-15, (1e-3 * h).clamp(min=1e-6), (0.01 / largest) ** 0.2)
        h = torch.minimum(100.0 * h, own).nan_to_num(1e-6).clamp(max=abs(span))
        return flow._replace(h=sign * h, calls=flow.calls + 1)

    def _go(self, flow: _Flow, target: float, show: Callable[[Tensor], None]) -> _Flow:
        """All samples at the target time. Those that are there already wait, and cost nothing."""
        index, part, cond = torch.arange(len(flow.t), device=flow.t.device), flow, self.cond
        while True:
            moving = (part.t != target).nonzero()[:, 0]
            if len(moving) < len(index):
                flow, index = flow.put(index, part), index[moving]
                part = flow.take(index)
                cond = {name: value.index_select(0, index) for name, value in self.cond.items()}
            if len(index) == 0:
                return flow
            part, stuck, tried = self._attempt(part, target, cond)
            if bool(stuck.any()):
                part = self._given_up(part._replace(h=tried), stuck, target, index, cond)
            if self.nfe > _MOST_CALLS:
                raise OptionError(self._endless(f"made {self.nfe} calls", part))
            show(part.t)

    def _attempt(self, flow: _Flow, target: float, cond: Mapping[str, Tensor]) -> tuple[_Flow, Tensor, Tensor]:
        """One step for each sample, which stands where its error allows; which are stuck (B,), and the steps (B,)."""
        left = target - flow.t
        last = 1.01 * flow.h.abs() >= left.abs()
        h = torch.where(last, left, flow.h)
        slopes, x, data, t = [flow.slope], flow.x, flow.data, flow.t
        for c, row in _TABLEAU:
            x = flow.x + spread(h, flow.x) * _combined(row, slopes)
            t = torch.where(last, target, flow.t + h) if c == 1.0 else flow.t + c * h
            slope, data = self._ask(x, t, cond)
            slopes.append(slope)
        wrong = spread(h, x) * _combined(_ERROR, slopes)
        error = _rms(wrong / self._scale(flow.x, x))
        calls = flow.calls + len(_TABLEAU)
        stands = error <= 1.0  # not so for nan
        growth = torch.where(
            stands, _SAFETY * error.clamp(min=1e-10) ** -0.17 * flow.error**0.04, (_SAFETY * error**-0.2).clamp(max=0.9)
        )
        proposed = h * growth.clamp(0.2, 10.0).nan_to_num(0.1)
        # A step cut short by the target says nothing against the longer one that was planned.
        longer = stands & last & (proposed.abs() < flow.h.abs())
        proposed = torch.where(longer, flow.h, proposed)
        new = _Flow(x, slopes[-1], data, t, proposed, error.clamp(min=1e-4), calls)
        old = flow._replace(h=proposed, calls=calls)
        return old.moved(stands, new), ~stands & (h.abs() < _SMALLEST_STEP), h

    def _given_up(self, flow: _Flow, stuck: Tensor, target: float, index: Tensor, cond: Mapping[str, Tensor]) -> _Flow:
        """Samples that are stuck on numbers that are not finite become nan at the target; `check` will tell."""
        rows = stuck.nonzero()[:, 0]
        part, own = flow.take(rows), {name: value.index_select(0, rows) for name, value in cond.items()}
        ahead = part.x + spread(part.h, part.x) * part.slope.nan_to_num()
        out = self.frame.model.query(part.t + part.h).call(ahead, own)
        self.nfe += 1
        if running.finite(out) and running.finite(part.x):
            raise OptionError(self._endless(f"needs steps below {_SMALLEST_STEP:g}", part))
        if self._lost is None:
            who = running.caller(self.frame.model, part.t + part.h, ahead, own)
            self._lost = (
                f"{who} returned {running.what(out, index[rows])} near t = {self._own_time(part.t)}, "
                f"for states up to {float(part.x.abs().max()):.3g}"
            )
        nan = torch.full_like(part.x, torch.nan)
        return flow.put(rows, part._replace(x=nan, slope=nan, data=nan, t=torch.full_like(part.t, target)))

    def _ask(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Velocity and data estimate at states x and times t (B,) of the frame."""
        estimate = self._estimate(self.frame.model, x, t, cond)
        return estimate.velocity, estimate.data

    def _estimate(self, model: Model, x: Tensor, t: float | Tensor, cond: Mapping[str, Tensor]) -> Estimate:
        self.nfe += 1
        return Estimate(model.query(t), x, cond)

    def _scale(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """What an error is measured by: atol + rtol |x|, the larger of two states."""
        size = x.detach().abs() if other is None else torch.maximum(x.detach().abs(), other.detach().abs())
        return self.solver.atol + self.solver.rtol * size

    # What is said when it fails.

    def check(self, start: Tensor, end: Tensor) -> None:
        """Raises, naming the time and the culprit, if the end of the run holds a number that is not finite.

        Raises:
            NonFiniteError: so it is.
        """
        if not running.finite(end):
            said = running.bad_input(start, self.cond) or self._lost
            raise NonFiniteError(said or f"the data estimate the run landed on holds {running.what(end)}")

    def _own_time(self, t: Tensor) -> str:
        """The earliest of these times of the frame, on the model's own clock."""
        return f"{self.model.path.time(self.frame.path.log_snr(float(t.min()))):.6g}"

    def _endless(self, what: str, flow: _Flow) -> str:
        return (
            f"dopri5 {what} at t = {self._own_time(flow.t)}, with rtol {self.solver.rtol:g} and atol "
            f"{self.solver.atol:g}; expected tolerances that the network's own precision and smoothness allow"
        )


class _Frame:
    """The run as seen on the path in whose clock it is integrated: x' = x √(alpha'² + sigma'²)/√(alpha² + sigma²).

    A noise level that this path does not have is taken for its nearer end, and the pair mixed there.
    """

    def __init__(self, model: Model, along: Path | None) -> None:
        self.own, self.plain = model.path, along is None or along == model.path
        self.path = model.path if along is None else along
        self.model = model if self.plain else convert(model, self.path)

    def time(self, t: float) -> float:
        return t if self.plain else self.path.time(self.own.log_snr(t))

    def check(self, t: float) -> None:
        """Raises where the velocity is not determined at this time of the model's own."""
        query = self.model.query(self.time(t))
        solve(query.state, query.weights, (query.c.dalpha, query.c.dsigma), "velocity")

    def shares(self, t: float) -> bool:
        """Whether the path has the noise level of this time of the model's own."""
        return self.plain or self.path.log_snr(0.0) <= self.own.log_snr(t) <= self.path.log_snr(1.0)

    def scale(self, t: float) -> float:
        """What brings a state of the model's own path here."""
        return 1.0 if self.plain else _norm(self.path(self.time(t))) / _norm(self.own(t))

    def mixed(self, estimate: Estimate, t: float) -> Tensor:
        """The pair estimated on the model's own path at time t, mixed here."""
        c = self.path(self.time(t))
        return c.alpha * estimate.data + c.sigma * estimate.noise

    def leave(self, flow: _Flow, here: float, t: float) -> Tensor:
        """The states of a flow that is at time `here`, on the model's own path at its time t."""
        if self.shares(t):
            return flow.x if self.plain else flow.x / self.scale(t)
        c, own = self.path(here), self.own(t)
        noise = (flow.x - c.alpha * flow.data) / c.sigma
        return own.alpha * flow.data + own.sigma * noise


def _norm(c: Coefficients) -> float:
    return math.hypot(c.alpha, c.sigma)


def _rms(x: Tensor) -> Tensor:
    """Root mean square over each sample (B,), for the control of steps: no gradient goes through it."""
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    return x.detach().reshape(len(x), -1).to(exact).square().mean(1).sqrt()


def _combined(row: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total = row[0] * slopes[0]
    for coefficient, slope in zip(row[1:], slopes[1:]):
        if coefficient:
            total = torch.add(total, slope, alpha=coefficient)
    return total


@contextmanager
def _bar(wanted: bool, start: float, end: float) -> Iterator[Callable[[Tensor], None]]:
    """A progress bar over the time of the last sample, or nothing."""
    if not wanted or start == end:
        yield lambda t: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("sampling", total=1.0)
        yield lambda t: bar.update(task, completed=float((t - start).abs().min()) / abs(end - start))
