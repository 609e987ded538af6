"""What is gained by working on latents, and what their autoencoder has to be like?

    python recipes/latent.py mnist.npz --out latent

Autoencoders under several weights of the KL: what their latents cost, how far the images come back, and from which rate
on a classifier still reads them. On the latents of each a model is trained, for equal times; on those of one of them
a second without standardised latents; and one on the pixels, for the same time. All are judged by the squared
Frechet distance on the features of a classifier of the same data, beside the distance of real images to real ones. Then
the latent model is seen in other notations, and straightened once.

Finished parts are not trained again. Times are those of the processor, so that other programs do not decide. --share
scales all of training; 1 takes about two hours of one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fluvial as fl
from fluvial import measure, sheets, straighten, systems, training
from fluvial.convention import Normalisation
from fluvial.show import plots
from fluvial.training.runs import RunFolder

WEIGHTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MAIN = 1e-2
SECONDS = {"autoencoder": 240.0, "model": 480.0, "reflow": 240.0}
STEPS = 18  # of Heun's method, behind every figure that does not say otherwise
_CHUNK = 250


class Judge:
    """Distances of labelled images to the real ones, and which of them a classifier reads."""

    def __init__(self, source: Any, n: int) -> None:
        rows = source.batch(fl.random.permutation(len(source), seed=0)[:10_000])
        self.images, self.labels, self.n = rows["data"], rows["label"], n
        self.classifier = measure.train_classifier(self.images, self.labels, epochs=8)
        self.low, self.high = float(self.images.min()), float(self.images.max())
        self.real = self.classifier.features(self.images)
        self.asked = torch.arange(n) % source.num_classes
        floor = measure.real_floor(measure.frechet, self.real, len(self.real) // 2, labels=self.labels)
        # Halves against halves say how far n samples of a perfect sampler would be from all of it.
        share = (1 / n + 1 / len(self.real)) * floor.n / 2
        self.floor, self.floor_std = floor.mean * share, floor.std * share

    def draw(self, model: Any, seed: int = 0, **how: Any) -> tuple[torch.Tensor, float]:
        """n images, classes in turn, and how many were drawn in a second of processor time."""
        began, parts = time.process_time(), []
        for k, part in enumerate(self.asked.split(_CHUNK)):
            parts.append(fl.sample(model, len(part), seed=seed, first=_CHUNK * k, cond={"label": part}, **how))
        return torch.cat(parts), self.n / (time.process_time() - began)

    def __call__(self, images: torch.Tensor) -> dict[str, float]:
        images = images.clamp(self.low, self.high)
        return {
            "frechet": measure.frechet(self.classifier.features(images), self.real),
            "recognised": measure.share_recognised(self.classifier, images, self.asked),
        }


def steps_in(seconds: float, train: Callable[[int], Any]) -> int:
    """How many training steps so many seconds of processor time make: timed on a few, less what precedes them."""
    train(1)
    times = []
    for steps in (2, 12):
        began = time.process_time()
        train(steps)
        times.append(time.process_time() - began)
    return max(2, round(seconds * 10 / max(times[1] - times[0], 0.3 * times[1])))


def finished(folder: Path) -> bool:
    """Whether there is a run whose steps are all made."""
    run = RunFolder(folder)
    config = run.config()
    return config is not None and run.step() == config["training"]["steps"]


# Parts


def autoencoder(source: Any, weight: float, given: argparse.Namespace) -> Any:
    folder = given.out / f"autoencoder-{weight:g}"
    how = {"kl_weight": weight, "factor": given.factor, "width": given.width, "precision": "fp32", "sheet_every": None}
    if not finished(folder):
        trial = {**how, "progress": False}
        steps = steps_in(
            SECONDS["autoencoder"] * given.share, lambda n: systems.train_autoencoder(source, None, n, **trial)
        )
        systems.train_autoencoder(source, folder, steps, schedule="cosine", **how)
    return systems.load_autoencoder(folder)


def model_of(source: Any, folder: Path, seconds: float, **how: Any) -> Any:
    """The averaged model of a run on this source, for so many seconds."""
    units = how.pop("normalisation", None)
    model = training.model_for(source, **how)
    model = model if units is None else model.under(normalisation=units)
    options: dict[str, Any] = {"precision": "fp32", "batch_size": 64, "schedule": "cosine", "sheet_every": None}
    if not finished(folder):
        trial = copy.deepcopy(model)
        steps = steps_in(seconds, lambda n: fl.train(trial, source, steps=n, progress=False, **options))
        fl.train(model, source, steps=steps, out=folder, **options)
    return fl.load(folder)


def rate_and_distortion(made: Any, judge: Judge) -> dict[str, float]:
    half = len(judge.images) // 2
    images, labels = judge.images[:half], judge.labels[:half]
    noise = fl.random.normal(len(images), made.latent_shape(tuple(images.shape[1:])), seed=1)
    back = made.decode(made.encode(images).sample(noise))
    span = judge.high - judge.low
    return {
        "rate": float(made.rate(images).mean()),
        "rmse": float((back - images).square().mean().sqrt()) / span,
        "psnr": float(-10 * ((back - images) / span).square().flatten(1).mean(1).log10().mean()),
        "recognised": measure.share_recognised(judge.classifier, back, labels),
        "of_images": measure.share_recognised(judge.classifier, images, labels),
        "frechet": measure.frechet(judge.classifier.features(back), judge.real[half:]),
    }


def notations(system: Any) -> dict[str, float]:
    """The largest differences of one state's latents and images, in other notations at the same noise levels."""
    model, found = system.model, {}
    times = [0.02, *(0.1 * k for k in range(1, 10)), 0.95, 1.0]
    cond = {"label": torch.arange(8)}
    state = fl.random.normal(8, model.shape, seed=5, dtype=torch.float64)
    own = model.path(times[0])
    here = system.stages(state=state, times=times, solver="ddim", cond=cond)
    for name in ("vp", "edm"):
        seen = fl.convert(system, path=name)
        theirs = [float(seen.model.path.time(model.path.log_snr(t))) for t in times[:-1]] + [1.0]
        c = seen.model.path(theirs[0])
        size = ((c.alpha**2 + c.sigma**2) / (own.alpha**2 + own.sigma**2)) ** 0.5
        there = seen.stages(state=state * size, times=theirs, solver="ddim", cond=cond)
        found |= {f"{name}, {part}": float((there[part] - here[part]).abs().max()) for part in here}
    return found


