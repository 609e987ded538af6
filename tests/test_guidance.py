"""Guidance: its convention of scale and each method's formula, in every notation."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import fluvial as fl
from fluvial.errors import DependenceError, OptionError
from fluvial.exact import GaussianMixture
from fluvial.guidance import APG, CFG, Autoguidance, CFGZero
from fluvial.model import Model, Normalisation, convert
from problems import PATHS, PREDICTIONS, Counter, column, mixture, normal, odd_mixture, one_line, pair, state

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


# The formulas, by hand and per sample, on the closed form of the pair.


def blurred(gm):
    """A worse model of the mixture: the same components, wider."""
    return GaussianMixture(gm.means * 0.8, gm.stds * 1.6, torch.ones(len(gm.stds)))


def by_hand(gm, x, c, label):
    """(data, noise) of the whole mixture and of each sample's own component."""
    own = [pair(GaussianMixture(gm.means[k, None], gm.stds[k, None], torch.ones(1)), x[i : i + 1], c.alpha, c.sigma)
           for i, k in enumerate(label)]  # fmt: skip
    return pair(gm, x, c.alpha, c.sigma), tuple(torch.cat(parts) for parts in zip(*own))


def hand_cfg(null, cond, scale):
    return (1 - scale) * null + scale * cond


def hand_rescaled(null, cond, scale, share):
    rows = []
    for low, high in zip(null, cond):
        out = hand_cfg(low, high, scale)
        rows.append(share * out * high.std() / out.std() + (1 - share) * out)
    return torch.stack(rows)


def hand_apg(null, cond, scale, eta, threshold):
    rows = []
    for low, high in zip(null, cond):
        d = high - low
        d = d * min(1.0, threshold / max(float(d.norm()), 1e-300))
        unit = high / high.norm()
        parallel = (d * unit).sum() * unit
        rows.append(high + (scale - 1) * (d - parallel + eta * parallel))
    return torch.stack(rows)


def hand_zero(null, cond, scale):
    rows = []
    for low, high in zip(null, cond):
        s = (low * high).sum() / (low * low).sum()
        rows.append(s * low + scale * (high - s * low))
    return torch.stack(rows)


def hand_zero_data(null, cond, x, c, scale):
    """The data estimate of which data - noise is that velocity."""
    velocity = hand_zero(*(data - (x - c.alpha * data) / c.sigma for data in (null, cond)), scale)
    return (x + c.sigma * velocity) / (c.alpha + c.sigma)


def native(gm, path, prediction):
    """The mixture's model as a network of this very prediction."""
    exact = gm.model(path)

    def network(x, t, label=None):
        return exact(x, t, **({} if label is None else {"label": label})).predict(prediction)

    return Model(network, path, prediction, lambda t: t, lambda t: 1.0, null={"label": len(gm.stds)})


def labels(gm, n=5):
    return torch.arange(n) % len(gm.stds)


LEVELS = {"noisy": -2.0, "middle": 0.5, "clean": 2.5}
CASES = [(path, prediction) for path in ("rectified", "vp", "edm", "zero_snr") for prediction in PREDICTIONS]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("problem", [mixture, odd_mixture])
@pytest.mark.parametrize(("path", "prediction"), CASES)
def test_formulas_in_every_notation(path, prediction, problem, level):
    gm, path = problem(), PATHS[path]
    t, label = path.time(LEVELS[level]), labels(problem())
    c, x = path(t), state(gm, path, t, 5)
    model = native(gm, path, PREDICTIONS[prediction])
    (null, null_noise), (cond, cond_noise) = by_hand(gm, x, c, label)
    near = {"rtol": 1e-9, "atol": 1e-9}

    def data(guidance):
        return guidance(model)(x, t, label=label).data

    torch.testing.assert_close(data(CFG(3.0)), hand_cfg(null, cond, 3.0), **near)
    for share in (0.7, 1.0):
        torch.testing.assert_close(data(CFG(3.0, rescale=share)), hand_rescaled(null, cond, 3.0, share), **near)
    for eta, threshold in [(0.0, math.inf), (0.3, math.inf), (1.0, math.inf), (0.0, 0.05), (0.5, 0.4)]:
        guidance = APG(3.0, eta, None if threshold == math.inf else threshold)
        torch.testing.assert_close(data(guidance), hand_apg(null, cond, 3.0, eta, threshold), **near)
    torch.testing.assert_close(data(APG(3.0, eta=1.0)), hand_cfg(null, cond, 3.0), **near)
    est = CFGZero(3.0)(model)(x, t, label=label)
    velocity = hand_zero(null - null_noise, cond - cond_noise, 3.0)
    torch.testing.assert_close(est.data - est.noise, velocity, **near)
    # Every estimate belongs to the state it was made at.
    torch.testing.assert_close(c.alpha * est.data + c.sigma * est.noise, x, **near)


