"""Paths: closed forms, derivatives, the log-SNR and its inverse, and the noising SDE."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluvial import paths
from fluvial.errors import FluvialError, OptionError, PathTimeError
from problems import PATHS, ddpm_table, one_line, zero_snr_table

INSIDE = torch.linspace(0.003, 0.997, 101, dtype=torch.float64)
WHOLE = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)
all_paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
saved_paths = pytest.mark.parametrize(
    "path", [p for n, p in PATHS.items() if n != "affine"], ids=[n for n in PATHS if n != "affine"]
)
times = st.floats(0.001, 0.999)


def close(actual, expected, tolerance=1e-12):
    """Relative to each expected number, with a floor of the same size times one."""
    torch.testing.assert_close(actual, torch.as_tensor(expected).to(actual), rtol=tolerance, atol=tolerance)


# The definitions of MATH.md, written out.

B = lambda u, low=0.1, high=20.0: 0.5 * u**2 * (high - low) + u * low  # noqa: E731
DEFINITIONS = {
    "rectified": (lambda t: t, lambda t: 1 - t),
    "cosine": (lambda t: math.sin(math.pi * t / 2), lambda t: math.sin(math.pi * (1 - t) / 2)),
    "vp": (lambda t: math.exp(-B(1 - t) / 2), lambda t: math.sqrt(1 - math.exp(-B(1 - t)))),
    "subvp": (lambda t: math.exp(-B(1 - t) / 2), lambda t: 1 - math.exp(-B(1 - t))),
    "ve": (lambda t: 1.0, lambda t: 0.01 * 5000.0 ** (1 - t)),
    "edm": (
        lambda t: 1.0,
        lambda t: (0.002 ** (1 / 7) + (1 - t) * (80.0 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7,
    ),
    "shifted": (lambda t: t / (t + 3 * (1 - t)), lambda t: 3 * (1 - t) / (1 + 2 * (1 - t))),
    "affine": (lambda t: t * (3 - t) / 2, lambda t: (1 - t) * (1 + t / 2)),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@given(t=st.floats(0.0, 1.0))
def test_coefficients_are_the_definitions(name, t):
    c = PATHS[name](t)
    alpha, sigma = DEFINITIONS[name]
    assert c.alpha == pytest.approx(alpha(t), rel=1e-12, abs=1e-15)
    # sqrt(1 - exp(-B)) written so loses digits at t = 1; the library uses expm1.
    assert c.sigma == pytest.approx(sigma(t), rel=1e-10, abs=2e-8 if name == "vp" else 1e-15)


def test_ends_are_exact():
    for name in ["rectified", "cosine", "vp", "subvp", "shifted", "shifted_vp", "affine"]:
        c = PATHS[name](1.0)
        assert (c.alpha, c.sigma) == (1.0, 0.0), name
        assert PATHS[name].lands_on_data
    for name in ["rectified", "cosine", "zero_snr", "shifted", "affine"]:
        c = PATHS[name](0.0)
        assert (c.alpha, c.sigma) == (0.0, 1.0), name
    for name, low, high in [("ve", 0.01, 50.0), ("edm", 0.002, 80.0)]:
        assert PATHS[name](0.0).sigma == pytest.approx(high, rel=1e-13)
        assert PATHS[name](1.0).sigma == pytest.approx(low, rel=1e-13)
        assert not PATHS[name].lands_on_data
    assert not PATHS["discrete"].lands_on_data


@all_paths
def test_derivatives_by_finite_differences(path):
    h = 1e-5
    ahead, behind = path(INSIDE + h), path(INSIDE - h)
    c = path(INSIDE)
    for slope, after, before in [(c.dalpha, ahead.alpha, behind.alpha), (c.dsigma, ahead.sigma, behind.sigma)]:
        # Second order inside a smooth piece; the table's cubic has a jump of its second derivative at each knot.
        tolerance = 1e-3 if isinstance(path, paths.Discrete) else 3e-5
        close((after - before) / (2 * h), slope, tolerance)


@all_paths
def test_derivatives_by_autograd(path):
    t = INSIDE.clone().requires_grad_()
    for value in ("alpha", "sigma"):
        number = getattr(path(t), value)
        slope = torch.autograd.grad(number.sum(), t)[0] if number.requires_grad else torch.zeros_like(t)
        close(slope, getattr(path(INSIDE), "d" + value), 1e-11)


@all_paths
def test_log_snr_is_its_definition_and_rises(path):
    c, log_snr = path(INSIDE), path.log_snr(INSIDE)
    close(log_snr, 2 * (c.alpha.log() - c.sigma.log()), 1e-10)
    whole = path.log_snr(WHOLE)
    assert bool((whole[1:] > whole[:-1]).all())
    assert bool((path(INSIDE).wronskian > 0).all())
    # d(log_snr)/dt = 2 w / (alpha sigma)
    h = 1e-6
    slope = (path.log_snr(INSIDE + h) - path.log_snr(INSIDE - h)) / (2 * h)
    tolerance = 1e-2 if isinstance(path, paths.Discrete) else 1e-3
    close(slope, 2 * c.wronskian / (c.alpha * c.sigma), tolerance)


@all_paths
def test_time_inverts_log_snr_everywhere(path):
    close(path.time(path.log_snr(WHOLE)), WHOLE, 1e-11)
    for t in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert path.time(path.log_snr(t)) == pytest.approx(t, abs=1e-12)
    low, high = max(path.log_snr(0.0), -20.0), min(path.log_snr(1.0), 14.0)
    levels = torch.linspace(low, high, 101, dtype=torch.float64)
    close(path.log_snr(path.time(levels)), levels, 1e-8)


@all_paths
def test_time_outside_the_range_is_the_nearer_end(path):
    low, high = path.log_snr(0.0), path.log_snr(1.0)
    assert (path.time(-math.inf), path.time(math.inf)) == (0.0, 1.0)
    for level, end in [(-1e5, 0.0), (low - 1.0, 0.0), (high + 1.0, 1.0), (1e5, 1.0)]:
        assert path.time(level) == pytest.approx(end, abs=1e-15)
    levels = torch.tensor([-math.inf, -1e30, 1e30, math.inf], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        assert path.time(levels.to(dtype)).tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0], abs=1e-9)


def test_log_snr_at_the_ends():
    for name in ["rectified", "cosine", "zero_snr", "shifted", "affine"]:
        assert PATHS[name].log_snr(0.0) == -math.inf
    for name in ["rectified", "cosine", "vp", "subvp", "shifted", "shifted_vp", "affine"]:
        assert PATHS[name].log_snr(1.0) == math.inf
    assert PATHS["vp"].log_snr(0.0) == pytest.approx(-10.05, abs=5e-3)
    assert PATHS["edm"].log_snr(0.0) == pytest.approx(-8.76, abs=5e-3)


# The noising SDE


@all_paths
def test_sde_has_the_path_as_its_moments(path):
    """The mean and variance of dx = f x du + g dW from one data point: d alpha/du = f alpha, d V/du = 2 f V + g²."""
    h = 1e-5
    f, g = path.drift(INSIDE), path.diffusion(INSIDE)
    c, later, sooner = path(INSIDE), path(INSIDE + h), path(INSIDE - h)
    tolerance = 1e-3 if isinstance(path, paths.Discrete) else 1e-4
    close(-(later.alpha - sooner.alpha) / (2 * h), f * c.alpha, tolerance)
    slope = -(later.sigma.square() - sooner.sigma.square()) / (2 * h)
    close(slope, 2 * f * c.sigma.square() + g.square(), tolerance)


BETA = lambda u: 0.1 + u * 19.9  # noqa: E731
SDES = {
    "rectified": (lambda t: -1 / t, lambda t: 2 * (1 - t) / t),
    "cosine": (
        lambda t: -math.pi / 2 / math.tan(math.pi * t / 2),
        lambda t: math.pi / math.tan(math.pi * t / 2),
    ),
    "vp": (lambda t: -BETA(1 - t) / 2, lambda t: BETA(1 - t)),
    "subvp": (lambda t: -BETA(1 - t) / 2, lambda t: BETA(1 - t) * (1 - math.exp(-2 * B(1 - t)))),
    "ve": (lambda t: 0.0, lambda t: 2 * math.log(5000) * (0.01 * 5000 ** (1 - t)) ** 2),
}


@pytest.mark.parametrize("name", SDES)
@given(t=times)
def test_drift_and_diffusion_in_closed_form(name, t):
    f, g2 = SDES[name]
    assert PATHS[name].drift(t) == pytest.approx(f(t), rel=1e-10, abs=1e-12)
    assert PATHS[name].diffusion(t) ** 2 == pytest.approx(g2(t), rel=1e-10)
    tensor = torch.tensor(t, dtype=torch.float64)
    assert float(PATHS[name].drift(tensor)) == pytest.approx(f(t), rel=1e-10, abs=1e-12)
    assert float(PATHS[name].diffusion(tensor)) ** 2 == pytest.approx(g2(t), rel=1e-10)


def test_vp_sde_exists_at_the_data():
    assert PATHS["vp"].diffusion(1.0) ** 2 == pytest.approx(0.1, rel=1e-12)
    assert PATHS["vp"].drift(1.0) == pytest.approx(-0.05, rel=1e-12)
    assert PATHS["vp"].shifted(3.0).diffusion(1.0) ** 2 == pytest.approx(0.3, rel=1e-12)
    assert PATHS["vp"].langevin(1.0) == pytest.approx(0.05, rel=1e-12)
    assert float(PATHS["vp"].diffusion(torch.ones(1))) ** 2 == pytest.approx(0.1, rel=1e-5)


@all_paths
def test_langevin_strength_is_wronskian_times_sigma(path):
    c = path(INSIDE)
    close(path.langevin(INSIDE), c.wronskian * c.sigma, 1e-10)
    assert path.langevin(0.25) == pytest.approx(float(path.langevin(torch.tensor(0.25, dtype=torch.float64))))


@pytest.mark.parametrize("name", ["rectified", "cosine", "zero_snr", "shifted", "affine"])
def test_sde_does_not_exist_at_pure_noise(name):
    for quantity in (PATHS[name].drift, PATHS[name].diffusion):
        with pytest.raises(PathTimeError, match=r"at t = 0.0") as caught:
            quantity(0.0)
        one_line(caught.value)
        assert not bool(quantity(torch.zeros(2)).isfinite().any())


# Tables


@pytest.mark.parametrize("table", [ddpm_table(), zero_snr_table(50), torch.tensor([0.9, 0.1])])
def test_table_is_hit_exactly(table):
    path, n = paths.Discrete(table.tolist()), len(table)
    t = 1 - torch.arange(n, dtype=torch.float64) / (n - 1)
    c = path(t)
    torch.testing.assert_close(c.alpha.square(), table.double(), rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(c.sigma.square(), 1 - table.double(), rtol=1e-11, atol=1e-16)
    close(path.time(path.log_snr(t)), t, 1e-12)
    close(path.time((table.double() / (1 - table.double())).log()), t, 1e-11)


@given(t=st.floats(0.0, 1.0))
def test_table_stays_variance_preserving_between_its_entries(t):
    for name in ("discrete", "zero_snr"):
        c = PATHS[name](t)
        assert c.alpha**2 + c.sigma**2 == pytest.approx(1.0, abs=1e-15)
        assert c.alpha * c.dalpha + c.sigma * c.dsigma == pytest.approx(0.0, abs=1e-12)


def test_table_of_a_smooth_path_follows_it():
    """DDPM's table is the linear-beta VP sampled a thousand times: between the entries they agree too."""
    vp, n = paths.VP(), 1000
    u = torch.arange(n, dtype=torch.float64) / (n - 1)
    u[0] = 1e-3  # sigma > 0 at the first entry, as in every trained table
    path = paths.Discrete(vp(1 - u).alpha.square().tolist())
    t = torch.linspace(0.01, 0.98, 3000, dtype=torch.float64)
    close(path(t).alpha, vp(t).alpha, 1e-6)
    close(path(t).sigma, vp(t).sigma, 1e-6)
    close(path(t).dalpha, vp(t).dalpha, 1e-2)