def straightened(system: Any, given: argparse.Namespace) -> Any:
    folder, model = given.out / "straight", system.model
    n = max(256, round(20_000 * min(1.0, given.share)))
    pairs = straighten.make_pairs(model, n, steps=12, out=given.out / "pairs", seed=7)
    if not finished(folder):
        seconds = SECONDS["reflow"] * given.share
        short = {"precision": "fp32", "sheet_every": None, "batch_size": 64}
        steps = steps_in(seconds, lambda k: straighten.reflow(model, pairs, k, progress=False, **short))
        straighten.reflow(model, pairs, steps, out=folder, **short)
    return system.with_models({"model": fl.load(folder)})


# Figures


def draw_rate_distortion(rows: dict[float, dict[str, float]], out: Path) -> str:
    """Rate against distortion; the regimes are told apart by what the classifier still reads."""
    known = sorted(rows.items(), key=lambda item: item[1]["rate"])
    read = [entry for _, entry in known if entry["recognised"] >= entry["of_images"] - 0.02]
    border = min((entry["rate"] for entry in read), default=None)
    figure, axes = plots.blank(7.6, 4.4)
    axes.plot([e["rate"] for _, e in known], [e["rmse"] for _, e in known], color=plots.BLUE, marker="o", lw=1.8)
    for k, (weight, entry) in enumerate(known):
        # In turn above and below, as neighbours may lie close.
        above = {"xytext": (8, 6)} if k % 2 == 0 else {"xytext": (-8, -24), "ha": "right"}
        axes.annotate(f"KL weight {weight:g}\nread {entry['recognised']:.1%}", (entry["rate"], entry["rmse"]),
                      textcoords="offset points", fontsize=8.5, color="#3c4654", **above)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, digits in ((axes.xaxis, "25"), (axes.yaxis, "2468")):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _, d=digits: f"{value:.2g}" if f"{value:e}"[0] in d else "")
    axes.margins(x=0.22, y=0.18)
    axes.set(
        xlabel="rate (bits per dimension of the image)", ylabel="RMSE of the images that come back (of their range)"
    )
    finding = "No autoencoder here keeps what the classifier reads"
    if border is not None:
        left, right = axes.get_xlim()
        finding = f"From {border:.2g} bits/dim on, bits buy looks; below, they buy what is shown"
        axes.axvspan(left, border * 0.93, color=plots.ORANGE, alpha=0.08, lw=0)
        axes.axvspan(border * 0.93, right, color=plots.GREEN, alpha=0.08, lw=0)
        axes.set_xlim(left, right)
        # Each in the corner that the falling curve leaves free.
        axes.text(0.01, 0.03, "semantic: classes are lost", transform=axes.transAxes, fontsize=9.5)
        axes.text(0.99, 0.93, "perceptual: all are read", transform=axes.transAxes, ha="right", fontsize=9.5)
    axes.set_title(finding)
    figure.savefig(out, dpi=130)
    return finding


