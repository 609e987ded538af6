"""Data to noise and back: the ODE run backwards, and its landing inverted."""

from __future__ import annotations

import pytest
import torch

from fluvial import encode, paths, sample
from fluvial.errors import OptionError
from fluvial.exact import GaussianMixture
from fluvial.model import Model, Normalisation

MIXTURE = GaussianMixture(torch.tensor([[2.0, 0.0], [-1.0, 1.0]]), torch.tensor([0.5, 0.4]), torch.tensor([1.0, 2.0]))
PATHS = {
    "rectified": paths.Rectified(),
    "cosine": paths.Cosine(),
    "vp": paths.VP(),
    "ve": paths.VE(),
    "edm": paths.EDM(),
}


def round_trip(path: paths.Path, solver: str, steps: int) -> float:
    """The median error of data -> noise -> data."""
    model, data = MIXTURE.model(path), MIXTURE.sample(300, seed=1, dtype=torch.float64)
    noise = encode(model, data, solver=solver, steps=steps)
    return (sample(model, noise, solver=solver, steps=steps) - data).abs().median().item()


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize(("solver", "fall"), [("ddim", 1.6), ("heun", 3.2)])
def test_round_trip_error_falls_with_the_steps(path, solver, fall):
    """By the solver's order or faster: the errors of the two ways partly cancel."""
    coarse, fine = round_trip(path, solver, 40), round_trip(path, solver, 80)
    assert fine < coarse / fall
    assert fine < (0.08 if solver == "ddim" else 5e-4)


def test_noise_of_a_gaussian_is_known():
    """For data Normal(m, s²) the ODE is linear: noise = (data - m)/s, up to its discretisation."""
    mixture = GaussianMixture(torch.tensor([[3.0]]), torch.tensor([0.5]), torch.ones(1))
    data = mixture.sample(50, seed=0, dtype=torch.float64)
    noise = encode(mixture.model(paths.Rectified()), data, steps=400)
    torch.testing.assert_close(noise, (data - 3.0) / 0.5, rtol=1e-3, atol=1e-3)


def test_data_come_in_their_own_units():
    model = Model(lambda x, t: torch.zeros_like(x), "rectified", normalisation=Normalisation((5.0,), (2.0,)))
    # A velocity of zero everywhere: noise = data = x, in path units.
    torch.testing.assert_close(encode(model, torch.tensor([[7.0], [5.0]]), steps=20), torch.tensor([[1.0], [0.0]]))


def test_no_call_at_the_data_itself():
    seen = []

    def network(x, t):
        seen.extend(t.tolist())
        return torch.zeros_like(x)

    encode(Model(network, "vp", "noise"), torch.zeros(2, 3), steps=4)
    assert max(seen) == 0.75


def test_refusals():
    model = MIXTURE.model(paths.Rectified())
    with pytest.raises(OptionError, match="stochastic"):
        encode(model, torch.zeros(1, 2), solver="euler_maruyama")
    with pytest.raises(OptionError, match="expected an end at 1"):
        encode(model, torch.zeros(1, 2), times=[0.0, 0.5])
    with pytest.raises(OptionError, match="expected 2"):
        encode(model, torch.zeros(1, 2), steps=1)


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_few_steps_are_finite_and_tell_data_apart(path, steps):
    data = MIXTURE.sample(50, seed=1, dtype=torch.float64)
    noise = encode(MIXTURE.model(path), data, solver="ddim", steps=steps)
    assert bool(noise.isfinite().all())
    assert len(noise.unique(dim=0)) == 50