def test_table_is_monotone_even_where_it_is_rough():
    path = paths.Discrete([0.99, 0.98, 0.5, 0.499, 0.498, 0.01, 0.0])
    t = torch.linspace(0, 1, 5001, dtype=torch.float64)
    assert bool((path(t).alpha.diff() > 0).all())
    assert bool((path(t).sigma.diff() < 0).all())
    close(path.time(path.log_snr(t)), t, 1e-7)


def test_zero_terminal_snr():
    path = PATHS["zero_snr"]
    c = path(0.0)
    assert (c.alpha, c.sigma) == (0.0, 1.0)
    assert path.log_snr(0.0) == -math.inf
    assert c.dalpha > 0
    assert PATHS["discrete"](0.0).alpha > 0


@pytest.mark.parametrize(
    "table",
    [[0.5], [], [0.1, 0.9], [0.9, 0.9], [0.9, 0.5, 0.6], [1.1, 0.5], [0.5, -0.1], [0.9, math.nan, 0.1]],
)
def test_bad_table(table):
    with pytest.raises(OptionError, match="alphas_cumprod") as caught:
        paths.Discrete(table)
    one_line(caught.value)


# Shift


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("name", ["rectified", "cosine", "vp", "edm", "discrete"])
def test_shift_moves_the_noise_level(name, shift):
    base, path = PATHS[name], PATHS[name].shifted(shift)
    level = 1 - INSIDE
    inner = 1 - shift * level / (1 + (shift - 1) * level)
    close(path(INSIDE).alpha, base(inner).alpha)
    close(path(INSIDE).sigma, base(inner).sigma)
    if name == "rectified":
        # The noise-to-data ratio is multiplied by the shift.
        close(path.log_snr(INSIDE), base.log_snr(INSIDE) - 2 * math.log(shift), 1e-11)
    for t in (0.0, 1.0):
        assert path(t)[:2] == pytest.approx(base(t)[:2], abs=1e-15)


