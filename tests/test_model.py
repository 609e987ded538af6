"""Models: what reaches the network, conditions, independence, and conversion between paths."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import fluvial as fl
from fluvial import predictions
from fluvial.errors import DependenceError, OptionError, PathTimeError, ShapeError
from fluvial.model import Clock, Convention, Model, Normalisation, convert
from problems import (
    MIXTURES,
    PATHS,
    PREDICTIONS,
    Counter,
    Net,
    column,
    mixture,
    normal,
    one_line,
    pair,
    state,
    weights,
)


class Spy:
    """A network that remembers what it was given, and gives it back."""

    def __call__(self, x, t, **cond):
        self.x, self.t, self.cond = x, t, cond
        return x


class SpyModule(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x, t):
        self.x, self.t = x, t
        return self.gain * x


# What reaches the network


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_gets_x_in_its_own_dtype_and_time_in_float32(dtype):
    network = SpyModule(dtype)
    est = Model(network, "rectified", "data")(normal(3, 2, dtype=torch.float32), 0.3)
    assert network.x.dtype == dtype
    assert network.t.dtype == torch.float32
    assert torch.equal(network.t, torch.full((3,), 0.3))
    assert est.data.dtype == torch.float32
    assert torch.equal(est.data, network.x.float())


def test_module_in_float32_under_float64_states():
    network, x = SpyModule(torch.float32), normal(3, 2)
    est = Model(network, "rectified", "data")(x, 0.3)
    assert (network.x.dtype, network.t.dtype, est.data.dtype) == (torch.float32, torch.float64, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_callable_gets_x_as_it_is(dtype):
    spy, x = Spy(), normal(3, 2, dtype=dtype)
    Model(spy, "rectified")(x, 0.3)
    assert spy.x is x
    assert spy.t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert spy.t.tolist() == torch.full((3,), 0.3, dtype=spy.t.dtype).tolist()


def test_batch_of_times_reaches_the_network():
    spy, t = Spy(), torch.tensor([0.1, 0.5, 0.9])
    Model(spy, "rectified")(normal(3, 2, dtype=torch.float32), t)
    assert torch.equal(spy.t, t)
    Model(spy, "rectified")(normal(3, 2), torch.tensor(0.5))
    assert torch.equal(spy.t, torch.full((3,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2,), (3, 1), (4,), (1, 1)])
def test_times_that_do_not_fit_the_batch(shape):
    with pytest.raises(ShapeError, match="t has shape") as caught:
        Model(Spy(), "rectified")(normal(3, 2), torch.zeros(shape))
    one_line(caught.value)


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_time_outside_the_path(t):
    network = Counter(lambda x, t: x)
    for model in (Model(network, "vp"), convert(Model(network, "vp"), "rectified")):
        with pytest.raises(PathTimeError) as caught:
            model(normal(3, 2), t)
        one_line(caught.value)
    assert network.calls == 0


def test_clock_is_computed_in_float64():
    """999 (1 - t) loses six digits if t passes through float32 first."""
    spy, t = Spy(), 0.9999123456789
    model = Model(spy, "rectified", clock=lambda t: 1e6 * (1.0 - t))
    exact = 1e6 * (1.0 - t)
    model(normal(2, 2, dtype=torch.float32), t)
    assert float(spy.t[0]) == torch.tensor(exact, dtype=torch.float32).item()
    model(normal(2, 2), torch.full((2,), t, dtype=torch.float64))
    assert float(spy.t[0]) == exact


@pytest.mark.parametrize("n", [10, 1000])
@pytest.mark.parametrize("batch", [False, True])
def test_clock_of_steps_hits_the_integers(n, batch):
    spy = Spy()
    model = Model(spy, "vp", "noise", clock=Clock.steps(n))
    for i in range(n):
        t = 1 - i / (n - 1)
        model(normal(1, 2, dtype=torch.float32), torch.tensor([t], dtype=torch.float64) if batch else t)
        assert spy.t.tolist() == [float(i)]
        model(normal(1, 2), t)
        assert float(spy.t) == pytest.approx(i, abs=1e-12)  # float64, from a t that is itself rounded
    assert Clock.steps(n)(1.0) == 0.0
    assert Clock.steps(n)(0.0) == n - 1


def test_clock_of_noise_levels():
    spy = Spy()
    Model(spy, "rectified", clock=Clock.noise_level())(normal(1, 2, dtype=torch.float32), 0.25)
    assert spy.t.tolist() == [750.0]


def test_input_is_scaled():
    spy, x = Spy(), normal(3, 2)
    model = Model(spy, "rectified", "data", scale_input=lambda t: 2.0 + t)
    model(x, 0.5)
    torch.testing.assert_close(spy.x, 2.5 * x)
    model(x, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(spy.x, torch.tensor([2.0, 2.5, 3.0]).double()[:, None] * x)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("batch", [False, True])
def test_edm_preconditioning_is_the_published_one(sigma_data, t, batch):
    """Table 1 of Karras et al.: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)."""

    def network(x, t):
        network.x, network.t = x, t
        return torch.sin(3 * x)

    path, x = fl.paths.EDM(), 10 * normal(3, 2)
    model = Model(network, path, fl.predictions.EDM(sigma_data=sigma_data))
    est = model(x, torch.full((3,), t, dtype=torch.float64) if batch else t)
    sigma = path(t).sigma
    total = sigma**2 + sigma_data**2
    c_skip, c_out = sigma_data**2 / total, sigma * sigma_data / math.sqrt(total)
    c_in, c_noise = 1 / math.sqrt(total), math.log(sigma) / 4
    torch.testing.assert_close(network.x, c_in * x, rtol=1e-12, atol=0)
    torch.testing.assert_close(network.t, torch.full((3,), c_noise, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(est.data, c_skip * x + c_out * torch.sin(3 * c_in * x), rtol=1e-10, atol=1e-13)
    assert torch.equal(model.predict(x, t), torch.sin(3 * network.x))


# Conditions


def test_missing_conditions_are_null():
    spy, x = Spy(), normal(3, 2)
    text = torch.arange(4.0)
    model = Model(spy, "rectified", null={"label": 10, "text": text})
    model(x, 0.5)
    assert spy.cond["label"].tolist() == [10, 10, 10]
    assert spy.cond["label"].dtype == torch.int64
    assert torch.equal(spy.cond["text"], text.expand(3, 4))
    given = torch.tensor([1, 2, 3])
    model(x, 0.5, label=given)
    assert spy.cond["label"] is given
    assert torch.equal(spy.cond["text"], text.expand(3, 4))
    Model(spy, "rectified")(x, 0.5)
    assert spy.cond == {}


# Independence


def test_score_of_a_dependent_model_is_refused_before_the_network_is_called():
    network = Counter(lambda x, t: x)
    model = Model(network, "rectified", independent=False)
    with pytest.raises(DependenceError, match="assume_independent"):
        _ = model(normal(3, 2), 0.5).score
    assert network.calls == 0


@pytest.mark.parametrize("made", ["itself", "converted", "to a score"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dependent_model_has_no_score(prediction, made):
    network, x = Counter(lambda x, t: x), normal(3, 2)
    model = Model(network, "rectified", PREDICTIONS[prediction], independent=False)
    if made != "itself":
        model = convert(model, "vp", "score" if made == "to a score" else None)
    assert not model.independent
    for t in (0.5, torch.full((3,), 0.5)):
        est = model(x, t)
        with pytest.raises(DependenceError, match="assume_independent") as caught:
            _ = est.score
        one_line(caught.value)
        # The flow is still there.
        for quantity in ("data", "noise", "velocity", "v"):
            assert bool(getattr(est, quantity).isfinite().all())


def test_assume_independent():
    gm = mixture()
    x = state(gm, PATHS["rectified"], 0.5)
    exact = gm.model(PATHS["rectified"])
    doubtful = exact.under(independent=False)
    assert not doubtful.independent
    allowed = doubtful.assume_independent()
    assert torch.equal(allowed(x, 0.5).score, exact(x, 0.5).score)
    assert not doubtful.independent
    assert torch.equal(convert(doubtful, prediction="noise").assume_independent()(x, 0.5).score, exact(x, 0.5).score)
    assert convert(allowed, "vp").independent


@pytest.mark.parametrize(
    "solver",
    ["euler_maruyama", "langevin", fl.solvers.DDIM(eta=0.5), fl.solvers.Langevin(lambda t: 1.0)],
    ids=["euler_maruyama", "langevin", "ddim", "langevin of t"],
)
def test_sde_solvers_refuse_before_the_first_call(solver):
    network = Counter(lambda x, t: x)
    model = Model(network, "rectified", independent=False)
    for refused in (model, convert(model, "vp", "noise")):
        with pytest.raises(DependenceError, match="not independent") as caught:
            fl.sample(refused, (2, 3), solver=solver, steps=3)
        one_line(caught.value)
    assert network.calls == 0
    fl.sample(model.assume_independent(), (2, 3), solver=solver, steps=3)
    fl.sample(model, (2, 3), solver="heun", steps=3)
    assert network.calls == 3 + 5


# Conversion


def shared_levels(first, second, n=7):
    """log-SNRs inside both paths' ranges, a little away from the ends."""
    low = max(first.log_snr(0.0), second.log_snr(0.0), -9.5)
    high = min(first.log_snr(1.0), second.log_snr(1.0), 9.5)
    return [low + (high - low) * (k + 0.5) / n for k in range(n)]


