"""On a device other than the processor nothing is left behind on it, and the numbers are the same."""

from __future__ import annotations

import contextlib

import numpy
import pytest
import torch

import fluvial as fl
from elsewhere import DEVICE, There, elsewhere
from fluvial import distill, guidance, likelihood, measure, random, sampling, solvers, straighten, systems, training
from fluvial.objectives import Objective
from fluvial.show import diagnose, evaluate
from fluvial.training import batch, opening, precision
from problems import command

LABELS = {"label": torch.arange(4)}
SOURCE = {
    "data": 16 * torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    "label": torch.arange(24) % 5,
}
POINTS = {"data": torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), "label": torch.arange(24) % 5}
QUICK = {"progress": False, "batch_size": 8, "precision": "fp32", "log_every": 1}


def small(source=SOURCE):
    made = training.model_for(source, width=8)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return made


def both(model, call):
    """What the call gives on the processor and on the second device."""
    here = call(model.to("cpu"))
    with elsewhere():
        there = call(model.to(DEVICE))
        assert there.device == DEVICE
        model.to("cpu")
        return here, there.cpu()


def test_the_second_device_is_one():
    with elsewhere():
        x = torch.ones(3).to(DEVICE)
        assert isinstance(x * 2.0, There)
        assert (torch.tensor([1.0, 2.0, 3.0], device=DEVICE) * torch.tensor(2.0)).cpu().tolist() == [2.0, 4.0, 6.0]
        assert x[torch.tensor([0, 2])].cpu().tolist() == [1.0, 1.0]
        for mixed in (
            lambda: x + torch.ones(3),
            lambda: torch.ones(3)[x.long()],
            lambda: torch.cat([x, torch.ones(1)]),
        ):
            with pytest.raises(RuntimeError, match="tensors of two devices"):
                mixed()
        with pytest.raises(TypeError, match="cpu"):
            x.numpy()


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_noise_is_the_same_to_the_bit(shape):
    here = random.normal(range(2, 9), shape, 7, draw=3)
    with elsewhere():
        there = random.normal(range(2, 9), shape, 7, draw=3, device=DEVICE)
        moved = random.uniform(torch.arange(2, 9).to(DEVICE), shape, 7, device=DEVICE)
        assert there.device == DEVICE
        assert there.cpu().equal(here)
        assert moved.cpu().equal(random.uniform(range(2, 9), shape, 7))


@pytest.mark.parametrize("solver", solvers.names())
def test_every_solver_samples_there(solver):
    model = small(POINTS)
    for how in ({}, {"guidance": guidance.CFG(2.0)}):
        here, there = both(
            model, lambda m, how=how: fl.sample(m, 4, solver=solver, steps=3, seed=0, cond=LABELS, **how)
        )
        torch.testing.assert_close(there, here, rtol=0, atol=2e-3)


@pytest.mark.parametrize("path", ["vp", "subvp", "ve", "edm", "cosine"])
def test_other_notations_guidance_and_the_ways_back(path):
    model = small(POINTS)
    seen, x = fl.convert(model, path=path), POINTS["data"][:4]
    for call in (
        lambda m: fl.sample(seen, 4, steps=3, seed=0, cond=LABELS),
        lambda m: fl.sample(seen, 4, steps=3, seed=0, cond=LABELS, guidance=guidance.CFGZero(2.0)),
        lambda m: fl.sample(seen, 4, steps=3, seed=0, cond=LABELS, guidance=guidance.APG(2.0)),
        lambda m: fl.sample(m, init=x, strength=0.5, steps=4, seed=0, cond=LABELS),
        lambda m: fl.sample(m, 4, noise="brownian", solver="ddpm", steps=3, seed=0, cond=LABELS),
        lambda m: fl.sample(m, 4, nfe=6, seed=0, cond=LABELS, record=True).samples,
        lambda m: sampling.round_trip(m, x.to(m.device), steps=3, cond=LABELS).data,
        lambda m: (
            likelihood.log_likelihood(m, x.to(m.device), cond=LABELS, steps=2, divergence="hutchinson", seed=0).log_prob
        ),
    ):
        here, there = both(model, call)
        torch.testing.assert_close(there, here, rtol=1e-3, atol=2e-3)


