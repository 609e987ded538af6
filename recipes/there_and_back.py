"""A diffusers pipeline in, straightened and distilled here, and out again as diffusers pipelines.

    python recipes/there_and_back.py --out there

A small DDPM of handwritten digits stands for the pipeline that a user has: diffusers' own UNet2DModel and
DDPMScheduler, noise-predicting. It is trained here (`fl.train` trains any imported network), saved as a pipeline and
from then on known by its folder alone. Every pipeline that leaves is loaded in a fresh process that has diffusers and
not Fluvial, and has to make the same images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fluvial as fl
from fluvial import distill, measure, sheets, straighten, training
from fluvial.interop.diffusers import sampling_times

DDIM = {"clip_sample": False, "timestep_spacing": "trailing"}

# What the fresh process runs: diffusers alone, on noise that it is given.
ALONE = """
import sys, torch
from diffusers import DDIMScheduler, DiffusionPipeline
folder, noise, steps, out = sys.argv[1:5]
pipe = DiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
x = torch.load(noise, weights_only=True)
scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="trailing")
scheduler.set_timesteps(int(steps))
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, t, return_dict=False)[0], t, x, return_dict=False)[0]
assert "fluvial" not in sys.modules
torch.save(x, out)
"""


def alone(folder: Path, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """What diffusers makes of the noise (B, …) with the pipeline in this folder, in path units."""
    given, made = folder.parent / "noise.pt", folder.parent / "made.pt"
    torch.save(noise, given)
    subprocess.run([sys.executable, "-c", ALONE, str(folder), str(given), str(steps), str(made)], check=True)
    return torch.load(made, weights_only=True)


def difference(model: fl.Model, folder: Path, noise: torch.Tensor, steps: int) -> float:
    """The largest, in any pixel, between the model here and its folder in a process without Fluvial."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", **DDIM)
    own = fl.convert(model, path=fl.load(folder).path)
    how = {"solver": fl.solvers.Jump(renoise=0.0) if own.jumps else "ddim"}
    x = fl.sample(own, state=noise, times=sampling_times(scheduler, steps), **how)
    return float((alone(folder, noise, steps) - x).abs().max())


def pipeline(out: Path, steps: int) -> Path:
    """The pipeline that a user has."""
    from diffusers import DDPMScheduler, UNet2DModel

    folder = out / "ddpm"
    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=32,
    )  # fmt: skip
    images = training.open_source("digits")
    rows = images.batch(torch.arange(len(images)))["data"]
    model = fl.from_diffusers(unet, DDPMScheduler(clip_sample=False))
    made = fl.train(model, rows / 8 - 1, steps=steps, schedule="cosine", out=out / "training", precision="fp32")
    return Path(fl.to_diffusers(made.ema, folder))


class Judge:
    """Squared Frechet distances on a classifier's features, to the digits and to the teacher's accurate samples."""

    def __init__(self, rows: torch.Tensor, label: torch.Tensor, teacher: fl.Model, n: int) -> None:
        self.n, self.classifier = n, measure.train_classifier(rows, label)
        self.real = self.classifier.features(rows)
        self.teacher = [self.features(self.draw(teacher, seed, solver="heun", times="karras")) for seed in (901, 902)]
        self.floor = measure.frechet(*self.teacher)

    def draw(self, model: fl.Model, seed: int, **how: Any) -> torch.Tensor:
        parts = range(0, self.n, 500)
        return torch.cat([fl.sample(model, min(500, self.n - k), seed=seed, first=k, **how) for k in parts])

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier.features(x.clamp(-1, 1))

    def __call__(self, x: torch.Tensor) -> tuple[float, float]:
        return tuple(measure.frechet(self.features(x), known) for known in (self.teacher[0], self.real))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=1.0, help="of the training steps")
    parser.add_argument("-n", type=int, default=2000, help="samples behind every figure")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    of = lambda steps: max(1, round(steps * given.share))  # noqa: E731
    folder = pipeline(given.out, of(1500))

    digits = training.open_source("digits")
    known = digits.batch(torch.arange(len(digits)))
    rows, teacher = known["data"] / 8 - 1, fl.load(folder)
    student = distill.consistency(teacher, rows, of(1000), out=given.out / "one-step", precision="fp32")
    pairs = straighten.make_pairs(teacher, of(20_000), solver="vabm", steps=24, out=given.out / "pairs")
    straight = straighten.reflow(teacher, pairs, of(1200), out=given.out / "straight", precision="fp32")
    models: dict[str, tuple[Any, dict[str, Any]]] = {
        "as it came, ddim": (teacher, {"solver": "ddim"}),
        "as it came, vabm": (fl.convert(teacher, path="rectified"), {"solver": "vabm"}),
        "straightened, euler": (straight, {"solver": "euler"}),
        "distilled, jump": (student, {}),
    }
    judge = Judge(rows, known["label"], fl.convert(teacher, path="rectified"), given.n)
    table, sheet = {}, []
    for name, (model, how) in models.items():
        drawn = {steps: judge.draw(model, 10, steps=steps, **how) for steps in (1, 2, 4, 32)}
        table[name] = {steps: judge(x) for steps, x in drawn.items()}
        print(name, {steps: "{:.3f} / {:.3f}".format(*found) for steps, found in table[name].items()}, flush=True)
        sheet += [drawn[steps][:16] for steps in (1, 32)]
    print(f"to the teacher / to the digits; two sets of the teacher: {judge.floor:.3f}")
    picture = sheets.sheet(
        torch.cat(sheet), columns=16, labels=[f"{name}, {n}" for name in models for n in (1, 32)],
        low=-1.0, high=1.0,
    )  # fmt: skip
    sheets.save(picture, given.out / "there_and_back.png", {"seed": 10})

    noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    same = {"as it came": difference(teacher, folder, noise, 20)}
    for name, model, steps in (("straight", straight, 2), ("one-step", student, 1)):
        told = {"steps": steps} if model is student else {}
        same[name] = difference(
            model, Path(fl.to_diffusers(model, given.out / f"{name}-pipeline", **told)), noise, steps
        )
    print("largest difference to diffusers alone:", same)
    (given.out / "results.json").write_text(json.dumps({"table": table, "same": same}, indent=1, default=float))


if __name__ == "__main__":
    main()
