"""Which part of a trajectory is worth straightening, and where should the steps go?

    python recipes/half_straightening.py runs/a --out half

One teacher, one set of guided pairs with the state at the split captured exactly. From it three students, with as many
seeds each: the first half straightened (the noise side), the second, both; a half that is not straightened is anchored
to the teacher. All four, the teacher among them, are sampled with Euler steps in each half as the allocation says,
from the same noises; the averaged weights, without guidance where it is built in. Distances are on the features of a
classifier of the same data, in their range, to the real data and to the teacher's own accurate samples.
Straightness and curvature of each half are measured before and after.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from half_page import write

import fluvial as fl
from fluvial import measure, straighten, training

ARMS = {"first": (True, False), "second": (False, True), "both": (True, True)}
ALLOCATIONS = ((1, 1), (1, 9), (2, 8), (5, 5), (8, 2), (9, 1), (9, 9))


class Judge:
    """Frechet distances of labelled samples, with their floors: to the real data and to the teacher's samples."""

    def __init__(self, source: Any, teacher: Any, guidance: Any, n: int) -> None:
        rows = source.batch(fl.random.permutation(len(source), seed=0)[:10_000])
        self.low, self.high = rows["data"].min(), rows["data"].max()
        self.classifier = measure.train_classifier(rows["data"], rows["label"])
        self.labels = torch.arange(n) % source.num_classes
        self.real = self.classifier.features(rows["data"])
        # Half of the real against the other half says how far n samples of a perfect sampler would be from all of it.
        floor = measure.real_floor(measure.frechet, self.real, len(self.real) // 2, labels=rows["label"])
        halves = 2 / floor.n
        self.floor = floor.mean * (1 / n + 1 / len(self.real)) / halves
        self.teacher = [
            self.features(self.draw(teacher, seed, guidance, solver="heun", steps=18)) for seed in (901, 902)
        ]
        self.teacher_floor = measure.frechet(*self.teacher)

    def draw(self, model: Any, seed: int, guidance: Any = None, **how: Any) -> torch.Tensor:
        """n samples, classes in turn."""
        parts = self.labels.split(500)
        return torch.cat([
            fl.sample(model, len(part), seed=seed, first=500 * k, cond={"label": part}, guidance=guidance, **how)
            for k, part in enumerate(parts)
        ])  # fmt: skip

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier.features(x.clamp(self.low, self.high))

    def __call__(self, x: torch.Tensor) -> dict[str, float]:
        features = self.features(x)
        return {
            "to_real": measure.frechet(features, self.real),
            "to_teacher": measure.frechet(features, self.teacher[0]),
            "recognised": measure.share_recognised(self.classifier, x.clamp(self.low, self.high), self.labels),
        }


def bent(model: Any, guidance: Any, split: float, seed: int) -> dict[str, Any]:
    """Straightness and mean curvature of each half, on 200 of the model's own trajectories."""
    cond = {"label": torch.arange(200) % model.null["label"]}
    found = measure.straightness(
        model.under(segments=None), 200, steps=32, seed=seed, cond=cond, guidance=guidance, segments=[0, split, 1]
    )
    halves: tuple[list[float], list[float]] = ([], [])
    for t, curve in zip(found.times[1:-1], found.curvature):
        halves[t >= split].append(curve)
    return {
        "straightness": found.per_segment,
        "total": found.total,
        "curvature": [statistics.fmean(half) for half in halves],
        "profile": [found.times[1:-1], found.curvature],
        "split": found.split(2)[1],
    }


def kept_half(
    judge: Judge, model: Any, teacher: Any, guidance: Any, keeps: int, split: float, seed: int
) -> torch.Tensor:
    """Samples whose kept half is the student's, in 9 steps, and whose other half is the teacher's, accurately."""
    fine, rough = torch.linspace(0, 1, 8).tolist(), torch.linspace(0, 1, 10).tolist()
    samples = []
    for k, part in enumerate(judge.labels.split(500)):
        x = fl.random.normal(range(500 * k, 500 * k + len(part)), model.shape, seed)
        for half, (low, high) in enumerate(((0.0, split), (split, 1.0))):
            own = half == keeps
            which, under, shares = (
                (model, None if model is not teacher else guidance, rough) if own else (teacher, guidance, fine)
            )
            times = [low + (high - low) * share for share in shares[:-1]] + [high]
            x = fl.sample(
                which.under(segments=None), state=x, times=times, solver="euler" if own else "heun", guidance=under,
                cond={"label": part},
            )  # fmt: skip
        samples.append(x)
    return torch.cat(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--split", type=float, default=0.5)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=1500, help="of training, for each student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-n", type=int, default=2000, help="samples behind every figure")
    given = parser.parse_args()
    source, split, guidance = training.open_source(given.data), given.split, fl.guidance.CFG(given.guidance)
    teacher = fl.convert(fl.load(given.run), path="rectified")
    pairs = straighten.make_pairs(
        teacher,
        given.pairs,
        solver="vabm",
        steps=16,
        states=[split],
        guidance=guidance,
        out=given.out / "pairs",
        seed=1,
    )
    students: dict[str, list[Any]] = {"none": [teacher] * given.seeds}
    for arm, straight in ARMS.items():
        students[arm] = [
            straighten.reflow(
                teacher, pairs, given.steps, [0.0, split, 1.0], straight, guidance=guidance, seed=seed,
                out=given.out / f"{arm}-{seed}", sheet_every=None,
            )
            for seed in range(given.seeds)
        ]  # fmt: skip
    judge = Judge(source, teacher, guidance, given.n)
    results: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(given).items()}, "pairs": dict(pairs.manifest)}
    results |= {"classifier": judge.classifier.description, "floor": judge.floor, "teacher_floor": judge.teacher_floor}
    results |= {"cells": [], "bends": [], "kept": []}
    sheets: dict[tuple[str, tuple[int, int]], torch.Tensor] = {}
    for arm, models in students.items():
        under = guidance if arm == "none" else None
        for seed, model in enumerate(models):
            results["bends"].append({"arm": arm, "seed": seed, **bent(model, under, split, 70 + seed)})
            for steps in ALLOCATIONS:
                x = judge.draw(model, 10 + seed, under, solver="euler", times=fl.grids.Split([0, split, 1], steps))
                results["cells"].append({"arm": arm, "seed": seed, "steps": list(steps), **judge(x)})
                sheets.setdefault((arm, steps), x[:20])
            for half in (0, 1):
                if arm == "none" or not ARMS[arm][half]:
                    x = kept_half(judge, model, teacher, guidance, half, split, 40 + seed)
                    results["kept"].append({"arm": arm, "seed": seed, "half": half, **judge(x)})
            print(arm, seed, [f"{c['to_teacher']:.3f}" for c in results["cells"][-len(ALLOCATIONS) :]], flush=True)
    (given.out / "results.json").write_text(json.dumps(results, indent=1))
    print(write(given.out, results, sheets))


if __name__ == "__main__":
    main()
