"""The training loop, and what must happen around it: beginning or going on, logging, saving, stopping."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluvial.errors import NonFiniteError
from fluvial.model import Model
from fluvial.objectives import Objective
from fluvial.training import atomic, batch, opening, preview
from fluvial.training import precision as precisions
from fluvial.training.batch import Batch
from fluvial.training.checkpoints import config_of, fill, weights_of
from fluvial.training.data import batches
from fluvial.training.ema import EMA
from fluvial.training.interrupts import Interrupts, RunInterrupted
from fluvial.training.meter import Meter, Watch, culprit
from fluvial.training.progress import Bar, bar
from fluvial.training.runs import Run, RunFolder, State
from fluvial.training.settings import Settings, describe_training
from fluvial.training.source import Rows, Source, Tensors


class Loop:
    """A training run, in one of its processes.

    Attributes:
        model: the model that learns; `learner` is the same around the network that Accelerate wrapped.
        step: how many steps were made.
        whole: whether each process reads the whole batch, because the coupling needs it.
    """

    def __init__(
        self, model: Model, source: Source, objective: Objective, settings: Settings, folder: Path | None
    ) -> None:
        self.accelerator = opening.accelerator()
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.place = self.accelerator.process_index, self.accelerator.num_processes
        self.several = self.place[1] > 1
        self.model, self.source, self.objective, self.settings = model, source, objective, settings
        self.whole = self.several and batch.needs_whole(objective)
        self.folder = None if folder is None else RunFolder(folder)
        self.step, self.seconds, self.interval = 0, 0.0, 0.0
        self.metrics: list[dict[str, Any]] = []
        # Wrong sizes are known before any work is done.
        batches(source, settings.batch_size, settings.seed, 0, *self.place)

    # Beginning

    def begin(self, precision: str, channels_last: bool | str, progress: bool) -> None:
        """Sets everything up, from the folder's last state where there is one."""
        self.model.to(self.device)
        self.network: nn.Module = self.model.network  # type: ignore[assignment]
        # The first process writes what the others then read.
        with self.accelerator.main_process_first():
            if self.folder is None:
                self.precision = self._choose(precision, channels_last)
            else:
                config = config_of(self.model)
                config["training"] = describe_training(self.settings, self.objective, self.source)
                asked = opening.Asked(self.settings, precision, channels_last)
                self.precision = opening.open_run(self.folder, config, asked, self._choose, writes=self.main)
        if progress and self.main:
            layout = ", channels last" if self.precision.channels_last else ""
            print(f"training on {self.device} in {self.precision.precision}{layout} ({self.precision.why})")
        if self.precision.channels_last:
            precisions.as_channels_last(self.network)
        self.network.train()
        self.ema = EMA(self.network, self.settings.ema_decay)
        self.meter, self.watch = Meter(self.device), Watch()
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        state = None if self.folder is None else self.folder.read_state()
        if state is not None:
            self._restore(state)
        prepared, self.stepper = self.accelerator.prepare(self.network, self.optimiser)
        self.learner, self.parameters = self.model.with_network(prepared), [*prepared.parameters()]
        self.accelerator.wait_for_everyone()
        if state is None:
            self._save()

    def _choose(self, precision: str, channels_last: bool | str) -> precisions.Choice:
        if precision == "auto" and self.several and self.folder is None and self.device.type == "cpu":
            precision = "fp32"  # each process would time it by itself, and might choose differently
        rows = next(batches(self.source, min(self.settings.batch_size, 32), self.settings.seed))
        return precisions.choose(
            self.model, self._prepare(rows, self.objective), self.objective, precision, channels_last
        )

    def _restore(self, state: State) -> None:
        assert self.folder is not None
        fill(self.network, state.raw, self.folder.path)
        fill(self.ema.network, state.averaged, self.folder.path)
        self.step, self.ema.updates = state.step, state.counters["ema_updates"]
        self.seconds, self.interval = state.counters["seconds"], state.counters["interval_seconds"]
        self.metrics = self.folder.metrics(self.step)
        if self.main:
            self.meter.sums.copy_(state.optimiser["meter"])
        for name, parameter in self.network.named_parameters():
            kept = self.optimiser.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = state.optimiser.get(f"{key}/{name}")
                if value is not None:
                    # In the parameter's own memory format: the fused step goes through both as they lie.
                    kept[key] = (torch.empty_like(parameter) if value.ndim else parameter.new_empty(())).copy_(value)

    # The steps

    def run(self, log_every: int, sheet_every: int | None, checkpoint_every: int, progress: bool) -> Run:
        """All steps that are left.

        Raises:
            RunInterrupted: when it was asked to stop, after saving.
        """
        steps, shown = self.settings.steps, progress and self.main and self.step < self.settings.steps
        cuda = [self.device] if self.device.type == "cuda" else []
        try:
            with (
                torch.random.fork_rng(devices=cuda),
                contextlib.closing(self._rows()) as rows,
                Interrupts() as interrupts,
                bar(shown, self.step, steps, self.settings.batch_size) as tell,
            ):
                self._since = time.perf_counter()
                while self.step < steps:
                    given = self._step(next(rows))
                    tell(self.step)
                    logs, last = self.step % log_every == 0, self.step == steps
                    if logs or last:
                        self._log(tell, given)
                    if sheet_every is not None and (last or self.step % sheet_every == 0):
                        self._sheet()
                    # Processes hear a signal at different steps: they agree on it where they meet anyway.
                    stop = not last and (logs or not self.several) and self._any(interrupts.asked is not None)
                    if last or stop or self.step % checkpoint_every == 0:
                        self._save()
                    if stop:
                        raise RunInterrupted(self._farewell(), self._result())
        finally:
            self.network.eval()
        self.accelerator.wait_for_everyone()
        return self._result()

    def _rows(self) -> Generator[Rows]:
        place = (0, 1) if self.whole else self.place
        rows = batches(self.source, self.settings.batch_size, self.settings.seed, self.step, *place)
        idle = self.device.type != "cpu" and not isinstance(self.source, Tensors)
        yield from batch.ahead(rows) if self.source.waits or idle else rows

    def _objective(self, step: int) -> Objective:
        """The objective of a step, from 1."""
        return self.objective.at(step - 1, self.model, self.ema.model(self.model))

    def _prepare(self, rows: Rows, objective: Objective) -> Batch:
        seed, drop_cond = self.settings.seed, self.settings.drop_cond
        return batch.prepare(rows, self.model, objective, seed, drop_cond, self.device)

    def _step(self, rows: Rows) -> Batch:
        self.step += 1
        settings, objective = self.settings, self._objective(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = settings.rate(self.step)
        batch.seed_torch(settings.seed, self.step, self.place[0], self.device)
        given = self._prepare(rows, objective)
        if self.whole:
            given = batch.coupled_share(given, objective, settings.seed, *self.place)
            objective = batch.already_coupled(objective)
        if self.precision.channels_last and given.data.ndim == 4:
            given = replace(given, data=given.data.to(memory_format=torch.channels_last))
        with precisions.autocast(self.device, self.precision.precision):
            loss = given.loss(objective, self.learner, settings.seed)
        self.accelerator.backward(loss.mean())
        loss, norm = loss.detach(), self._clip()
        self.watch.add(self.step, loss, norm)
        if self.device.type == "cpu" and not self.several:
            self._require_finite()  # before it reaches the weights; here, looking costs nothing
        self.stepper.step()
        self.stepper.zero_grad()
        self.ema.update()
        self.meter.add(loss, self.model.path.log_snr(given.t), norm)
        return given

    def _clip(self) -> torch.Tensor:
        """Clips the gradient, and returns the norm it had."""
        limit = math.inf if self.settings.clip is None else self.settings.clip
        return nn.utils.clip_grad_norm_(self.parameters, limit).detach()

    # What happens between them

    def _lap(self, training: bool = True) -> None:
        """Counts the time since the last lap, as training or as something else."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self.interval += now - self._since if training else 0.0
        self._since = now

    def _log(self, tell: Bar, given: Batch) -> None:
        self._require_finite()
        sums = self.accelerator.reduce(self.meter.sums, "sum")
        assert isinstance(sums, torch.Tensor)
        means, samples = Meter.read(sums)
        self._lap()
        rate = samples / max(self.interval, 1e-9)
        line = {
            "step": self.step,
            **means,
            **given.watched(self._objective(self.step), self.model, self.settings.seed),
            "lr": self.settings.rate(self.step),
            "samples_per_second": round(rate, 1),
            "seconds": round(self.seconds, 3),
        }
        self.metrics.append(line)
        if self.main and self.folder is not None:
            self.folder.add_metrics(line)
        tell(self.step, means["loss"], rate)
        self.meter.sums.zero_()
        self.interval = 0.0

    def _sheet(self) -> None:
        self._lap()
        if self.main and self.folder is not None:
            rows = next(batches(self.source, self.settings.batch_size, self.settings.seed))
            path = self.folder.sheet(self.step)
            with atomic.writing(path):
                preview.draw(self.ema.model(self.model), self.source, rows, self.settings.seed, self.step, path)
        self._lap(training=False)

    def _save(self) -> None:
        """Writes the state of this step, if it is a good one."""
        if self.step:
            self._require_finite()
            self._lap()
        if self.folder is None:
            return
        sums = self.accelerator.reduce(self.meter.sums, "sum")
        assert isinstance(sums, torch.Tensor)
        self.meter.sums.copy_(sums if self.main else torch.zeros_like(sums))
        if self.main:
            optimiser = {
                f"{key}/{name}": value
                for name, parameter in self.network.named_parameters()
                for key, value in self.optimiser.state.get(parameter, {}).items()
            }
            counters = {
                "step": self.step,
                "ema_updates": self.ema.updates,
                "seconds": self.seconds,
                "interval_seconds": self.interval,
            }
            raw, averaged = weights_of(self.network), weights_of(self.ema.network)
            self.folder.write_state(State(self.step, raw, averaged, {**optimiser, "meter": sums}, counters))
        if self.step:
            self._lap(training=False)

    def _any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if not self.several:
            return flag
        flags = self.accelerator.gather(torch.tensor([float(flag)], device=self.device))
        return bool(flags.max() > 0)  # type: ignore[union-attr]

    def _require_finite(self) -> None:
        """Stops the run, in all processes alike, where a step since the last look was not finite."""
        first = self.watch.first()
        if self._any(first is not None):
            never = self.settings.steps + 1
            found = torch.tensor([never if first is None else first], device=self.device)
            step = int(self.accelerator.gather(found).min())  # type: ignore[union-attr]
            loss = self.accelerator.gather(self.watch.loss(step))
            assert isinstance(loss, torch.Tensor)
            raise self._culprit(step, loss)
        self.watch.clear()

    def _culprit(self, step: int, loss: torch.Tensor) -> NonFiniteError:
        """The error that says what was not finite, after keeping the whole batch, which is a function of the step."""
        rows = next(batches(self.source, self.settings.batch_size, self.settings.seed, step - 1))
        given = self._prepare(rows, self._objective(step))
        who, kept = culprit(loss, given.index, given.t, self.model.path.log_snr(given.t)), ""
        if self.folder is not None:
            kept = f"; the last good state, of step {self.folder.step()}, is kept"
            if self.main:
                tensors = {"data": given.data, "noise": given.drawn_noise(self.settings.seed), "t": given.t}
                tensors |= {"index": given.index, "loss": loss, **given.cond}
                kept += f", and the batch is in {self.folder.write_bad_batch(step, tensors)}"
        return NonFiniteError(f"step {step}: {who} is not finite{kept}; expected a lower lr, fp32, or other data")

    def _farewell(self) -> str:
        where = f"interrupted at step {self.step} of {self.settings.steps}"
        if self.folder is None:
            return f"{where}; nothing is saved without a run folder"
        return f"{where} and saved in {self.folder.path}; the same command goes on from there"

    def _result(self) -> Run:
        path = None if self.folder is None else self.folder.path
        self.network.eval()
        return Run(self.model, self.ema.model(self.model), path, list(self.metrics), self.step)
