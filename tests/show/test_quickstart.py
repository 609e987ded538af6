"""The quickstart at a tiny size: every part of it runs, and its report says what was measured."""

from __future__ import annotations

import json
import re

import pytest

from fluvial.show import quickstart
from fluvial.solvers import named


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "COUNT", 40)
        patch.setattr(quickstart, "SWEEP_COUNT", 30)
        patch.setattr(quickstart, "SWEEP_STEPS", 2)
        patch.setattr(quickstart, "SAMPLERS", (("ODE", named("ddim"), (1, 2)), ("ODE, Heun", named("heun"), (2,))))
        quickstart.run(folder, lambda line: None, steps=6)
    return folder


def test_results_are_those_of_the_run(folder):
    results = json.loads((folder / "results.json").read_text())
    assert results["training_steps"] == 6
    assert [row["nfe"] for row in results["quality"]] == [1, 2, 3]
    assert [row["gamma"] for row in results["gamma"]] == list(quickstart.GAMMAS)
    assert results["classifier_accuracy"] > 0.97
    ddim = [row["difference"] for row in results["notations"] if row["solver"] == "ddim"]
    assert max(ddim) < 16e-4  # of 16: 1e-4 of the range
    assert max(row["difference"] for row in results["notations"]) > 0.0


def test_report_is_one_file_with_the_figures(folder):
    page = (folder / "report.html").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert f"{results['headline']['recognised']:.1%}" in page
    assert results["model_hash"] in page
    assert page.count("<svg") == 9
    assert page.count("data:image/png;base64,") == 2 + 3 + len(quickstart.GAMMAS)
    # Nothing is fetched: no source, link or script of another place.
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page


def test_second_run_trains_nothing_again(folder):
    before = (folder / "run" / "model.safetensors").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("COUNT", 20), ("SWEEP_COUNT", 20), ("SWEEP_STEPS", 1)):
            patch.setattr(quickstart, name, value)
        patch.setattr(quickstart, "SAMPLERS", (("ODE", named("ddim"), (1,)),))
        quickstart.run(folder, lambda line: None, steps=6)
    assert (folder / "run" / "model.safetensors").stat().st_mtime_ns == before
