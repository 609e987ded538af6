"""The 2x2 solve: every prediction to every quantity, at all times, with signs checked against log densities."""

from __future__ import annotations

import math

import pytest
import torch

from fluvial import predictions
from fluvial.errors import OptionError, PathTimeError
from fluvial.model import Model
from fluvial.predictions import Flow, Score, solve
from problems import (
    MIXTURES,
    PATHS,
    PREDICTIONS,
    column,
    log_density,
    mixture,
    normal,
    one_line,
    pair,
    state,
    weights,
)

INSIDE = [0.03, 0.2, 0.5, 0.81, 0.97]
all_paths = pytest.mark.parametrize("name", PATHS)
given_and_wanted = [(g, w) for g in PREDICTIONS for w in PREDICTIONS]


def mixed(p, q, data, noise):
    return p * data + q * noise


def assert_equal_to(actual, expected, tolerance=1e-9):
    """Within tolerance of the size of the tensor."""
    scale = max(float(expected.abs().max()), 1.0)
    assert actual.dtype == expected.dtype
    assert float((actual - expected).abs().max()) <= tolerance * scale


def model_giving(out, path, prediction):
    """A model whose network always returns this tensor."""
    return Model(lambda x, t: out, path, prediction)


@pytest.mark.parametrize("problem", MIXTURES)
@all_paths
def test_every_prediction_gives_every_quantity(name, problem):
    path, gm = PATHS[name], MIXTURES[problem]()
    for t in INSIDE:
        c, x = path(t), state(gm, path, t)
        data, noise = pair(gm, x, c.alpha, c.sigma)
        assert_equal_to(c.alpha * data + c.sigma * noise, x, 1e-13)
        for given, wanted in given_and_wanted:
            out = mixed(*weights(given, c), data, noise)
            expected = mixed(*weights(wanted, c), data, noise)
            est = model_giving(out, path, PREDICTIONS[given])(x, t)
            assert_equal_to(est.predict(PREDICTIONS[wanted]), expected)
            if wanted != "edm":
                assert torch.equal(getattr(est, wanted), est.predict(PREDICTIONS[wanted]))


@all_paths
def test_times_of_a_batch_are_each_their_own(name):
    path, gm, t = PATHS[name], mixture(), torch.tensor(INSIDE, dtype=torch.float64)
    x = state(gm, path, t, len(t))
    parts = [pair(gm, x[i : i + 1], *path(float(s))[:2]) for i, s in enumerate(t)]
    data, noise = (torch.cat(end) for end in zip(*parts))

    def target(which):
        rows = [weights(which, path(float(s))) for s in t]
        p, q = (column(torch.tensor(w, dtype=torch.float64), 2) for w in zip(*rows))
        return mixed(p, q, data, noise)

    for given, wanted in given_and_wanted:
        est = model_giving(target(given), path, PREDICTIONS[given])(x, t)
        assert_equal_to(est.predict(PREDICTIONS[wanted]), target(wanted))


# The ends


def exists(c, given, wanted):
    """Whether x = alpha data + sigma noise and the output determine what is asked for; by the two equations alone."""
    (p, q), (wp, wq) = weights(given, c), weights(wanted, c)
    if given == wanted:
        return True
    if not (math.isfinite(wp) and math.isfinite(wq)):
        return False
    if c.sigma == 0.0:
        return wq == 0.0 or (math.isfinite(q) and q != 0.0)
    if c.alpha == 0.0:
        return wp == 0.0 or (math.isfinite(p) and p != 0.0)
    return True


def at_end(name, t, given):
    """A state at this end, a network's output there, and the pair, which may be anything."""
    c = PATHS[name](t)
    data, noise = normal(5, 3, seed=1), normal(5, 3, seed=2)
    p, q = weights(given, c)
    finite = math.isfinite(p) and math.isfinite(q)
    out = mixed(p, q, data, noise) if finite else normal(5, 3, seed=3)
    return c, mixed(c.alpha, c.sigma, data, noise), out, data, noise


def expected_at_end(c, given, wanted, out, data, noise):
    return out if given == wanted else mixed(*weights(wanted, c), data, noise)


@pytest.mark.parametrize("t", [0.0, 1.0])
@all_paths
def test_ends_at_a_float(name, t):
    for given, wanted in given_and_wanted:
        c, x, out, data, noise = at_end(name, t, given)
        est = model_giving(out, PATHS[name], PREDICTIONS[given])(x, t)
        if exists(c, given, wanted):
            assert_equal_to(
                est.predict(PREDICTIONS[wanted]), expected_at_end(c, given, wanted, out, data, noise), 1e-11
            )
        else:
            with pytest.raises(PathTimeError) as caught:
                est.predict(PREDICTIONS[wanted])
            message = one_line(caught.value)
            assert message.startswith(f"the {wanted} does not exist"), message
            assert ("noise end" if t == 0.0 else "data end") in message


