"""A captured run: what is recorded reads fixed memory, and every replay gives what `sample` gives.

Without a CUDA device the recording is replaced by one that runs the same function again on the same memory; on one, the
real graph is held to the same.
"""

from __future__ import annotations

import pytest
import torch

import fluvial as fl
from fluvial import captured
from fluvial.errors import OptionError, ShapeError
from fluvial.model import Model, Normalisation
from problems import Net, normal, one_line

CUDA = torch.cuda.is_available()


class Labelled(torch.nn.Module):
    """A small network with a label."""

    def __init__(self):
        super().__init__()
        self.inner = Net()

    def forward(self, x, t, label):
        return self.inner(x, t) + 0.1 * label[:, None]


@pytest.fixture
def device(monkeypatch):
    if not CUDA:

        def again(run, device):
            found = {"end": run()}
            return lambda: found.update(end=run()), lambda: found["end"]

        monkeypatch.setattr(captured, "_recorded", again)
    return torch.device("cuda" if CUDA else "cpu")


def labelled(device):
    return Model(Labelled().to(device), "rectified", null={"label": 3}, normalisation=Normalisation((1.0,), (2.0,)))


@pytest.mark.parametrize("solver", ["euler", "heun", "vabm", "unipc", "ddpm", "seeds", "churn"])
@pytest.mark.parametrize("guidance", [None, fl.guidance.CFG(2.0)], ids=["plain", "guided"])
def test_every_replay_is_a_run(device, solver, guidance):
    model = labelled(device)
    given = {"solver": solver, "steps": 5, "guidance": guidance}
    label = torch.arange(4, device=device) % 3
    run = captured.Captured(model, (4, 2), cond={"label": label}, **given)
    for seed, labels in [(0, label), (7, label), (7, label.flip(0))]:
        expected = fl.sample(model, (4, 2), seed=seed, cond={"label": labels}, **given)
        torch.testing.assert_close(run(seed=seed, label=labels), expected, rtol=1e-5, atol=1e-5)
    noise = normal(4, 2, seed=5, dtype=torch.float32).to(device)
    expected = fl.sample(model, noise, seed=2, first=3, cond={"label": label}, **given)
    torch.testing.assert_close(run(noise, seed=2, first=3, label=label), expected, rtol=1e-5, atol=1e-5)


def test_results_are_not_overwritten_and_weights_may_change(device):
    model = labelled(device)
    label = torch.zeros(4, dtype=torch.long, device=device)
    run = captured.Captured(model, (4, 2), solver="euler", times=[0.0, 0.5, 0.9], cond={"label": label})
    first = run(seed=1, label=label)
    kept = first.clone()
    run(seed=2, label=label)
    assert torch.equal(first, kept)
    with torch.no_grad():
        next(model.network.parameters()).mul_(1.5)
    changed = run(seed=1, label=label)
    expected = fl.sample(model, (4, 2), solver="euler", times=[0.0, 0.5, 0.9], seed=1, cond={"label": label})
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(changed, kept)


def test_what_does_not_fit_is_said(device):
    model = labelled(device)
    label = torch.zeros(4, dtype=torch.long, device=device)
    run = captured.Captured(model, (4, 2), steps=3, cond={"label": label})
    with pytest.raises(ShapeError, match=r"start has shape \(5, 2\); expected \(4, 2\)") as caught:
        run(torch.zeros(5, 2, device=device), label=label)
    one_line(caught.value)
    with pytest.raises(ShapeError, match=r"conditions are \[\]; expected \['label'\]"):
        run()
    with pytest.raises(OptionError, match="dopri5 chooses its steps"):
        captured.Captured(model, (4, 2), solver="dopri5", cond={"label": label})


@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so():
    with pytest.raises(OptionError, match=r"model is on cpu; a CUDA graph needs a CUDA device") as caught:
        captured.Captured(Model(Net(), "rectified"), (4, 2), steps=3)
    one_line(caught.value)
