"""`sample`: one network in three notations, batches, starts, units, records, and refusals."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fluvial as fl
from fluvial import random
from fluvial.errors import FluvialError, OptionError, PathTimeError, ShapeError
from fluvial.model import Model, Normalisation, convert
from problems import PATHS, Counter, Net, mixture, normal, one_line

HERE = Path(__file__).parent
SOLVERS = ["euler", "heun", "ddim", "langevin", "euler_maruyama", fl.solvers.DDIM(eta=0.7)]
solvers = pytest.mark.parametrize("solver", SOLVERS, ids=str)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def flow(dtype=torch.float32, **options):
    """A network of random weights, taken for the velocity of a rectified flow."""
    return Model(Net(dtype=dtype), "rectified", "velocity", **options)


# One network in three notations


def in_notation(model, path, noise, levels, lands, solver="ddim"):
    """The samples in this notation, from the rectified state `noise` at the first level, brought to the path."""
    times = [path.time(level) for level in levels]
    here, c = PATHS["rectified"](PATHS["rectified"].time(levels[0])), path(times[0])
    x = noise * math.hypot(c.alpha, c.sigma) / math.hypot(here.alpha, here.sigma)
    end = fl.sample(convert(model, path), state=x, solver=solver, times=[*times, 1.0] if lands else times)
    if lands:
        return end
    here, c = PATHS["rectified"](PATHS["rectified"].time(levels[-1])), path(times[-1])
    return end * math.hypot(here.alpha, here.sigma) / math.hypot(c.alpha, c.sigma)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("steps", [5, 20, 100])
@pytest.mark.parametrize("lands", [True, False])
@pytest.mark.parametrize("name", ["vp", "edm", "cosine", "subvp", "ve", "discrete"])
def test_natural_euler_is_the_same_in_every_notation(name, dtype, tolerance, steps, lands):
    path, model, noise = PATHS[name], flow(dtype), normal(32, 2, dtype=dtype)
    low, high = max(path.log_snr(0.0), -8.5) + 0.1, min(path.log_snr(1.0), 12.0) - 0.1
    levels = [low + (high - low) * k / steps for k in range(steps + 1)]
    expected = in_notation(model, PATHS["rectified"], noise, levels, lands)
    found = in_notation(model, path, noise, levels, lands)
    assert float((found - expected).abs().max()) < tolerance
    # They are not all alike: the samples differ, and so does plain Euler.
    assert float(expected.std()) > 0.1
    assert float((in_notation(model, path, noise, levels, lands, "euler") - expected).abs().max()) > 10 * tolerance


# A sample does not depend on its batch


@pytest.mark.parametrize("solver", [*fl.solvers.names(), fl.solvers.DDIM(eta=0.7)], ids=str)
@dtypes
def test_sample_does_not_depend_on_its_batch(solver, dtype):
    model, tolerance = flow(dtype), TOLERANCE[dtype]
    noise = random.normal(64, (2,), 9, dtype=dtype)
    given = {"solver": solver, "steps": 12, "seed": 9}
    whole = fl.sample(model, noise, **given)
    for first, count in [(0, 1), (0, 7), (13, 7), (63, 1)]:
        part = fl.sample(model, noise[first : first + count], first=first, **given)
        assert float((part - whole[first : first + count]).abs().max()) <= tolerance
    # At equal composition, bit for bit.
    assert torch.equal(fl.sample(model, noise, **given), whole)


SHARED = """
import sys, torch, fluvial as fl
sys.path.insert(0, sys.argv[1])
from problems import Net
torch.set_num_threads(1)
first, count, out = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
found = {}
for dtype in (torch.float32, torch.float64):
    model = fl.Model(Net(dtype=dtype), "rectified")
    start = fl.random.normal(range(first, first + count), (2,), 9, dtype=dtype)
    for solver in ("vabm", "dopri5", "ddpm", "seeds", "churn", "langevin"):
        for noise in ("independent", "brownian"):
            given = {"noise": noise, "solver": solver, "seed": 9, "first": first}
            steps = None if solver == "dopri5" else 9
            found[f"{solver} {noise} {dtype}"] = fl.sample(model, start, steps=steps, **given)
