"""Whether bf16 training costs quality: the final Frechet distance on digits in bf16 and in fp32, over several seeds.

Same network, steps and seeds; only the autocast differs. Samples: natural Euler, 20 NFE, averaged weights, against all
1,797 digits on features of one classifier. Usage: python benchmarks/precision.py [--steps 300] [--seeds 3]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import fluvial as fl
from fluvial import measure
from fluvial.measure.classifier import train_classifier

COUNT = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = fl.training.open_source("digits")
    rows = source.batch(torch.arange(len(source)))
    classifier = train_classifier(rows["data"], rows["label"], seed=0)
    real, labels = classifier.features(rows["data"]), torch.arange(COUNT) % 10
    print(f"features: {classifier.description}; {COUNT} samples, {arguments.steps} steps")
    found: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for seed in range(arguments.seeds):
        for precision, distances in found.items():
            began = time.perf_counter()
            model = fl.training.model_for(source, seed=seed)
            options = {"precision": precision, "progress": False, "sheet_every": None}
            run = fl.train(model, source, steps=arguments.steps, seed=seed, **options)
            seconds = time.perf_counter() - began
            x = fl.sample(run.ema, COUNT, solver="ddim", steps=20, seed=1, cond={"label": labels})
            distances.append(measure.frechet(classifier.features(x.clamp(0, 16)), real))
            print(f"seed {seed} {precision}: Frechet distance {distances[-1]:.4f}, {seconds:.0f} s", flush=True)
    for precision, distances in found.items():
        spread = statistics.stdev(distances) if len(distances) > 1 else float("nan")
        print(f"{precision}: {statistics.mean(distances):.4f} ± {spread:.4f} over {len(distances)} seeds")


if __name__ == "__main__":
    main()
