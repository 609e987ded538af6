"""Does a cascade pay, and what does conditioning augmentation do for it?

    python recipes/cascade.py digits --sizes 4,8 --out cascade
    python recipes/cascade.py mnist.npz --sizes 7,14,28 --out cascade

Trains a base and the stages above it, once with conditioning augmentation and once without; and a single model of the
largest images, of as many parameters x pixels, for as much time of the processor. Squared Frechet distances to the
real data, on the features of a classifier of the same data: of the single model; of the cascade over levels of log-SNR
in sampling, its lower images re-noised, or the lower stages stopped early at the same level; and with its last stage
distilled to one step. All from the same noises of the base, with the same number of network calls a stage.

Any images with labels will do: a name or a folder that `fluvial train` takes, or a .npz file of images and labels. It
goes on where it was stopped. --share scales all training.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

import fluvial as fl
from fluvial import measure, networks, sheets, systems, training
from fluvial.systems.upsampling import shrink

STEPS, BATCH, WIDTH = 3000, 64, 32
LEVELS = (0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, math.inf)
STOPPED = (2.0, 3.0, 4.0, 5.0, 6.0)  # levels at which the lower stages are stopped early
PART = 250  # samples at a time


def opened(spec: str) -> training.Source:
    """Images with labels; of an .npz file whatever its arrays are called."""
    if spec.endswith(".npz"):
        arrays = numpy.load(spec)
        if "data" not in arrays:
            images, labels = (
                next(n for n in arrays if n in names) for names in (("images", "train_x"), ("labels", "train_y"))
            )
            return training.open_source({"data": arrays[images], "label": arrays[labels].astype(numpy.int64)})
    return training.open_source(spec)


def made_for(source: Any, width: int = WIDTH) -> fl.Model:
    """A stage, or a single model, untrained."""
    make = systems.stage_model if isinstance(source, systems.StageSource) else training.model_for
    return make(source, width=width)


def step_seconds(source: Any, width: int = WIDTH) -> float:
    """Processor time of one training step."""
    model, how = made_for(source, width), {"batch_size": BATCH, "precision": "fp32", "progress": False}
    times = []
    for steps in (1, 2, 12):  # the first to warm up
        began = time.process_time()
        fl.train(model, source, steps=steps, **how)
        times.append(time.process_time() - began)
    return max(times[2] - times[1], 0.3 * times[2]) / 10


def trained(source: Any, folder: Path, steps: int, width: int = WIDTH) -> fl.Model:
    """A stage, or a single model, on its data."""
    model = made_for(source, width)
    return fl.train(model, source, steps=steps, batch_size=BATCH, out=folder, precision="fp32", schedule="cosine").ema


def load_of(model: fl.Model) -> float:
    """Parameters x pixels."""
    shape = model.shape or (1,)
    return sum(p.numel() for p in model.parameters()) * math.prod(shape[1:])


def width_for(source: training.Source, load: float) -> int:
    """The width whose network has nearest to this many parameters x pixels."""
    pixels = math.prod(source.shape[1:])

    def off(width: int) -> float:
        with torch.device("meta"):
            network = networks.for_data(source.shape, source.num_classes, width)
        return abs(math.log(sum(p.numel() for p in network.parameters()) * pixels / load))

    return min(range(8, 129, 8), key=off)


def single(source: training.Source, data: list[Any], load: float, steps: int, folder: Path) -> dict[str, Any]:
    """A single model of this load, trained for the time that the stages take on their data."""
    width, cost = width_for(source, load), folder.parent / "cost.json"
    if not cost.exists():  # kept, as times differ a little and a run's steps may not
        stages, alone = sum(map(step_seconds, data)), step_seconds(source, width)
        told = {"seconds": steps * stages, "step": alone, "steps": max(2, round(steps * stages / alone))}
        cost.write_text(json.dumps(told))
    told = json.loads(cost.read_text())
    return {**told, "model": trained(source, folder, told["steps"], width)}


class Judge:
    """Frechet distances of n labelled samples to the real data, and their floor."""

    def __init__(self, source: training.Source, n: int) -> None:
        rows = source.batch(fl.random.permutation(len(source), seed=0)[:10_000])
        self.low, self.high = float(rows["data"].min()), float(rows["data"].max())
        self.classifier = measure.train_classifier(rows["data"], rows["label"])
        self.real, self.labels = self.classifier.features(rows["data"]), torch.arange(n) % (source.num_classes or 1)
        floor = measure.real_floor(measure.frechet, self.real, len(self.real) // 2, labels=rows["label"])
        share = floor.n / 2 * (1 / n + 1 / len(self.real))
        self.floor, self.floor_std = floor.mean * share, floor.std * share

    def draw(self, sample: Callable[..., Any]) -> Any:
        """sample(n, first, label) in parts: tensors, or those of all stages by name."""
        parts = [sample(len(part), PART * k, part) for k, part in enumerate(self.labels.split(PART))]
        if isinstance(parts[0], dict):
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return torch.cat(parts)

    def __call__(self, x: torch.Tensor) -> dict[str, float]:
        x = x.clamp(self.low, self.high)
        features = self.classifier.features(x)
        return {
            "frechet": measure.frechet(features, self.real),
            "recognised": measure.share_recognised(self.classifier, x, self.labels),
        }


class Table:
    """Rows of figures, as they come in."""

    def __init__(self, judge: Judge, seed: int) -> None:
        self.judge, self.seed = judge, seed
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, at: float | None, model: Any, **how: Any) -> dict[str, torch.Tensor]:
        """Samples and measures; returns what each stage made."""

        def sample(n: int, first: int, label: torch.Tensor) -> Any:
            options = {**how, "seed": self.seed, "first": first, "cond": {"label": label}}
            if isinstance(model, systems.Cascade):
                return model.stages(n, **options)
            return {"single": fl.sample(model, n, **options)}

        made = self.judge.draw(sample)
        found = self.judge(list(made.values())[-1])
        self.rows.append({"name": name, "level": shown(at), **found})
        print(f"{name:32} {shown(at):>6} {found['frechet']:8.3f} {found['recognised']:7.1%}", flush=True)
        return made

    def frechet(self, name: str, at: float | None) -> float:
        """The distance of one of its rows."""
        return next(r["frechet"] for r in self.rows if (r["name"], r["level"]) == (name, shown(at)))

    def text(self) -> str:
        lines = ["| model | level | Frechet | recognised |", "|---|---|---|---|"]
        lines += [f"| {r['name']} | {r['level']} | {r['frechet']:.3f} | {r['recognised']:.1%} |" for r in self.rows]
        return "\n".join(lines) + "\n"


def shown(level: float | None) -> str:
    return "" if level is None else "clean" if level == math.inf else f"{level:g}"


def stages(source: training.Source, sizes: list[int], out: Path, steps: int) -> tuple[list[Any], dict[str, list[Any]]]:
    """The data of the stages; the base, and the stages above it with and without augmentation."""
    data = [systems.StageSource(source, size, low=low) for size, low in zip(sizes, [None, *sizes])]
    base = trained(data[0], out / "base", steps)
    made: dict[str, list[Any]] = {"augmented": [base], "plain": [base]}
    for k in range(1, len(sizes)):
        made["augmented"].append(trained(data[k], out / f"up{k}-augmented", steps))
        clean = systems.StageSource(source, sizes[k], low=sizes[k - 1], augmentation=None)
        made["plain"].append(trained(clean, out / f"up{k}-plain", steps))
    return data, made


def from_real(cascade: systems.Cascade, source: training.Source, judge: Judge, sizes: list[int], nfe: int, seed: int):
    """Upper stages alone, from real small images: what is left is not the base's doing."""
    rows = source.batch(fl.random.permutation(len(source), seed=1)[: len(judge.labels)])
    whole, small = (shrink(rows["data"], size) for size in (sizes[-1], sizes[0]))
    parts = enumerate(zip(small.split(PART), rows["label"].split(PART)))
    up = torch.cat(
        [cascade.upscale(x, nfe=nfe, cond={"label": label}, seed=seed, first=PART * k) for k, (x, label) in parts]
    )
    return {
        "from_real": judge(up)["frechet"],
        "themselves": judge(whole)["frechet"],
        "moved": float((shrink(up, sizes[0]) - small).square().mean().sqrt() / whole.std()),
    }


