"""The report of `quickstart`: what was trained, how one network speaks three notations, what noise buys and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluvial import __version__, sheets
from fluvial.show import page, plots

LOW, HIGH = 0.0, 16.0  # of scikit-learn's digits


def write(
    folder: Path,
    results: Mapping[str, Any],
    samples: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    mixture: Mapping[str, Any],
) -> Path:
    """`report.html` in the folder, and the sheets as PNG files beside it."""
    info = {"model": results["model_hash"], "seed": 1, "grid": "uniform", "fluvial": __version__}
    _save_sheets(folder, samples, info, results)
    parts = [
        *_opening(results, samples["headline"], samples["real"]),
        *_training(results, metrics),
        *_notations(results, samples["notations"]),
        *_quality(results),
        *_mixture(mixture),
        *_gamma(results, samples["gamma"]),
        *_next(),
    ]
    made = f"Made by fluvial quickstart, Fluvial {__version__}; model {results['model_hash']}, seed 0."
    return page.write(folder / "report.html", "One network, every notation", parts, made)


def _save_sheets(folder: Path, samples: Mapping[str, Any], info: dict[str, Any], results: Mapping[str, Any]) -> None:
    nfe = results["headline"]["nfe"]
    picture = sheets.sheet(samples["headline"], columns=10, low=LOW, high=HIGH)
    sheets.save(picture, folder / "samples.png", {**info, "solver": "ddim", "nfe": nfe})
    for gamma, x in samples["gamma"].items():
        picture = sheets.sheet(x, columns=10, low=LOW, high=HIGH)
        told = {**info, "solver": "langevin", "gamma": float(gamma), "nfe": results["gamma"][0]["nfe"]}
        sheets.save(picture, folder / f"gamma-{gamma}.png", told)


def _sheet(x: Tensor, alt: str, columns: int = 10, scale: int = 8) -> str:
    """Digits on the page, smoothed between their 8x8 pixels for the eye; the PNG files have the pixels as they are."""
    smooth = torch.nn.functional.interpolate(x, scale_factor=scale, mode="bicubic").clamp(LOW, HIGH)
    return page.image(sheets.sheet(smooth, columns=columns, scale=1, low=LOW, high=HIGH), alt)


def _opening(results: Mapping[str, Any], x: Tensor, real: Tensor) -> list[str]:
    head = results["headline"]
    return [
        page.paragraph(
            "A small network was just trained on 1,797 real handwritten digits as a rectified flow. Below, that one "
            "network is sampled as a flow and as a diffusion, in three notations, and every claim is measured.",
            "lead",
        ),
        page.facts(
            [
                (f"{head['recognised']:.1%}", f"of its samples at {head['nfe']} network evaluations are read as asked"),
                (f"{results['classifier_accuracy']:.1%}", "of held-out real digits are read right by the same reader"),
                (
                    f"{head['frechet']:.2f}",
                    f"squared Fréchet distance; real to real {results['floor']['mean']:.2f}",
                ),
                (f"{results['training_seconds']:.0f} s", f"of training, {results['parameters']:,} parameters"),
            ]
        ),
        page.figure(
            _sheet(x, "sixty generated digits, six of each class"),
            f"Generated digits, classes 0 to 9 from left to right: natural Euler (DDIM), {head['nfe']} NFE, seed 1. "
            "They are 8x8 pixels, smoothed here for the eye.",
        ),
        page.figure(_sheet(real, "ten real digits"), "Real digits, for comparison: the first of each class."),
    ]


def _training(results: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        page.heading("What was trained"),
        page.paragraph(
            "The network sees <em>x</em> = <em>t</em>·data + (1 − <em>t</em>)·noise and the class, and learns the "
            "velocity data − noise. One in ten labels is hidden, so that it also learns the digits without a class. "
            "A loss of zero is impossible: at each noise level part of the answer cannot be known, and the second plot "
            "shows where."
        ),
        page.figure(
            page.svg(plots.loss(metrics), "training loss by step"),
            f"{results['training_steps']} steps of 128 digits. Each thin line is one band of log-SNR, log(α²/σ²).",
        ),
        page.figure(page.svg(plots.loss_by_log_snr(metrics), "loss by log-SNR"), "Mean of the last fifth of training."),
    ]


def _notations(results: Mapping[str, Any], samples: Mapping[str, Tensor]) -> list[str]:
    rows = [
        ("natural Euler (DDIM)" if r["solver"] == "ddim" else "Heun", r["path"], f"{r['difference']:.1e}")
        for r in results["notations"]
    ]
    shown = [
        page.figure(_sheet(samples[f"ddim {name}"][:20], f"digits as {name}", columns=5), f"as {title}")
        for name, title in (("Rectified", "rectified flow"), ("VP", "VP diffusion"), ("EDM", "EDM"))
    ]
    worst = max(r["difference"] for r in results["notations"] if r["solver"] == "ddim")
    return [
        page.heading("The same network in three notations"),
        page.paragraph(
            "A rectified flow, a variance-preserving diffusion and EDM's variance-exploding one differ by how time "
            "runs and how the state is scaled, not by what the network knows. <code>fl.convert</code> translates "
            "exactly: it matches the log-SNR, rescales the state and keeps the estimated pair (data, noise). No "
            "training is involved. Each notation starts from the same state."
        ),
        page.row(shown),
        page.table(["solver", "path", "difference"], rows),
        page.paragraph(
            "The difference is the largest of any pixel to the rectified notation, on the digits' scale of 0 to 16. "
            f"Natural Euler (DDIM) takes the same step in every notation, so the samples agree to {worst:.0e} of 16: "
            "rounding. Heun integrates on each path's own clock: what it differs by is the error of 21 steps on a "
            "clock that suits the path more or less well, not of the conversion, and vanishes as the steps shrink."
        ),
    ]


def _quality(results: Mapping[str, Any]) -> list[str]:
    header = ["sampler", "NFE", "Fréchet distance", "recognised", "spread in class", "samples/s"]
    rows = [
        (
            r["sampler"],
            r["nfe"],
            f"{r['frechet']:.2f}",
            f"{r['recognised']:.1%}",
            f"{r['spread']:.2f}",
            f"{1000 / r['seconds']:.0f}",
        )
        for r in results["quality"]
    ]
    floor, quality = results["floor"], results["quality"]
    return [
        page.heading("Quality against network evaluations"),
        page.paragraph(
            "The same network by its ODE, on two solvers, and by its Langevin-corrected SDE, from 1 evaluation to 32. "
            "Distances are squared Fréchet distances on features of a small classifier trained on the spot, "
            "1,000 samples against all 1,797 real digits."
        ),
        page.row(
            [
                page.figure(page.svg(plots.frechet(quality, floor["mean"]), "Fréchet distance by NFE")),
                page.figure(page.svg(plots.spread(quality), "within-class variance by NFE")),
            ],
            "wide",
        ),
        page.paragraph(
            f"Reader: {results['classifier']}. Real to real, {floor['n']} digits a side of the same classes: "
            f"{floor['mean']:.2f} ± {floor['std']:.2f}. One evaluation can only give the mean of a class: every such "
            "digit is recognised, and nearly all variety is missing. So recognition alone is no measure of quality, "
            "and is shown beside the distance and the spread."
        ),
        page.figure(page.svg(plots.recognised(quality), "share recognised by NFE")),
        page.table(header, rows),
    ]


def _mixture(mixture: Mapping[str, Any]) -> list[str]:
    ode = plots.trajectories(mixture["ode"], mixture["data"], plots.BLUE, "The ODE's paths are smooth")
    rough = f"The SDE's (gamma {mixture['gamma']:g}) wander to the same law"
    sde = plots.trajectories(mixture["sde"], mixture["data"], plots.ORANGE, rough)
    return [
        page.heading("What the solvers do, where everything is known"),
        page.paragraph(
            "For a mixture of Gaussians the velocity is known in closed form, so nothing here is learned. The same "
            "noise goes to the data by the ODE and by the Langevin-corrected SDE: at every time both have the same "
            "distribution, along different paths."
        ),
        page.row(
            [page.figure(page.svg(ode, "paths of the ODE")), page.figure(page.svg(sde, "paths of the SDE"))], "wide"
        ),
        page.paragraph("Sixty starts, the same in both pictures; 150 steps each; five modes."),
    ]


def _gamma(results: Mapping[str, Any], samples: Mapping[str, Tensor]) -> list[str]:
    rows = results["gamma"]
    shown = [
        page.figure(_sheet(x, f"digits at gamma {gamma}", columns=5), f"gamma = {gamma}")
        for gamma, x in samples.items()
    ]
    return [
        page.heading("How much noise is too much"),
        page.paragraph(
            "dZ = velocity·dt + gamma·(Langevin step) keeps the right law for any gamma if the velocity is exact. A "
            "learned velocity is not: near the data the score that follows from it is over-estimated, and a large "
            "gamma pulls samples towards the middle of their class. The within-class variance, as a ratio to that of "
            f"the real digits, shows it; all at {rows[0]['nfe']} NFE, so that gamma 0 (the ODE) is the yardstick."
        ),
        page.row(
            [
                page.figure(page.svg(plots.gamma_spread(rows), "within-class variance by gamma")),
                page.figure(page.svg(plots.gamma_frechet(rows), "Fréchet distance by gamma")),
            ],
            "wide",
        ),
        page.paragraph("600 samples at each gamma, 20 of them below."),
        page.row(shown),
    ]


def _next() -> list[str]:
    return [
        page.heading("What to try next"),
        page.code(
            "fluvial sample quickstart/run -n 60 --solver heun --steps 10 --out mine.png\n"
            "fluvial sample quickstart/run -n 60 --label 3 --guidance 2.0 --solver langevin --gamma 0.5 --steps 50\n"
            "fluvial convert quickstart/run --path vp --prediction noise --out quickstart/run-vp\n"
            "fluvial train moons --out runs/moons"
        ),
        page.code(
            "import fluvial as fl\n\n"
            'model = fl.load("quickstart/run")\n'
            'vp = fl.convert(model, path=fl.paths.VP(), prediction="noise")\n'
            'x = fl.sample(vp, 16, solver="ddim", steps=20, seed=0)'
        ),
    ]
