"""A whole sampling run as one CUDA graph: the processor launches it once, and no longer every kernel of every step.

A plan is fixed before the first network call, and nothing in the loop waits for the device or branches on a value, so
that a run can be recorded as it is. What changes from run to run (the start, the steps' noise, the conditions) is
copied into the memory that the recording reads. It pays where a step is short: small networks, small batches.

Source: PyTorch: CUDA graphs, https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fluvial import inputs, solvers
from fluvial.errors import OptionError, ShapeError
from fluvial.model import Model
from fluvial.plans import Plan, plan
from fluvial.running import Drawn, Run
from fluvial.sampling import DEFAULT_SOLVER, DEFAULT_STEPS
from fluvial.solvers import Solver
from fluvial.solvers.rows import Step


class Captured:
    """`sample`, recorded once for a batch of one size: Captured(model, (64, 3, 32, 32), solver="vabm", steps=10).

    Args:
        model: on a CUDA device, in evaluation mode; its weights may change between runs, in place.
        shape: of a batch (B, …).
        solver, steps, times, guidance: as for `sample`; a solver that chooses its own steps cannot be recorded.
        cond: conditions like those of the runs to come, by name.

    Raises:
        OptionError: for a model that is not on a CUDA device, or such a solver.
    """

    def __init__(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        solver: str | Solver = DEFAULT_SOLVER,
        steps: int | None = None,
        times: Any = None,
        cond: Mapping[str, Tensor] | None = None,
        guidance: Callable[[Model], Model] | None = None,
    ) -> None:
        solver = solvers.named(solver)
        if isinstance(solver, solvers.Dopri5):
            raise OptionError("dopri5 chooses its steps while it runs; expected a solver whose plan is fixed")
        self.model = inputs.guided(model, guidance)
        self.nodes = model.times(times, steps, DEFAULT_STEPS)
        self.plan = plan(self.model, solver, self.nodes)
        self.start = inputs.start(self.model, tuple(shape), self.nodes[0], 0, 0, None, None)
        self.cond = {k: v.clone() for k, v in inputs.conditions(self.model, cond, self.start).items()}
        self.noises = [[torch.zeros_like(self.start) for _ in step.noises] for step in self.plan]
        self._replay, self._end = _recorded(self._run, self.start.device)

    def __call__(self, start: Tensor | None = None, *, seed: int = 0, first: int = 0, **cond: Tensor) -> Tensor:
        """Samples (B, …) in the data's own units, as `sample` would give: from this start, or the seed's."""
        shape = tuple(self.start.shape)
        given = inputs.conditions(self.model, cond, self.start)
        if given.keys() != self.cond.keys():
            raise ShapeError(f"conditions are {sorted(given)}; expected {sorted(self.cond)}, as recorded")
        x = inputs.start(self.model, shape if start is None else start, self.nodes[0], seed, first, None, None)
        if x.shape != self.start.shape:
            raise ShapeError(f"the start has shape {tuple(x.shape)}; expected {shape}, as recorded")
        self.start.copy_(x)
        for name, value in given.items():
            self.cond[name].copy_(value)
        draw = Drawn(seed, first, self.model.path).source(self.plan, self.start)
        for index, (step, noises) in enumerate(zip(self.plan, self.noises)):
            for kept, drawn in zip(noises, draw(index, step)):
                kept.copy_(drawn)
        self._replay()
        end = self._end()
        return self.model.normalisation.invert(end) if self.nodes[-1] == 1.0 else end.clone()

    def _run(self) -> Tensor:
        x = self.start
        with torch.no_grad():
            for report in Run(self.model, self.plan, self.cond, self).reports(x):
                x = report.x
        return x

    def source(self, plan: Plan, x: Tensor) -> Callable[[int, Step], list[Tensor]]:
        """The noises as the recording reads them: what `Drawn.source` is to an ordinary run."""
        return lambda index, step: self.noises[index]


def _recorded(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """What repeats `run`, and what gives its result."""
    if device.type != "cuda":
        raise OptionError(f"the model is on {device}; a CUDA graph needs a CUDA device, elsewhere use fl.sample")
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # lets libraries choose their kernels, and the allocator find its memory
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        end = run()
    return graph.replay, lambda: end