def test_shifts_compose():
    twice, once = PATHS["rectified"].shifted(2.0).shifted(3.0), PATHS["rectified"].shifted(6.0)
    for a, b in zip(twice(INSIDE), once(INSIDE)):
        close(a, b)


# Floats, tensors, types


@all_paths
@given(t=times)
def test_float_and_tensor_agree(path, t):
    tensor = path(torch.tensor([t], dtype=torch.float64))
    for number, element in zip(path(t), tensor):
        assert type(number) is float
        assert number == pytest.approx(float(element), rel=1e-13, abs=1e-300)
    assert path.log_snr(t) == pytest.approx(float(path.log_snr(torch.tensor([t], dtype=torch.float64))), rel=1e-12)
    assert path.table([t, t])[1] == path(t)


@all_paths
def test_float32_is_close_to_float64(path):
    single = path(INSIDE.float())
    for name, value, exact in zip(single._fields, single, path(INSIDE.float().double())):
        assert value.dtype == torch.float32
        tolerance = 5e-3 if isinstance(path, paths.Discrete) and name.startswith("d") else 2e-4
        torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=1e-6)
    assert path.log_snr(INSIDE.float()).dtype == torch.float32
    middle = INSIDE[20:-20].float()
    close(path.time(path.log_snr(middle)), middle, 1e-4)


