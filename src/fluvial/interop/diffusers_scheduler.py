"""Every Fluvial solver as a scheduler of diffusers.

    pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver="langevin", gamma=0.5)

A pipeline calls the network itself, at each of `timesteps`, and hands what comes out to `step`. Here that drives the
rows of a plan (see `solvers.rows`), those that `fl.sample` drives by calling the model: each stage of a step is one
timestep, `order` of them to a step, and `step` hands back the next stage's input, or the next state after the last.

The calls are counted, never looked up by their time, and the times are exact: a run knows where it is from its
`set_begin_index`, or, where a pipeline sets none, from the timestep nearest to its first. The state is kept in float32
from step to step also where the pipeline's is float16; what a pipeline changes in between (inpainting) is taken over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fluvial import plans, solvers
from fluvial.errors import OptionError, PathTimeError
from fluvial.interop.diffusers_schedule import OURS, Schedule, alphas_cumprod, read_schedule
from fluvial.interop.diffusers_times import sampling_times
from fluvial.paths import Path
from fluvial.predictions import EDM, spread
from fluvial.random import fresh_seed
from fluvial.running import Drawn
from fluvial.solvers import Leg, Solver
from fluvial.solvers.rows import STATE, At, Row, Step


@dataclass(frozen=True)
class _AsGiven(Solver):
    """A solver whose first step starts from what it is handed, not from that noised back."""

    inner: Solver

    @property
    def order(self) -> int:
        return self.inner.order

    @property
    def memory(self) -> int:
        return self.inner.memory

    def legs(self, times: Sequence[float], path: Path) -> list[Leg]:
        first, *rest = self.inner.legs(times, path)
        return [first._replace(start=None), *rest]

    def step(self, at: At) -> Row:
        return self.inner.step(at)


class Driver:
    """What `FluvialScheduler` does, without diffusers: see there."""

    config: Any

    def _prepare(self) -> None:
        """From the configuration: the schedule, the solver, and the timesteps of training."""
        config = self.config
        self._schedule: Schedule = read_schedule({**config, "_class_name": OURS})
        if self._schedule.family == "consistency":
            raise OptionError("the scheduler is a consistency model's; expected fl.sample(from_diffusers(…), steps=1)")
        self._solver = solvers.named(config["solver"], **(config["solver_options"] or {}))
        if isinstance(self._solver, solvers.Dopri5):
            raise OptionError("solver is 'dopri5', which chooses its own times; expected one with times set in advance")
        self._model = self._schedule.model(_no_network)
        if self._schedule.family == "table":
            self.alphas_cumprod, self.alphas, self.betas = _table(self._schedule)
        self.order = max(self._solver.stages, 1)
        self.num_inference_steps: int | None = None
        # Until a run is laid out these are training's.
        count = config["num_train_timesteps"]
        self._times = torch.linspace(0.0, 1.0, count, dtype=torch.float64).tolist()
        self._whole: plans.Plan = ()
        self._show(torch.device("cpu"))

    # What a pipeline calls.

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lays out a run, and forgets whatever came before.

        Args:
            num_inference_steps: steps, spaced as the configuration or its `grid` says.
            device: of `timesteps`.
            timesteps, sigmas, mu: in their place, as in `sampling_times`; mu counts where the clock is shifted by the
                image's size.

        Raises:
            OptionError: as `sampling_times`.
        """
        if (grid := self.config["grid"]) is not None and timesteps is None and sigmas is None:
            nodes = self._model.times(grid, num_inference_steps)
        else:
            settings = self._schedule.settings
            mu = mu if settings["use_dynamic_shifting"] else None  # Flux's pipeline hands one to all
            nodes = sampling_times(settings, num_inference_steps, timesteps=timesteps, sigmas=sigmas, mu=mu)
        self.num_inference_steps = len(nodes) - 1
        self._nodes = nodes
        self._whole = plans.forward(self._model, _AsGiven(self._solver), nodes)
        self._times = [stage.t for step in self._whole for stage in step.stages]
        self._show(torch.device(device or "cpu"))

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The run starts at this call, not at the first: what image-to-image does.

        Raises:
            OptionError: for a call inside a step, or a solver whose calls would then be others.
        """
        self._begin(begin_index)
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state as the network reads it: scaled where EDM's convention says so."""
        if not isinstance(self._schedule.prediction, EDM):
            return sample
        running = self._call is not None and not self._finished
        at = self._call if running else self._first(timestep)
        return sample * self._schedule.prediction.scale_input(self._schedule.path(self._times[at or 0]))

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """The next input of the network, from its output (B, …) at this timestep and sample (B, …).

        Args:
            generator: torch's, or one for each sample, for the noise of stochastic solvers; None is the configured
                `seed`, by which a sample's noise is the same in any batch.

        Returns:
            .prev_sample, and .pred_original_sample, the data estimate; as a tuple (prev_sample,) by request.
        """
        if self._call is None or self._finished:
            self._begin(self._first(timestep))
        self._take(sample, generator)
        now = self._plan[self._index]
        out = model_output.to(self._slots[STATE].dtype)
        self._slots[now.stages[self._stage].slot] = out if self._schedule.sign == 1.0 else out * self._schedule.sign
        data = _data(now, self._slots) if return_dict else None
        self._stage, self._call = self._stage + 1, self._call + 1  # type: ignore[operator]
        if self._stage < len(now.stages):
            self._handed = now.stages[self._stage].state(self._slots)
        else:
            self._advance(now, generator)
        given = self._handed.to(model_output.dtype)
        self._given = given
        if not return_dict:
            return (given,)
        return _output(given, data)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha data + sigma noise (B, …) at these timesteps, (B,) or (1,): any, not only those of a run."""
        t = self._schedule.time(torch.as_tensor(timesteps).cpu().flatten())
        c = self._schedule.path(t)
        like = original_samples
        return spread(c.alpha.to(like.device), like) * like + spread(c.sigma.to(like.device), like) * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    @property
    def init_noise_sigma(self) -> float:
        """What a pipeline multiplies unit noise with: √(alpha² + sigma²) where the run starts (a flow's: sigma).

        `fl.sample` takes sigma there; the two differ where a spacing starts below the noisiest level.
        """
        c = self._schedule.path(self._times[0])
        return c.sigma if self._schedule.family == "flow" else math.hypot(c.alpha, c.sigma)

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The number of network calls so far, from the first of `timesteps`; None before the first."""
        return self._call

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    # How a run goes on.

    def _show(self, device: torch.device) -> None:
        """What a pipeline reads of the run, with nothing done of it yet."""
        times = torch.tensor(self._times, dtype=torch.float64)
        self.timesteps = self._schedule.timestep(times).to(device=device, dtype=torch.float32)
        self.sigmas = torch.cat([self._schedule.level(times), torch.zeros(1)]).float()
        self._call: int | None = None
        self._begin_index: int | None = None
        self._finished = False

    def _begin(self, call: int) -> None:
        """Starts a run at this call: with a plan of its own, because there is nothing to look back on."""
        if not self._whole:
            raise OptionError("no run is laid out; expected set_timesteps(n) before the first step")
        starts, name = self._starts(), self._solver.name
        if call not in starts:
            raise OptionError(f"the run is to begin at call {call}, inside a step of {name}; expected one of {starts}")
        k = starts.index(call)
        self._plan = self._whole
        if k:
            start = self._whole[k].stages[0].t
            plain = len(self._whole) == len(self._nodes) - 1
            rest = self._nodes[k + 1 :] if plain else [t for t in self._nodes if t > start]
            self._plan = plans.forward(self._model, _AsGiven(self._solver), [start, *rest])
            if sum(len(step.stages) for step in self._plan) != len(self._times) - call:
                raise OptionError(f"{name} makes other calls where it begins at call {call}; expected one like heun")
        self._call, self._index, self._stage, self._finished = call, 0, 0, False
        self._memory: list[Tensor] = []
        self._slots: list[Any] = []
        self._given: Tensor | None = None
        self._drawn: Drawn | None = None

    def _starts(self) -> list[int]:
        """The number of the first call of each step."""
        return list(accumulate((len(step.stages) for step in self._whole[:-1]), initial=0))

    def _first(self, timestep: Any) -> int:
        """The call a run begins at: as was said, or the first of the step whose timestep lies nearest."""
        if self._begin_index is not None:
            return self._begin_index
        times, value = self.timesteps.tolist(), float(timestep)
        return min(self._starts() if self._whole else [0], key=lambda call: abs(times[call] - value))

    def _take(self, sample: Tensor, generator: Any) -> None:
        """Takes over what the pipeline changed in what it was given; at the start of a run, all of it."""
        if sample is self._given:
            return
        sample = sample if sample.dtype == torch.float64 else sample.float()
        if not self._slots:
            self._open(sample, generator)
        terms = dict(self._plan[self._index].stages[self._stage].state.terms)
        if terms == {STATE: 1.0}:
            self._slots[STATE] = sample
        elif share := terms.get(STATE, 0.0):
            # The state that this input of the network belongs to.
            self._slots[STATE] = self._slots[STATE] + (sample - self._handed) / share

    def _open(self, x: Tensor, generator: Any) -> None:
        """Begins a step: its slots, with the state, what is remembered and its noises."""
        step = self._plan[self._index]
        self._slots = [x, *self._memory[: step.memory], *[None] * (step.slots - step.memory - 1)]
        for noise, drawn in zip(step.noises, self._noises(step, x, generator)):
            self._slots[noise.slot] = drawn
        self._handed = step.stages[0].state(self._slots)

    def _noises(self, step: Step, x: Tensor, generator: Any) -> list[Tensor]:
        if not step.noises:
            return []
        if generator is not None:
            from diffusers.utils.torch_utils import randn_tensor

            return [
                randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)  # type: ignore[arg-type]
                for _ in step.noises
            ]
        if self._drawn is None:
            seed = self.config["seed"]
            self._drawn = Drawn(fresh_seed() if seed is None else seed, 0, self._schedule.path)
        return self._drawn.source(self._plan, x)(self._index, step)

    def _advance(self, step: Step, generator: Any) -> None:
        """Ends a step and opens the next."""
        x = step.next(self._slots)
        kept = [recipe(self._slots) for recipe in step.kept]
        self._index, self._stage = self._index + 1, 0
        if self._index == len(self._plan):
            self._handed, self._finished = x, True
            return
        self._memory = [*kept, *self._memory][: self._plan[self._index].memory]
        self._open(x, generator)


def _table(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """alphas_cumprod, alphas and betas, (N,) float32 each, which some pipelines read."""
    table = alphas_cumprod(schedule.settings)
    alphas = table / torch.cat([table.new_ones(1), table[:-1]])
    return table.float(), alphas.float(), (1.0 - alphas).float()


def _no_network(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
    raise RuntimeError("a scheduler's network is called by its pipeline")


def _data(step: Step, slots: list[Any]) -> Tensor | None:
    """The data estimate of the step's first call; None at pure noise, where the output may not determine it."""
    try:
        return step.first.data.fixed()(slots)
    except PathTimeError:
        return None


def _output(given: Tensor, data: Tensor | None) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

    return DDIMSchedulerOutput(prev_sample=given, pred_original_sample=data)  # type: ignore[arg-type]
