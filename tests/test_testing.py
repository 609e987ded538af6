"""The contract suite: what is built in passes, and what is broken on purpose is caught, by name."""

from __future__ import annotations

import math
import pathlib

import pytest
import torch
from torch import nn

import fluvial as fl
from fluvial.errors import FluvialError, OptionError
from fluvial.model import Model
from fluvial.paths import Coefficients, Path, Rectified
from fluvial.solvers import DDIM, Euler, Heun, Solver
from fluvial.testing import ContractError, check_model, check_path, check_solver
from problems import PATHS, PREDICTIONS, Net, gaussian, mixture, normal, odd_mixture, one_line


def caught(check, subject, **given):
    """Fails the check of this name and no earlier one, in one line that says what was expected."""
    suite, name = check
    with pytest.raises(ContractError, match=rf"check '{name}'") as error:
        suite(subject, **given)
    message = one_line(error.value)
    assert "expected" in message
    assert isinstance(error.value, AssertionError)
    assert isinstance(error.value, FluvialError)


# What is built in


@pytest.mark.parametrize("name", PATHS)
def test_every_path_passes(name):
    report = check_path(PATHS[name])
    assert {"derivatives", "inverse", "moments", "conversion"} <= set(report.checks)
    assert ("config" in report.checks) == (name != "affine")


@pytest.mark.parametrize("name", fl.solvers.names())
def test_every_solver_passes(name):
    report = check_solver(name, paths=("vp",) if name == "annealed_langevin" else ("rectified", "vp"))
    solver = fl.solvers.named(name)
    assert ("order" in report.checks) == (not solver.stochastic and name != "dopri5")
    assert ("law" in report.checks) == (name != "dopri5")
    assert ("tolerance" in report.checks) == (name == "dopri5")


@pytest.mark.parametrize(
    "solver", [Euler(along=PATHS["vp"]), Heun(along=PATHS["edm"]), fl.solvers.named("unipc", steps=3, start="single")]
)
def test_solvers_with_options_pass(solver):
    check_solver(solver, paths=("rectified", "vp"))


@pytest.mark.parametrize("name", PATHS)
def test_untrained_models_on_every_path_pass(name):
    """Any prediction of a network that was never trained: the contract is not about quality."""
    predictions = [p for p in PREDICTIONS if p != "edm"] if name in ("vp", "edm") else ["velocity"]
    for prediction in predictions:
        report = check_model(Model(Net(), PATHS[name], PREDICTIONS[prediction]), shape=(2,))
        assert any(row.what.startswith("network calls") for row in report)


