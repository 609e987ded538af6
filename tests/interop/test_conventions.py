"""The named conventions: their tables against the papers, their options, and their words."""

from __future__ import annotations

import math

import pytest
import torch

from fluvial import paths
from fluvial.convention import Clock, Convention
from fluvial.errors import OptionError
from fluvial.interop import NAMES, SigmaClock, foreign, in_words
from fluvial.interop.conventions import cosine_table, linear_table, scaled_linear_table
from fluvial.predictions import Noise
from problems import one_line


def test_tables_are_those_of_the_papers():
    """Each by its product of 1 - beta, written out; the last entries are the figures that everybody has."""
    product, betas = 1.0, [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    for beta, entry in zip(betas, linear_table()):
        product *= 1 - beta
        assert entry == pytest.approx(product, rel=1e-12)
    assert linear_table()[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    product = 1.0
    for i, entry in enumerate(scaled_linear_table()):
        product *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
        assert entry == pytest.approx(product, rel=1e-12)
    assert scaled_linear_table()[-1] ** 0.5 == pytest.approx(0.0683, rel=1e-3)  # the signal left in Stable Diffusion
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1000)]
    assert cosine_table()[:-1] == pytest.approx([entry / f[0] for entry in f[1:]], rel=1e-10)
    assert cosine_table()[-1] == pytest.approx(f[-1] / f[0] * 0.001, rel=1e-10)  # beta is cut at 0.999


@pytest.mark.parametrize("steps", [2, 3, 1000])
def test_tables_of_few_steps(steps):
    for table in (linear_table(steps), scaled_linear_table(steps), cosine_table(steps)):
        assert len(table) == steps
        assert paths.Discrete(table)(0.0).alpha == pytest.approx(table[-1] ** 0.5, rel=1e-12)


def test_level_as_a_clock():
    for path in (paths.EDM(), paths.VE(), paths.Rectified(), paths.VP()):
        t = torch.tensor([0.2, 0.6], dtype=torch.float64)
        level = (-path.log_snr(t) / 2).exp()
        torch.testing.assert_close(SigmaClock(path)(t), level, rtol=1e-9, atol=0)
        torch.testing.assert_close(SigmaClock(path, 0.25)(t), level.log() / 4, rtol=1e-9, atol=1e-9)
        assert SigmaClock(path, 1.0)(0.2) == pytest.approx(math.log(level[0]), rel=1e-9)


def test_every_name_has_its_words_and_source():
    for name in NAMES:
        found = foreign(name)
        assert found.name == name
        assert "https://" in found.source
        assert str(found).startswith(f"{name}: predicts ")
        assert "\n" not in str(found)
    assert in_words(foreign("ddpm", steps=400).convention) == (
        "predicts the noise on a table of 400 steps, time: 399 at the noise, 0 at the data"
    )
    assert in_words(foreign("edm").convention).endswith("rho=7.0), time: sigma")
    assert in_words(Convention(paths.EDM(), foreign("edm").convention.prediction)).endswith("from noise 0 to data 1")


def test_the_betas_of_stable_diffusion():
    path = foreign("ddpm", betas="scaled_linear", beta_start=0.00085, beta_end=0.012).convention.path
    assert path == paths.Discrete(scaled_linear_table())


def test_objects_pass_as_they_are():
    found = foreign("sit", path="gvp", prediction="noise")
    assert foreign(found) is found
    own = Convention(paths.VP(), Noise(), Clock.noise_level(10.0))
    assert foreign(own).convention is own


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: foreign("dddpm"), "unknown convention 'dddpm'; expected one of ddpm, ddpm_cosine, .*mean 'ddpm'"),
        (lambda: foreign("ddpm", step=10), "unknown option of convention 'ddpm' 'step'; .*did you mean 'steps'"),
        (lambda: foreign("flow_matching", steps=10), "'flow_matching' 'steps'; expected none"),
        (lambda: foreign(foreign("ddpm"), steps=10), "was given steps; expected no options"),
        (lambda: foreign("sit", path="cosine"), "unknown path of SiT 'cosine'; expected one of gvp, linear, vp"),
        (lambda: foreign("ddpm", betas="cosine"), "unknown kind of betas 'cosine'; expected one of linear, scaled_lin"),
        (lambda: foreign("ddpm", steps=1), "steps is 1; expected a whole number, 2 or more"),
        (lambda: foreign("ddpm", steps=1000.0), "steps is 1000.0; expected a whole number"),
        (lambda: foreign("ddpm", beta_end=1.5), "beta_end 1.5; expected 0 < beta_start <= beta_end < 1"),
        (lambda: foreign("ddpm", prediction="epsilon"), "unknown prediction 'epsilon'"),
        (lambda: foreign("edm", sigma_min=90.0), "expected 0 < sigma_min < sigma_max"),
    ],
)
def test_bad_input_has_one_clear_error(make, message):
    with pytest.raises(OptionError, match=message) as caught:
        make()
    one_line(caught.value)
