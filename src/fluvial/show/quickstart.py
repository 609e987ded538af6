"""The main job in miniature: train a flow on real handwritten digits, then sample it as a flow and as a diffusion.

One network, trained once as a rectified flow; the same noise through it as rectified flow, VP and EDM; its ODE and its
Langevin-corrected SDE at several rates; all measured, and told in a report that opens offline.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluvial import measure, paths, random, sampling, training
from fluvial.exact import GaussianMixture
from fluvial.measure.classifier import Classifier, share_recognised, train_classifier
from fluvial.model import Model, convert
from fluvial.solvers import Langevin, Solver, named

STEPS = 1000
SHEET = 60  # samples on a sheet: six of each digit
COUNT = 1000  # samples behind every figure of quality
SWEEP_COUNT = 600  # and behind every gamma
GAMMAS = (0.0, 0.1, 0.5, 1.0, 5.0, 20.0)
SWEEP_STEPS = 32
# What each sampler does in N steps, and the NFE this takes.
SAMPLERS: tuple[tuple[str, Solver, tuple[int, ...]], ...] = (
    ("ODE, natural Euler", named("ddim"), (1, 2, 4, 8, 16, 32)),
    ("ODE, Heun", named("heun"), (1, 2, 4, 8, 16)),
    ("SDE, Langevin gamma 0.5", Langevin(0.5), (1, 2, 4, 8, 16, 32)),
)


@dataclass
class Digits:
    """The real digits as measured against: images (N, 1, 8, 8), labels (N,), features (N, 64), and who measures."""

    images: Tensor
    labels: Tensor
    features: Tensor
    classifier: Classifier


def run(folder: str | os.PathLike[str], say: Callable[[str], None] = print, steps: int = STEPS) -> Path:
    """Trains (or resumes) in `folder`, measures, writes `results.json`, the sheets and `report.html`; returns it."""
    from fluvial.show.quickstart_report import write

    folder, started = Path(folder), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    say(f"1/4  training a class-conditional rectified flow on 1,797 handwritten digits, {steps} steps")
    source = training.open_source("digits")
    model = training.model_for(source)
    trained = training.train(model, source, steps=steps, schedule="cosine", out=folder / "run", seed=0)
    model, seconds = trained.ema, time.perf_counter() - started
    say("2/4  training the classifier that measures")
    digits = _digits(source)
    say(f"     {digits.classifier.description}")
    say("3/4  sampling: three notations, quality against NFE, gamma sweep")
    results: dict[str, Any] = {
        "classifier": digits.classifier.description,
        "classifier_accuracy": digits.classifier.accuracy,
        "training_steps": steps,
        "training_seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_hash": training.model_hash(model),
        "floor": _floor(digits),
    }
    results["notations"], notation_samples = notations(model)
    results["quality"] = quality(model, digits)
    results["gamma"], gamma_samples = gamma_sweep(model, digits)
    results["headline"], headline_samples = headline(model, digits)
    results["seconds"] = time.perf_counter() - started
    say("4/4  writing the report")
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    real = torch.stack([digits.images[digits.labels == digit][0] for digit in range(10)])
    samples = {"headline": headline_samples, "notations": notation_samples, "gamma": gamma_samples, "real": real}
    return write(folder, results, samples, trained.metrics, mixture_paths())


def _digits(source: Any) -> Digits:
    rows = source.batch(torch.arange(len(source)))
    classifier = train_classifier(rows["data"], rows["label"], seed=0)
    return Digits(rows["data"], rows["label"], classifier.features(rows["data"]), classifier)


def _floor(digits: Digits) -> dict[str, float]:
    floor = measure.real_floor(measure.frechet, digits.features, COUNT, seed=0, labels=digits.labels)
    return {"mean": floor.mean, "std": floor.std, "n": floor.n}


def _labels(count: int) -> Tensor:
    return torch.arange(count) % 10


def _judged(samples: Tensor, labels: Tensor, digits: Digits) -> dict[str, float]:
    """Frechet distance to the real digits, share recognised as asked, and within-class variance over the real."""
    samples = samples.clamp(digits.images.min(), digits.images.max())
    return {
        "frechet": measure.frechet(digits.classifier.features(samples), digits.features),
        "recognised": share_recognised(digits.classifier, samples, labels),
        "spread": measure.within_class_spread(samples, labels, digits.images, digits.labels).ratio or float("nan"),
    }


def notations(model: Model) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The same noise through one network as rectified flow, VP and EDM: largest difference of any pixel, of 16.

    Notations start at different log-SNRs, so they are compared from one state on one log-SNR grid inside all ranges.
    """
    levels = torch.linspace(-8.7, 12.0, 21, dtype=torch.float64)
    rectified = paths.Rectified()
    start = rectified(rectified.time(levels[0].item()))
    state = random.normal(SHEET, model.shape or (), seed=7) * start.sigma
    cond = {"label": _labels(SHEET)}
    rows, samples = [], {}
    for solver in ("ddim", "heun"):
        for path in (rectified, paths.VP(), paths.EDM()):
            c = path(path.time(levels[0].item()))
            scale = (c.alpha**2 + c.sigma**2) ** 0.5 / (start.alpha**2 + start.sigma**2) ** 0.5
            times = [*path.time(levels).tolist(), 1.0]
            seen = convert(model, path=path)
            x = sampling.sample(seen, state=state * scale, solver=solver, times=times, cond=cond)
            name = type(path).__name__
            samples[f"{solver} {name}"] = x
            difference = (x - samples[f"{solver} Rectified"]).abs().max().item()
            rows.append({"solver": solver, "path": name, "difference": difference})
    return rows, samples