class Labelled(nn.Module):
    """A convolution, moved by a label."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.embed = nn.Embedding(11, 8)
        self.norm = norm or nn.Identity()

    def forward(self, x, t, label):
        moved = self.embed(label) + t[:, None].to(x.dtype)
        return self.last(self.norm(torch.tanh(self.first(x) + moved[:, :, None, None])))


MODELS = {
    "exact": (lambda: mixture().model(PATHS["cosine"]), {}),
    "exact, odd shape, labels": (lambda: odd_mixture().model(PATHS["vp"]), {"cond": {"label": torch.arange(3)}}),
    "empirical": (lambda: fl.exact.Empirical(normal(7, 2)).model(PATHS["rectified"]), {}),
    "converted": (lambda: fl.convert(Model(Net(), "vp", "noise"), path="rectified"), {"shape": (2,)}),
    "edm": (lambda: Model(Net(), "edm", "edm"), {"shape": (2,)}),
    "bfloat16": (lambda: Model(Net(dtype=torch.bfloat16), "rectified"), {"shape": (2,)}),
    "float64": (lambda: Model(Net(dtype=torch.float64), "rectified"), {"shape": (2,)}),
    "paired": (lambda: Model(Net(), "rectified", independent=False), {"shape": (2,)}),
    "null": (lambda: Model(Labelled(), "rectified", null={"label": 10}, shape=(3, 8, 8)), {}),
    "labels": (
        lambda: Model(Labelled(nn.BatchNorm2d(8)).eval(), "vp", null={"label": 10}, shape=(3, 8, 8)),
        {"cond": {"label": torch.tensor([1, 5])}},
    ),
    "guided": (
        lambda: fl.guidance.CFG(2.0)(Model(Labelled(), "rectified", null={"label": 10}, shape=(3, 8, 8))),
        {"cond": {"label": torch.arange(3)}},
    ),
    "clock": (
        lambda: Model(Net(), "rectified", clock=fl.model.Clock.noise_level(), scale_input=lambda t: 0.5 + 0.5 * t),
        {"shape": (2,)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_kind_pass(name):
    make, given = MODELS[name]
    model = make()
    check_model(model, **given)
    # It is left as it was: no hook, no mode changed.
    assert not isinstance(model.network, nn.Module) or not model.network._forward_pre_hooks


# Broken paths


class OwnPath(Path):
    """alpha = t, sigma = 1 - t, from which the broken ones differ in one place."""

    def _coefficients(self, t):
        return Coefficients(t, 1.0 - t, torch.ones_like(t), -torch.ones_like(t))

    def __eq__(self, other):
        return type(self) is type(other)

    __hash__ = None


def test_a_path_of_ones_own_passes():
    assert "config" not in check_path(OwnPath()).checks


class WrongSlope(OwnPath):
    def _coefficients(self, t):
        return super()._coefficients(t)._replace(dsigma=-1.001 * torch.ones_like(t))


class WrongInverse(OwnPath):
    def _time(self, log_snr):
        return torch.sigmoid(log_snr / 2.01)


class ClampedInverse(OwnPath):
    def _time(self, log_snr):
        return super()._time(log_snr).clamp(0.01, 1.0)


class FallingSNR(OwnPath):
    def _coefficients(self, t):
        return Coefficients(1.0 - 0.9 * t, 0.1 + 0.9 * t, -0.9 * torch.ones_like(t), 0.9 * torch.ones_like(t))


class FlatStretch(OwnPath):
    def _coefficients(self, t):
        inner = torch.where(t < 0.503, t, torch.where(t < 0.603, 0.503, 1.0 - (1.0 - t) * 0.497 / 0.397))
        slope = torch.where(t < 0.503, 1.0, torch.where(t < 0.603, 0.0, 0.497 / 0.397)).to(t)
        return Coefficients(inner, 1.0 - inner, slope, -slope)


class WrongLevel(OwnPath):
    def _log_snr(self, t):
        return t.log() - (-t).log1p()

    def _time(self, log_snr):
        return torch.sigmoid(log_snr)


class FloatsDiffer(OwnPath):
    def __call__(self, t):
        c = super().__call__(t)
        return c if isinstance(t, torch.Tensor) else c._replace(alpha=float(c.alpha) * (1 + 1e-6))


class TableDiffers(OwnPath):
    def table(self, times):
        return [self(t) for t in sorted(times, reverse=True)]


class LosesShape(OwnPath):
    def _log_snr(self, t):
        return super()._log_snr(t).reshape(-1)


class Widens(OwnPath):
    def _coefficients(self, t):
        return Coefficients(*(c.double() for c in super()._coefficients(t)))


class NearlyLands(OwnPath):
    def _coefficients(self, t):
        angle = math.pi / 2 * t
        return Coefficients(angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin())


class WrongDrift(OwnPath):
    def drift(self, t):
        return -super().drift(t)


class WrongDiffusion(OwnPath):
    def _langevin(self, t):
        return super()._langevin(t) * 2.0


class Negative(OwnPath):
    def _coefficients(self, t):
        return super()._coefficients(t)._replace(sigma=0.9 - t)


class Infinite(OwnPath):
    def _coefficients(self, t):
        return super()._coefficients(t)._replace(alpha=t / (0.5 - t).abs())


class Unchecked(OwnPath):
    def __call__(self, t):
        t = t if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=torch.float64).nan_to_num().clamp(0, 1).item()
        return super().__call__(t)


class Rectified2(Rectified):
    def config(self):
        return {"name": "Cosine"}


@pytest.mark.parametrize(
    ("path", "check"),
    [
        (WrongSlope(), "derivatives"),
        (WrongInverse(), "inverse"),
        (ClampedInverse(), "inverse"),
        (FallingSNR(), "log snr"),
        (FlatStretch(), "log snr"),
        (WrongLevel(), "log snr"),
        (FloatsDiffer(), "floats and tensors"),
        (TableDiffers(), "floats and tensors"),
        (LosesShape(), "floats and tensors"),
        (Widens(), "floats and tensors"),
        (NearlyLands(), "ends"),
        (Unchecked(), "ends"),
        (WrongDrift(), "sde"),
        (WrongDiffusion(), "sde"),
        (Negative(), "coefficients"),
        (Infinite(), "coefficients"),
        (Rectified2(), "config"),
        (lambda t: t, "coefficients"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_broken_paths_are_caught(path, check):
    caught((check_path, check), path)


# Broken models


def net(x, t):
    return torch.tanh(x) + t[:, None].to(x.dtype)


def stateful():
    calls = []
    return lambda x, t: calls.append(0) or net(x, t) + 0.1 * len(calls)


def ignores_order(x, t, label):
    return net(x, t) + label[0]


class CallsTwice(Model):
    """Reports half of what it asks for."""

    def queries(self, times):
        return [
            q._replace(call=lambda x, cond, q=q: (q.call(x, cond) + q.call(x, cond)) / 2)
            for q in super().queries(times)
        ]


class SwappedPair(Model):
    """Its queries say data where they mean noise."""

    def queries(self, times):
        return [query._replace(weights=query.weights[::-1], prediction=None) for query in super().queries(times)]


class FloatsOneClock(Model):
    """Asks the network at another time for a float than for a tensor."""

    def queries(self, times):
        return super().queries([0.9 * t for t in times])


class NarrowTime(nn.Module):
    """Mixes its time into the input as it comes, in whatever type."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x, t):
        return self.inner(torch.cat([x, t[:, None]], dim=1))