def exact_network(gm, path, prediction):
    """A network that counts in path time and gives the exact output of this prediction."""

    def network(x, t):
        rows = []
        for one, s in zip(x, t.tolist()):
            c = path(s)
            data, noise = pair(gm, one[None], c.alpha, c.sigma)
            p, q = weights(prediction, c)
            rows.append(p * data + q * noise)
        return torch.cat(rows)

    return network


def assert_same_estimate(est, expected, tolerance=1e-8):
    for quantity, value in expected.items():
        found = getattr(est, quantity)
        scale = max(float(value.abs().max()), 1.0)
        assert float((found - value).abs().max()) <= tolerance * scale, quantity


def oracle(gm, path, x, t):
    c = path(t)
    data, noise = pair(gm, x, c.alpha, c.sigma)
    wanted = {name: weights(name, c) for name in ("data", "noise", "velocity", "v", "score")}
    return {name: p * data + q * noise for name, (p, q) in wanted.items()}


@pytest.mark.parametrize("target", PATHS)
@pytest.mark.parametrize("source", PATHS)
def test_conversion_of_every_ordered_pair(source, target):
    gm = mixture()
    first, second = PATHS[source], PATHS[target]
    model = convert(gm.model(first), second)
    assert model.path == second
    levels = shared_levels(first, second)
    times = [second.time(level) for level in levels]
    for t in times:
        x = state(gm, second, t, 6)
        assert_same_estimate(model(x, t), oracle(gm, second, x, t))
    batch = torch.tensor(times, dtype=torch.float64)
    x = state(gm, second, batch, len(times))
    parts = [oracle(gm, second, x[i : i + 1], t) for i, t in enumerate(times)]
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    est = model(x, batch)
    for quantity, value in together.items():
        scale = value.abs().clamp(min=1.0)
        assert float(((getattr(est, quantity) - value).abs() / scale).max()) <= 1e-8, quantity


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("problem", MIXTURES)
@pytest.mark.parametrize(
    ("source", "target"), [("rectified", "vp"), ("vp", "edm"), ("edm", "rectified"), ("subvp", "discrete")]
)
def test_conversion_of_every_prediction(prediction, problem, source, target):
    gm = MIXTURES[problem]()
    first, second = PATHS[source], PATHS[target]
    network = exact_network(gm, first, prediction)
    if prediction == "edm":
        # Its own convention scales the input and sets the clock: undo both, as a trained network would have learnt.
        inner = network

        def network(x, t):
            s = first.time(-8.0 * t)
            c = first(s)
            norm = (c.sigma.square() + (0.7 * c.alpha).square()).sqrt()
            return inner(column(norm, x.ndim) * x, s)

    model = convert(Model(network, first, PREDICTIONS[prediction]), second)
    for level in shared_levels(first, second, 4):
        t = second.time(level)
        x = state(gm, second, t, 3)
        expected = oracle(gm, second, x, t)
        assert_same_estimate(model(x, t), expected)
        assert_same_estimate(model(x, torch.full((3,), t, dtype=torch.float64)), expected)


