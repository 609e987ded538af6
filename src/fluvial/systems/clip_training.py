"""Training a small CLIP on captioned images, for data that no pretrained one has seen.

Everything drawn in a step is a function of the seed and the step, so that a run that was stopped goes on as if it had
not been. It runs in one process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.errors import DataError, NonFiniteError, OptionError, RunError
from fluvial.systems.captions import Captioned, open_captioned, tokenizer_for
from fluvial.systems.clip import CLIP, WEIGHTS, contrastive, embed_images, embed_texts, equal_rows, library
from fluvial.training import atomic
from fluvial.training.building import fill, weights_of
from fluvial.training.data import batches
from fluvial.training.interrupts import Interrupts, RunInterrupted
from fluvial.training.progress import bar
from fluvial.training.settings import Settings, whole

_CONFIG, _STATE, _METRICS = "training.json", "state.safetensors", "metrics.jsonl"
_HOTTEST = math.log(100.0)  # of the scale's logarithm, as in the source


def train_clip(
    source: Any,
    out: str | os.PathLike[str] | None = None,
    steps: int = 2000,
    batch_size: int = 256,
    seed: int = 0,
    *,
    dim: int = 64,
    width: int = 64,
    layers: int = 3,
    lr: float = 1e-3,
    warmup: int = 100,
    weight_decay: float = 0.1,
    log_every: int = 50,
    checkpoint_every: int = 200,
    progress: bool = True,
) -> CLIP:
    """Trains a small CLIP: a vision transformer and a text transformer, with the tokenizer of these captions' words.

    The loss is `contrastive`, its temperature is learned, the learning rate falls as a cosine to 0. Run again on the
    same folder, it goes on where the last state was; one that is finished is read. The folder is in the end one that
    transformers loads too.

    Args:
        source: a `Captioned` source, or what `open_captioned` takes.
        out: the folder. None: nothing is written, and nothing can be resumed.
        steps: how many in all.
        batch_size: images in a step, each compared with all captions of the step.
        seed: of the weights and the order of the images.
        dim: numbers in an embedding.
        width: of both transformers, a multiple of 32.
        layers: of each.
        lr, warmup: AdamW's learning rate, which rises linearly for `warmup` steps first.
        weight_decay: AdamW's, of matrices alone.
        log_every, checkpoint_every: steps between lines of metrics, and between states.
        progress: show a bar.

    Raises:
        OptionError, DataError: for arguments that do not fit, before the first step.
        RunError: for a folder that holds something else, or a run under other settings; for a disk that is full.
        NonFiniteError: when the loss is not finite; the last good state is kept.
        RunInterrupted: a KeyboardInterrupt, after Ctrl-C or SIGTERM, when the state has been saved.
    """
    settings = Settings(steps, batch_size, seed, 0.0, lr, warmup, "cosine", weight_decay, ema_decay=0.0)
    for name, value in (
        ("dim", dim),
        ("layers", layers),
        ("log_every", log_every),
        ("checkpoint_every", checkpoint_every),
    ):
        whole(name, value, 1)
    if width < 32 or width % 32:
        raise OptionError(f"width is {width}; expected a multiple of 32 (the width of a head of attention)")
    source = open_captioned(source)
    # A batch that is one caption over and over has nothing to tell apart.
    if len(set(source.captions)) < 2:
        raise DataError(f"all captions of {source.name} are {source.captions[0]!r}; expected two or more to tell apart")
    clip = _fresh(source, dim, width, layers, seed)
    told = source.told({"text": clip.tokens(source.captions)})
    run = _Training(clip, told, settings, None if out is None else Path(out))
    run.begin({"dim": dim, "width": width, "layers": layers})
    run.go(log_every, checkpoint_every, progress)
    return run.finished()


def _fresh(source: Captioned, dim: int, width: int, layers: int, seed: int) -> CLIP:
    """A CLIP of random weights for this data."""
    transformers = library()
    tokenizer = tokenizer_for(source.captions)
    side = min(source.shape[1:])
    # About seven patches a side: small enough to see strokes, few enough to attend to all.
    patch = max(n for n in range(1, max(2, side // 7) + 1) if side % n == 0)
    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    shared |= {"num_attention_heads": width // 32, "projection_dim": dim, "hidden_act": "gelu"}
    marks = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, **marks}
    pixels = {"image_size": side, "patch_size": patch, "num_channels": source.shape[0]}
    config = transformers.CLIPConfig(
        text_config={**shared, **words}, vision_config={**shared, **pixels}, projection_dim=dim
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = transformers.CLIPModel(config)
    n, half = source.normalisation, [0.5] * source.shape[0]
    return CLIP(model, tokenizer, n.low or 0.0, 1.0 if n.high is None else n.high, half, half)


class _Training:
    """A run in its process; `step` is how many steps were made."""

    def __init__(self, clip: CLIP, source: Captioned, settings: Settings, folder: Path | None) -> None:
        self.clip, self.source, self.settings, self.folder = clip, source, settings, folder
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.model: Any = clip.model.to(self.device).requires_grad_(True)
        self.step, self.lines, self.sums, self.since = 0, [], [0.0, 0.0], time.perf_counter()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)

    # Beginning, or going on

    def begin(self, sizes: Mapping[str, int]) -> None:
        if self.folder is None:
            return
        asked = {"data": self.source.name, "images": len(self.source), **sizes, **asdict(self.settings)}
        digest = hashlib.sha256("\n".join(self.source.captions).encode()).hexdigest()[:12]
        asked |= {"range": [self.clip.low, self.clip.high], "captions": digest}
        file = self.folder / _CONFIG
        if not file.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise RunError(f"{self.folder} holds something else; expected a new folder for CLIP")
            with atomic.writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                atomic.write_json(file, asked)
            return
        before = atomic.read_json(file)
        for name in {**before, **asked}:
            if before.get(name) != asked.get(name):
                raise RunError(
                    f"{self.folder} was trained with {name} = {before.get(name)!r}, and {name} = {asked.get(name)!r} "
                    "is asked for; expected the same settings to go on with it, or another folder"
                )
        if (self.folder / _STATE).is_file():
            self._restore(self.folder / _STATE)

    def _restore(self, file: Path) -> None:
        tensors, metadata = atomic.read_tensors(file)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, _, own = name.partition("/")
            parts.setdefault(part, {})[own] = value
        self.step = int(metadata["step"])
        fill(self.model, parts.pop("weights"), file)
        self.sums = parts.pop("meter")["sums"].tolist()
        for name, parameter in self.model.named_parameters():
            kept = {key: values[name] for key, values in parts.items() if name in values}
            # Adam counts its steps on the processor.
            self.optimiser.state[parameter] = {k: v if k == "step" else v.to(self.device) for k, v in kept.items()}
        self.lines = [line for line in self._read_metrics() if line["step"] <= self.step]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        atomic.replace(file.with_name(_METRICS), lambda new: new.write_text(text, encoding="utf-8"))

    def _read_metrics(self) -> Iterator[dict[str, Any]]:
        assert self.folder is not None
        path = self.folder / _METRICS
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            # A line that was cut short is none.
            if text.endswith("}"):
                yield json.loads(text)

    # The steps

    def go(self, log_every: int, checkpoint_every: int, progress: bool) -> None:
        settings, steps = self.settings, self.settings.steps
        rows = batches(self.source, settings.batch_size, settings.seed, self.step)
        with (
            Interrupts() as interrupts,
            bar(progress and self.step < steps, self.step, steps, settings.batch_size) as tell,
        ):
            self.model.train()
            while self.step < steps:
                self._step(next(rows))
                tell(self.step)
                last = self.step == steps
                if last or self.step % log_every == 0:
                    line = self._log()
                    tell(self.step, line["loss"], line["samples_per_second"])
                stop = not last and interrupts.asked is not None
                if last or stop or self.step % checkpoint_every == 0:
                    self._save()
                if stop:
                    where = f" and saved in {self.folder}" if self.folder else "; nothing is saved without a folder"
                    raise RunInterrupted(f"interrupted at step {self.step} of {steps}{where}", None)

    def _step(self, rows: Mapping[str, Tensor]) -> None:
        self.step += 1
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.rate(self.step)
        tokens = rows["text"].to(self.device)
        pixels = self.clip.pixels(rows["data"], self.source.normalisation)
        images, texts = embed_images(self.model, pixels), embed_texts(self.model, tokens)
        loss = contrastive(images, texts, equal_rows(tokens), self.model.logit_scale.exp()).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip or math.inf)
        if not bool(loss.isfinite() & norm.isfinite()):
            raise NonFiniteError(f"step {self.step}: CLIP's loss or gradient is not finite; expected a lower lr")
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=_HOTTEST)
        self.sums = [self.sums[0] + loss.item(), self.sums[1] + 1.0]

    def _log(self) -> dict[str, Any]:
        now = time.perf_counter()
        rate = self.sums[1] * self.settings.batch_size / max(now - self.since, 1e-9)
        scale = float(self.model.logit_scale.detach().exp())
        line = {"step": self.step, "loss": self.sums[0] / self.sums[1], "temperature": 1.0 / scale}
        line |= {"lr": self.settings.rate(self.step), "samples_per_second": round(rate, 1)}
        self.lines.append(line)
        self.sums, self.since = [0.0, 0.0], now
        if self.folder is not None:
            with atomic.writing(self.folder), open(self.folder / _METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return line

    def _save(self) -> None:
        if self.folder is None:
            return
        tensors = {f"weights/{name}": value for name, value in weights_of(self.model).items()}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{key}/{name}": value for key, value in self.optimiser.state[parameter].items()}
        tensors["meter/sums"] = torch.tensor(self.sums, dtype=torch.float64)
        with atomic.writing(self.folder):
            file = self.folder / _STATE
            atomic.replace(file, lambda new: atomic.write_tensors(new, tensors, step=self.step))

    def finished(self) -> CLIP:
        self.model.eval().requires_grad_(False).cpu()
        if self.folder is not None and not (self.folder / WEIGHTS).is_file():
            self.clip.save(self.folder)
        return self.clip
