"""Pairs made on the fly are those that `make_pairs` stores."""

from __future__ import annotations

import pytest
import torch

from fluvial import paths
from fluvial.errors import OptionError
from fluvial.exact import GaussianMixture
from fluvial.guidance import CFG
from fluvial.model import Normalisation
from fluvial.straighten.online import Online
from fluvial.training import make_pairs
from fluvial.training.data import batches

TWO = GaussianMixture(torch.tensor([[2.0, 0.0], [-1.0, 1.0]]), torch.tensor([0.5, 0.4]), torch.tensor([1.0, 2.0]))


def teacher():
    return TWO.model(paths.VP()).under(normalisation=Normalisation((1.0,), (2.0,)))


@pytest.mark.parametrize("cond", [None, "all", {"label": torch.arange(24) // 10}])
def test_online_pairs_are_the_stored_ones(cond):
    options = {"steps": 4, "states": [0.3, 0.6], "drop_cond": 0.3, "guidance": CFG(1.5), "seed": 11, "cond": cond}
    stored = make_pairs(teacher(), 24, batch_size=24, progress=False, **options)
    online = Online(teacher(), 24, **options)
    every = online.batch(torch.arange(24))
    assert tuple(every) == ("data", *online.conditions) == ("data", *stored.conditions)
    assert all(torch.equal(values, stored.batch(torch.arange(24))[name]) for name, values in every.items())
    order = torch.tensor([23, 4, 4, 11])
    for name, values in online.batch(order).items():
        torch.testing.assert_close(values, every[name][order], rtol=1e-5, atol=1e-5)
    for fact in ("shape", "num_classes", "normalisation", "path", "times"):
        assert getattr(online, fact) == getattr(stored, fact)
    same = {name: value for name, value in stored.manifest.items() if name in online.manifest}
    assert online.manifest == same


def test_online_is_a_source_of_any_length():
    online = Online(teacher(), steps=2)
    assert len(online) == 1_000_000
    one = online.batch(torch.tensor([999_999]))
    assert torch.equal(one["noise"], make_pairs(teacher(), 1, first=999_999, steps=2, progress=False).noise)
    rows = next(batches(online, 6, seed=1))
    assert rows["noise"].shape == rows["data"].shape == (6, 2)
    assert rows["data"].device.type == "cpu"


def test_bad_options_are_refused():
    with pytest.raises(OptionError, match="is stochastic"):
        Online(teacher(), solver="langevin")
    with pytest.raises(OptionError, match="n is 0"):
        Online(teacher(), 0)
