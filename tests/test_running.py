"""The loop itself: plans that are kept, steps that are pure functions, gradients, narrow networks, and bad numbers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import fluvial as fl
from fluvial import plans
from fluvial.errors import NonFiniteError, OptionError
from fluvial.model import Model, Normalisation
from problems import PATHS, Counter, Net, mixture, normal, one_line

ROWS = [name for name in fl.solvers.names() if name != "dopri5"]


def flow(dtype=torch.float32, **options):
    """A network of random weights, taken for the velocity of a rectified flow."""
    return Model(Net(dtype=dtype), "rectified", "velocity", **options)


# Plans


def test_a_plan_is_kept_and_found_again():
    model, solver, times = flow(), fl.solvers.named("unipc"), [0.0, 0.3, 0.6, 1.0]
    assert plans.plan(model, solver, times) is plans.plan(model, fl.solvers.named("unipc"), list(times))
    assert plans.plan(model, solver, times) is not plans.plan(model, solver, [0.0, 0.3, 0.7, 1.0])
    assert plans.plan(model, solver, times) is not plans.plan(model, fl.solvers.named("unipc", steps=3), times)
    for k in range(20):
        plans.plan(model, solver, [0.0, (k + 1) / 30, 1.0])
    assert len(model.__dict__["_plans"]) <= 8


def test_a_kept_plan_is_void_when_the_model_changes():
    noise = normal(4, 2, dtype=torch.float32)
    model = flow()
    before = fl.sample(model, noise, solver="vabm", steps=4)
    model.network = Net(seed=9)
    after = fl.sample(model, noise, solver="vabm", steps=4)
    assert torch.equal(after, fl.sample(Model(Net(seed=9), "rectified"), noise, solver="vabm", steps=4))
    assert not torch.equal(before, after)
    narrow = fl.sample(model.to(torch.bfloat16), noise, solver="vabm", steps=4)
    assert torch.equal(
        narrow, fl.sample(Model(Net(seed=9).to(torch.bfloat16), "rectified"), noise, solver="vabm", steps=4)
    )
    # Copies, and other conventions around the same network, have plans of their own.
    vp = model.under(path=fl.paths.VP())
    assert "_plans" not in vp.__dict__
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "_plans" not in twin.__dict__
        assert fl.sample(twin, noise, solver="vabm", steps=4).equal(narrow)


def test_a_solver_that_cannot_be_hashed_still_runs():
    class Mine(fl.solvers.Heun):
        __hash__ = None  # type: ignore[assignment]

    noise = normal(4, 2, dtype=torch.float32)
    model = flow()
    assert torch.equal(fl.sample(model, noise, solver=Mine(), steps=3), fl.sample(model, noise, solver="heun", steps=3))


@pytest.mark.parametrize("solver", ROWS)
def test_runs_do_not_disturb_one_another(solver):
    """A run within a callback of a run: no state lies in the solver, the plan or the model."""
    model, noise = flow(), normal(4, 2, dtype=torch.float32)
    given = {"solver": fl.solvers.named(solver), "steps": 5, "seed": 3}
    alone = fl.sample(model, noise, **given)
    inner = []
    outer = fl.sample(model, noise, callback=lambda step: inner.append(fl.sample(model, noise, **given)), **given)
    assert torch.equal(outer, alone)
    assert all(torch.equal(x, alone) for x in inner)


@torch.no_grad()
@pytest.mark.parametrize("solver", ROWS)
def test_a_step_compiles_as_one_graph(solver):
    """Every step of the plan, without a graph break, and to the same numbers."""
    torch._dynamo.reset()
    model = flow()
    plan = plans.plan(model, fl.solvers.named(solver), [0.0, 0.3, 0.6, 0.8, 1.0])
    x, memory = normal(4, 2, dtype=torch.float32), ()
    for step in plan[:4]:
        noises = [normal(4, 2, seed=k, dtype=torch.float32) for k in range(len(step.noises))]
        expected, kept, _ = step(x, memory, noises, {})

        def run(x, memory, noises, step=step):
            return step(x, memory, noises, {})[:2]

        compiled = torch.compile(run, fullgraph=True, backend="eager")
        found, found_kept = compiled(x, memory, noises)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert len(found_kept) == len(kept)
        x, memory = expected, [*kept, *memory]


# Gradients


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim", "vabm", "unipc", "dpmpp_2s", "langevin"])
def test_gradients_of_the_samples_are_those_of_finite_differences(solver):
    model = flow(torch.float64)
    noise = normal(3, 2).requires_grad_()
    given = {"solver": solver, "steps": 4, "seed": 0, "differentiable": True}
    fl.sample(model, noise, **given).square().sum().backward()
    way, eps = normal(3, 2, seed=5), 1e-6

    def value(shift):
        return float(fl.sample(model, noise.detach() + shift * way, **given).detach().square().sum())

    numeric = (value(eps) - value(-eps)) / (2 * eps)
    assert float((noise.grad * way).sum()) == pytest.approx(numeric, rel=1e-6)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_without_asking_nothing_is_differentiated():
    x = fl.sample(flow(), normal(3, 2, dtype=torch.float32).requires_grad_(), steps=3)
    assert not x.requires_grad


# Narrow networks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", fl.solvers.names())
def test_narrow_networks_run_in_a_float32_state(solver, dtype):
    """The state is float32 and finite at both ends, and no further from the float32 result than rounding explains."""
    noise = normal(64, 2, dtype=torch.float32)
    given = {"solver": solver, "steps": 6, "seed": 0}
    given |= {"solver": fl.solvers.Dopri5(rtol=0.02, atol=0.02)} if solver == "dopri5" else {}
    wide = fl.sample(flow(), noise, **given)
    tr = fl.sample(Model(Net().to(dtype), "rectified"), noise, record=True, **given)
    assert tr.x.dtype == torch.float32
    assert bool(tr.x.isfinite().all())
    distance = float((tr.samples - wide).square().mean().sqrt() / wide.std())
    assert 0 < distance < (0.04 if dtype == torch.bfloat16 else 0.02)


# Numbers that are not finite


class Breaks:
    """A network that returns nan in one sample from a time on."""

    def __init__(self, after=0.5, value=math.nan):
        self.after, self.value = after, value

    def __call__(self, x, t, label=None):
        out = torch.zeros_like(x)
        if float(t[0]) >= self.after:
            out[1] = self.value
        return out


@pytest.mark.parametrize("solver", ["euler", "heun", "vabm", "langevin", "ddpm"])
def test_a_network_that_breaks_is_named_with_its_step(solver):
    with pytest.raises(NonFiniteError) as caught:
        fl.sample(Model(Breaks(), "rectified"), normal(4, 2), solver=solver, times=[0.0, 0.25, 0.6, 1.0], seed=0)
    message = one_line(caught.value)
    # Heun reaches 0.6 within the step that begins at 0.25.
    assert ("step 1 (t = 0.25" if solver == "heun" else "step 2 (t = 0.6") in message
    assert "the network returned nan in 1 of 4 samples (1) at t = 0.6" in message


def test_infinite_values_guidance_start_and_conditions_are_told_apart():
    big = Model(lambda x, t: torch.full_like(x, 3e38), "rectified")
    with pytest.raises(NonFiniteError, match=r"step 0 .*the state became inf in 4 of 4 samples"):
        fl.sample(big, torch.full((4, 2), 3e38), steps=2)
    start = normal(4, 2)
    start[2, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"the start holds inf in 1 of 4 samples \(2\)"):
        fl.sample(mixture().model(PATHS["rectified"]), start, steps=2)

    def network(x, t, text):
        return x + text

    text = torch.tensor([[0.0], [0.0], [math.nan]])
    with pytest.raises(NonFiniteError, match=r"condition 'text' holds nan in 1 of 3 samples \(2\)"):
        fl.sample(Model(network, "rectified"), normal(3, 2), cond={"text": text}, steps=2)

    def fine(x, t, label):
        return torch.where((label == 3)[:, None], -1.0, 1.0) * torch.full_like(x, 1e308)

    guided = fl.guidance.CFG(scale=9.0, batched=False)
    model = Model(fine, "rectified", null={"label": 3})
    with pytest.raises(NonFiniteError, match="the guidance returned"):
        fl.sample(model, normal(3, 2), cond={"label": torch.arange(3)}, guidance=guided, steps=1)


def test_the_check_costs_no_call_and_can_be_left_out():
    network = Counter(lambda x, t: x)
    fl.sample(Model(network, "rectified"), normal(4, 2), solver="euler", steps=3)
    assert network.calls == 3
    x = fl.sample(Model(Breaks(), "rectified"), normal(4, 2), solver="euler", steps=3, check=False)
    assert bool(x[1].isnan().all())
    assert bool(x[[0, 2, 3]].isfinite().all())


# Starting from a level, there and back


@pytest.mark.parametrize("name", ["rectified", "vp", "edm", "cosine"])
@pytest.mark.parametrize("times", ["uniform", "karras", "flow"])
@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_strength_is_a_noise_level(name, times, strength):
    path, data, noise = PATHS[name], normal(4, 2, seed=1), normal(4, 2)
    norm = Normalisation((1.0,), (2.0,))
    model = mixture().model(path).under(normalisation=norm)
    tr = fl.sample(model, noise, init=data, strength=strength, steps=5, times=times, record=True, solver="euler")
    assert tr.nfe == 5
    c = path(tr.times[0])
    if strength < 1.0:
        assert c.sigma / (c.alpha + c.sigma) == pytest.approx(strength, rel=1e-9)
    else:
        assert tr.times[0] == 0.0
    torch.testing.assert_close(tr.x[0], c.alpha * norm.apply(data) + c.sigma * noise)


def test_strength_keeps_a_list_beyond_its_level():
    model = mixture().model(PATHS["rectified"])
    tr = fl.sample(model, init=normal(4, 2), strength=0.5, times=[0.0, 0.4, 0.7, 1.0], seed=0, record=True)
    assert tr.times == [0.5, 0.7, 1.0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"strength": 0.5}, "strength is 0.5 without init"),
        ({"strength": 0.0, "init": normal(4, 2)}, "strength is 0.0; expected a share of noise above 0"),
        ({"strength": 1.5, "init": normal(4, 2)}, "strength is 1.5"),
        ({"noise": "white"}, "noise 'white'"),
        ({"noise": normal(4, 2)}, "given twice"),
    ],
)
def test_bad_starts(given, words):
    with pytest.raises(OptionError, match=words) as caught:
        fl.sample(mixture().model(PATHS["rectified"]), (4, 2), **given)
    one_line(caught.value)


def test_noise_may_be_given_by_name():
    model, noise = mixture().model(PATHS["rectified"]), normal(4, 2)
    assert torch.equal(fl.sample(model, noise=noise, steps=3), fl.sample(model, noise, steps=3))


@pytest.mark.parametrize("name", ["rectified", "vp"])
@pytest.mark.parametrize("solver", ["heun", "midpoint", "vabm", "dpmpp_2m", "dpmpp_2s", "unipc"])
def test_round_trip_error_falls_with_the_steps(name, solver):
    norm = Normalisation((1.0,), (2.0,))
    model = mixture().model(PATHS[name]).under(normalisation=norm)
    data = norm.invert(mixture().sample(16, seed=0).double())
    errors = []
    for steps in (20, 40, 80):
        trip = fl.sampling.round_trip(model, data, solver=solver, steps=steps)
        assert torch.equal(trip.noise, fl.encode(model, data, solver=solver, steps=steps))
        assert torch.equal(trip.data, fl.decode(model, trip.noise, solver=solver, steps=steps))
        torch.testing.assert_close(trip.error, (trip.data - data).square().mean(1).sqrt())
        errors.append(float(trip.error.square().mean().sqrt()))
    assert errors[0] > 1.9 * errors[1] > 1.9**2 * errors[2]
    with pytest.raises(OptionError, match="stochastic"):
        fl.decode(model, trip.noise, solver="ddpm")


# A budget


@pytest.mark.parametrize("budget", [1, 2, 4, 11, 12, 40])
@pytest.mark.parametrize("name", ["rectified", "vp", "ve"])
def test_a_budget_is_kept_by_the_recommended_solver(name, budget):
    network = Counter(lambda x, t: x)
    model = Model(network, PATHS[name], "v")
    tr = fl.sample(model, normal(3, 2), nfe=budget, record=True)
    assert tr.nfe == network.calls == budget
    solver, grid = fl.solvers.recommended(budget)
    assert torch.equal(tr.x, fl.sample(model, normal(3, 2), solver=solver, steps=budget, times=grid, record=True).x)
    own = fl.sample(model, normal(3, 2), nfe=budget, times="log_snr", record=True)
    assert own.times == fl.grids.LogSNR().times(PATHS[name], budget)


@pytest.mark.parametrize("name", ["noise", "score"])
def test_a_network_of_the_noise_is_not_corrected_by_what_it_says_in_pure_noise(name):
    """Its data estimate errs by sigma/alpha: an error of 3 % in the noise is one of 450 % in the data at t = 0."""
    path, noise = PATHS["vp"], normal(200, 2)
    exact = mixture().model(path)

    def network(x, t, **cond):
        found = exact(x, t, **cond)
        wrong = found.noise + 0.03 * (7.0 * x.flip(1)).sin()
        return wrong if name == "noise" else -wrong / path(t).sigma[:, None]

    model = Model(network, path, name)
    truth = fl.sample(exact, noise, solver="vabm", steps=400, times="log_snr")
    for budget in (4, 6, 8, 16):
        found, seen = fl.sample(model, noise, nfe=budget), fl.convert(model, "rectified")
        solver, grid = fl.solvers.recommended(budget, name)
        chosen = fl.sample(seen, noise, solver=solver, steps=budget, times=grid)
        torch.testing.assert_close(fl.sample(seen, noise, nfe=budget), chosen, rtol=0, atol=0)
        solver, grid = fl.solvers.recommended(budget)
        corrected = fl.sample(model, noise, solver=solver, steps=budget, times=grid)
        assert float((found - truth).norm()) < 0.9 * float((corrected - truth).norm())
    assert fl.solvers.recommended(8, "noise") == fl.solvers.recommended(8, fl.predictions.Noise())
    assert fl.solvers.recommended(8, "v") == fl.solvers.recommended(8)


def test_a_budget_and_steps_do_not_go_together():
    for given in ({"steps": 4}, {"solver": "euler"}):
        with pytest.raises(OptionError, match="nfe is 4 together with solver or steps"):
            fl.sample(mixture().model(PATHS["rectified"]), (3, 2), nfe=4, **given)
    for bad in (0, True, 2.0):
        with pytest.raises(OptionError, match="nfe is"):
            fl.sample(mixture().model(PATHS["rectified"]), (3, 2), nfe=bad)


def test_the_recommended_is_better_than_the_default_for_as_many_calls():
    """On an exact mixture, from the same noise, by a factor: what it is recommended for."""
    for name in ("rectified", "vp", "edm"):
        model, noise = mixture().model(PATHS[name]), normal(64, 2)
        truth = fl.sample(model, noise, solver="vabm", steps=400, times="log_snr")
        for budget in (7, 11, 15, 31):
            found = fl.sample(model, noise, nfe=budget)
            heun = fl.sample(model, noise, solver="heun", steps=(budget + 1) // 2)
            assert float((found - truth).norm()) < 0.5 * float((heun - truth).norm())


@pytest.mark.parametrize("along", ["vp", "cosine", "rectified"])
@pytest.mark.parametrize("name", ["rectified", "edm"])
def test_along_another_path_backwards_too(name, along):
    """There and back on inner times by the same clock: of second order, and with every call made."""
    model, network = mixture().model(PATHS[name]), Counter(lambda x, t: x)
    lo, hi = (PATHS[name].time(level) for level in (-6.0, 4.0))
    x = PATHS[name](lo).sigma * normal(16, 2)
    solver, errors = fl.solvers.Heun(along=PATHS[along]), []
    for steps in (40, 80):
        times = [lo + (hi - lo) * k / steps for k in range(steps + 1)]
        there = fl.sampling.integrate(model, x, times, solver=solver)
        back = fl.sampling.integrate(model, there, times[::-1], solver=solver)
        errors.append(float((back - x).norm() / x.norm()))
    assert errors[0] > 3.4 * errors[1]
    fl.sampling.integrate(Model(network, PATHS[name], "v"), x, times[::-1], solver=solver)
    assert network.calls == 2 * 80
