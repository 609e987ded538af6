"""One step of a teacher's ODE for samples at times of their own: each is the step that the sampler makes."""

from __future__ import annotations

import pytest
import torch

import fluvial as fl
from fluvial import solvers
from fluvial.distill.scaled import Scaled
from fluvial.distill.teacher_steps import TeacherSteps
from fluvial.errors import OptionError
from fluvial.exact import GaussianMixture
from problems import PATHS, Net, mixture, normal, odd_mixture, one_line

ONE_STEP = [
    name
    for name in solvers.names()
    if not solvers.named(name).stochastic and name != "dopri5" and solvers.named(name).memory == 0
]
REMEMBERING = [name for name in solvers.names() if solvers.named(name).memory and not solvers.named(name).stochastic]
GRIDS = {
    "one": [0.0, 1.0],
    "two": [0.0, 0.4, 1.0],
    "three": [0.0, 0.1, 0.7, 1.0],
    "inside": [0.05, 0.3, 0.31, 0.9],
    "karras": fl.grids.Karras().times(fl.paths.Rectified(), 6),
}


def compare(model, solver, times, cond=None, shape=(2,), guidance=None):
    """The steps of all places at once against the sampler's, one place after the other."""
    steps = TeacherSteps(model if guidance is None else guidance(model), solver, times)
    n = 3 * (len(times) - 1)
    x, place = normal(n, *shape), torch.arange(n) % (len(times) - 1)
    cond = {name: values[:n] for name, values in (cond or {}).items()}
    found = steps(x, place, cond)
    assert found.dtype == x.dtype
    for k in range(len(times) - 1):
        rows = place == k
        chosen = {name: values[rows] for name, values in cond.items()}
        by_sampler = fl.sample(
            model, state=x[rows], times=times[k : k + 2], solver=solver, cond=chosen, guidance=guidance
        )
        # Coefficients of a landing step from near the data are large, and so are the states.
        torch.testing.assert_close(found[rows], by_sampler, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", ONE_STEP + REMEMBERING)
def test_every_deterministic_solver_makes_the_samplers_step(solver, grid):
    compare(mixture().model(fl.paths.Rectified()), solver, GRIDS[grid])


def test_the_solvers_are_all_there():
    assert {"euler", "heun", "midpoint", "rk4", "ddim", "dpmpp_2s", "dpmpp_3s"} <= set(ONE_STEP)
    assert {"dpmpp_2m", "unipc", "vabm"} <= set(REMEMBERING)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2s", "rk4"])
@pytest.mark.parametrize("path", ["vp", "edm", "cosine"])
@pytest.mark.parametrize("prediction", ["noise", "edm", "v"])
def test_teachers_of_other_notations_are_followed_too(path, prediction, solver):
    """Where the teacher's path stops short of noise or data, too."""
    net = Net(dtype=torch.float64)
    model = fl.convert(fl.Model(net, PATHS[path], prediction), path="rectified")
    start = 0.0 if path != "cosine" or prediction != "noise" else 0.02  # noise alone says nothing of the data
    compare(model, solver, [start, 0.2, 0.6, 1.0])


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_guided_teachers_are_followed_under_their_guidance(solver):
    problem, label = mixture(), torch.arange(12) % 3
    model = problem.model(fl.paths.Rectified())
    compare(model, solver, [0.0, 0.3, 0.6, 1.0], {"label": label}, guidance=fl.guidance.CFG(2.5))
    vp = fl.convert(problem.model(fl.paths.VP()), path="rectified")
    compare(vp, solver, [0.0, 0.3, 0.6, 1.0], {"label": label}, guidance=fl.guidance.CFG(2.5))


@pytest.mark.parametrize("path", ["rectified", "vp"])
def test_a_scale_for_each_sample_is_that_of_cfg(path):
    """Samples of two scales in one batch: each moves as under guidance of its scale."""
    model = fl.convert(mixture().model(PATHS[path]), path="rectified")
    times, x, label = [0.0, 0.3, 0.6, 1.0], normal(12, 2), torch.arange(12) % 3
    place, scale = torch.arange(12) % 3, torch.tensor([1.0, 2.5, 0.0, 2.5] * 3).double()
    steps = TeacherSteps(Scaled()(model), "heun", times)
    found = steps(x, place, {"label": label, "guidance": scale})
    for value in (0.0, 1.0, 2.5):
        rows = scale == value
        under = TeacherSteps(fl.guidance.CFG(value)(model), "heun", times)
        by_cfg = under(x[rows], place[rows], {"label": label[rows]})
        torch.testing.assert_close(found[rows], by_cfg, rtol=0, atol=1e-12)


def test_odd_shapes_and_single_precision():
    model = odd_mixture().model(fl.paths.Rectified())
    compare(model, "heun", GRIDS["three"], shape=(3, 1, 2))
    steps, x, place = TeacherSteps(model, "heun", GRIDS["three"]), normal(6, 3, 1, 2), torch.arange(6) % 3
    single = steps(x.float(), place, {})
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), steps(x, place, {}), rtol=1e-5, atol=1e-5)


def test_a_stage_is_one_network_call():
    net = Net(dtype=torch.float64)
    steps = TeacherSteps(fl.Model(net, "rectified"), "heun", GRIDS["karras"])
    net.calls = 0
    steps(normal(9, 2), torch.arange(9) % 6, {})
    assert net.calls == 2


def test_a_step_that_lands_is_exact_on_a_point():
    point = GaussianMixture(torch.tensor([[1.0, -2.0]]), torch.tensor([1e-9]), torch.ones(1))
    steps = TeacherSteps(point.model(fl.paths.Rectified()), "heun", [0.0, 0.9, 1.0])
    x = 0.9 * point.means + 0.1 * normal(5, 2)
    landed = steps(x, torch.ones(5, dtype=torch.long), {})
    torch.testing.assert_close(landed, point.means.expand(5, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", [name for name in solvers.names() if name not in ONE_STEP + REMEMBERING])
def test_what_makes_no_ode_step_is_refused(solver):
    with pytest.raises(OptionError, match="adaptive" if solver == "dopri5" else "stochastic") as error:
        TeacherSteps(mixture().model(fl.paths.Rectified()), solver, [0.0, 1.0])
    assert "expected" in one_line(error.value)