def test_measures():
    a, b = (torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for name in ("frechet", "mmd", "sliced_wasserstein", "energy_distance"):
        distance = getattr(measure, name)
        with elsewhere():
            assert distance(a.to(DEVICE), b.to(DEVICE)) == pytest.approx(distance(a, b), rel=1e-5, abs=1e-6)


# Training, with the accelerator that Accelerate would find there.


class Accelerator:
    device, is_main_process, num_processes, process_index = DEVICE, True, 1, 0

    @contextlib.contextmanager
    def main_process_first(self):
        yield

    def prepare(self, *parts):
        return parts

    def backward(self, loss):
        loss.backward()

    def reduce(self, x, how):
        return x

    def wait_for_everyone(self):
        pass


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setattr(opening, "accelerator", Accelerator)
    monkeypatch.setattr(batch, "seed_torch", lambda seed, step, *rest: torch.manual_seed(1000 * seed + step))
    monkeypatch.setattr(precision, "autocast", lambda *given: contextlib.nullcontext())


def trained(run):
    return torch.cat([parameter.detach().cpu().flatten() for parameter in getattr(run, "ema", run).parameters()])


TRAININGS = {
    "rectified": lambda m, **how: fl.train(m, SOURCE, steps=3, **how),
    "ot": lambda m, **how: fl.train(m, SOURCE, Objective(coupling="ot"), steps=3, **how),
    "min_snr": lambda m, **how: fl.train(m, SOURCE, Objective(weight="min_snr", times="logit_normal"), steps=3, **how),
    "consistency": lambda m, **how: distill.consistency(m, SOURCE, 3, **how),
    "guided": lambda m, **how: distill.consistency(m, SOURCE, 3, guidance=(1.0, 3.0), **how),
    "shortcut": lambda m, **how: distill.shortcut(m, SOURCE, 3, **how),
    "improved": lambda m, **how: distill.METHODS["improved"](m, SOURCE, 3, **how),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_training_there_makes_the_same_weights(launched, monkeypatch, tmp_path, name):
    """In three steps, with a sheet at the end; and goes on from its folder."""
    monkeypatch.setattr(Accelerator, "device", torch.device("cpu"))
    here = trained(TRAININGS[name](small(), sheet_every=None, **QUICK))
    monkeypatch.setattr(Accelerator, "device", DEVICE)
    with elsewhere():
        there = trained(TRAININGS[name](small(), sheet_every=3, out=tmp_path / "run", **QUICK))
        again = trained(TRAININGS[name](small(), sheet_every=3, out=tmp_path / "run", **QUICK))
    torch.testing.assert_close(there, here, rtol=0, atol=1e-4)
    assert again.equal(there)
    assert [*(tmp_path / "run").rglob("*.png")]


def test_reflow_there(launched):
    pairs = training.make_pairs(small(), 16, steps=2, progress=False)
    with elsewhere():
        assert trained(straighten.reflow(small(), pairs, 2, sheet_every=None, **QUICK)).isfinite().all()


def test_commands_sample_there(monkeypatch, tmp_path):
    """With the same samples as on the processor; and so do systems."""
    run = fl.train(small(), SOURCE, steps=1, out=tmp_path / "run", sheet_every=None, **QUICK)
    assert run.step == 1
    sample = ["sample", tmp_path / "run", "-n", 4, "--steps", 2, "--npz"]
    assert command(*sample, tmp_path / "here.npz", "--out", tmp_path / "here.png") == 0
    autoencoder = systems.train_autoencoder(SOURCE, None, 1, factor=2, width=8, sheet_every=None, **QUICK)
    z, inside = systems.begin_latent_run(autoencoder, SOURCE, tmp_path / "latent", progress=False)
    fl.train(training.model_for(z, width=8), z, steps=1, out=inside, sheet_every=None, **QUICK)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: DEVICE)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with elsewhere():
        assert command(*sample, tmp_path / "there.npz", "--out", tmp_path / "there.png") == 0
        assert command("sample", tmp_path / "latent", "-n", 4, "--steps", 1, "--out", tmp_path / "latent.png") == 0
    here, there = (numpy.load(tmp_path / name)["samples"] for name in ("here.npz", "there.npz"))
    numpy.testing.assert_allclose(there, here, rtol=0, atol=2e-3)
    assert (tmp_path / "latent-latent.png").is_file()


def test_evaluations_and_diagnoses_there():
    """Figures of samples that were drawn there are those of samples from here."""
    source, model = training.open_source(POINTS), small(POINTS)
    here = evaluate.evaluate({"a": model}, source, steps=(2,), n=8, seeds=1).entries[0]
    straight = diagnose.diagnose(model, source, n=8, steps=3, seeds=2)
    with elsewhere():
        model.to(DEVICE)
        there = evaluate.evaluate({"a": model}, source, steps=(2,), n=8, seeds=1).entries[0]
        again = diagnose.diagnose(model, source, n=8, steps=3, seeds=2)
    for name, figure in here.figures.items():
        assert there.figures[name].mean == pytest.approx(figure.mean, rel=1e-3, abs=1e-4)
    assert again.straightness.mean == pytest.approx(straight.straightness.mean, rel=1e-3)