@pytest.mark.parametrize("weak_path", ["rectified", "vp", "edm"])
@pytest.mark.parametrize("prediction", ["data", "noise", "velocity"])
def test_autoguidance_formula(weak_path, prediction):
    gm, path, t = mixture(), PATHS["cosine"], 0.45
    c, x = path(t), state(gm, path, t, 5)
    weak = native(blurred(gm), PATHS[weak_path], PREDICTIONS[prediction])
    guided = Autoguidance(2.5, weak)(gm.model(path))
    strong_free, strong_given = by_hand(gm, x, c, LABEL)
    weak_free, weak_given = by_hand(blurred(gm), x, c, LABEL)
    for i, quantity in enumerate(["data", "noise"]):
        for cond, weak_one, strong_one in [({}, weak_free, strong_free), ({"label": LABEL}, weak_given, strong_given)]:
            expected = hand_cfg(weak_one[i], strong_one[i], 2.5)
            for time in (t, torch.full((5,), t, dtype=torch.float64)):
                found = getattr(guided(x, time, **cond), quantity)
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_autoguidance_needs_no_conditions():
    x, t = normal(4, 2), 0.3
    strong, weak = Model(lambda x, t: torch.sin(x), "vp"), Model(lambda x, t: torch.cos(x), "vp")
    expected = torch.cos(x) + 2.0 * (torch.sin(x) - torch.cos(x))
    torch.testing.assert_close(Autoguidance(2.0, weak)(strong).predict(x, t), expected, rtol=1e-13, atol=1e-13)


# Identities, to the bit where nothing may be computed.

FAMILY = {
    "cfg": CFG(3.0),
    "interval": CFG(3.0, interval=(0.2, 3.0)),
    "rescale": CFG(3.0, rescale=0.7),
    "both": CFG(3.0, interval=(0.2, 3.0), rescale=0.7),
    "apg": APG(3.0, eta=0.2, norm_threshold=0.4),
    "zero": CFGZero(3.0),
    "auto": Autoguidance(3.0, blurred(mixture()).model(PATHS["vp"])),
}
# The data estimate that each should make, where its interval acts, from the two data estimates it compares.
HAND = {
    "cfg": lambda null, cond, x, c: hand_cfg(null, cond, 3.0),
    "interval": lambda null, cond, x, c: hand_cfg(null, cond, 3.0),
    "rescale": lambda null, cond, x, c: hand_rescaled(null, cond, 3.0, 0.7),
    "both": lambda null, cond, x, c: hand_rescaled(null, cond, 3.0, 0.7),
    "apg": lambda null, cond, x, c: hand_apg(null, cond, 3.0, 0.2, 0.4),
    "zero": lambda null, cond, x, c: hand_zero_data(null, cond, x, c, 3.0),
}
family = pytest.mark.parametrize("guidance", FAMILY.values(), ids=FAMILY)


def test_scale_one_is_the_model_itself():
    model, _ = problem()
    weak = blurred(mixture()).model(PATHS["vp"])
    for guidance in (CFG(1.0, interval=(0, 1), rescale=0.5), APG(1.0), CFGZero(1.0, 0.0), Autoguidance(1.0, weak)):
        assert guidance(model) is model