def quality(model: Model, digits: Digits) -> list[dict[str, Any]]:
    """A row for every sampler and budget: NFE, Frechet distance, share recognised, within-class spread, seconds."""
    rows, labels = [], _labels(COUNT)
    for name, solver, budgets in SAMPLERS:
        for steps in budgets:
            began = time.perf_counter()
            x, nfe = _sampled(model, labels, solver, steps)
            seconds = time.perf_counter() - began
            rows.append({"sampler": name, "steps": steps, "nfe": nfe, "seconds": seconds, **_judged(x, labels, digits)})
    return rows


def gamma_sweep(model: Model, digits: Digits) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The Langevin rate from none to too much, all at one NFE: does the SDE concentrate the classes?"""
    rows, samples, labels = [], {}, _labels(SWEEP_COUNT)
    for gamma in GAMMAS:
        x, nfe = _sampled(model, labels, Langevin(gamma), SWEEP_STEPS)
        rows.append({"gamma": gamma, "nfe": nfe, **_judged(x, labels, digits)})
        samples[f"{gamma:g}"] = x[:20]
    return rows, samples


def headline(model: Model, digits: Digits) -> tuple[dict[str, Any], Tensor]:
    """The samples shown first: natural Euler at 20 NFE."""
    labels = _labels(COUNT)
    x, nfe = _sampled(model, labels, named("ddim"), 20)
    return {"nfe": nfe, **_judged(x, labels, digits)}, x[:SHEET]


def _sampled(model: Model, labels: Tensor, solver: Solver, steps: int) -> tuple[Tensor, int]:
    """Samples (n, …) and the network evaluations each took."""
    x = sampling.sample(model, len(labels), solver=solver, steps=steps, seed=1, cond={"label": labels})
    return x, sampling.nfe(model, solver, steps)


def mixture_paths(gamma: float = 1.0, count: int = 60) -> dict[str, Any]:
    """The same noise through an exact 2-D mixture, by its ODE and by its SDE: states (steps + 1, count, 2)."""
    angles = torch.arange(5) * (2 * torch.pi / 5) + torch.pi / 2
    means = 2.2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    mixture = GaussianMixture(means, torch.full((5,), 0.25), torch.ones(5))
    model = mixture.model(paths.Rectified())
    states = {}
    for name, solver in (("ode", named("heun")), ("sde", Langevin(gamma))):
        states[name] = sampling.sample(model, (count, 2), solver=solver, steps=150, seed=3, record=True).x.numpy()
    return {**states, "data": mixture.sample(600, seed=1).numpy(), "gamma": gamma}