def test_seeds_special_cases():
    """VE from VP: z = x / alpha. Rectified from VE: r = z / (1 + sigma)."""
    spy = Spy()
    vp, ve, rectified = PATHS["vp"], PATHS["ve"], PATHS["rectified"]
    x = normal(3, 2)
    convert(Model(spy, vp), ve)(x, 0.6)
    s = vp.time(ve.log_snr(0.6))
    torch.testing.assert_close(spy.x, x * vp(s).alpha, rtol=1e-10, atol=0)
    convert(Model(spy, rectified), ve)(x, 0.6)
    torch.testing.assert_close(spy.x, x / (1 + ve(0.6).sigma), rtol=1e-10, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("batch", [False, True])
def test_noisier_than_the_source_knows(prediction, batch):
    """The source's data estimate at its noise end is kept, and the noise follows from the state."""
    gm, source, target, t = mixture(), PATHS["vp"], PATHS["rectified"], 1e-3
    assert target.log_snr(t) < source.log_snr(0.0)
    x = state(gm, target, t, 5)
    c, end = target(t), source(0.0)
    inside = x * math.hypot(end.alpha, end.sigma) / math.hypot(c.alpha, c.sigma)
    data = pair(gm, inside, end.alpha, end.sigma)[0]
    noise = (x - c.alpha * data) / c.sigma
    model = convert(convert(gm.model(source), prediction=PREDICTIONS[prediction]), target)
    est = model(x, torch.full((5,), t, dtype=torch.float64) if batch else t)
    expected = {"data": data, "noise": noise, "velocity": data - noise, "score": -noise / c.sigma}
    assert_same_estimate(est, expected, 1e-11)


@pytest.mark.parametrize("source", ["edm", "ve", "discrete"])
@pytest.mark.parametrize("batch", [False, True])
def test_cleaner_than_the_source_knows(source, batch):
    gm, path, target = mixture(), PATHS[source], PATHS["rectified"]
    end = path(1.0)
    t = target.time(path.log_snr(1.0) + 1.0)
    x = state(gm, target, t, 5)
    c = target(t)
    inside = x * math.hypot(end.alpha, end.sigma) / math.hypot(c.alpha, c.sigma)
    data = pair(gm, inside, end.alpha, end.sigma)[0]
    noise = (x - c.alpha * data) / c.sigma
    est = convert(gm.model(path), target)(x, torch.full((5,), t, dtype=torch.float64) if batch else t)
    assert_same_estimate(est, {"data": data, "noise": noise, "velocity": data - noise}, 1e-10)


@pytest.mark.parametrize("source", ["edm", "ve", "discrete"])
@pytest.mark.parametrize("batch", [False, True])
def test_at_the_data_the_pair_of_the_source_is_kept(source, batch):
    """sigma = 0: the noise cannot be recomputed, so the source's own stays, and so does its data."""
    gm, path, target = mixture(), PATHS[source], PATHS["rectified"]
    x, end = gm.sample(5, dtype=torch.float64), path(1.0)
    data, noise = pair(gm, x * math.hypot(end.alpha, end.sigma), end.alpha, end.sigma)
    est = convert(gm.model(path), target)(x, torch.ones(5, dtype=torch.float64) if batch else 1.0)
    assert_same_estimate(est, {"data": data, "noise": noise, "velocity": data - noise}, 1e-8)


@pytest.mark.parametrize("target", PATHS)
@pytest.mark.parametrize("source", PATHS)
def test_converted_ends_are_finite(source, target):
    """An exact model knows its pair at both ends of its own path, so on any path data, noise and v are finite."""
    gm, path = mixture(), PATHS[target]
    model = convert(gm.model(PATHS[source]), path)
    for t in (0.0, 1.0):
        x = state(gm, path, t, 5)
        c = path(t)
        for time in (t, torch.full((5,), t, dtype=torch.float64)):
            est = model(x, time)
            wanted = {"data": est.data, "noise": est.noise, "v": est.v}
            if math.isfinite(c.dsigma):
                wanted["velocity"] = est.velocity
            for quantity, value in wanted.items():
                assert bool(value.isfinite().all()), (quantity, time)
            mixed = c.alpha * est.data + c.sigma * est.noise
            if c.sigma > 0:
                torch.testing.assert_close(mixed, x, rtol=1e-9, atol=1e-9)


def test_raw_outputs_of_a_converted_model():
    gm, first, second = mixture(), PATHS["rectified"], PATHS["vp"]
    x = state(gm, second, 0.4)
    data, noise = pair(gm, x, *second(0.4)[:2])
    for name, prediction in PREDICTIONS.items():
        model = convert(gm.model(first), path="vp", prediction=prediction)
        assert model.prediction == prediction
        p, q = weights(name, second(0.4))
        torch.testing.assert_close(model.predict(x, 0.4), p * data + q * noise, rtol=1e-9, atol=1e-9)


def test_the_pair_is_carried_not_the_raw_output():
    """At the data a noise prediction says nothing of the noise's partner; the converted model knows the pair still."""
    gm = mixture()
    model = convert(gm.model(PATHS["rectified"]), "cosine", "data")
    x = gm.sample(4, dtype=torch.float64)
    for t in (1.0, torch.ones(4, dtype=torch.float64)):
        assert bool(model(x, t).noise.isfinite().all())
        assert bool(model(x, t).velocity.isfinite().all())


def test_converting_a_converted_model_forgets_the_way():
    gm = mixture()
    direct = convert(gm.model(PATHS["rectified"]), PATHS["edm"], "noise")
    # VP's narrower range in between would lose the ends, were the conversions stacked.
    around = convert(
        convert(convert(gm.model(PATHS["rectified"]), PATHS["ve"]), PATHS["discrete"], "v"), "edm", "noise"
    )
    for t in (0.0, 0.3, 1.0):
        x = state(gm, PATHS["edm"], t)
        for quantity in ("data", "noise", "velocity"):
            assert torch.equal(getattr(direct(x, t), quantity), getattr(around(x, t), quantity))
        assert torch.equal(direct.predict(x, t), around.predict(x, t))


def test_there_and_back_is_the_model_itself():
    gm = mixture()
    back = convert(convert(gm.model(PATHS["vp"]), "rectified"), "vp")
    x = state(gm, PATHS["vp"], 0.3)
    assert torch.equal(back(x, 0.3).velocity, gm.model(PATHS["vp"])(x, 0.3).velocity)


def test_prediction_of_a_converted_model_does_not_change_its_network_call():
    spy, x = Spy(), normal(3, 2)
    source = Model(spy, "rectified", clock=Clock.noise_level(), null={"label": 3})
    model = convert(source, "vp", "noise")
    model(x, 0.4)
    s = PATHS["rectified"].time(PATHS["vp"].log_snr(0.4))
    assert float(spy.t[0]) == pytest.approx(1000 * (1 - s), rel=1e-12)
    assert spy.cond["label"].tolist() == [3, 3, 3]
    assert model.null == {"label": 3}


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("target", ["vp", "edm", "rectified"])
def test_gradient_flows_to_the_shared_network(target, batch):
    network = Net(dtype=torch.float64)
    source = Model(network, "rectified")
    model = convert(source, target, "noise")
    assert model.network is network
    assert {id(p) for p in model.parameters()} == {id(p) for p in network.parameters()}
    x = normal(5, 2)
    t = PATHS[target].time(0.5)
    out = model.predict(x, torch.full((5,), t, dtype=torch.float64) if batch else t)
    out.square().sum().backward()
    analytic = network.outer.bias.grad[0].item()
    assert all(bool((p.grad != 0).any()) for p in network.parameters())

    def loss(step):
        with torch.no_grad():
            network.outer.bias[0] += step
            value = float(model.predict(x, t).square().sum())
            network.outer.bias[0] -= step
        return value

    assert (loss(1e-6) - loss(-1e-6)) / 2e-6 == pytest.approx(analytic, rel=1e-6)


def test_with_network_replaces_it_in_every_notation():
    one, two, x = Net(seed=0), Net(seed=9), normal(4, 2, dtype=torch.float32)
    for make in (lambda net: Model(net, "rectified"), lambda net: convert(Model(net, "rectified"), "vp", "noise")):
        model = make(one).with_network(two)
        assert model.network is two
        assert torch.equal(model(x, 0.4).data, make(two)(x, 0.4).data)
        assert not torch.equal(model(x, 0.4).data, make(one)(x, 0.4).data)


# Faults of the network and of the arguments


@pytest.mark.parametrize(
    ("network", "word"),
    [
        (lambda x, t: x[:, :1], r"\(3, 1\)"),
        (lambda x, t: x.sum(), r"\(\)"),
        (lambda x, t: (x, t), "tuple"),
        (lambda x, t: None, "NoneType"),
    ],
)
def test_network_that_returns_something_else(network, word):
    for model in (Model(network, "rectified"), convert(Model(network, "rectified"), "vp")):
        with pytest.raises(ShapeError, match=word) as caught:
            model(normal(3, 2), 0.5)
        assert "(3, 2)" in one_line(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Model(3, "rectified"),
        lambda: Model(Spy(), "rectfied"),
        lambda: Model(Spy(), "rectified", "epsilon"),
        lambda: convert(Model(Spy(), "rectified"), "vpp"),
        lambda: convert(Model(Spy(), "rectified"), prediction="eps"),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(OptionError, match="expected") as caught:
        make()
    one_line(caught.value)


# The convention


def test_convention_round_trip():
    convention = Convention(
        PATHS["shifted"],
        predictions.EDM(0.7),
        Clock.steps(1000),
        null={"label": 10},
        independent=False,
        normalisation=Normalisation((0.1, 0.2, 0.3), (2.0, 3.0, 4.0), 0.0, 1.0, 0.4, 0.3),
        shape=(3, 8, 8),
    )
    assert Convention.from_config(json.loads(json.dumps(convention.config()))) == convention
    plain = Model(Spy(), "vp", "v").convention
    assert Convention.from_config(json.loads(json.dumps(plain.config()))) == plain


@pytest.mark.parametrize(
    "convention",
    [
        Convention(PATHS["vp"], predictions.Noise(), clock=lambda t: t),
        Convention(PATHS["vp"], predictions.Noise(), scale_input=lambda t: t),
        Convention(PATHS["vp"], predictions.Noise(), null={"text": torch.zeros(3)}),
        Convention(PATHS["affine"], predictions.Noise()),
    ],
)
def test_conventions_that_are_code_are_not_saved(convention):
    with pytest.raises(OptionError, match="cannot be saved") as caught:
        convention.config()
    one_line(caught.value)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4, 4)])
def test_normalisation_is_per_channel_and_inverted(shape):
    norm = Normalisation((1.0, 2.0, 3.0), (0.5, 4.0, 2.0))
    data = normal(*shape)
    scaled = norm.apply(data)
    for k, (shift, scale) in enumerate(zip(norm.shift, norm.scale)):
        torch.testing.assert_close(scaled[:, k], (data[:, k] - shift) / scale)
    torch.testing.assert_close(norm.invert(scaled), data)
    assert Normalisation().invert(data) is data
    torch.testing.assert_close(Normalisation((1.0,), (2.0,)).invert(data), 2 * data + 1)