def draw_sheets(out: Path, made: dict[str, dict[str, torch.Tensor]], source: training.Source, info: Any) -> None:
    """What every stage made of the same noises; and a row for each model and level."""
    usual = made["cascade"]
    pictures = [sheets.sheet(x[:50], columns=10, normalisation=source.normalisation) for x in usual.values()]
    titles = [f"{name}, {x.shape[-1]} pixels" for name, x in usual.items()]
    sheets.save(sheets.beside(pictures, titles), out / "stages.png", info)
    rows = {name: list(x.values())[-1][:12] for name, x in made.items() if name != "cascade"}
    both = sheets.sheet(
        torch.cat(list(rows.values())), columns=12, labels=list(rows), normalisation=source.normalisation
    )
    sheets.save(both, out / "compared.png", info)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--sizes", default="4,8", help="of the stages, rising")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=1.0, help="of all training steps")
    parser.add_argument("-n", type=int, default=2000, help="samples behind every figure")
    parser.add_argument("--nfe", type=int, default=12, help="network calls of each stage")
    parser.add_argument("--seed", type=int, default=10, help="of the samples")
    given = parser.parse_args()
    source, sizes = opened(given.data), [int(size) for size in given.sizes.split(",")]
    given.out.mkdir(parents=True, exist_ok=True)
    if sizes[-1] != source.shape[-1]:
        source = systems.StageSource(source, sizes[-1])
    whole = source.source if isinstance(source, systems.StageSource) else source
    steps = max(2, round(STEPS * given.share))
    stage_data, models = stages(whole, sizes, given.out, steps)
    load = sum(map(load_of, models["augmented"]))
    alone = single(source, stage_data, load, steps, given.out / "single")
    # The last stage in one step: its data bring their lower images along.
    upper, folder = models["augmented"][-1], given.out / f"up{len(sizes) - 1}-one-step"
    data = systems.stage_source(upper, whole)
    few = max(2, round(1000 * given.share))
    one = fl.distill.consistency(upper, data, few, out=folder, batch_size=BATCH, precision="fp32")

    judge = Judge(source, given.n)
    table, nfe = Table(judge, given.seed), given.nfe
    cascade, plain = systems.Cascade(models["augmented"]), systems.Cascade(models["plain"])
    made = {"single model": table.add("single model", None, alone["model"], nfe=nfe)}
    made["not augmented"] = table.add("cascade, not augmented", math.inf, plain, nfe=nfe)
    for level in LEVELS:
        made[f"at {shown(level)}"] = table.add("cascade", level, cascade, nfe=nfe, level=level)
    for level in STOPPED:
        t = cascade.models["base"].path.time(level)
        made[f"stopped at {level:g}"] = table.add("cascade, lower stages stopped", level, cascade, nfe=nfe, truncated=t)
    best = min(LEVELS, key=lambda level: table.frechet("cascade", level))
    made["cascade"] = made[f"at {shown(best)}"]
    last = list(cascade.models)[-1]
    fast = cascade.with_models({**cascade.models, last: one})
    how: dict[str, Any] = {"nfe": dict.fromkeys([*cascade.models][:-1], nfe), "level": best}
    made["last in one step"] = table.add("cascade, last stage one step", best, fast, **how)
    facts = {
        "data": given.data, "sizes": sizes, "n": given.n, "nfe": nfe, "seed": given.seed, "share": given.share,
        "floor": judge.floor, "classifier": judge.classifier.description, "load": load,
        "floor_std": judge.floor_std, "single_load": load_of(alone["model"]), "steps": steps,
        "seconds": alone["seconds"], "single_steps": alone["steps"],
        "best": shown(best), **from_real(cascade, whole, judge, sizes, nfe, given.seed),
    }  # fmt: skip
    draw_sheets(given.out, made, source, facts)
    fl.save(cascade, given.out / "cascade")
    (given.out / "results.json").write_text(json.dumps({**facts, "rows": table.rows}, indent=1))
    (given.out / "table.md").write_text(table.text())
    print(f"\n{table.text()}\nfloor {judge.floor:.3f} +- {judge.floor_std:.3f}")
    print(
        f"from real small images {facts['from_real']:.3f} (those at full size: {facts['themselves']:.3f}); area ",
        end="",
    )
    print(f"averages of what comes out are {facts['moved']:.3f} of the data's deviation away from them")
    print(f"{facts['seconds']:.0f} s of one processor each; load {load:.3g} against {facts['single_load']:.3g}")


if __name__ == "__main__":
    main()