@pytest.mark.parametrize("t", [0.0, 1.0])
@all_paths
def test_what_does_not_exist_at_a_tensor_is_not_finite(name, t):
    for given, wanted in given_and_wanted:
        c, x, out, _, _ = at_end(name, t, given)
        if not exists(c, given, wanted):
            est = model_giving(out, PATHS[name], PREDICTIONS[given])(x, torch.full((5,), t))
            assert not bool(est.predict(PREDICTIONS[wanted]).isfinite().any()), (given, wanted)


@pytest.mark.parametrize("t", [0.0, 1.0])
@all_paths
def test_what_exists_at_a_tensor_is_finite(name, t):
    missed = []
    for given, wanted in given_and_wanted:
        c, x, out, data, noise = at_end(name, t, given)
        if exists(c, given, wanted):
            est = model_giving(out, PATHS[name], PREDICTIONS[given])(x, torch.full((5,), t, dtype=torch.float64))
            expected = expected_at_end(c, given, wanted, out, data, noise)
            if not torch.allclose(est.predict(PREDICTIONS[wanted]), expected, rtol=1e-11, atol=1e-11):
                missed.append(f"{given} -> {wanted}")
    assert not missed


def test_what_was_predicted_comes_back_untouched():
    x, out = normal(4, 2), normal(4, 2, seed=1)
    for prediction in PREDICTIONS.values():
        for t in (0.0, 0.5, 1.0, torch.full((4,), 1.0)):
            assert model_giving(out, PATHS["vp"], prediction)(x, t).predict(prediction) is out


def test_solve_is_lazy():
    """Noise cannot be had at the data from a data prediction, and asking for the data does not ask for the noise."""
    x, out = normal(4, 2), normal(4, 2, seed=1)
    est = model_giving(out, PATHS["rectified"], "data")(x, 1.0)
    assert torch.equal(est.data, out)
    for quantity in ("noise", "velocity", "v", "score"):
        with pytest.raises(PathTimeError):
            getattr(est, quantity)


# at(s): the natural Euler step


@all_paths
def test_at_is_the_ddim_step(name):
    path, gm = PATHS[name], mixture()
    x = state(gm, path, 0.4)
    data, noise = pair(gm, x, *path(0.4)[:2])
    for given in PREDICTIONS:
        est = model_giving(mixed(*weights(given, path(0.4)), data, noise), path, PREDICTIONS[given])(x, 0.4)
        for s in (0.0, 0.2, 0.4, 0.7, 1.0):
            expected = mixed(*path(s)[:2], data, noise)
            assert_equal_to(est.at(s), expected, 1e-10)
            assert_equal_to(est.at(torch.full((16,), s, dtype=torch.float64)), expected, 1e-10)
    # Song et al. 2021, equation 12 with sigma = 0, in the paper's own terms.
    if name in ("vp", "discrete", "cosine"):
        now, then = (torch.tensor(path(s).alpha ** 2, dtype=torch.float64) for s in (0.4, 0.7))
        predicted = (x - (1 - now).sqrt() * noise) / now.sqrt()
        published = then.sqrt() * predicted + (1 - then).sqrt() * noise
        assert_equal_to(model_giving(noise, path, "noise")(x, 0.4).at(0.7), published, 1e-12)


def test_at_takes_other_times_for_a_batch():
    path, gm = PATHS["cosine"], mixture()
    t, s = torch.tensor([0.2, 0.5, 0.7]).double(), torch.tensor([0.3, 0.6, 1.0]).double()
    x = state(gm, path, t, 3)
    together = gm.model(path)(x, t).at(s)
    for i in range(3):
        alone = gm.model(path)(x[i : i + 1], float(t[i])).at(float(s[i]))
        assert_equal_to(together[i : i + 1], alone, 1e-11)


def test_at_leaves_the_noise_end():
    """From pure noise a velocity gives the pair, so the first step is possible; a noise prediction does not."""
    x, out = normal(4, 2), normal(4, 2, seed=1)
    torch.testing.assert_close(model_giving(out, PATHS["rectified"], "velocity")(x, 0.0).at(0.25), x + 0.25 * out)
    with pytest.raises(PathTimeError, match="the state does not exist"):
        model_giving(out, PATHS["rectified"], "noise")(x, 0.0).at(0.25)


# Signs: what a wrong formula that is wrong everywhere alike would not escape.


def score_error(noise_of, path, t):
    """The largest relative distance of the model's score from the gradient of the log density."""
    gm = mixture()
    c = path(t)
    x = state(gm, path, t).requires_grad_()
    (score,) = torch.autograd.grad(log_density(gm, x, c.alpha, c.sigma).sum(), x)
    x = x.detach()
    model = Model(lambda x, t: noise_of(pair(gm, x, c.alpha, c.sigma)[1]), path, "noise")
    return float((model(x, t).score - score).abs().max() / score.abs().max())