@all_paths
def test_tensors_keep_their_shape_and_narrow_types_are_widened(path):
    t = torch.full((2, 3, 4), 0.5)
    assert all(c.shape == t.shape for c in path(t))
    assert all(c.shape == () for c in path(torch.tensor(0.5)))
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        assert path(torch.ones(2).to(dtype)).alpha.dtype == torch.float32
    assert path.time(path.log_snr(t)).shape == t.shape


@all_paths
@pytest.mark.parametrize("t", [-1e-9, 1 + 1e-9, 7.0, math.nan, math.inf])
def test_time_outside_the_path(path, t):
    for quantity in (path, path.log_snr, path.drift, path.diffusion, path.langevin, lambda t: path.table([0.5, t])):
        with pytest.raises(PathTimeError, match=r"expected (a )?times? in \[0, 1\]") as caught:
            quantity(t)
        one_line(caught.value)


def test_times_of_tensors_are_not_checked():
    path = PATHS["vp"]
    assert path(torch.tensor([1.0])).dsigma.tolist() == [-math.inf]
    assert path.log_snr(torch.tensor([0.0, 1.0])).isfinite().tolist() == [True, False]


# Names and JSON


@saved_paths
def test_json_round_trip(path):
    again = paths.from_config(json.loads(json.dumps(path.config())))
    assert again == path
    assert hash(again) == hash(path)
    for mine, theirs in zip(again(WHOLE), path(WHOLE)):
        assert torch.equal(mine, theirs)


def test_functions_are_not_saved():
    with pytest.raises(OptionError, match="cannot be saved") as caught:
        PATHS["affine"].config()
    one_line(caught.value)


def test_paths_by_name():
    assert paths.named("rectified") == paths.Rectified()
    assert paths.named("Sub-VP") == paths.SubVP()
    assert paths.named("vp", beta_max=10.0) == paths.VP(beta_max=10.0)
    assert paths.named("edm", rho=5.0, sigma_max=10.0) == paths.EDM(0.002, 10.0, 5.0)
    path = paths.VE()
    assert paths.named(path) is path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: paths.named("rectfied"), ["rectfied", "rectified", "edm", "subvp"]),
        (lambda: paths.named("vp", beta=3.0), ["beta", "beta_min", "beta_max"]),
        (lambda: paths.named("rectified", beta_min=3.0), ["beta_min"]),
        (lambda: paths.from_config({"name": "Straight"}), ["Straight", "Rectified"]),
        (lambda: paths.VP(beta_min=-1.0), ["beta_min", "-1"]),
        (lambda: paths.SubVP(beta_min=3.0, beta_max=2.0), ["beta_max", "2.0"]),
        (lambda: paths.VE(sigma_min=0.0), ["sigma_min"]),
        (lambda: paths.VE(sigma_min=2.0, sigma_max=1.0), ["sigma_max"]),
        (lambda: paths.EDM(sigma_max=math.nan), ["sigma_max"]),
        (lambda: paths.EDM(rho=0.0), ["rho"]),
        (lambda: paths.EDM(rho=math.nan), ["rho"]),
        (lambda: paths.Rectified().shifted(0.0), ["shift"]),
        (lambda: paths.Rectified().shifted(-2.0), ["shift"]),
    ],
)
def test_bad_options(make, words):
    with pytest.raises(OptionError) as caught:
        make()
    message = one_line(caught.value)
    assert all(word in message for word in words), message


def test_options_beside_a_path_are_not_ignored():
    with pytest.raises(FluvialError):
        paths.named(paths.VP(), beta_max=10.0)
