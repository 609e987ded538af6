"""The nodes for ComfyUI: what it looks for in them, options, and grids as its sigmas."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy_stub as stub
import pytest
import torch
from comfy_stub import EPS, FLOW, Flow, column, curved, levels, model, normal

import fluvial as fl
from fluvial.errors import OptionError
from fluvial.interop import comfyui
from fluvial.interop.comfyui import GRIDS, NAMES, FluvialSampler, FluvialSigmas, sampler_function


@pytest.fixture
def comfy(monkeypatch):
    stub.install(monkeypatch)


def test_nodes_are_what_comfyui_looks_for(comfy):
    file = Path(__file__).parents[2] / "recipes" / "comfyui" / "__init__.py"
    spec = importlib.util.spec_from_file_location("fluvial_nodes", file)
    assert spec is not None
    assert spec.loader is not None
    nodes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nodes)
    assert {"FluvialSampler": FluvialSampler, "FluvialSigmas": FluvialSigmas} == nodes.NODE_CLASS_MAPPINGS
    assert set(nodes.NODE_DISPLAY_NAME_MAPPINGS) == set(nodes.NODE_CLASS_MAPPINGS)
    for node, result in ((FluvialSampler, "SAMPLER"), (FluvialSigmas, "SIGMAS")):
        assert (result,) == node.RETURN_TYPES
        assert hasattr(node, node.FUNCTION)
        inputs = node.INPUT_TYPES()
        for name, (kind, *rest) in {**inputs["required"], **inputs["optional"]}.items():
            assert isinstance(name, str)
            if isinstance(kind, list) and rest:
                assert rest[0]["default"] in kind
    assert FluvialSampler.INPUT_TYPES()["required"]["solver"][0] == list(NAMES)
    assert {"euler", "langevin", "overshoot", "restart"} < set(NAMES)


def test_options_reach_the_solver(comfy):
    (sampler,) = FluvialSampler().get_sampler("langevin", " gamma = 0.25 ")
    assert sampler.sampler_function is sampler_function
    assert sampler.extra_options == {"solver": "langevin", "gamma": 0.25}
    x, sigmas = normal(2, 1, 3), levels(True, 5)
    ours = sampler.sample(model(True).inner_model, sigmas, {"seed": 4}, None, x, torch.zeros_like(x))
    network = fl.Model(lambda x, s: curved(x, column(s, x)), "rectified", "data", lambda t: 1 - t)
    times = [1.0 - s for s in sigmas.tolist()]
    expected = fl.sample(network, solver=fl.solvers.Langevin(gamma=0.25), times=times, state=x, seed=4)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def patcher(flow, **options):
    sampling = Flow(**options) if flow else EPS()
    return SimpleNamespace(get_model_object=lambda name: {"model_sampling": sampling}[name])


@pytest.mark.parametrize("grid", [name for name in GRIDS if name != "fitted"])
@FLOW
def test_every_grid_gives_sigmas(flow, grid):
    for steps in (1, 2, 3, 12):
        (sigmas,) = FluvialSigmas().get_sigmas(patcher(flow), grid, steps)
        assert len(sigmas) == steps + 1
        assert sigmas.dtype == torch.float32
        assert bool((sigmas.diff() < 0).all())
        assert float(sigmas[0]) == pytest.approx(1.0 if flow else float(EPS().sigma_max), rel=1e-5)
        assert float(sigmas[-1]) == 0.0
        sampler_function(model(flow), normal(1, 3), sigmas, solver="euler")


def test_grids_are_the_formulas():
    node = FluvialSigmas()
    low, high = float(EPS().sigma_min), float(EPS().sigma_max)
    roots = torch.linspace(high ** (1 / 7), low ** (1 / 7), 9, dtype=torch.float64)
    torch.testing.assert_close(
        node.get_sigmas(patcher(False), "karras", 9)[0][:-1], (roots**7).float(), rtol=1e-5, atol=0
    )
    gaps = node.get_sigmas(patcher(False), "log_snr", 9)[0][:-1].log().diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(8), rtol=1e-4, atol=0)
    # The table's own steps, and of a flow the shifted ones.
    table = node.get_sigmas(patcher(False), "uniform", 999)[0]
    torch.testing.assert_close(table[:-1], EPS().sigmas.flip(0)[:-1], rtol=1e-5, atol=0)
    for shift in (1.0, 3.0):
        u = torch.linspace(1, 0, 11)
        expected = shift * u / (1 + (shift - 1) * u)
        (sigmas,) = node.get_sigmas(patcher(True, shift=shift), "uniform", 10)
        torch.testing.assert_close(sigmas, expected, rtol=0, atol=1e-6)
    # The levels tau of a fitted grid: sigma is 1 - tau on a flow, and (1 - tau)/tau on the others.
    (sigmas,) = node.get_sigmas(patcher(True), "fitted", 4, levels="0, 0.1, 0.3, 0.6, 1")
    torch.testing.assert_close(sigmas, torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0]))


def test_denoise_takes_the_end_of_a_longer_grid():
    node = FluvialSigmas()
    (whole,), (part,) = (
        node.get_sigmas(patcher(True), "log_snr", 20),
        node.get_sigmas(patcher(True), "log_snr", 5, 0.25),
    )
    torch.testing.assert_close(part, whole[-6:])
    assert len(node.get_sigmas(patcher(True), "log_snr", 5, 0.0)[0]) == 0


@pytest.mark.parametrize(
    ("grid", "text", "message"),
    [("karas", "", "did you mean 'karras'"), ("fitted", "", "fitted"), ("fitted", "0, x, 1", "expected numbers")],
)
def test_bad_grids_are_one_clear_error(grid, text, message):
    with pytest.raises(OptionError, match=message):
        FluvialSigmas().get_sigmas(patcher(True), grid, 5, levels=text)


def test_importing_needs_no_comfyui():
    assert "comfy" not in sys.modules
    assert comfyui.NODE_CLASS_MAPPINGS


def test_bad_solvers_are_one_clear_error(comfy):
    node, sigmas = FluvialSampler(), levels(True)
    for make, message in (
        (lambda: node.get_sampler("heum"), "did you mean 'heun'"),
        (lambda: node.get_sampler("euler", "gamma=1"), "unknown option of Euler 'gamma'"),
        (lambda: node.get_sampler("langevin", "gamma"), "expected name=value"),
        (lambda: node.get_sampler("langevin", "gamma=much"), "expected a number"),
        (lambda: node.get_sampler("langevin", "gamma=-1"), "0 or more"),
        (lambda: node.get_sampler("dopri5"), "does not suit"),
        (lambda: sampler_function(model(True), normal(1, 3), sigmas, solver="jump"), "does not suit"),
        (lambda: sampler_function(model(True), normal(1, 3), sigmas, solver="ddim", gamma=1.0), "unknown option"),
    ):
        with pytest.raises(OptionError, match=message):
            make()
