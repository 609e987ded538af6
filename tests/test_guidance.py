"""Classifier-free guidance: its convention of scale, in every notation."""

from __future__ import annotations

import pytest
import torch

import fluvial as fl
from fluvial.errors import OptionError
from fluvial.guidance import CFG
from fluvial.model import Model, convert
from problems import PATHS, PREDICTIONS, Counter, mixture, normal, one_line, state

LABEL = torch.tensor([0, 1, 2, 0, 1])
T = 0.4


def problem(name="vp"):
    gm, path = mixture(), PATHS[name]
    return gm.model(path), state(gm, path, T, 5)


def both(model, x, t=T):
    """The model's estimates without and with the condition."""
    return model(x, t), model(x, t, label=LABEL)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 7.5, -1.0])
def test_scale_is_linear_from_null_to_conditional(scale, batched):
    model, x = problem()
    null, given = both(model, x)
    est = CFG(scale, batched)(model)(x, T, label=LABEL)
    for quantity in ("data", "noise", "velocity", "v", "score"):
        low, high = getattr(null, quantity), getattr(given, quantity)
        torch.testing.assert_close(getattr(est, quantity), low + scale * (high - low), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batched", [True, False])
def test_ends_of_the_scale_are_exact(batched):
    model, x = problem()
    null, given = both(model, x)
    torch.testing.assert_close(CFG(0.0, batched)(model)(x, T, label=LABEL).data, null.data, rtol=1e-14, atol=1e-14)
    assert torch.equal(CFG(1.0, batched)(model)(x, T, label=LABEL).data, given.data)


def labelled(x, t, label):
    """A network that mixes up nothing between the samples, and depends on all it is given."""
    return torch.sin(x + t[:, None] + label[:, None])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("batch", [False, True])
def test_batched_is_two_passes(prediction, batch):
    model = Model(labelled, "vp", PREDICTIONS[prediction], null={"label": 3})
    x = normal(5, 2)
    t = torch.linspace(0.2, 0.8, 5, dtype=torch.float64) if batch else T
    one, two = (CFG(2.5, batched)(model)(x, t, label=LABEL) for batched in (True, False))
    torch.testing.assert_close(one.data, two.data, rtol=1e-12, atol=1e-12)
    null, given = both(model, x, t)
    torch.testing.assert_close(two.data, null.data + 2.5 * (given.data - null.data), rtol=1e-9, atol=1e-9)


def test_number_of_calls():
    for batched, scale, calls in [(True, 2.0, 1), (False, 2.0, 2), (True, 1.0, 1), (False, 1.0, 1)]:
        network = Counter(labelled)
        CFG(scale, batched)(Model(network, "vp", null={"label": 3}))(normal(5, 2), T, label=LABEL)
        assert network.calls == calls


@pytest.mark.parametrize("target", ["rectified", "edm", "cosine"])
def test_guided_then_converted_is_converted_then_guided(target):
    model, _ = problem("vp")
    path = PATHS[target]
    x, t = state(mixture(), path, path.time(0.3), 5), path.time(0.3)
    first = convert(CFG(3.0)(model), path)(x, t, label=LABEL)
    second = CFG(3.0)(convert(model, path, "noise"))(x, t, label=LABEL)
    null, given = both(convert(model, path), x, t)
    expected = null.data + 3.0 * (given.data - null.data)
    for est in (first, second):
        torch.testing.assert_close(est.data, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", ["ddim", "heun", "langevin"])
def test_sampling_with_guidance(solver):
    model, _ = problem()
    given = {"steps": 4, "seed": 0, "solver": solver, "cond": {"label": LABEL}}
    guided = fl.sample(model, (5, 2), guidance=CFG(3.0), **given)
    assert torch.equal(guided, fl.sample(CFG(3.0)(model), (5, 2), **given))
    assert torch.equal(fl.sample(model, (5, 2), guidance=CFG(1.0), **given), fl.sample(model, (5, 2), **given))
    null = fl.sample(model, (5, 2), steps=4, seed=0, solver=solver)
    torch.testing.assert_close(fl.sample(model, (5, 2), guidance=CFG(0.0), **given), null, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(guided, null, atol=1e-2)


def test_conditional_samples_fall_on_their_component():
    gm = mixture()
    label = torch.arange(3).repeat(20)
    x = fl.sample(gm.model(PATHS["rectified"]), (60, 2), guidance=CFG(1.0), cond={"label": label}, steps=30, seed=0)
    distance = torch.cdist(x.double(), gm.means) / gm.stds
    assert float(distance[torch.arange(60), label].max()) < 4.5


def test_other_conditions_are_passed_to_both():
    seen = []

    def network(x, t, label, text):
        seen.append((label.tolist(), text.tolist()))
        return x

    model = Model(network, "vp", null={"label": 3})
    CFG(2.0, batched=False)(model)(normal(2, 2), T, label=torch.tensor([0, 1]), text=torch.tensor([7, 8]))
    assert seen == [([3, 3], [7, 8]), ([0, 1], [7, 8])]
    seen.clear()
    CFG(2.0)(model)(normal(2, 2), T, label=torch.tensor([0, 1]), text=torch.tensor([7, 8]))
    assert seen == [([3, 3, 0, 1], [7, 8, 7, 8])]


def test_model_without_a_null_condition():
    model = Model(labelled, "vp")
    for scale in (1.0, 3.0):
        with pytest.raises(OptionError, match="null condition") as caught:
            CFG(scale)(model)
        one_line(caught.value)
    with pytest.raises(OptionError, match="null condition"):
        fl.sample(model, (2, 2), guidance=CFG(3.0), cond={"label": LABEL[:2]})


def test_guidance_without_a_condition():
    network = Counter(labelled)
    with pytest.raises(OptionError, match="'label'") as caught:
        fl.sample(Model(network, "vp", null={"label": 3}), (2, 2), guidance=CFG(3.0), steps=2)
    one_line(caught.value)
    assert network.calls == 0


def test_guided_model_is_a_model_in_every_way():
    """What changes a convention or a network reaches through the guidance."""
    model, x = problem()
    guided = CFG(3.0)(model)
    doubtful = CFG(3.0)(model.under(independent=False))
    assert torch.equal(doubtful.assume_independent()(x, T, label=LABEL).score, guided(x, T, label=LABEL).score)


@pytest.mark.parametrize("converted", [False, True])
def test_network_of_a_guided_model_can_be_replaced(converted):
    def other(x, t, label):
        return torch.cos(x + t[:, None] + label[:, None])

    def make(network):
        guided = CFG(3.0)(Model(network, "vp", null={"label": 3}))
        return convert(guided, "rectified") if converted else guided

    x = normal(5, 2)
    found = make(labelled).with_network(other)(x, T, label=LABEL).data
    torch.testing.assert_close(found, make(other)(x, T, label=LABEL).data)