def test_scale_zero():
    model, x = problem()
    null, given = both(model, x)
    weak = blurred(mixture()).model(PATHS["vp"])
    for guidance, expected in [
        (CFG(0.0), null),
        (APG(0.0, eta=1.0), null),
        (Autoguidance(0.0, weak), both(weak, x)[1]),
    ]:
        found = guidance(model)(x, T, label=LABEL).data
        torch.testing.assert_close(found, expected.data, rtol=1e-13, atol=1e-13)
    est = CFGZero(0.0)(model)(x, T, label=LABEL)
    expected = hand_zero(null.data - null.noise, given.data - given.noise, 0.0)
    torch.testing.assert_close(est.data - est.noise, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_is_equal_to_the_bit(prediction, batch):
    model = native(mixture(), PATHS["vp"], PREDICTIONS[prediction])
    x = state(mixture(), PATHS["vp"], T, 5)
    t = torch.linspace(0.3, 0.6, 5, dtype=torch.float64) if batch else T
    given = model(x, t, label=LABEL).data
    assert torch.equal(CFG(3.0, interval=(500.0, 900.0))(model)(x, t, label=LABEL).data, given)
    assert torch.equal(CFG(3.0, interval=(0.0, 1e-3), rescale=0.5)(model)(x, t, label=LABEL).data, given)
    plain = CFG(3.0)(model)(x, t, label=LABEL).data
    assert torch.equal(CFG(3.0, rescale=0.0)(model)(x, t, label=LABEL).data, plain)
    assert torch.equal(CFG(3.0, interval=(0.0, math.inf))(model)(x, t, label=LABEL).data, plain)
    assert torch.equal(Autoguidance(3.0, model)(model)(x, t, label=LABEL).data, given)
    assert not torch.allclose(plain, given, atol=1e-3)


@pytest.mark.parametrize("path", ["rectified", "vp", "edm"])
def test_interval_is_open_below_and_closed_above(path):
    """Its unit is sigma/alpha on every path, and each sample of a batch of times is on its own side."""
    gm, path = mixture(), PATHS[path]
    levels = torch.tensor([0.19, 0.2, 0.2 + 1e-9, 1.0, 3.0 - 1e-9, 3.0 + 1e-9], dtype=torch.float64)
    t = path.time(-2 * levels.log())
    x, label = state(gm, path, t, 6), labels(gm, 6)
    model = gm.model(path)
    c = path(t)
    inside = (c.sigma / c.alpha > 0.2) & (c.sigma / c.alpha <= 3.0)
    assert inside.tolist()[2:] == [True, True, True, False]
    assert not inside[0]
    given, plain = model(x, t, label=label).data, CFG(3.0)(model)(x, t, label=label).data
    found = CFG(3.0, interval=(0.2, 3.0))(model)(x, t, label=label).data
    assert torch.equal(found, torch.where(column(inside, 2), plain, given))
    for i in range(6):
        one = CFG(3.0, interval=(0.2, 3.0))(model)(x[i : i + 1], float(t[i]), label=label[i : i + 1]).data
        torch.testing.assert_close(one, found[i : i + 1], rtol=1e-9, atol=1e-9)


def test_interval_ends_exactly():
    """low < sigma/alpha <= high, on EDM's path, where sigma/alpha is sigma itself."""
    model, t = mixture().model(PATHS["edm"]), 0.5
    x, sigma = state(mixture(), PATHS["edm"], 0.5, 5), PATHS["edm"](0.5).sigma
    given, plain = model(x, t, label=LABEL).data, CFG(3.0)(model)(x, t, label=LABEL).data
    assert torch.equal(CFG(3.0, interval=(0.0, sigma))(model)(x, t, label=LABEL).data, plain)
    assert torch.equal(CFG(3.0, interval=(sigma, 80.0))(model)(x, t, label=LABEL).data, given)


def test_published_interval_guides_the_published_steps():
    """(0.19, 1.61] are the steps 17 to 22 of EDM2's 32: two rows of work there, one elsewhere."""
    sizes = []

    def network(x, t, label):
        sizes.append(len(x))
        return x

    model = Model(network, "edm", null={"label": 3})
    guided = CFG(2.0, interval=(0.19, 1.61))(model)
    for i in range(32):
        guided(normal(1, 2), PATHS["edm"].time(-2 * math.log(float(fl.paths.EDM()(i / 31).sigma))), label=LABEL[:1])
    assert [i for i, n in enumerate(sizes) if n == 2] == [17, 18, 19, 20, 21, 22]
    assert len(sizes) == 32
    sizes.clear()
    half = CFG(2.0, batched=False, interval=(0.19, 1.61))(model)
    for t in (0.1, 0.6, 0.9):
        half(normal(1, 2), t, label=LABEL[:1])
    assert sizes == [1, 1, 1, 1]


# The same in any batch, call or notation.


@family
@pytest.mark.parametrize("path", ["rectified", "vp", "edm"])
def test_convert_and_guide_commute(guidance, path):
    source, path = PATHS["vp"], PATHS[path]
    model = native(mixture(), source, PREDICTIONS["noise"])
    for log_snr in (-4.0, 0.0, 3.0):
        t = path.time(log_snr)
        x = state(mixture(), path, t, 5)
        first = convert(guidance(model), path)
        second = guidance(convert(model, path, "velocity"))
        here = guidance(native(mixture(), path, PREDICTIONS["v"]))
        for time in (t, torch.full((5,), t, dtype=torch.float64)):
            expected = here(x, time, label=LABEL)
            for est in (first(x, time, label=LABEL), second(x, time, label=LABEL)):
                torch.testing.assert_close(est.data, expected.data, rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(est.noise, expected.noise, rtol=1e-9, atol=1e-9)


@family
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float_and_tensor_times_agree(guidance, prediction):
    gm, path = mixture(), PATHS["rectified"]
    guided = guidance(native(gm, path, PREDICTIONS[prediction]))
    times = [0.02, 0.3, 0.5, 0.8, 0.97]
    x = torch.cat([state(gm, path, t, 1, seed=i) for i, t in enumerate(times)])
    together = guided(x, torch.tensor(times), label=LABEL).velocity
    for i, t in enumerate(times):
        one = guided(x[i : i + 1], float(torch.tensor(t)), label=LABEL[i : i + 1]).velocity
        torch.testing.assert_close(one, together[i : i + 1], rtol=1e-9, atol=1e-9)


@family
@pytest.mark.parametrize("batch", [False, True])
def test_samples_do_not_see_each_other(guidance, batch):
    model, x = problem()
    t = torch.linspace(0.2, 0.8, 5, dtype=torch.float64) if batch else T
    together = guidance(model)(x, t, label=LABEL).data
    alone = guidance(model)(x[:1], t[:1] if batch else t, label=LABEL[:1]).data
    torch.testing.assert_close(alone, together[:1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [CFG, APG, CFGZero, lambda *a, **k: CFG(*a, rescale=0.7, interval=(0, 9), **k)])
def test_family_batched_is_two_passes(make):
    model, x = problem()
    one, two = (make(3.0, batched=batched)(model)(x, T, label=LABEL).data for batched in (True, False))
    torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 2), (2, 3, 4, 5)])
