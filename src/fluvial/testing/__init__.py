"""The contract suite: whether a path, a model or a solver of your own is what the library takes it for.

    fl.testing.check_path(path)        coefficients, derivatives, log-SNR and its inverse, SDE, conversion
    fl.testing.check_model(model)      shapes, times, the pair, dtypes, batch, conditions, counted calls, sampling
    fl.testing.check_solver(solver)    facts, order, exact cases, landing, counted calls, no hidden state, law

Each runs named checks and returns a `Report`, a list of (check, what, found, least, most) that prints as a table. The
first figure out of its bounds is a `ContractError` of one line, which names the check, what was found and what was
expected; it is an AssertionError too, so that a line in a test of any framework is enough. What is built in passes.

The truth that solvers are held to is closed-form: the flow of a mixture of Gaussians on the line carries quantiles to
quantiles, and on one Gaussian every step is a matrix, so that the law of a run needs no samples.
"""

from __future__ import annotations

from fluvial.testing.models import check_model
from fluvial.testing.paths import check_path
from fluvial.testing.report import ContractError, Figure, Report
from fluvial.testing.solvers import check_solver

__all__ = ["ContractError", "Figure", "Report", "check_model", "check_path", "check_solver"]
