"""Numbers that a network is told: without effect until they are trained, then what they say they are."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fluvial import networks
from fluvial.distill.derivatives import along
from fluvial.embeddings import NUMBERS, Sinusoids, Told, turns
from fluvial.errors import OptionError

SHAPES = [(1, 8, 8), (3, 7, 5), (1, 1, 1), (2,), (1,), (3, 11)]


def stirred(network, seed=0):
    """Weights that are nowhere zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
    return network.eval()


def asked(shape, classes=None, count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *shape, generator=generator).to(dtype)
    clock = 1000.0 if len(shape) == 3 else 1.0
    t = (torch.rand(count, generator=generator, dtype=torch.float64) * clock).to(
        torch.promote_types(dtype, torch.float32)
    )
    label = {} if classes is None else {"label": torch.arange(count) % (classes + 1)}
    return x, t, clock, label


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_network_that_is_told_more_answers_as_before(shape, classes, dtype):
    """To the last bit, whatever it is told, and when it is told nothing."""
    network = stirred(networks.for_data(shape, classes, width=16)).to(dtype)
    more = networks.told(network, NUMBERS)
    x, t, clock, label = asked(shape, classes, dtype=dtype)
    with torch.no_grad():
        before = network(x, t, **label)
        assert torch.equal(more(x, t, **label), before)
        for r in (0.0, 0.5 * clock, clock):
            for scale in (0.0, 1.0, 7.5):
                numbers = {"r": torch.full_like(t, r), "guidance": torch.full_like(t, scale)}
                assert torch.equal(more(x, t, **label, **numbers), before)
        assert torch.equal(more(x, t, **label, r=t), before)
    assert network.numbers == ()
    assert next(more.parameters()).dtype == dtype


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_each_sample_is_told_its_own(shape, count):
    network = stirred(networks.told(networks.for_data(shape, 4, width=16), NUMBERS)).double()
    x, t, clock, label = asked(shape, 4, count, torch.float64)
    numbers = {"r": torch.linspace(0.1, 0.9, count).double() * clock, "guidance": torch.linspace(1, 4, count).double()}
    with torch.no_grad():
        together = network(x, t, **label, **numbers)
        for i in range(count):
            one = {name: value[i : i + 1] for name, value in {**label, **numbers}.items()}
            torch.testing.assert_close(
                network(x[i : i + 1], t[i : i + 1], **one), together[i : i + 1], rtol=0, atol=1e-12
            )


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_what_is_not_given_has_its_default(shape, classes):
    """Without r there is no way left, r = t; without guidance its scale is 1. Once trained, other numbers tell."""
    network = stirred(networks.told(networks.for_data(shape, classes, width=16), NUMBERS))
    x, t, clock, label = asked(shape, classes)
    with torch.no_grad():
        plain = network(x, t, **label)
        assert torch.equal(network(x, t, **label, r=t, guidance=torch.ones_like(t)), plain)
        assert not torch.allclose(network(x, t, **label, r=t - 0.3 * clock), plain)
        assert not torch.allclose(network(x, t, **label, guidance=torch.full_like(t, 3.0)), plain)


def test_r_is_told_as_the_way_that_is_left():
    """The embedding depends on t - r alone, and on nothing else."""
    told = Told(None, turns, 64, 8, 1.0)
    told.add("r")
    stirred(told).double()
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)

    def embedded(t, r):
        return told((None, t, {"r": r}, torch.float64))

    torch.testing.assert_close(embedded(t, t + 0.1), embedded(t - 0.1, t), rtol=0, atol=1e-12)
    torch.testing.assert_close(embedded(t, t + 0.1)[0], embedded(t, t + 0.1)[2], rtol=0, atol=1e-12)
    assert not torch.allclose(embedded(t, t + 0.1), embedded(t, t - 0.1), rtol=0, atol=1e-3)