@family
def test_shapes(guidance, shape):
    """A sample is one vector, whatever its shape."""
    if isinstance(guidance, Autoguidance):
        guidance = Autoguidance(3.0, Model(lambda x, t, label: torch.cos(x), "vp"))

    def network(x, t, label):
        return torch.sin(x + column(t, x.ndim) + column(label, x.ndim))

    model = Model(network, "vp", "noise", null={"label": 3})
    x = normal(5, *shape)
    found = guidance(model)(x, T, label=LABEL).data
    flat = guidance(model)(x.reshape(5, -1), T, label=LABEL).data
    torch.testing.assert_close(found.reshape(5, -1), flat, rtol=1e-12, atol=1e-12)
    if math.prod(shape) == 1 and guidance == FAMILY["rescale"]:
        # One number has no contrast to bring back.
        assert torch.equal(found, CFG(3.0)(model)(x, T, label=LABEL).data)


@family
def test_guided_model_keeps_its_convention(guidance):
    def other(x, t, label):
        return torch.cos(x + t[:, None] + label[:, None])

    def make(network):
        return guidance(Model(network, "vp", "noise", null={"label": 3}, shape=(2,)))

    guided, x = make(labelled), normal(5, 2)
    assert (guided.path, guided.prediction.name, guided.shape) == (PATHS["vp"], "noise", (2,))
    found = guided.with_network(other)(x, T, label=LABEL).data
    assert torch.equal(found, make(other)(x, T, label=LABEL).data)
    doubtful = guided.under(independent=False)
    with pytest.raises(DependenceError):
        _ = doubtful(x, T, label=LABEL).score
    assert torch.equal(doubtful.assume_independent()(x, T, label=LABEL).score, guided(x, T, label=LABEL).score)
    # A raw output is one that its own prediction turns back into the estimate.
    est = guided(x, T, label=LABEL)
    assert torch.equal(est.noise, guided.predict(x, T, label=LABEL))


