"""What a training step costs: `fl.train` against the fast hand-written loop, in one run.

Same network, batch, data on hand, AdamW (fused), gradient clipping, EMA, precision and memory format; the hand-written
loop has nothing else. Rounds are interleaved, and the ratio is taken round by round, so that a machine that changes
speed changes it for both. Usage: python benchmarks/training_step.py [--size 8|28] [--rounds 5] [--precision fp32|bf16]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

import fluvial as fl

BATCH = 128


def by_hand(network: torch.nn.Module, data: torch.Tensor, label: torch.Tensor, steps: int, precision: str) -> float:
    """Seconds for `steps` steps of the shortest fast loop that trains the same thing."""
    network = network.to(memory_format=torch.channels_last).train()
    parameters = list(network.parameters())
    averaged = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    began = time.perf_counter()
    for _ in range(steps):
        rows = torch.randint(len(data), (BATCH,))
        clean = data[rows].contiguous(memory_format=torch.channels_last)
        noise, t = torch.randn_like(clean), torch.rand(BATCH)
        mixed = t.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = network(torch.lerp(noise, clean, mixed), 1000 * (1 - t), label=label[rows])
            loss = (out - (clean - noise)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 0.001)
    return time.perf_counter() - began


def ours(model: fl.Model, source: fl.training.Source, steps: int, precision: str) -> float:
    """Seconds for the same number of steps of `fl.train`, by its own count of the time spent training."""
    options = {"log_every": steps, "sheet_every": None, "progress": False, "precision": precision}
    run = fl.train(model, source, steps=steps, batch_size=BATCH, **options)
    return steps * BATCH / run.metrics[-1]["samples_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8, choices=(8, 28))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = torch.rand(2000, 1, arguments.size, arguments.size)
    labels = torch.arange(2000) % 10
    source = fl.training.open_source({"data": images, "label": labels})
    fresh = fl.training.model_for(source)
    data, ratios, times = source.normalisation.apply(images), [], []
    for _ in range(arguments.rounds):
        hand = by_hand(copy.deepcopy(fresh.network), data, labels, arguments.steps, arguments.precision)
        model = fresh.with_network(copy.deepcopy(fresh.network))
        mine = ours(model, source, arguments.steps, arguments.precision)
        ratios.append(hand / mine)
        times.append((hand, mine))
        rate = arguments.steps * BATCH
        print(f"by hand {rate / hand:7.0f} samples/s   fl.train {rate / mine:7.0f} samples/s   ratio {hand / mine:.3f}")
    fastest = min(hand for hand, _ in times) / min(mine for _, mine in times)
    print(
        f"{arguments.size}x{arguments.size}, batch {BATCH}, {arguments.precision}, channels last: median ratio "
        f"{statistics.median(ratios):.3f}, of the fastest rounds {fastest:.3f} "
        "(claim: at least 0.95)"
    )


if __name__ == "__main__":
    main()
