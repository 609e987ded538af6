"""Reflow where everything is known: an exact mixture of six Gaussians in the plane, straightened twice.

    python recipes/straight_mixture.py          about two minutes on one CPU core

Prints, for the exact teacher and after each round: straightness S, three convex transport costs of the same noises, the
sliced Wasserstein distance of many-step samples to exact ones, and the energy distance of one Euler step's samples,
with the floors of both (two exact sets of the same size).
"""

from __future__ import annotations

import torch

import fluvial as fl
from fluvial import measure, networks, straighten

N, PAIRS, STEPS = 10_000, 50_000, 1500
COSTS = {"squared": "squared", "absolute": "absolute", "|d|^1.5": lambda d: d.abs() ** 1.5}


def told(name: str, model: fl.Model, exact: torch.Tensor) -> None:
    """A row of figures."""
    noise = fl.random.normal(N, (2,), seed=500)
    many = fl.sample(model, noise, solver="heun", steps=32)
    one = fl.sample(model, noise, solver="euler", steps=1)
    straightness = measure.straightness(model, 2000, seed=9).total
    costs = "  ".join(f"{measure.transport_cost((noise, many), c):.4f}" for c in COSTS.values())
    marginal, single = measure.sliced_wasserstein(many, exact), measure.energy_distance(one, exact)
    print(f"{name:10s} {straightness:9.5f}   {costs}   {marginal:.4f}   {single:.5f}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    angle = torch.arange(6) * torch.pi / 3
    means = 2.0 * torch.stack([angle.cos(), angle.sin()], 1)
    mixture = fl.exact.GaussianMixture(means, torch.full((6,), 0.25), torch.ones(6))
    exact, other = (mixture.sample(N, seed=seed) for seed in (77, 78))
    spread = float(torch.cdist(exact[:2000], other[:2000]).mean())
    print(f"{'':10s} {'S':>9s}   {'  '.join(COSTS)}   sliced W   energy, one step   (n = {N})")
    floors = measure.sliced_wasserstein(exact, other), measure.energy_distance(exact, other)
    print(f"floor: sliced Wasserstein {floors[0]:.4f}, energy {floors[1]:.5f}; mean distance of the data {spread:.3f}")
    model: fl.Model = mixture.model(fl.paths.Rectified())
    told("exact", model, exact)
    torch.manual_seed(0)
    student = fl.Model(networks.mlp(2, width=128), "rectified", shape=(2,))
    for k in (1, 2):
        pairs = straighten.make_pairs(model, PAIRS, steps=32, seed=k, cond={}, batch_size=8192, progress=False)
        model = straighten.reflow(
            model, pairs, STEPS, student=student, batch_size=1024, lr=1e-3, precision="fp32", progress=False
        )
        student = model
        told(f"round {k}", model, exact)


if __name__ == "__main__":
    main()