def test_null_condition_given_to_a_converted_model():
    model = Model(labelled, "vp")
    late = convert(model, "rectified").under(null={"label": 3})
    early = convert(model.under(null={"label": 3}), "rectified")
    x = normal(5, 2)
    assert torch.equal(CFG(3.0)(late)(x, T, label=LABEL).data, CFG(3.0)(early)(x, T, label=LABEL).data)


def test_guidances_stack():
    model, x = problem()
    weak = blurred(mixture()).model(PATHS["edm"])
    stacked = Autoguidance(2.0, weak)(CFG(3.0)(model))(x, T, label=LABEL).data
    expected = hand_cfg(convert(weak, "vp")(x, T, label=LABEL).data, CFG(3.0)(model)(x, T, label=LABEL).data, 2.0)
    torch.testing.assert_close(stacked, expected, rtol=1e-11, atol=1e-11)


# The ends of time.


@pytest.mark.parametrize("prediction", ["velocity", "v", "data"])
@pytest.mark.parametrize(
    "guidance", [FAMILY["rescale"], FAMILY["apg"], CFGZero(3.0, 0.0)], ids=["rescale", "apg", "zero"]
)
def test_noise_end_where_the_data_are_determined(guidance, prediction):
    """At pure noise the formulas hold as they stand: the null's data estimate is the mixture's mean."""
    gm, x = mixture(), normal(5, 2)
    model = native(gm, PATHS["rectified"], PREDICTIONS[prediction])
    null, cond = (gm.weights @ gm.means).expand(5, 2), gm.means[LABEL]
    expected = {
        CFG: lambda: hand_rescaled(null, cond, 3.0, 0.7),
        APG: lambda: hand_apg(null, cond, 3.0, 0.2, 0.4),
        CFGZero: lambda: hand_zero(null - x, cond - x, 3.0) + x,
    }[type(guidance)]()
    for t in (0.0, torch.zeros(5)):
        torch.testing.assert_close(guidance(model)(x, t, label=LABEL).data, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("prediction", "t"), [("noise", 0.0), ("score", 0.0)])
