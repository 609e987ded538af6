"""The class `FluvialScheduler`: the driver of `diffusers_scheduler` with diffusers' own configuration and saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from fluvial.interop.diffusers_schedule import OURS, family_of, read_schedule, settings_of, shift_of
from fluvial.interop.diffusers_scheduler import Driver
from fluvial.interop.diffusers_times import spacing_kind


@cache
def scheduler_class() -> Any:
    """The class `FluvialScheduler`, which diffusers' own mixins make savable."""
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    class FluvialScheduler(Driver, SchedulerMixin, ConfigMixin):
        has_compatibles = False

        @register_to_config
        def __init__(
            self,
            solver: str = "dpmpp_2m",
            solver_options: dict[str, Any] | None = None,
            grid: str | None = None,
            seed: int | None = None,
            family: str = "table",
            num_train_timesteps: int = 1000,
            prediction_type: str = "epsilon",
            beta_start: float = 0.0001,
            beta_end: float = 0.02,
            beta_schedule: str = "linear",
            trained_betas: list[float] | None = None,
            rescale_betas_zero_snr: bool = False,
            timestep_spacing: str = "leading",
            steps_offset: int = 0,
            use_karras_sigmas: bool = False,
            use_exponential_sigmas: bool = False,
            use_beta_sigmas: bool = False,
            sigma_min: float | None = None,
            sigma_max: float | None = None,
            sigma_data: float = 0.5,
            sigma_schedule: str = "karras",
            rho: float = 7.0,
            shift: float = 1.0,
            use_dynamic_shifting: bool = False,
            base_shift: float | None = 0.5,
            max_shift: float | None = 1.15,
            base_image_seq_len: int = 256,
            max_image_seq_len: int = 4096,
            time_shift_type: str = "exponential",
            shift_terminal: float | None = None,
        ) -> None:
            self._prepare()

        @classmethod
        def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            made = cls(**_arguments(config, set(cls._get_init_keys(cls)) - {"self"}, kwargs))
            made.register_to_config(**_kept(config, made.config))
            return (made, {}) if return_unused_kwargs else made

        @classmethod
        def _get_compatibles(cls) -> list[Any]:
            return [cls]

    FluvialScheduler.__doc__ = _DOC
    # A pipeline is saved with the names by which its parts are found again.
    FluvialScheduler.__module__, FluvialScheduler.__qualname__ = "fluvial.interop.diffusers", OURS
    return FluvialScheduler


_DOC = """Any Fluvial solver in any diffusers pipeline, diffusion or flow.

    pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver="overshoot", c=1.0)

`from_config` takes the config of any scheduler in `diffusers_schedule`, and keeps what it says about the network and
the spacing. Its sampler, clipping and thresholding are replaced; their settings are carried along unread, so that
`from_config` of diffusers' scheduler leads back. It takes the solver's own options by name too.

Args:
    solver: its name; see `fl.solvers`.
    solver_options: its options by name.
    grid: the name of a grid of Fluvial's, in place of the spacing that the configuration describes.
    seed: of the noise of stochastic solvers, in pipelines that hand over no generator; None draws one for each run.
    family: "table", "flow" or "edm": what the other arguments, diffusers' own, describe.

Raises:
    OptionError: for a solver, an option or a setting that is not known; a solver that chooses its own times; a config
        whose clock or spacing could not be kept.
"""


def _arguments(config: Any, known: set[str], changes: dict[str, Any]) -> dict[str, Any]:
    """What to make a scheduler with, from a config and what to change in it."""
    settings = settings_of(config)
    family = family_of(settings)
    if settings["_class_name"] != OURS:
        # What would be read wrongly once these arguments are all that is left of it.
        read_schedule(settings)
        if changes.get("grid") is None:
            spacing_kind(settings)
    # What was left to the defaults stays so: diffusers keeps account of it.
    silent = settings.get("_use_default_values", ()) if settings["_class_name"] == OURS else ()
    arguments = {key: value for key, value in settings.items() if key in known}
    arguments["family"] = family
    arguments = {key: value for key, value in arguments.items() if key not in silent}
    if settings["_class_name"] != OURS and family == "flow":
        # The static shift goes by another name where a sampler for tables is set up for a flow.
        shift = shift_of({**settings, "use_dynamic_shifting": False})
        arguments.update(prediction_type=settings.get("prediction_type", "flow_prediction"), shift=shift)
    if isinstance(arguments.get("trained_betas"), Sequence | np.ndarray):
        arguments["trained_betas"] = [float(beta) for beta in arguments["trained_betas"]]
    options = {key: value for key, value in changes.items() if key not in known}
    kept = {} if "solver" in changes else settings.get("solver_options") or {}
    arguments.update((key, value) for key, value in changes.items() if key in known)
    given = {**(changes.get("solver_options", kept) or {}), **options}
    if given or "solver_options" not in silent:
        arguments["solver_options"] = given or None
    return arguments


def _kept(config: Any, made: Any) -> dict[str, Any]:
    """What of another scheduler's config is not this one's to read, and its mark where it was loaded from a file."""
    settings = config if isinstance(config, Mapping) else config.config
    kept = {key: value for key, value in settings.items() if key not in made and not key.startswith("_")}
    marks = {"_class_name": OURS, "_diffusers_version": settings.get("_diffusers_version")}
    return {**kept, **(marks if "_class_name" in settings else {})}