def draw_generation(
    rows: dict[float, dict[str, float]], made: dict[str, dict[str, float]], floor: float, out: Path
) -> str:
    """How the images of the latent models depend on the weight of the KL, beside what decoding alone costs."""
    figure, axes = plots.blank(7.6, 4.2)
    weights = sorted(rows)
    generated = [made[f"latent {w:g}"]["frechet"] for w in weights]
    best = weights[generated.index(min(generated))]
    axes.plot(weights, generated, color=plots.BLUE, marker="o", label="latent models, equal training")
    axes.plot(
        weights,
        [rows[w]["frechet"] for w in weights],
        color=plots.GREEN,
        marker="s",
        label="real images, decoded:\nhalf to half, a higher floor",
    )
    axes.axhline(made["pixels"]["frechet"], color=plots.ORANGE, ls="--", label="pixel model, equal training")
    axes.axhline(floor, color=plots.GREY, ls=":", label="real to real")
    axes.set(xscale="log", yscale="log", xlabel="KL weight", ylabel="squared Fréchet distance to real images")
    finding = f"Images are best from latents under a KL weight of {best:g}"
    axes.set_title(finding)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(out, dpi=130)
    return finding


def written(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| KL weight | bits/dim | RMSE | PSNR, dB | read of decoded | Fréchet of decoded (half to half) "
        "| Fréchet of generated |",
        "|---" * 7 + "|",
    ]
    for weight, entry in found["rate_distortion"].items():
        made = found["models"][f"latent {weight}"]
        lines.append(f"| {weight} | {entry['rate']:.3g} | {entry['rmse']:.3g} | {entry['psnr']:.1f} | "
                     f"{entry['recognised']:.1%} | {entry['frechet']:.3g} | {made['frechet']:.3g} |")  # fmt: skip
    lines += ["", "| model | Fréchet | read | samples/s of processor | training steps |", "|---" * 5 + "|"]
    for name, entry in found["models"].items():
        lines.append(
            f"| {name} | {entry['frechet']:.3g} | {entry['recognised']:.1%} | {entry['rate']:.3g} | {entry['steps']} |"
        )
    budgets = list(next(iter(found["reflow"].values())))
    lines += ["", f"| Euler steps | {' | '.join(budgets)} |", "|---" * (1 + len(budgets)) + "|"]
    lines += [f"| {name} | {' | '.join(f'{v:.3g}' for v in row.values())} |" for name, row in found["reflow"].items()]
    m = found["moments"]
    lines += ["", f"real to real {found['floor']:.3g} ± {found['floor_std']:.1g}; {found['classifier']}",
              f"latents of KL weight {MAIN:g}: mean {m['mean']}, deviation {m['std']} per channel",
              "largest differences in other notations, in float64: "
              + ", ".join(f"{name} {value:.1g}" for name, value in found["notations"].items())]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=1.0, help="of all training times")
    parser.add_argument("-n", type=int, default=2000, help="samples behind every figure")
    parser.add_argument("--factor", type=int, help="default: 4, or 2 for images below 16 pixels")
    parser.add_argument("--width", type=int, default=16, help="of the autoencoders")
    given = parser.parse_args()
    source = training.open_source(given.data)
    given.factor = given.factor or (4 if max(source.shape[1:]) >= 16 else 2)
    given.out.mkdir(parents=True, exist_ok=True)
    judge, rows, models, shown = Judge(source, given.n), {}, {}, {}
    pictures, seconds = {}, SECONDS["model"] * given.share

    def judged(name: str, model: Any, folder: Path) -> None:
        images, rate = judge.draw(model, steps=STEPS)
        models[name] = {**judge(images), "rate": rate, "steps": RunFolder(folder).step()}
        shown[name] = images[:10]
        print(name, {key: round(value, 4) for key, value in models[name].items()}, flush=True)

    main_system, cache = None, None
    for weight in WEIGHTS:
        made = autoencoder(source, weight, given)
        rows[weight] = rate_and_distortion(made, judge)
        print(f"KL weight {weight:g}", rows[weight], flush=True)
        pictures[f"KL weight {weight:g}"] = made.decode(made.encode(judge.images[:10]).mean)
        z = systems.latents(made, source, given.out / f"latents-{weight:g}")
        folder = given.out / f"latent-{weight:g}"
        system = systems.Latent(z.autoencoder, model_of(z, folder, seconds, width=64))
        judged(f"latent {weight:g}", system, folder)
        if weight == MAIN:
            main_system, cache = system, z
    assert main_system is not None
    assert cache is not None
    raw = Normalisation(low=cache.normalisation.low, high=cache.normalisation.high)
    folder = given.out / "latent-raw"
    plain = systems.Latent(cache.autoencoder, model_of(cache, folder, seconds, width=64, normalisation=raw))
    judged(f"latent {MAIN:g}, not standardised", plain, folder)
    judged("pixels", model_of(source, given.out / "pixels", seconds), given.out / "pixels")

    straight = straightened(main_system, given)
    reflow = {
        name: {str(k): judge(judge.draw(system, seed=1, solver="euler", steps=k)[0])["frechet"] for k in (1, 2, 4, 8)}
        for name, system in (("as trained", main_system), ("straightened", straight))
    }
    found: dict[str, Any] = {
        "data": given.data, "share": given.share, "n": given.n, "classifier": judge.classifier.description,
        "floor": judge.floor, "floor_std": judge.floor_std, "models": models, "reflow": reflow,
        "rate_distortion": {f"{w:g}": entry for w, entry in rows.items()}, "notations": notations(main_system),
        "moments": {"mean": [round(v, 3) for v in cache.normalisation.shift],
                    "std": [round(v, 3) for v in cache.normalisation.scale]},
    }  # fmt: skip
    found["findings"] = [
        draw_rate_distortion(rows, given.out / "rate_distortion.png"),
        draw_generation(rows, models, judge.floor, given.out / "kl_and_generation.png"),
    ]
    info, units = {"data": given.data, "share": given.share}, source.normalisation
    for name, parts in (("reconstructions", {"images": judge.images[:10], **pictures}), ("samples", shown)):
        picture = sheets.sheet(torch.cat([*parts.values()]), columns=10, labels=[*parts], normalisation=units)
        sheets.save(picture, given.out / f"{name}.png", info)
    (given.out / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (given.out / "table.md").write_text(text := written(found), encoding="utf-8")
    print(text, *found["findings"], sep="\n")


if __name__ == "__main__":
    main()