@pytest.mark.parametrize(
    "guidance", [FAMILY["rescale"], FAMILY["apg"], CFGZero(3.0, 0.0)], ids=["rescale", "apg", "zero"]
)
def test_noise_end_where_the_data_are_not_determined(guidance, prediction, t):
    """Plain guidance remains."""
    model, x = Model(labelled, "rectified", prediction, null={"label": 3}), normal(5, 2)
    expected = CFG(3.0)(model)(x, t, label=LABEL)
    for time in (t, torch.full((5,), t)):
        found = guidance(model)(x, time, label=LABEL)
        out = found.predict(model.prediction)
        torch.testing.assert_close(out, expected.predict(model.prediction), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("guidance", [FAMILY["cfg"], FAMILY["rescale"], FAMILY["apg"], FAMILY["zero"]])
def test_data_end(guidance):
    """The guided velocity at sigma = 0 is the limit of those before it, although the data estimates coincide."""
    model = Model(labelled, "rectified", null={"label": 3})
    x = normal(5, 2)
    limit = guidance(model)(x, 1.0 - 1e-9, label=LABEL).velocity
    for t in (1.0, torch.ones(5)):
        est = guidance(model)(x, t, label=LABEL)
        torch.testing.assert_close(est.velocity, limit, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(est.data, x, rtol=1e-14, atol=1e-14)
    plain = CFG(3.0)(model)(x, 1.0, label=LABEL).velocity
    assert guidance == FAMILY["cfg"] or not torch.allclose(limit, plain, atol=1e-2)


def test_cfg_zero_at_the_data_end_of_a_data_prediction():
    """The noise, and so the velocity, is unknown there: plain guidance remains."""
    model, x = Model(labelled, "rectified", "data", null={"label": 3}), normal(5, 2)
    for t in (1.0, torch.ones(5)):
        found = CFGZero(3.0)(model)(x, t, label=LABEL).data
        torch.testing.assert_close(found, CFG(3.0)(model)(x, t, label=LABEL).data, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("guidance", [FAMILY["rescale"], FAMILY["apg"], FAMILY["zero"]])
def test_single_precision_near_the_data(guidance):
    """Nothing is divided by the small sigma: the velocity keeps the digits of the network's output."""
    model = Model(labelled, "rectified", null={"label": 3})
    x = normal(5, 2)
    exact = guidance(model)(x, 1.0 - 1e-5, label=LABEL).velocity
    found = guidance(model)(x.float(), 1.0 - 1e-5, label=LABEL).velocity
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-5)


def test_weak_model_that_is_not_determined():
    """At the noise end a noise prediction says nothing of the data: the strong model stands alone."""
    strong = Model(labelled, "rectified", null={"label": 3})
    guidance = Autoguidance(3.0, Model(labelled, "rectified", "noise", null={"label": 3}))
    x = normal(5, 2)
    for t in (0.0, torch.zeros(5)):
        assert torch.equal(guidance(strong)(x, t, label=LABEL).velocity, strong(x, t, label=LABEL).velocity)
    # But of the noise it does.
    noise = Model(labelled, "rectified", "noise", null={"label": 3})
    weak = Model(lambda x, t, label: torch.cos(x), "rectified", "noise")
    for t in (0.0, torch.zeros(5)):
        found = Autoguidance(3.0, weak)(noise)(x, t, label=LABEL).noise
        expected = hand_cfg(torch.cos(x), noise(x, t, label=LABEL).noise, 3.0)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "guidance", [FAMILY["rescale"], FAMILY["apg"], CFGZero(3.0, 0.0)], ids=["rescale", "apg", "zero"]
)
def test_samples_without_a_direction(guidance):
    """Zero estimates have no direction and no contrast: plain guidance, not 0/0."""
    model = Model(lambda x, t, label: column(label - 3.0, 2) * torch.zeros_like(x), "rectified", null={"label": 3})
    x = torch.zeros(5, 2, dtype=torch.float64)
    assert torch.equal(guidance(model)(x, T, label=LABEL).data, x)


@family
@pytest.mark.parametrize("prediction", ["noise", "velocity", "data"])
def test_gradients_at_both_ends(guidance, prediction):
    """What is not chosen at an end must not spoil the gradient of what is."""
    model = Model(labelled, "rectified", prediction, null={"label": 3})
    if isinstance(guidance, Autoguidance):
        guidance = Autoguidance(3.0, Model(lambda x, t, label: torch.cos(x), "rectified", prediction))
    x = normal(5, 2).requires_grad_()
    t = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0])
    guidance(model)(x, t, label=LABEL).predict(model.prediction).sum().backward()
    assert torch.isfinite(x.grad).all()