class Conditioned(nn.Module):
    def forward(self, x, t, label):
        return net(x, t) + label[:, None]


@pytest.mark.parametrize(
    ("model", "given", "check"),
    [
        (Model(lambda x, t: net(x, t) - x.mean(0), "rectified"), {}, "batch"),
        (Model(Labelled(nn.BatchNorm2d(8)), "vp", null={"label": 10}, shape=(3, 8, 8)), {}, "batch"),
        (Model(lambda x, t: net(x, t[:1].expand(len(x))), "rectified"), {}, "batch"),
        (Model(lambda x, t: net(x, t)[:, :1], "rectified"), {}, "shapes"),
        (Model(lambda x, t: net(x, t).squeeze(0), "rectified"), {}, "batch"),
        (Model(lambda x, t: x.mul_(2.0) + net(x, t), "rectified"), {}, "in place"),
        (Model(Labelled(nn.Dropout(0.5)), "vp", null={"label": 10}, shape=(3, 8, 8)), {}, "repeats"),
        (Model(lambda x, t: nn.functional.dropout(net(x, t), 0.5), "rectified"), {}, "repeats"),
        (Model(stateful(), "rectified"), {}, "repeats"),
        (Model(lambda x, t: net(x, t) / (t[:, None] - 0.3), "rectified"), {}, "finite"),
        (Model(lambda x, t: net(x, t) + t.log()[:, None], "rectified"), {}, "finite"),
        (Model(lambda x, t: net(x, t).float().detach().double().numpy(), "rectified"), {}, "shapes"),
        (Model(NarrowTime(), "rectified"), {}, "dtypes"),
        (Model(lambda x, t, label: net(x, t), "rectified"), {}, "shapes"),
        (Model(ignores_order, "rectified"), {"cond": {"label": torch.arange(3)}}, "batch"),
        (FloatsOneClock(net, "rectified"), {}, "times"),
        (SwappedPair(net, "rectified", "v"), {}, "times"),
        (CallsTwice(net, "rectified"), {}, "sampled"),
    ],
)  # fmt: skip
def test_broken_models_are_caught(model, given, check):
    caught((check_model, check), model, **{"shape": None if model.shape else (2,)} | given)


