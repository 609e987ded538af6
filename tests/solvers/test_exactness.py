"""Cases in which a solver must be exact, the fewest steps, and the number of network calls."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fluvial as fl
from fluvial.errors import OptionError, PathTimeError
from fluvial.exact import Empirical
from fluvial.model import Model, convert
from problems import PATHS, Counter, mixture, normal, one_line, state

SOLVERS = fl.solvers.names()
DETERMINISTIC = [name for name in SOLVERS if not fl.solvers.named(name).stochastic]
# Those that make one call and so land on the first data estimate, in a single step.
SINGLE = [name for name in SOLVERS if name not in ("midpoint", "rk4", "dopri5")]
all_paths = pytest.mark.parametrize("name", PATHS)


@all_paths
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_point_mass_is_reached_from_anywhere(name, solver, steps):
    """One data point: the last data estimate is that point, whatever came before."""
    point = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    model = Empirical(point).model(PATHS[name])
    x = fl.sample(model, normal(8, 2), solver=solver, steps=steps, seed=0)
    torch.testing.assert_close(x, point.expand(8, 2), rtol=0, atol=1e-12)


@all_paths
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ddim_is_exact_at_every_time_on_a_point_mass(name, steps):
    """The pair does not change along the way, so mixing it anew is the solution: alpha(t) data + sigma(t) noise."""
    path, point, noise = PATHS[name], torch.tensor([0.3, -1.2], dtype=torch.float64), normal(8, 2)
    start = 0.02
    c = path(start)
    times = [start + (0.97 - start) * k / steps for k in range(steps + 1)]
    tr = fl.sample(
        Empirical(point[None]).model(path),
        state=c.alpha * point + c.sigma * noise,
        solver="ddim",
        times=times,
        record=True,
    )
    for t, x in zip(times, tr.x):
        c = path(t)
        torch.testing.assert_close(x, c.alpha * point + c.sigma * noise, rtol=1e-10, atol=1e-10)


def straight_flow(shift, stretch):
    """data = stretch * noise + shift, coupled so: the rectified ODE runs on straight lines at constant speed."""

    def velocity(x, t):
        t = t[:, None]
        noise = (x - t * shift) / (1 + t * (stretch - 1))
        return shift + (stretch - 1) * noise

    return Model(velocity, "rectified", independent=False)


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("stretch", [1.0, 0.25, 3.0])
def test_straight_flow_is_exact_in_any_number_of_steps(solver, steps, stretch):
    shift, noise = torch.tensor([2.0, -1.0], dtype=torch.float64), normal(8, 2)
    model = straight_flow(shift, stretch)
    tr = fl.sample(model, noise, solver=solver, steps=steps, record=True)
    torch.testing.assert_close(tr.samples, stretch * noise + shift, rtol=1e-12, atol=1e-12)
    for t, x in zip(tr.times, tr.x):
        torch.testing.assert_close(x, (1 - t) * noise + t * (stretch * noise + shift), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cosine", "vp", "subvp", "edm", "ve", "discrete", "shifted"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_straight_flow_stays_exact_for_ddim_on_any_path(name, steps):
    """Natural Euler maps exactly between paths; plain Euler does not."""
    path, noise = PATHS[name], normal(8, 2)
    shift = torch.tensor([2.0, -1.0], dtype=torch.float64)
    model, start = convert(straight_flow(shift, 0.25), path), path.time(-6.0)
    data, c = 0.25 * noise + shift, path(start)
    times = [start + (1 - start) * k / steps for k in range(steps)] + [1.0]
    given = {"state": c.alpha * data + c.sigma * noise, "times": times}
    torch.testing.assert_close(fl.sample(model, solver="ddim", **given), data, rtol=1e-9, atol=1e-9)
    if steps > 1:
        assert float((fl.sample(model, solver="euler", **given) - data).abs().max()) > 1e-6


def test_standard_normal_does_not_move_on_a_variance_preserving_path():
    gm = fl.exact.GaussianMixture(torch.zeros(1, 2), torch.ones(1), torch.ones(1))
    noise = normal(8, 2)
    for name in ("vp", "cosine", "discrete"):
        for solver in ("euler", "heun"):
            tr = fl.sample(gm.model(PATHS[name]), state=noise, solver=solver, times=[0.0, 0.3, 0.9], record=True)
            torch.testing.assert_close(tr.x, noise.expand(3, 8, 2), rtol=1e-12, atol=1e-12)


@all_paths
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("times", ["uniform", "karras", "log_snr"])
def test_few_steps_are_finite(name, solver, times):
    model = mixture().model(PATHS[name])
    for steps in (1, 2, 3):
        x = fl.sample(model, (16, 2), solver=solver, steps=steps, times=times, seed=0)
        assert bool(x.isfinite().all())
        # Along the path, not its clock: however few the steps, the samples stay where the data are.
        assert solver != "ddim" or float(x.abs().max()) < 6


@all_paths
def test_one_step_is_the_data_estimate_at_the_start(name):
    path, noise = PATHS[name], normal(8, 2)
    model = mixture().model(path)
    expected = model(path(0.0).sigma * noise, 0.0).data
    for solver in SINGLE:
        x = fl.sample(model, noise, solver=solver, steps=1, seed=0)
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


# Network calls

# A landing step makes no call at the data.
CALLS = {
    "heun": lambda steps: 2 * steps - 1,
    "churn": lambda steps: 2 * steps - 1,
    "midpoint": lambda steps: 2 * steps,
    "rk4": lambda steps: 4 * steps - 1,
}


@all_paths
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_calls_are_counted_and_none_is_made_at_the_data(name, solver, steps):
    path = PATHS[name]
    network = Counter(lambda x, t: x)
    tr = fl.sample(Model(network, path, "v"), normal(3, 2), solver=solver, steps=steps, seed=0, record=True)
    assert tr.nfe == network.calls
    if solver != "dopri5":
        assert tr.nfe == fl.sampling.nfe(Model(network, path, "v"), solver, steps)
    if solver in CALLS:
        assert tr.nfe == CALLS[solver](steps)
    elif fl.solvers.named(solver).stages == 1:
        assert tr.nfe == steps
    if solver != "dopri5":  # which goes to the last level there is, and lands from there
        assert max(network.times) < 1.0
    assert all(path(t).sigma > 0 for t in network.times)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("dopri5", "restart")])
def test_a_run_that_ends_before_the_data_makes_every_call(solver):
    network = Counter(lambda x, t: x)
    tr = fl.sample(Model(network, "vp", "v"), normal(3, 2), solver=solver, times=[0.0, 0.4, 0.9], seed=0, record=True)
    assert tr.nfe == network.calls == 2 * fl.solvers.named(solver).stages


def test_heun_in_its_own_words():
    """Algorithm 1 of Karras et al., by hand, on EDM: sigma falls, d = (x - D)/sigma, and Euler at the last step."""
    path, gm = PATHS["edm"], mixture()
    model, noise = gm.model(path), normal(8, 2)
    sigmas = [*(path(t).sigma for t in fl.grids.Karras().times(path, 6)[:-1]), 0.0]
    # The trapezoidal rule depends on the clock, and the paper's is sigma: here a path linear in it.
    found = fl.sample(gm.model(fl.paths.EDM(rho=1.0)), noise, solver="heun", times=fl.grids.Karras(), steps=6)
    x = sigmas[0] * noise

    def slope(x, sigma):
        return (x - model(x, path.time(-2 * math.log(sigma))).data) / sigma

    for now, then in itertools.pairwise(sigmas):
        d = slope(x, now)
        trial = x + (then - now) * d
        x = trial if then == 0 else x + (then - now) * (d + slope(trial, then)) / 2
    torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-8)


def test_euler_in_its_own_words():
    gm, path = mixture(), PATHS["rectified"]
    model, x = gm.model(path), normal(8, 2)
    found = fl.sample(model, x, solver="euler", steps=5)
    for k in range(5):
        x = x + 0.2 * model(x, k / 5).velocity
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["rectified", "vp", "edm"])
def test_ddim_in_its_own_words(name):
    path = PATHS[name]
    model = mixture().model(path)
    x = path(0.0).sigma * normal(8, 2)
    tr = fl.sample(model, normal(8, 2), solver="ddim", steps=5, record=True)
    for k in range(4):
        x = model(x, k / 5).at((k + 1) / 5)
        torch.testing.assert_close(tr.x[k + 1], x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tr.samples, model(x, 0.8).data, rtol=1e-9, atol=1e-9)


def test_impossible_start_is_said_before_the_first_call():
    """A noise prediction says nothing at pure noise: no ODE can leave it."""
    network = Counter(lambda x, t: x)
    for solver in SOLVERS:
        with pytest.raises(PathTimeError, match="noise end") as caught:
            fl.sample(Model(network, "rectified", "noise"), (3, 2), solver=solver, steps=4)
        one_line(caught.value)
    assert network.calls == 0
    fl.sample(Model(network, "rectified", "noise"), (3, 2), times=[0.01, 0.5, 1.0])
    assert network.calls == 3


def test_float64_stays_and_narrow_types_are_widened():
    model = mixture().model(PATHS["rectified"])
    x = state(mixture(), PATHS["rectified"], 0.2)
    for dtype, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ]:
        for solver in SOLVERS:
            assert fl.sample(model, x.to(dtype), solver=solver, steps=2, seed=0).dtype == expected


# Names and options


def test_solvers_by_name():
    assert fl.solvers.named("ddim", eta=0.5) == fl.solvers.DDIM(eta=0.5)
    assert fl.solvers.named("langevin", gamma=2.0) == fl.solvers.Langevin(2.0)
    own = fl.solvers.Heun()
    assert fl.solvers.named(own) is own


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fl.solvers.named("huen"), ["huen", "heun", "ddim", "euler_maruyama", "langevin"]),
        (lambda: fl.solvers.named("ddim", etta=1.0), ["etta", "eta"]),
        (lambda: fl.solvers.named("heun", eta=1.0), ["heun", "eta"]),
        (lambda: fl.solvers.named(fl.solvers.DDIM(), eta=1.0), ["eta"]),
        (lambda: fl.solvers.DDIM(eta=1.5), ["eta", "1.5"]),
        (lambda: fl.solvers.DDIM(eta=-0.1), ["eta"]),
        (lambda: fl.solvers.DDIM(eta=math.nan), ["eta"]),
        (lambda: fl.solvers.Langevin(-1.0), ["gamma", "-1.0"]),
        (lambda: fl.solvers.Langevin(math.inf), ["gamma"]),
        (lambda: fl.solvers.Langevin("much"), ["gamma", "much"]),
        (lambda: fl.solvers.EulerMaruyama(-1.0), ["kappa"]),
        (lambda: fl.solvers.EulerMaruyama(math.nan), ["kappa"]),
    ],
)
def test_bad_options(make, words):
    with pytest.raises(OptionError) as caught:
        make()
    message = one_line(caught.value)
    assert all(word in message for word in words), message


def test_bad_rate_of_a_function_names_the_time():
    network = Counter(lambda x, t: x)
    solver = fl.solvers.Langevin(lambda t: 1 / (t - 0.5) if t != 0.5 else math.inf)
    with pytest.raises(OptionError, match=r"gamma is -2.0 at t = 0") as caught:
        fl.sample(Model(network, "vp"), (3, 2), solver=solver, steps=4)
    one_line(caught.value)
    assert network.calls == 0
