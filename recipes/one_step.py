"""Which distillation makes the best one-step student of a run, in about five minutes each?

    python recipes/one_step.py runs/a --out one --methods consistency,pairs,shortcut --seeds 3

Every method starts from the same run, with its defaults, on the same data, for as many steps as five minutes of two
processor cores allow. Students and teacher are sampled from the same noises. Distances are squared Frechet distances on
the features of a classifier of the same data: to the real data, and to the teacher's own accurate samples, each beside
its floor. Finished students are not trained again, so the table can grow method by method.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from half_straightening import Judge

import fluvial as fl
from fluvial import distill, sheets, straighten, training
from fluvial.training.runs import RunFolder

# Steps of about five minutes on two cores, for a U-Net of 8x8 digits.
STEPS = {
    "consistency": 1000,
    "consistency-training": 1500,
    "improved": 1500,
    "easy": 1500,
    "continuous": 800,
    "mean-flow": 800,
    "shortcut": 1200,
    "progressive": 1250,
    "pairs": 1200,
}
BUDGETS = (1, 2, 4)
TEACHER = (1, 2, 4, 8, 32)


def student(base: Any, source: Any, name: str, seed: int, out: Path, steps: int) -> Any:
    """A finished student, or a new one."""
    folder = RunFolder(out / f"{name}-{seed}")
    config = folder.config()
    if config is not None and folder.step() == config["training"]["steps"]:
        return fl.load(folder.path)
    if name == "pairs":
        times = [0.25, 0.5, 0.75]
        teacher = fl.convert(base, path="rectified")
        source = straighten.make_pairs(
            teacher, 20_000, solver="vabm", steps=24, states=times, out=out / "pairs", seed=7
        )
    return distill.METHODS[name](base, source, steps, out=out / f"{name}-{seed}", seed=seed)


def of_steps(made: Any, folder: Path, steps: int) -> Any:
    """The student for so many steps: progressive distillation leaves one for each number."""
    own = folder.with_name(f"{folder.name}-steps-{steps}")
    return fl.load(own) if own.is_dir() else made


def row(judge: Judge, model: Any, budgets: tuple[int, ...], seed: int, **how: Any) -> list[dict[str, Any]]:
    """What the judge says of the model at each number of steps, and its first samples."""
    cells = []
    for steps in budgets:
        x = judge.draw(model, seed, steps=steps, **how)
        cells.append({"steps": steps, "seed": seed, **judge(x), "samples": x[:20]})
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--methods", default=",".join(STEPS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the training steps of each method")
    parser.add_argument("-n", type=int, default=2000, help="samples behind every figure")
    given = parser.parse_args()
    source, base = training.open_source(given.data), fl.load(given.run)
    judge = Judge(source, fl.convert(base, path="rectified"), None, given.n)
    rectified = fl.convert(base, path="rectified")
    rows = {
        "teacher, Euler": [row(judge, rectified, TEACHER, 10 + s, solver="euler") for s in range(given.seeds)],
        "teacher, vabm": [row(judge, rectified, TEACHER, 10 + s, solver="vabm") for s in range(given.seeds)],
    }
    for name in given.methods.split(","):
        for seed in range(given.seeds):
            made = student(base, source, name, seed, given.out, round(STEPS[name] * given.share))
            rows.setdefault(name, []).append(
                [
                    cell
                    for steps in BUDGETS
                    for cell in row(judge, of_steps(made, given.out / f"{name}-{seed}", steps), (steps,), 10 + seed)
                ]
            )
        print(name, [f"{cell['to_teacher']:.3f}" for cells in rows[name] for cell in cells], flush=True)
    text = table(rows)
    print(text)
    print(f"floors: real {judge.floor:.3f}, teacher {judge.teacher_floor:.3f}")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.md").write_text(text)
    # The same twelve noises in a row each: what one step makes of them, and what they should become.
    shown = {"teacher, 32 steps": rows["teacher, Euler"][0][-1], "teacher, 1 step": rows["teacher, Euler"][0][0]}
    shown |= {f"{name}, 1 step": rows[name][0][0] for name in given.methods.split(",")}
    picture = sheets.sheet(
        torch.cat([cell["samples"][:12] for cell in shown.values()]), columns=12, labels=list(shown),
        normalisation=base.normalisation,
    )  # fmt: skip
    sheets.save(picture, given.out / "one_step.png", {"run": given.run, "seed": 10})
    plain = {
        name: [[{k: v for k, v in cell.items() if k != "samples"} for cell in cells] for cells in seeds]
        for name, seeds in rows.items()
    }
    floors = {"floor": judge.floor, "teacher_floor": judge.teacher_floor}
    (given.out / "results.json").write_text(json.dumps({**floors, "rows": plain}, indent=1))


def table(rows: dict[str, list[list[dict[str, Any]]]]) -> str:
    """The rows as Markdown: to the teacher's samples / to the real data / recognised, means over the seeds."""
    budgets = sorted({cell["steps"] for seeds in rows.values() for cells in seeds for cell in cells})
    lines = [f"| | {' | '.join(map(str, budgets))} |", "|---" * (1 + len(budgets)) + "|"]
    for name, seeds in rows.items():
        entries = []
        for steps in budgets:
            cells = [cell for cells in seeds for cell in cells if cell["steps"] == steps]
            mean = (
                [statistics.fmean(cell[key] for cell in cells) for key in ("to_teacher", "to_real", "recognised")]
                if cells
                else []
            )
            entries.append(f"{mean[0]:.3f} / {mean[1]:.3f} / {mean[2]:.1%}" if cells else "")
        lines.append(f"| {name} | {' | '.join(entries)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
