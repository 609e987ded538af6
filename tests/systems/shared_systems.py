"""The same small runs of all systems' parts in as many processes as it was launched on; see `test_system_processes`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fluvial as fl
from fluvial import systems, training

QUICK = {"batch_size": 8, "precision": "fp32", "log_every": 1, "sheet_every": None, "progress": False, "warmup": 0}
RUNS = ("autoencoder", "judged", "latent/model", "upper", "prior", "decoder", "autoregressive")


def rows() -> dict:
    data = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"data": data, "label": torch.arange(24) % 3}


def small_clip() -> systems.CLIP:
    captioned = {"data": rows()["data"], "caption": ["a one", "a two", "the three"] * 8}
    return systems.train_clip(captioned, steps=1, dim=8, width=32, layers=1, batch_size=8, progress=False)


def runs(folder: Path) -> None:
    torch.set_num_threads(1)
    size = {"factor": 2, "width": 8, "latent_channels": 2}
    made = systems.train_autoencoder(rows(), folder / "autoencoder", 4, **size, **QUICK)
    systems.train_autoencoder(rows(), folder / "judged", 4, adversarial=0.1, adversarial_start=2, **size, **QUICK)
    z, inside = systems.begin_latent_run(made, rows(), folder / "latent", shard_size=6, batch_size=3, progress=False)
    fl.train(training.model_for(z, width=8), z, steps=4, out=inside, **QUICK)
    stage = systems.StageSource(rows(), 8, low=4)
    fl.train(systems.stage_model(stage, width=8), stage, steps=4, out=folder / "upper", **QUICK)
    captioned = systems.open_captioned({"data": rows()["data"], "caption": ["a one", "a two", "the three"] * 8})
    data = systems.embedded(captioned, small_clip())
    # What is left out is drawn in each process: not the same numbers in another number of them.
    systems.train_prior(data, folder / "prior", 4, width=8, depth=1, drop=0.0, **QUICK)
    systems.train_decoder(data, folder / "decoder", 4, width=8, drop={"embedding": 0.0}, **QUICK)
    plain = {"width": 8, "depth": 1, "drop": 0.0, "dropout": 0.0, **QUICK}
    systems.train_autoregressive_prior(data, folder / "autoregressive", 4, **plain)
    if training.is_main_process():
        print("done")


if __name__ == "__main__":
    runs(Path(sys.argv[1]))