def test_the_embedding_is_the_sum_of_its_parts():
    """label + layers(features(t - r)) + layers(features(scale clock / 10)), by hand."""
    label = torch.nn.Embedding(5, 8)
    told = Told(label, Sinusoids(16), 16, 8, 1000.0)
    told.add("r")
    told.add("guidance")
    stirred(told).double()
    t, r, scale = (torch.tensor(values, dtype=torch.float64) for values in ([900.0, 30.0], [100.0, 0.0], [1.5, 4.0]))
    which = torch.tensor([1, 4])

    def waves(value):
        angle = value[:, None] * 10_000 ** (-torch.arange(8, dtype=torch.float64) / 8)
        return torch.cat([angle.cos(), angle.sin()], 1)

    by_hand = label(which) + told.numbers["r"](waves(t - r)) + told.numbers["guidance"](waves(100.0 * scale))
    got = told((which, t, {"r": r, "guidance": scale}, torch.float64))
    torch.testing.assert_close(got, by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_one_number_added_to_another_keeps_its_weights(shape):
    network = stirred(networks.told(networks.for_data(shape, 4, width=16), ["r"]))
    both = networks.told(network, ["r", "guidance"])
    assert both.numbers == ("r", "guidance")
    kept, now = network.state_dict(), both.state_dict()
    assert all(torch.equal(now[name], value) for name, value in kept.items())
    assert {name for name in now if name not in kept} == {name for name in now if "numbers.guidance" in name}
    x, t, clock, label = asked(shape, 4)
    r = t - 0.2 * clock
    with torch.no_grad():
        assert torch.equal(both(x, t, **label, r=r, guidance=3 * torch.ones_like(t)), network(x, t, **label, r=r))


@pytest.mark.parametrize("numbers", [("r",), ("guidance",), ("guidance", "r")])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5)])
def test_the_config_builds_it_again(shape, numbers):
    network = stirred(networks.told(networks.for_data(shape, 3, width=16), numbers))
    config = json.loads(json.dumps(network.config()))
    assert config["numbers"] == list(numbers)
    again = networks.from_config(config).eval()
    assert again.config() == network.config()
    again.load_state_dict(network.state_dict())
    x, t, _, label = asked(shape, 3)
    given = {name: (0.4 * t if name == "r" else 2 * torch.ones_like(t)) for name in numbers}
    assert torch.equal(again(x, t, **label, **given), network(x, t, **label, **given))
    assert "numbers" not in networks.for_data(shape, 3, width=16).config()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5), (2,)])
def test_the_derivative_along_t_and_r_goes_forward(shape):
    """d/de of network(x, t + e, r + a e), against central differences: the lengths of flow maps are learned by it."""
    network = stirred(networks.told(networks.for_data(shape, 3, width=16), ["r"])).double()
    x, t, clock, label = asked(shape, 3, dtype=torch.float64)
    r, move = 0.5 * (t + clock), torch.full_like(t, clock)

    def answer(t, r):
        return network(x, t, r=r, **label)

    step = 1e-6
    with torch.no_grad():
        _, slope = along(answer, (t, r), (move, 0.3 * move))
        ahead, behind = (answer(t + e * move, r + 0.3 * e * move) for e in (step, -step))
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=0, atol=1e-6 * float(slope.abs().max()))


@pytest.mark.parametrize("blur", [0.01, 0.2])
def test_a_blur_is_the_average_over_uncertain_times(blur):
    """E cos(w (t + blur z)) of a standard normal z, by quadrature."""
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z.square()) * (z[1] - z[0])
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    for features, share in ((turns, blur), (Sinusoids(16, 30 * blur), 30 * blur)):
        plain = features if features is turns else Sinusoids(16)
        got = turns(t, blur) if features is turns else features(t)
        at = plain((t[:, None] + share * z).flatten()).reshape(2, len(z), -1)
        average = (weight[:, None] * at).sum(1) / math.sqrt(2 * math.pi)
        torch.testing.assert_close(got, average, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_unknown_numbers_are_refused(shape):
    plain = networks.for_data(shape, width=16)
    x, t, _, _ = asked(shape)
    for network, name in ((plain, "r"), (networks.told(plain, ["r"]), "guidance")):
        with pytest.raises(OptionError, match=f"built without '{name}'") as caught:
            network(x, t, **{name: t})
        assert "\n" not in str(caught.value)
    for make in (
        lambda: networks.told(plain, ["gidance"]),
        lambda: networks.from_config({**plain.config(), "numbers": ["gidance"]}),
    ):
        with pytest.raises(OptionError, match="did you mean 'guidance'") as caught:
            make()
        assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match="cannot be told r"):
        networks.told(torch.nn.Linear(2, 2), ["r"])
