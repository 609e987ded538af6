"""Pairs made when they are asked for, by a frozen teacher: nothing is stored, and no pair need ever come twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluvial.model import Model
from fluvial.sampling import DEFAULT_SOLVER
from fluvial.solvers import Solver
from fluvial.training.pair_request import Conditions, Steps, recipe
from fluvial.training.pairs import PairSource
from fluvial.training.settings import whole
from fluvial.training.source import Rows


class Online(PairSource):
    """The pairs that `make_pairs` would store, made on the spot: pair i is the same function of (seed, i).

    A batch is made on the teacher's device and returned on the CPU. It costs the teacher's network calls every time, so
    it is for few steps of the solver, or for more pairs than a disk holds.

    Args:
        teacher: the model that makes them. Its network is put in eval mode, and must not be the one that is trained.
        n: how many pairs an epoch has.
        solver, steps, times, states, cond, drop_cond, guidance, seed: as for `make_pairs`.

    Raises:
        OptionError, ShapeError: for arguments that do not fit.
    """

    def __init__(
        self,
        teacher: Model,
        n: int = 1_000_000,
        *,
        solver: str | Solver = DEFAULT_SOLVER,
        steps: Steps | None = None,
        times: Any = None,
        states: Sequence[float] | None = None,
        cond: Conditions = None,
        drop_cond: float = 0.1,
        guidance: Callable[[Model], Model] | None = None,
        seed: int = 0,
    ) -> None:
        whole("n", n, 1)
        made = recipe(
            teacher, n, solver=solver, steps=steps, times=times, states=states, cond=cond, drop_cond=drop_cond,
            guidance=guidance, seed=seed,
        )  # fmt: skip
        made.try_once()
        self._recipe = made
        super().__init__(
            "pairs made on the fly", n, made.shape, made.conditions, made.num_classes, teacher.normalisation,
            teacher.path, made.states,
        )  # fmt: skip

    @property
    def manifest(self) -> dict[str, Any]:
        """How the pairs are made, as in the manifest of a stored set."""
        return self._recipe.manifest(len(self))

    def batch(self, indices: Tensor) -> Rows:
        rows = self._recipe.rows(indices.to(torch.int64))
        return {name: rows[name] for name in ("data", *self.conditions)}
