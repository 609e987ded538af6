"""Langevin dynamics on a known score: the law, its bias, and noise that is each sample's own."""

from __future__ import annotations

import math

import pytest
import torch

from fluvial.errors import OptionError
from fluvial.mcmc import langevin
from problems import log_density, mixture, normal


def narrow(x):
    return -x / 0.25


@pytest.mark.parametrize("step_size", [0.1, 0.05, 0.025])
def test_variance_has_the_bias_of_its_step_and_no_other(step_size):
    """V/(1 - step_size/2V), which tends to V = 0.25."""
    n = 20_000
    x = langevin(narrow, torch.zeros(n, 1), step_size, round(2.0 / step_size), seed=0).double()
    assert float(x.var()) == pytest.approx(0.25 / (1 - step_size / 0.5), rel=5 * math.sqrt(2 / n))
    assert abs(float(x.mean())) < 4 * 0.5 / math.sqrt(n)


def test_mixture_is_reached_from_its_neighbourhood():
    """Every mode with the spread it has; how often each is visited would take far longer."""
    gm = mixture()

    def score(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(log_density(gm, x, 1.0, 0.0).sum(), x)[0]

    start = gm.means.repeat_interleave(1000, 0)
    x = langevin(score, start, 2e-3, 150, seed=1)
    for k in range(3):
        # By the median, which the few that have crossed to another mode do not move: 2 log 2 in units of std².
        median = float((x[1000 * k : 1000 * k + 1000] - gm.means[k]).square().sum(1).median())
        assert math.sqrt(median / (2 * math.log(2))) == pytest.approx(float(gm.stds[k]), rel=0.07)


def test_noise_is_each_samples_own():
    start = normal(64, 2, dtype=torch.float32)
    whole = langevin(narrow, start, 0.05, 7, seed=3)
    assert whole.dtype == torch.float32
    for first, count in ((0, 1), (20, 7)):
        part = langevin(narrow, start[first : first + count], 0.05, 7, seed=3, first=first)
        assert torch.equal(part, whole[first : first + count])
    assert not (langevin(narrow, start, 0.05, 7, seed=4) == whole).any()
    assert torch.equal(langevin(narrow, start, 0.05, 0, seed=3), start)


def test_without_a_seed_torch_decides():
    start = normal(4, 2)
    torch.manual_seed(0)
    one = langevin(narrow, start, 0.05, 3)
    torch.manual_seed(0)
    assert torch.equal(langevin(narrow, start, 0.05, 3), one)
    assert not torch.equal(langevin(narrow, start, 0.05, 3), one)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"step_size": math.inf}, "step_size is inf"),
        ({"steps": -1}, "steps is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"first": -1}, "first is -1"),
    ],
)
def test_bad_values_are_named(given, message):
    with pytest.raises(OptionError, match=message):
        langevin(narrow, normal(2, 1), **{"step_size": 0.1, "steps": 3, "seed": 0, **given})