# CFG-Zero* stands still.


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", ["rectified", "vp", "edm", "zero_snr"])
def test_zero_velocity(path, prediction):
    """data = noise = x / (alpha + sigma), without a call of the network, up to the rectified time zero_until."""
    path, network = PATHS[path], Counter(labelled)
    guided = CFGZero(3.0, 0.2)(
        Model(network, path, PREDICTIONS[prediction], lambda t: t, lambda t: 1.0, null={"label": 3})
    )
    x = normal(5, 2)
    level = torch.tensor([0.1, 0.15, 0.19, 0.21, 0.5], dtype=torch.float64)  # alpha / (alpha + sigma)
    t = path.time(2 * (level / (1 - level)).log())
    together = guided(x, t, label=LABEL)
    network.calls = 0
    for i in range(5):
        c = path(float(t[i]))
        est = guided(x[i : i + 1], float(t[i]), label=LABEL[i : i + 1])
        torch.testing.assert_close(est.data, together.data[i : i + 1], rtol=1e-9, atol=1e-9)
        if level[i] < 0.2:
            still = x[i : i + 1] / (c.alpha + c.sigma)
            torch.testing.assert_close(est.data, still, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(est.noise, still, rtol=1e-10, atol=1e-10)
    assert network.calls == 2


def test_zero_init_of_a_run():
    """Two of 50 uniform steps, by default; the state converted to a rectified one does not move, on any path."""
    model = native(mixture(), PATHS["rectified"], PREDICTIONS["velocity"])
    times = [0.0, 0.02, 0.04, 0.3, 1.0]
    run = fl.sample(CFGZero(3.0)(model), normal(5, 2), cond={"label": LABEL}, solver="euler", times=times, record=True)
    assert torch.equal(run.x[1], run.x[0])
    assert torch.equal(run.x[2], run.x[0])
    assert not torch.allclose(run.x[3], run.x[0], atol=1e-2)
    path = PATHS["vp"]
    guided = CFGZero(3.0, 0.5)(convert(model, path))
    times = [0.0, 0.2, 0.4, 1.0]
    run = fl.sample(guided, normal(5, 2), cond={"label": LABEL}, solver="ddim", times=times, record=True)
    assert path(0.2).alpha < path(0.2).sigma
    assert path(0.4).alpha < path(0.4).sigma
    rectified = [x / (path(t).alpha + path(t).sigma) for x, t in zip(run.x[:3], times)]
    for x in rectified[1:]:
        torch.testing.assert_close(x, rectified[0], rtol=1e-12, atol=1e-12)


# Sampling, precision, devices.


@family
@pytest.mark.parametrize("path", ["rectified", "vp", "edm"])
@pytest.mark.parametrize("solver", ["euler", "heun", "ddim"])
def test_sampling_with_each(guidance, path, solver):
    model = mixture().model(PATHS[path])
    for steps in (1, 2, 3):
        given = {"steps": steps, "seed": 0, "solver": solver, "cond": {"label": LABEL}}
        x = fl.sample(model, (5, 2), guidance=guidance, **given)
        assert torch.isfinite(x).all()
        assert torch.equal(x, fl.sample(guidance(model), (5, 2), **given))


@pytest.mark.parametrize("name", HAND)
def test_run_by_hand(name):
    """Euler on the rectified path, x + (s - t) (data - noise), with the formulas above for the data."""
    gm, path, times = mixture(), PATHS["rectified"], [0.1, 0.3, 0.55, 0.7, 0.9]
    x = start = state(gm, path, 0.1, 5)
    for t, s in pairwise(times):
        (null, _), (cond, _) = by_hand(gm, x, path(t), LABEL)
        acts = 0.2 < (1 - t) / t <= 3.0 or name in ("cfg", "rescale", "apg", "zero")
        data = HAND[name](null, cond, x, path(t)) if acts else cond
        x = x + (s - t) * (data - (x - t * data) / (1 - t))
    given = {"solver": "euler", "times": times, "cond": {"label": LABEL}, "state": start}
    found = fl.sample(gm.model(path), guidance=FAMILY[name], **given)
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


@family
def test_ddim_samples_agree_between_notations(guidance):
    """From the same state on the same noise levels, as without guidance."""
    levels, found = [-4.0, -2.0, -0.5, 1.0, 3.0], []
    for name in ("rectified", "vp", "edm"):
        path = PATHS[name]
        times = [path.time(level) for level in levels]
        c, end = path(times[0]), path(times[-1])
        start = normal(5, 2) * math.hypot(c.alpha, c.sigma)
        x = fl.sample(
            mixture().model(path), state=start, solver="ddim", times=times, guidance=guidance, cond={"label": LABEL}
        )
        found.append(x / math.hypot(end.alpha, end.sigma))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


class Labelled(nn.Module):
    """A small network with a label, for images."""

    def __init__(self):
        super().__init__()
        self.label, self.mix = nn.Embedding(4, 3), nn.Conv2d(3, 3, 3, padding=1)
        with torch.no_grad():
            for k, parameter in enumerate(self.parameters()):
                parameter.copy_(0.5 * normal(*parameter.shape, seed=k))

    def forward(self, x, t, label):
        return self.mix(x + self.label(label)[:, :, None, None] + column(t, 4).to(x.dtype))


@pytest.mark.parametrize("name", ["cfg", "interval", "rescale", "both", "apg", "zero"])
def test_half_precision_network(name):
    """The network runs in bfloat16, all else in float32: norms and projections keep their digits."""
    model = Model(Labelled().bfloat16(), "rectified", null={"label": 3})
    x = normal(5, 3, 4, 4, dtype=torch.float32)
    found = FAMILY[name](model)(x, T, label=LABEL).data
    assert found.dtype == torch.float32
    with torch.no_grad():
        null, cond = (model(x, T, **given).data.double() for given in ({}, {"label": LABEL}))
        expected = HAND[name](null, cond, x.double(), model.path(T))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@family
@pytest.mark.parametrize("batch", [False, True])
def test_nothing_waits_for_a_value(guidance, batch):
    """On the meta device tensors have no values: asking for one, for a branch or a print, is an error."""
    if isinstance(guidance, Autoguidance):
        guidance = Autoguidance(3.0, Model(labelled, "edm", "noise"))
    model = Model(labelled, "vp", "v", null={"label": 3})
    x, t = torch.empty(5, 2, device="meta"), torch.empty(5, device="meta") if batch else T
    est = guidance(model)(x, t, label=LABEL.to("meta"))
    assert est.velocity.shape == x.shape


# Refusals.

WEAK = Model(labelled, "vp", shape=(2,))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CFG("3"), ["scale", "'3'"]),
        (lambda: CFG(math.nan), ["scale", "nan"]),
        (lambda: APG(True), ["scale", "True"]),
        (lambda: CFG(3.0, (0.2, 1.0)), ["batched", "(0.2, 1.0)"]),
        (lambda: CFG(3.0, interval=0.5), ["interval", "0.5", "sigma/alpha"]),
        (lambda: CFG(3.0, interval=(2.0, 1.0)), ["interval", "low < high"]),
        (lambda: CFG(3.0, interval=(-1.0, 1.0)), ["interval", "-1.0"]),
        (lambda: CFG(3.0, interval=(0.0, 1.0, 2.0)), ["interval"]),
        (lambda: CFG(3.0, interval=(0.0, math.nan)), ["interval", "nan"]),
        (lambda: CFG(3.0, rescale=1.5), ["rescale", "1.5", "0 to 1"]),
        (lambda: APG(3.0, eta=None), ["eta", "None"]),
        (lambda: APG(3.0, norm_threshold=0.0), ["norm_threshold", "None for no limit"]),
        (lambda: CFGZero(3.0, 1.0), ["zero_until", "1.0", "below 1"]),
        (lambda: CFGZero(3.0, -0.1), ["zero_until", "-0.1"]),
        (lambda: Autoguidance(3.0, labelled), ["weak", "fl.Model"]),
        (lambda: Autoguidance(WEAK, 3.0), ["scale"]),
        (lambda: Autoguidance(3.0, WEAK)(Model(labelled, "vp", shape=(3,))), ["(2,)", "(3,)"]),
        (
            lambda: Autoguidance(3.0, WEAK)(Model(labelled, "vp", normalisation=Normalisation((0.5,), (2.0,)))),
            ["normalised", "units"],
        ),
        (lambda: APG(3.0)(WEAK), ["null condition"]),
        (lambda: CFGZero(3.0)(WEAK), ["null condition"]),
    ],
)
def test_options_that_cannot_be(make, words):
    with pytest.raises(OptionError) as caught:
        make()
    for word in words:
        assert word in one_line(caught.value)


@pytest.mark.parametrize("guidance", [CFG(3.0, interval=(0.1, 0.2)), APG(3.0), CFGZero(3.0, 0.9)])
def test_missing_condition_is_noticed_at_once(guidance):
    """Also where this noise level would have used no null condition, or no network."""
    network = Counter(labelled)
    with pytest.raises(OptionError, match="'label'"):
        fl.sample(Model(network, "vp", null={"label": 3}), (2, 2), guidance=guidance, steps=2)
    assert network.calls == 0


def test_score_of_a_doubtful_weak_model():
    """The guided score is a mixture of both."""
    model, x = problem()
    weak = blurred(mixture()).model(PATHS["vp"])
    doubtful = Autoguidance(3.0, weak.under(independent=False))(model)
    assert not doubtful.independent
    with pytest.raises(DependenceError):
        _ = doubtful(x, T, label=LABEL).score
    expected = Autoguidance(3.0, weak)(model)(x, T, label=LABEL).score
    assert torch.equal(doubtful.assume_independent()(x, T, label=LABEL).score, expected)