def test_a_null_condition_that_is_not_filled_is_caught():
    class Forgets(Model):
        def _query(self, t, c):
            query = super()._query(t, c)
            return query._replace(call=lambda x, cond: query.call(x, cond or {"label": torch.zeros(len(x))}))

    caught((check_model, "conditions"), Forgets(Conditioned(), "rectified", null={"label": 3.0}), shape=(2,))


def test_training_mode_is_named():
    for norm in (nn.Dropout(0.5), nn.GroupNorm(2, 8)):
        model = Model(Labelled(norm).train(), "rectified", null={"label": 10}, shape=(3, 8, 8))
        if isinstance(norm, nn.Dropout):
            with pytest.raises(ContractError, match=r"training mode; expected model.network.eval\(\)"):
                check_model(model)
            model.network.eval()
        check_model(model)


def test_what_the_suite_itself_needs():
    with pytest.raises(OptionError, match="shape=") as error:
        check_model(Model(net, "rectified"))
    one_line(error.value)
    with pytest.raises(OptionError, match="two or more"):
        check_model(Model(net, "rectified"), shape=(2,), cond={"label": torch.zeros(1)})
    with pytest.raises(OptionError, match="unknown solver 'huen'"):
        check_solver("huen")


# Broken solvers


class WrongSlopes(Heun):
    """The second slope is taken at the first's time."""

    def step(self, at):
        first = at.ask(at.x, at.t)
        if at.lands:
            return first.data
        h = at.s - at.t
        return at.x + (h / 2) * (first.velocity + at.ask(at.x + h * first.velocity, at.t).velocity)


class WrongWeights(Heun):
    weights = (0.45, 0.55)


class Inconsistent(Euler):
    weights = (1.02,)


class OnePlan(Solver):
    """Euler's facts and step, for the broken ones to change."""

    order = 1

    def step(self, at):
        estimate = at.ask(at.x, at.t)
        return estimate.data if at.lands else at.x + (at.s - at.t) * estimate.velocity


class LandsShort(OnePlan):
    def step(self, at):
        estimate = at.ask(at.x, at.t)
        return estimate.want(1.0, 1e-3, "state") if at.lands else at.x + (at.s - at.t) * estimate.velocity


class Noisy(DDIM):
    """Ancestral, with noise on the landing too."""

    def step(self, at):
        row = super().step(at)
        return row + 0.01 * at.randn() if at.lands else row


class Borrowed(DDIM):
    """The ancestral Euler step of variance-exploding paths, in sigma alone."""

    def step(self, at):
        estimate = at.ask(at.x, at.t)
        if at.lands:
            return estimate.data
        sigma, sigma_next = at.start.sigma, at.end.sigma
        up = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        down = math.sqrt(sigma_next**2 - up**2)
        return estimate.want(1 - down, down, "state") + up * at.randn()


class TooQuiet(DDIM):
    """The noise is taken away and nine tenths of it put back."""

    def step(self, at):
        estimate = at.ask(at.x, at.t)
        if at.lands:
            return estimate.data
        return estimate.want(at.end.alpha, 0.6 * at.end.sigma, "state") + (0.7 * at.end.sigma) * at.randn()


class Secret(OnePlan):
    """Draws noise, and says it does not."""

    def step(self, at):
        row = super().step(at)
        return row if at.lands else row + 0.1 * (at.s - at.t) * at.randn()


class Quiet(OnePlan):
    """Says that it draws noise, and does not."""

    needs = "score"
    stochastic = True


class Unsaid(DDIM):
    needs = "velocity"


class Counting(OnePlan):
    """Every second step is another: it counts them in itself."""

    def step(self, at):
        count = self.__dict__["count"] = self.__dict__.get("count", 0) + 1
        estimate = at.ask(at.x, at.t)
        if at.lands:
            return estimate.data
        return at.x + (at.s - at.t) * estimate.velocity if count % 2 else estimate.want(*at.end[:2], "state")


class Remembering(OnePlan):
    """Keeps the last step's time in itself, and forgets it at t = 0: two runs in turn agree, and yet it remembers."""

    def step(self, at):
        before = self.__dict__.get("before", 0.0) if at.t else 0.0
        self.__dict__["before"] = at.t
        estimate = at.ask(at.x, at.t)
        if at.lands or at.t == before:
            return estimate.want(*at.end[:2], "state")
        return at.x + (at.s - at.t) * estimate.velocity


