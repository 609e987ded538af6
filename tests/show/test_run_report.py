"""A run's own page, and what it says of a distillation that goes well or fails."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch

from fluvial import distill, load
from fluvial.errors import NonFiniteError
from fluvial.model import Model
from fluvial.networks import mlp
from fluvial.show import plots, run_report
from fluvial.training import describe, train
from fluvial.training.runs import RunFolder

POINTS = torch.randn(256, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[1.0, 0.5], [0.0, 0.4]])
QUIET = {"progress": False, "sheet_every": None, "precision": "fp32", "batch_size": 32}


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return train(Model(mlp(2, width=32, depth=2), "rectified"), POINTS, steps=150, **QUIET).ema


def watched(teacher, folder, lr):
    with contextlib.suppress(NonFiniteError):
        distill.consistency(teacher, POINTS, 60, lr=lr, warmup=0, clip=None, log_every=5, out=folder, **QUIET)
    return RunFolder(folder).metrics(1000)


@pytest.fixture(scope="module")
def good(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "good"
    return folder, watched(teacher, folder, 5e-4)


def test_a_run_that_goes_well_says_so(good):
    folder, metrics = good
    assert [m["step"] for m in metrics] == list(range(5, 61, 5))
    said = plots.watched_finding(metrics)
    assert said.startswith("The gap")
    assert f"the spread is {metrics[-1]['spread']:.2f}" in said
    page = run_report.write(folder).read_text()
    assert said in page
    assert "consistency: to the data, from any time" in page
    assert "This run fails" not in page
    assert load(folder).jumps


@pytest.mark.parametrize("lr", [0.3, 1.0, 3.0])
def test_a_run_that_fails_is_seen_early_in_what_is_watched_while_its_loss_is_a_number(teacher, good, tmp_path, lr):
    metrics = watched(teacher, tmp_path / "bad", lr)
    assert all(math.isfinite(m["loss"]) for m in metrics)
    # The same samples at the same steps.
    early = [(bad["gap"], fine["gap"]) for bad, fine in zip(metrics, good[1]) if bad["step"] <= 20]
    assert max(bad / fine for bad, fine in early) > 3.0
    if lr >= 1.0:
        assert plots.watched_finding(metrics[:4]).startswith("This run fails: the ")
        page = run_report.write(tmp_path / "bad").read_text()
        assert plots.watched_finding(metrics) in page
        assert "is a run that fails, whatever its loss says" in page


def record(step, loss=1.0, **more):
    return {"step": step, "loss": loss, "loss_by_log_snr": {"0..2": loss}, **more}


@pytest.mark.parametrize(
    ("watched", "said"),
    [
        ([(0.1, 1.0), (0.05, 0.9)], "The gap fell from 0.1 to 0.05; the spread is 0.90"),
        ([(0.1, 1.0), (0.4, 1.9)], "The gap rose from 0.1 to 0.4; the spread is 1.90"),
        ([(0.1, 1.0), (0.102, 1.0)], "The gap stayed at about 0.1; the spread is 1.00"),
        ([(0.1, 1.0)], "The gap is 0.1 after the first record; the spread is 1.00"),
        ([(0.1, 1.0), (0.1, 2.5), (math.nan, 1.0)], "This run fails: the spread is 2.5 at step 2"),
        ([(0.1, 0.3), (0.1, 0.4)], "The gap stayed at about 0.1; the spread is 0.40"),
        ([(0.1, 0.3), (0.1, 0.8), (0.1, 0.4)], "This run fails: the spread is 0.4 at step 3"),
        ([(0.1, 0.9), (2.5, 0.9)], "This run fails: the gap is 2.5 at step 2"),
        ([(0.1, 1.0), (math.inf, 1.0)], "This run fails: no number is left at step 2"),
        ([(0.1, math.nan)], "This run fails: no number is left at step 1"),
        ([(0.0, 1.0), (0.0, 1.0)], "The gap stayed at about 0; the spread is 1.00"),
    ],
)
def test_the_finding_is_what_the_numbers_are(watched, said):
    import matplotlib.pyplot as plt

    metrics = [record(step, gap=gap, spread=spread) for step, (gap, spread) in enumerate(watched, start=1)]
    assert plots.watched_finding(metrics) == said
    figure = plots.gap_and_spread(metrics)
    figure.canvas.draw()
    assert figure.axes[0].get_title("left") == said
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    drawn = [float(y) for y in lines["spread"].get_ydata()]
    assert [y for y in drawn if y == y] == [spread for _, spread in watched if spread == spread]
    plt.close(figure)


def test_the_axis_is_logarithmic_where_the_loss_spans_much():
    import matplotlib.pyplot as plt

    for losses, scale in (([1.0, 0.1], "log"), ([1.0, 0.9], "linear"), ([1.0, 0.0], "linear"), ([0.5], "linear")):
        figure = plots.loss([record(k, value) for k, value in enumerate(losses, start=1)])
        figure.canvas.draw()
        assert figure.axes[0].get_yscale() == scale
        plt.close(figure)


def test_bins_that_only_some_records_have_are_drawn_in_order():
    import matplotlib.pyplot as plt

    metrics = [
        {"step": 1, "loss": 1.0, "loss_by_log_snr": {"8..": 1.0, "-2..0": 2.0}},
        {"step": 2, "loss": 0.5, "loss_by_log_snr": {"..-8": 3.0}},
    ]
    figure = plots.loss(metrics)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["log-SNR below -8", "log-SNR -2 to 0", "log-SNR above 8", "all"]
    plt.close(figure)


def test_the_page_of_a_plain_run_is_as_before(tmp_path):
    torch.manual_seed(0)
    train(Model(mlp(2, width=8, depth=1), "rectified"), POINTS, steps=2, out=tmp_path / "r", **QUIET)
    page = run_report.write(tmp_path / "r").read_text()
    assert "gap and spread" not in page
    for name, value in describe(tmp_path / "r").items():
        assert name in page
        assert value.replace("'", "&#x27;") in page
    assert json.loads((tmp_path / "r" / "metrics.jsonl").read_text())["step"] == 2