torch.save(found, out)
"""


def test_two_processes_draw_what_one_draws(tmp_path):
    """Adaptive and stochastic solvers too: each process its share of the samples."""
    shares = {"whole": (0, 12), "left": (0, 5), "right": (5, 7)}
    jobs = [
        subprocess.Popen([sys.executable, "-c", SHARED, str(HERE), str(first), str(count), str(tmp_path / name)])
        for name, (first, count) in shares.items()
    ]
    assert [job.wait(120) for job in jobs] == [0, 0, 0]
    whole, left, right = (torch.load(tmp_path / name) for name in shares)
    assert len(whole) == 24
    for name, x in whole.items():
        difference = float((torch.cat([left[name], right[name]]) - x).abs().max())
        assert difference <= TOLERANCE[x.dtype], name


@solvers
def test_shapes_and_first_name_the_same_noise(solver):
    """What `noise=shape` draws is a function of (seed, sample): any split gives the same numbers to the network."""
    seen = []

    def network(x, t):
        seen.append(x.clone())
        return torch.zeros_like(x)

    model = Model(network, "rectified")
    given = {"solver": solver, "steps": 5, "seed": 3}
    whole = fl.sample(model, (64, 3), **given)
    inputs, seen = seen, []
    parts = [fl.sample(model, (count, 3), first=first, **given) for first, count in [(0, 1), (1, 7), (8, 56)]]
    assert torch.equal(torch.cat(parts), whole)
    calls = len(inputs)
    for k in range(calls):
        assert torch.equal(torch.cat([seen[k], seen[calls + k], seen[2 * calls + k]]), inputs[k])


def test_start_noise_is_the_seeds():
    network = Counter(lambda x, t: x)
    tr = fl.sample(Model(network, "rectified"), (5, 3), steps=1, seed=11, first=2, record=True)
    assert torch.equal(tr.x[0], random.normal(range(2, 7), (3,), 11, stream=random.START))


def test_start_noise_and_step_noise_are_separate():
    """The noise of the start may be given, and that of the steps stays."""
    model = Model(lambda x, t: torch.zeros_like(x), "rectified")
    given = {"solver": "langevin", "times": [0.0, 0.5, 0.8], "seed": 4}
    start = random.normal(6, (3,), 4, stream=random.START)
    assert torch.equal(fl.sample(model, (6, 3), **given), fl.sample(model, start, **given))
    assert not torch.equal(fl.sample(model, start, **{**given, "seed": 5}), fl.sample(model, start, **given))


@pytest.mark.parametrize("solver", ["euler", "langevin"])
def test_seed_is_recorded_and_repeats_the_run(solver):
    model = flow()
    torch.manual_seed(0)
    one = fl.sample(model, (4, 2), solver=solver, steps=4, record=True)
    two = fl.sample(model, (4, 2), solver=solver, steps=4, record=True)
    assert one.seed != two.seed
    assert not torch.equal(one.x, two.x)
    again = fl.sample(model, (4, 2), solver=solver, steps=4, record=True, seed=one.seed)
    assert torch.equal(again.x, one.x)
    torch.manual_seed(0)
    assert fl.sample(model, (4, 2), solver=solver, steps=4, record=True).seed == one.seed


# Where a run starts and where it ends


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_noise_alone_starts_at_sigma_times_noise(name, start):
    path, noise = PATHS[name], normal(4, 2)
    tr = fl.sample(mixture().model(path), noise, times=[start, 0.6, 1.0], record=True)
    torch.testing.assert_close(tr.x[0], path(start).sigma * noise, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["rectified", "vp", "edm"])
def test_init_starts_from_data(name):
    path, noise, data = PATHS[name], normal(4, 2), 3 + normal(4, 2, seed=1)
    norm = Normalisation((1.0, 2.0), (0.5, 4.0))
    model = mixture().model(path).under(normalisation=norm)
    tr = fl.sample(model, noise, init=data, times=[0.4, 0.7, 1.0], record=True)
    c = path(0.4)
    torch.testing.assert_close(tr.x[0], c.alpha * norm.apply(data) + c.sigma * noise, rtol=1e-12, atol=1e-12)
    drawn = fl.sample(model, init=data, times=[0.4, 0.7, 1.0], record=True, seed=6, first=5)
    own = random.normal(range(5, 9), (2,), 6, dtype=torch.float64)
    torch.testing.assert_close(drawn.x[0], c.alpha * norm.apply(data) + c.sigma * own, rtol=1e-12, atol=1e-12)
    shaped = fl.sample(model, (4, 2), init=data, times=[0.4, 0.7, 1.0], record=True, seed=6, first=5)
    assert torch.equal(shaped.x, drawn.x)


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim"])
@pytest.mark.parametrize("name", ["rectified", "vp", "edm"])
def test_state_resumes(name, solver):
    """Two halves of a run are the run; the middle is in path units."""
    norm = Normalisation((1.0,), (2.0,))
    model, noise = mixture().model(PATHS[name]).under(normalisation=norm), normal(4, 2)
    times = [k / 10 for k in range(10)] + [1.0]
    whole = fl.sample(model, noise, solver=solver, times=times)
    middle = fl.sample(model, noise, solver=solver, times=times[:5])
    torch.testing.assert_close(
        fl.sample(model, state=middle, solver=solver, times=times[4:]), whole, rtol=1e-12, atol=1e-12
    )


def test_arguments_are_left_as_they_were():
    noise, state, data = (normal(4, 2, seed=k) for k in range(3))
    kept = [v.clone() for v in (noise, state, data)]
    model = Model(lambda x, t: x, "vp", "v")
    for solver in SOLVERS:
        fl.sample(model, noise, init=data, solver=solver, steps=3, seed=0)
        fl.sample(model, noise, solver=solver, steps=3, seed=0)
        fl.sample(model, state=state, solver=solver, steps=3, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(kept, (noise, state, data)))


@pytest.mark.parametrize("name", ["ve", "edm", "discrete"])
def test_paths_that_stop_short_land_all_the_same(name):
    """N steps visit N noise levels and then 0; where a list ends at 1 too."""
    path = PATHS[name]
    network = Counter(lambda x, t: torch.zeros_like(x))
    data = fl.sample(Model(network, path, "data"), (4, 2), solver="ddim", steps=4, seed=0)
    assert data.tolist() == [[0.0, 0.0]] * 4
    assert network.times == [0.0, 0.25, 0.5, 0.75]
    noise = normal(4, 2)
    stopped = fl.sample(Model(network, path, "data"), noise, solver="ddim", times=[0.0, 0.5])
    torch.testing.assert_close(stopped, path(0.5).sigma * noise, rtol=1e-12, atol=0)


def test_karras_on_edm_visits_sigma_max_to_sigma_min():
    path = PATHS["edm"]
    network = Counter(lambda x, t: torch.zeros_like(x))
    fl.sample(Model(network, path, "data"), (4, 2), solver="euler", times="karras", steps=7, seed=0)
    expected = [(80 ** (1 / 7) + k / 6 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for k in range(7)]
    # The clock reaches the network in float32.
    assert [path(t).sigma for t in network.times] == pytest.approx(expected, rel=1e-4)


# What is recorded


@solvers
@pytest.mark.parametrize("times", [None, [0.1, 0.3, 0.8]], ids=["landing", "stopping"])
def test_trajectory(solver, times):
    norm = Normalisation((1.0, 2.0), (0.5, 4.0))
    network = Counter(Net(dtype=torch.float64))
    model, noise = Model(network, "rectified", normalisation=norm), normal(5, 2)
    steps = 4 if times is None else None
    tr = fl.sample(model, noise, solver=solver, steps=steps, times=times, seed=8, record=True)
    calls, nodes = network.calls, times or [0.0, 0.25, 0.5, 0.75, 1.0]
    n = len(nodes) - 1
    assert isinstance(tr, fl.Trajectory)
    assert tr.times == nodes
    assert tr.x.shape == (n + 1, 5, 2)
    assert tr.data.shape == (n, 5, 2)
    assert tr.nfe == calls
    assert tr.seed == 8
    # Values: the start, each step's data estimate in the data's units, and the end.
    assert torch.equal(tr.x[0], noise * (1 - nodes[0]))
    for k in range(n):
        torch.testing.assert_close(tr.data[k], norm.invert(model(tr.x[k], nodes[k]).data), rtol=1e-9, atol=1e-9)
    plain = fl.sample(model, noise, solver=solver, steps=steps, times=times, seed=8)
    if times is None:
        assert torch.equal(plain, norm.invert(tr.x[-1]))
        assert torch.equal(plain, tr.samples)
    else:
        assert torch.equal(plain, tr.x[-1])


def test_times_may_be_a_tensor_or_a_name():
    model, noise = mixture().model(PATHS["rectified"]), normal(4, 2)
    times = torch.linspace(0, 1, 6, dtype=torch.float64)
    expected = fl.sample(model, noise, steps=5)
    assert torch.equal(fl.sample(model, noise, times=times.tolist()), expected)
    torch.testing.assert_close(fl.sample(model, noise, times=times), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(fl.sample(model, noise, times="uniform", steps=5), expected)
    assert torch.equal(fl.sample(model, noise, times=fl.grids.Uniform(), steps=5), expected)


def test_defaults_are_those_of_the_docstring():
    network = Counter(lambda x, t: x)
    tr = fl.sample(Model(network, "rectified"), (2, 2), record=True)
    assert len(tr.times) == 19
    assert tr.nfe == network.calls == 35
    assert 'default "heun"' in fl.sample.__doc__
    assert "default 18 (35 network calls with heun)" in fl.sample.__doc__


@solvers
def test_callback(solver):
    norm = Normalisation((1.0, 2.0), (0.5, 4.0))
    model, noise, told = flow(torch.float64, normalisation=norm), normal(5, 2), []
    model.network.calls = 0

    def callback(step):
        assert step.nfe == model.network.calls
        told.append((step.index, step.t, step.x.clone(), step.data.clone(), step.nfe))

    tr = fl.sample(model, noise, solver=solver, steps=4, seed=1, record=True, callback=callback)
    assert [entry[0] for entry in told] == [0, 1, 2, 3]
    assert [entry[1] for entry in told] == [0.25, 0.5, 0.75, 1.0]
    assert torch.equal(torch.stack([entry[2] for entry in told]), tr.x[1:])
    assert torch.equal(torch.stack([entry[3] for entry in told]), tr.data)
    assert told[-1][4] == tr.nfe
    model.network.calls = 0
    assert torch.equal(
        fl.sample(model, noise, solver=solver, steps=4, seed=1, callback=callback), norm.invert(tr.x[-1])
    )


def test_progress_changes_nothing(capsys):
    model, noise = flow(), normal(3, 2, dtype=torch.float32)
    assert torch.equal(fl.sample(model, noise, steps=3, progress=True), fl.sample(model, noise, steps=3))
    capsys.readouterr()


def test_no_gradient_is_kept():
    assert not fl.sample(flow(), (3, 2), steps=2, seed=0).requires_grad


def test_count_asks_for_the_models_own_shape():
    gm = mixture()
    found = fl.sample(gm.model(PATHS["vp"]), 5, steps=2, seed=0)
    assert torch.equal(found, fl.sample(gm.model(PATHS["vp"]), (5, 2), steps=2, seed=0))
    with pytest.raises(OptionError, match="does not know its shape") as caught:
        fl.sample(flow(), 5)
    one_line(caught.value)


# Conditions


def labelled(network=None, **options):
    return Model(network or Counter(lambda x, t, label: x + label[:, None]), "rectified", null={"label": 10}, **options)


def test_conditions_reach_the_network():
    seen = []

    def network(x, t, label, text):
        seen.append((label, text))
        return x

    model = Model(network, "rectified", null={"label": 10})
    text = normal(3, 4)
    fl.sample(model, (3, 2), cond={"text": text}, steps=2, solver="euler", seed=0)
    assert [label.tolist() for label, _ in seen] == [[10] * 3] * 2
    assert all(torch.equal(t, text) for _, t in seen)
    seen.clear()
    fl.sample(model, (3, 2), cond={"text": text, "label": torch.tensor([0, 9, 10])}, steps=1, solver="euler", seed=0)
    assert seen[0][0].tolist() == [0, 9, 10]


# Refusals: one clear line each, before the network is called


BAD = {
    "unknown solver": ({"solver": "huen"}, ["huen", "heun", "euler", "did you mean"]),
    "solver of another kind": ({"solver": 3}, ["3", "heun"]),
    "unknown grid": ({"times": "karas"}, ["karas", "karras"]),
    "no steps": ({"steps": 0}, ["steps is 0"]),
    "negative steps": ({"steps": -4}, ["steps is -4"]),
    "fractional steps": ({"steps": 1.5}, ["steps is 1.5"]),
    "falling times": ({"times": [1.0, 0.0]}, ["rise"]),
    "equal times": ({"times": [0.0, 0.5, 0.5, 1.0]}, ["rise"]),
    "times outside": ({"times": [0.0, 1.5]}, ["[0, 1]"]),
    "times that are not numbers": ({"times": [0.0, math.nan, 1.0]}, ["[0, 1]"]),
    "a table of times": ({"times": torch.zeros(2, 2)}, ["times"]),
    "steps against times": ({"steps": 5, "times": [0.0, 0.5, 1.0]}, ["steps is 5", "2 steps"]),
    "seed below 0": ({"seed": -1}, ["seed is -1"]),
    "seed too large": ({"seed": 2**64}, ["seed is"]),
    "label too large": ({"cond": {"label": torch.tensor([0, 1, 11])}}, ["label", "11", "0 to 9"]),
    "label below 0": ({"cond": {"label": torch.tensor([0, -1, 1])}}, ["label", "-1"]),
    "too few labels": ({"cond": {"label": torch.tensor([0, 1])}}, ["label", "3 entries"]),
    "one label": ({"cond": {"label": torch.tensor(1)}}, ["label", "3 entries"]),
    "labels in a list": ({"cond": {"label": [0, 1, 2]}}, ["label", "list"]),
    "wrong channels": ({"noise": (3, 4, 8, 8)}, ["(3, 4, 8, 8)", "3, 8, 8"]),
    "wrong channels of a tensor": ({"noise": torch.zeros(3, 1, 8, 8)}, ["(3, 1, 8, 8)"]),
    "too few dimensions": ({"noise": torch.zeros(3, 3)}, ["(3, 3)"]),
    "wrong channels of a state": ({"noise": None, "state": torch.zeros(3, 4, 8, 8)}, ["state", "(3, 4, 8, 8)"]),
    "init of another shape": ({"init": torch.zeros(2, 3, 8, 8)}, ["init", "(2, 3, 8, 8)"]),
    "nothing to start from": ({"noise": None}, ["noise is missing"]),
    "noise and state": ({"state": torch.zeros(3, 3, 8, 8)}, ["state"]),
    "init and state": (
        {"noise": None, "state": torch.zeros(3, 3, 8, 8), "init": torch.zeros(3, 3, 8, 8)},
        ["state"],
    ),
    "no samples": ({"noise": (0, 3, 8, 8)}, ["(0, 3, 8, 8)"]),
    "negative count": ({"noise": -3}, ["-3"]),
    "an empty shape": ({"noise": ()}, ["()"]),
    "half a sample": ({"noise": (1.5, 3, 8, 8)}, ["1.5"]),
    "a number for noise": ({"noise": torch.tensor(1.0)}, ["noise"]),
    "true": ({"noise": True}, ["noise"]),
    "guidance that is a number": ({"guidance": 3.0}, ["guidance", "3.0"]),
}


@pytest.mark.parametrize(("given", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line(given, words):
    network = Counter(lambda x, t, label: x)
    model = Model(network, "rectified", null={"label": 10}, shape=(3, 8, 8))
    with pytest.raises(FluvialError) as caught:
        fl.sample(model, **{"noise": (3, 3, 8, 8), **given})
    message = one_line(caught.value)
    assert all(word in message for word in words), message
    assert len(message) < 400
    assert network.calls == 0


def test_unknown_keyword():
    with pytest.raises(TypeError, match="sampler"):
        fl.sample(flow(), (2, 2), sampler="heun")


def test_network_that_loses_a_channel_is_named():
    with pytest.raises(ShapeError, match=r"the network returned shape \(2, 1\)") as caught:
        fl.sample(Model(lambda x, t: x[:, :1], "rectified"), (2, 2))
    one_line(caught.value)


def test_time_outside_is_said_by_the_model_too():
    with pytest.raises(PathTimeError):
        flow()(normal(2, 2), 1.5)
