"""A trained network's samples per network call: the Frechet distance to real images, ours and the peers'.

The network is a rectified flow from a run folder, trained by `fluvial train FILE.npz`, asked through the same counted
call by every library, from the same start noises, each class as often. For each sampler and budget: the squared Frechet
distance on the features of a classifier trained here on the same data (with the distance of real to real as the
floor), and the root mean square distance to the model's own ODE solution, which does not depend on how well it was
trained.

Usage: python benchmarks/frechet_per_nfe.py RUN DATA.npz [--samples 512] [--nfe 4,6,8,10,16] [--threads 2]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import peers
import torch
from torch import Tensor

import fluvial as fl
from fluvial import measure, training
from problems import FLOW_START, level_grids

# Of the peers' samplers those that do well on exactly known flows (accuracy_per_nfe), and what their pipelines ship.
PEERS = {
    "diffusers flow euler": "uniform",
    "diffusers flow heun": "uniform",
    "diffusers dpmsolver++ 2": "uniform",
    "diffusers unipc 2 bh2": "uniform",
    "k-diffusion dpmpp_2m": "karras/0.02",
    "azula vAB2 to 0": "uniform",
    "azula vAB3 to 0": "uniform",
    "flow_matching midpoint to 1": "uniform",
    "flow_matching heun3 to 1": "uniform",
}


class Images:
    """A trained rectified flow in the part of `problems.Problem`: what the peers' adapters ask of one."""

    family = "flow"
    start = FLOW_START

    def __init__(self, model: fl.Model, noise: Tensor, cond: dict[str, Tensor]) -> None:
        self.inner, self.noise, self.cond, self.calls = model, noise, cond, 0
        self.path, self.network = model.path, self

    def pair(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """Data and noise at x = alpha data + sigma noise, by one call on the rectified path."""
        self.calls += 1
        y, t = x / (alpha + sigma), alpha / (alpha + sigma)
        with torch.no_grad():
            velocity = self.inner(y.float(), t, **self.cond).velocity.to(x.dtype)
        return y + (1.0 - t) * velocity, y - t * velocity

    def coefficients(self, level: float) -> tuple[float, float]:
        return 1.0 / (1.0 + level), level / (1.0 + level)

    def time(self, level: float) -> float:
        return 0.0 if level >= self.start else 1.0 / (1.0 + level)


def theirs(problem: Images, nfe: int) -> dict[str, Callable[[], Tensor] | None]:
    """What each peer can run in this budget."""
    grids, runs = level_grids("flow"), {}
    for method in peers.methods("flow"):
        name = f"{method.library} {method.label}"
        if name in PEERS:
            n = method.levels(nfe)
            levels = grids[PEERS[name]](problem, n) if n > 0 else None
            runs[name] = None if levels is None else (lambda m=method, l=levels: m.run(problem, l))
    return runs


def ours(problem: Images, nfe: int) -> dict[str, Callable[[], Tensor]]:
    solver, grid = fl.solvers.recommended(nfe)
    model, given = problem.inner, {"cond": problem.cond, "times": grid}

    def run(solver: Any, steps: int) -> Callable[[], Tensor]:
        def counted() -> Tensor:
            trajectory = fl.sample(model, problem.noise, solver=solver, steps=steps, record=True, **given)
            problem.calls += trajectory.nfe
            return trajectory.x[-1]

        return counted

    heun = {"fluvial heun": run("heun", (nfe + 1) // 2)}
    return {"fluvial recommended": run(solver, nfe), "fluvial vab": run("vab", nfe), **heun}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--nfe", default="4,6,8,10,16")
    parser.add_argument("--real", type=int, default=10_000, help="images for the classifier and the distance")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.data is None:
        print("needs a run folder and the file it was trained on: frechet_per_nfe.py RUN DATA.npz")
        return
    torch.set_num_threads(arguments.threads)
    source = training.open_source(arguments.data)
    batch = source.batch(torch.arange(arguments.real))
    real, labels = batch["data"], batch["label"]
    with torch.enable_grad():
        classifier = measure.train_classifier(real, labels, epochs=5)
    real_features, n = classifier.features(real), arguments.samples
    model = training.load(arguments.run)
    cond = {"label": torch.arange(n) % 10}
    noise = fl.random.normal(n, model.shape or (), seed=0)
    problem = Images(model, noise, cond)
    truth = fl.sample(model, noise, solver="vabm", steps=64, times="flow", cond=cond, record=True).x[-1]
    floor = measure.real_floor(measure.frechet, real_features, n)
    print(f"{classifier.description}; {n} samples, {len(real)} real images; real to real {floor}")

    def distance(x: Tensor) -> float:
        return measure.frechet(classifier.features(model.normalisation.invert(x)), real_features)

    print(f"the model's ODE solution, by 64 calls: {distance(truth):.4g}")
    for nfe in map(int, arguments.nfe.split(",")):
        print(f"\nNFE {nfe}: squared Frechet distance, distance to the ODE solution, calls")
        for name, run in {**ours(problem, nfe), **theirs(problem, nfe)}.items():
            problem.calls = 0
            x = None if run is None else run().float()
            if x is None or problem.calls > nfe or not bool(x.isfinite().all()):
                print(f"  {name:<30} -")
                continue
            print(f"  {name:<30} {distance(x):8.4f} {rms(x - truth):8.4f} {problem.calls:4d}", flush=True)


if __name__ == "__main__":
    main()