@all_paths
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_score_is_the_gradient_of_the_log_density(name, t):
    assert score_error(lambda noise: noise, PATHS[name], t) < 1e-9


def test_planted_wrong_signs_are_caught(monkeypatch):
    assert score_error(lambda noise: -noise, PATHS["vp"], 0.5) > 1.0
    monkeypatch.setattr(Score, "weights", lambda self, c: (0.0, 1.0 / c.sigma))
    assert score_error(lambda noise: noise, PATHS["vp"], 0.5) > 1.0


@all_paths
@pytest.mark.parametrize("t", [0.15, 0.5, 0.85])
def test_velocity_transports_the_density(name, t):
    """The continuity equation d/dt log p + v . grad log p + div v = 0, which fixes the velocity's sign and size."""
    path, gm = PATHS[name], mixture()
    x = state(gm, path, t, 8).requires_grad_()
    c, h = path(t), 1e-5
    velocity = gm.model(path)(x, t).velocity
    divergence = sum(torch.autograd.grad(velocity[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    (score,) = torch.autograd.grad(log_density(gm, x, c.alpha, c.sigma).sum(), x)
    later, sooner = (log_density(gm, x.detach(), *path(s)[:2]) for s in (t + h, t - h))
    change = (later - sooner) / (2 * h)
    residual = change + (velocity.detach() * score).sum(1) + divergence
    scale = max(float(change.abs().max()), float(divergence.abs().max()))
    assert float(residual.abs().max()) < 1e-6 * scale


def test_score_on_the_rectified_path_in_its_own_terms():
    gm, path = mixture(), PATHS["rectified"]
    x = state(gm, path, 0.3)
    est = gm.model(path)(x, 0.3)
    assert_equal_to(est.score, (0.3 * est.velocity - x) / 0.7, 1e-12)


# The velocity towards the noise


@all_paths
def test_flow_is_the_velocity_towards_the_noise(name):
    """Given the flow of a pair, everything else comes back; and asked for, it is minus the velocity, ends included."""
    path, gm = PATHS[name], mixture()
    for t in (0.0, *INSIDE, 1.0):
        c = path(t)
        velocity = (c.dalpha, c.dsigma)
        if not all(map(math.isfinite, velocity)):
            continue
        data, noise = normal(5, 3, seed=1), normal(5, 3, seed=2)
        x, flow = mixed(c.alpha, c.sigma, data, noise), -mixed(*velocity, data, noise)
        assert_equal_to(model_giving(flow, path, "flow")(x, t).velocity, -flow, 1e-11)
        assert_equal_to(model_giving(-flow, path, "velocity")(x, t).predict(Flow()), flow, 1e-11)
    times = torch.tensor(INSIDE, dtype=torch.float64)
    x = state(gm, path, times, len(times))
    exact = gm.model(path)(x, times)
    for wanted in PREDICTIONS:
        est = model_giving(exact.predict(Flow()), path, "flow")(x, times)
        assert_equal_to(est.predict(PREDICTIONS[wanted]), exact.predict(PREDICTIONS[wanted]))


def test_flow_in_the_terms_of_a_rectified_network():
    """noise - data, from which x - sigma out is the data and x + (1 - sigma) out the noise (Esser et al. 2024)."""
    data, noise, level = normal(4, 2), normal(4, 2, seed=1), 0.7
    x = (1 - level) * data + level * noise
    est = model_giving(noise - data, PATHS["rectified"], "flow")(x, 1 - level)
    assert_equal_to(est.data, data, 1e-14)
    assert_equal_to(est.noise, noise, 1e-14)
    assert predictions.from_config(Flow().config()) == predictions.named("flow") == Flow()


# Names


def test_predictions_by_name_and_from_json():
    for name in PREDICTIONS:
        prediction = predictions.named(name)
        assert prediction.name == name
        assert predictions.named(prediction) is prediction
        assert predictions.from_config(prediction.config()) == prediction
    assert predictions.from_config(predictions.EDM(0.7).config()) == predictions.EDM(0.7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: predictions.named("epsilon"),
        lambda: predictions.from_config({"name": "epsilon"}),
        lambda: Model(lambda x, t: x, "rectified", "velocty"),
    ],
)
def test_unknown_prediction_lists_the_known_ones(make):
    with pytest.raises(OptionError, match="data, edm, flow, noise, score, v, velocity") as caught:
        make()
    one_line(caught.value)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.nan])
def test_bad_sigma_data(sigma_data):
    with pytest.raises(OptionError, match="sigma_data"):
        predictions.EDM(sigma_data)


def test_solve_refuses_parallel_equations():
    """An output that is the state again says nothing more about the pair."""
    c = PATHS["rectified"](0.25)
    with pytest.raises(PathTimeError):
        solve(c, (c.alpha, c.sigma), (1.0, 0.0), "data")
