"""What pairs cost beside the network: `make_pairs` into a folder against the network's bare forward calls, in one run.

The bare loop makes as many forward calls, of the same network on a batch of the same size, and nothing else: no noise,
no solver, no file. The two alternate, and the ratio is taken round by round, so that a machine that changes speed
changes it for both; the whole call of `make_pairs` counts, with beginning and ending. Fewer steps are the harder case.
On a busy machine, take the ratio of processor time (with one thread; more of them count while they wait).
Usage: python benchmarks/pairs_rate.py [--sizes 8,28] [--rounds 5] [--batches 3] [--batch-size 256] [--steps 18]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import fluvial as fl


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


Seconds = tuple[float, float]  # by the clock, and of the processor


def seconds(since: Seconds = (0.0, 0.0)) -> Seconds:
    return time.perf_counter() - since[0], time.process_time() - since[1]


@torch.no_grad()
def bare(model: fl.Model, size: int, calls: int) -> Seconds:
    """The time of so many forward calls on a batch of this size."""
    assert model.shape is not None
    device = model.device
    x, t = torch.randn(size, *model.shape, device=device), torch.full((size,), 500.0, device=device)
    label = torch.arange(size, device=device) % 10
    wait(device)
    began = seconds()
    for _ in range(calls):
        model.network(x, t, label=label)
    wait(device)
    return seconds(began)


def pairs(model: fl.Model, n: int, batch_size: int, steps: int) -> Seconds:
    """The time of `make_pairs` for n pairs, on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        began = seconds()
        fl.training.make_pairs(
            model, n, steps=steps, batch_size=batch_size, out=Path(folder) / "pairs", states=[0.5], progress=False
        )
        return seconds(began)


def reading(model: fl.Model, n: int) -> float:
    """Milliseconds to read 128 random pairs of n, with their noise drawn again."""
    with tempfile.TemporaryDirectory() as folder:
        instant = model.with_network(lambda x, t, label: x)
        made = fl.training.make_pairs(instant, n, steps=1, out=Path(folder) / "pairs", progress=False)
        times = []
        for _ in range(50):
            indices = torch.randint(n, (128,))
            began = time.perf_counter()
            made.batch(indices)
            times.append(time.perf_counter() - began)
        return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="8,28")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=18, help="of heun")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    for size in (int(text) for text in given.sizes.split(",")):
        source = fl.training.open_source({"data": torch.rand(100, 1, size, size), "label": torch.arange(100) % 10})
        model = fl.training.model_for(source).to(device)
        model.network.eval()
        # A state at a half costs a step more where the steps do not meet it.
        calls = fl.sampling.nfe(model, "heun", times=sorted({k / given.steps for k in range(given.steps + 1)} | {0.5}))
        n, ratios = given.batches * given.batch_size, []
        bare(model, given.batch_size, 3)
        pairs(model, given.batch_size, given.batch_size, 1)
        for _ in range(given.rounds):
            theirs = bare(model, given.batch_size, calls * given.batches)
            ours = pairs(model, n, given.batch_size, given.steps)
            ratios.append([a / b for a, b in zip(theirs, ours)])
            print(
                f"bare network {n / theirs[0]:8.1f} pairs/s   make_pairs {n / ours[0]:8.1f} pairs/s   "
                f"ratio {ratios[-1][0]:.3f}, of processor time {ratios[-1][1]:.3f}"
            )
        name = (
            torch.cuda.get_device_name() if device is not None and device.type == "cuda" else f"{given.threads} threads"
        )
        wall, processor = (statistics.median(column) for column in zip(*ratios))
        print(
            f"{size}x{size}, batch {given.batch_size}, {calls} NFE, {name}: median ratio {wall:.3f}, of processor time "
            f"{processor:.3f} (claim: at least 0.95)"
        )
        count = 50_000 if size <= 8 else 20_000
        print(f"reading 128 random pairs of {count:,} takes {reading(model, count):.2f} ms, their noise drawn anew")


if __name__ == "__main__":
    main()