class ClaimsMore(OnePlan):
    stages = 2


class ClaimsOrder(OnePlan):
    order = 2


class FloatOrder(OnePlan):
    order = 1.0


class AsksData(OnePlan):
    """Heun's landing with a call at the data."""

    def step(self, at):
        estimate = at.ask(at.x, at.t)
        return at.ask(estimate.data, at.s).data if at.lands else at.x + (at.s - at.t) * estimate.velocity


class Breaks(OnePlan):
    def step(self, at):
        return (1.0 / at.start.alpha) * super().step(at)


class SkipsLeg(OnePlan):
    def legs(self, times, path):
        return super().legs(times, path)[:-1]


class WrongHistory(fl.solvers.Adams):
    """A multistep method that remembers what it made of the state and not what it saw."""

    def step(self, at):
        row = super().step(at)
        at.keep(value=1.01 * at.kept["value"])
        return row


@pytest.mark.parametrize(
    ("solver", "check"),
    [
        (WrongSlopes(), "straight flow"),
        (WrongWeights(), "order"),
        (Inconsistent(), "straight flow"),
        (WrongHistory(), "straight flow"),
        (ClaimsOrder(), "order"),
        (LandsShort(), "landing"),
        (Noisy(eta=1.0), "landing"),
        (Borrowed(eta=1.0), "law"),
        (TooQuiet(eta=1.0), "law"),
        (Secret(), "facts"),
        (Quiet(), "facts"),
        (Unsaid(eta=1.0), "facts"),
        (FloatOrder(), "facts"),
        (SkipsLeg(), "facts"),
        (ClaimsMore(), "stages"),
        (AsksData(), "calls"),
        (Counting(), "repeats"),
        (Remembering(), "pure"),
        (Breaks(), "facts"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_broken_solvers_are_caught(solver, check):
    caught((check_solver, check), solver, paths=("rectified", "vp"))


def test_a_solver_of_ones_own_passes():
    check_solver(OnePlan(), paths=("rectified", "cosine"))


# Reports


def test_report_prints_as_a_table():
    report = check_path(Rectified())
    lines = str(report).splitlines()
    assert lines[0] == f"Rectified(): {len(report.checks)} checks passed"
    assert lines[1].split() == ["check", "measured", "found", "expected"]
    assert len(lines) == len(report) + 2
    check, what, found, least, most = report[0]
    assert (check, what) == ("coefficients", "smallest alpha")
    assert least <= found <= most


def test_the_oracle_agrees_with_samples():
    """The law without samples is that of samples; the quantiles are the flow's."""
    from fluvial.testing import oracle

    path, solver, n = PATHS["rectified"], DDIM(1.0), 20_000
    x = fl.sample(gaussian(0.0, oracle.DATA_STD).model(path), (n, 1), solver=solver, steps=20, seed=0).double()
    assert float(x.std()) / oracle.DATA_STD == pytest.approx(
        oracle.std_ratio(path, solver, 20, 1.0), abs=3 / math.sqrt(2 * n)
    )
    for name in ("vp", "edm"):
        path = PATHS[name]
        start, end = (oracle.quantiles(path, t) for t in (0.1, 0.9))
        found = fl.sample(
            oracle.line().model(path), state=start, solver="rk4", times=[0.1 + 0.8 * k / 200 for k in range(201)]
        )
        torch.testing.assert_close(found, end, rtol=1e-6, atol=1e-6)


def test_the_example_of_the_page_runs():
    """With the order's slopes exchanged it fails as the page says."""
    page = (pathlib.Path(__file__).parent.parent / "docs" / "testing.md").read_text("utf-8")
    example = page.split("```python\n")[1].split("```")[0]
    exec(example, {})
    wrong = example.replace("0.25 * first.velocity + 0.75 * second", "0.75 * first.velocity + 0.25 * second")
    assert wrong != example
    with pytest.raises(ContractError) as error:
        exec(wrong, {})
    assert one_line(error.value) in page
