"""diffusers, both ways: pipelines in as models, models out as pipelines, and every solver as a scheduler.

    model = from_diffusers("folder-or-hub-id")              # the network, and the convention in its scheduler's config
    folder = to_diffusers(model, "folder")                  # a folder that diffusers alone loads and runs
    pipe.scheduler = FluvialScheduler.from_config(pipe.scheduler.config, solver="langevin", gamma=0.5)

`FluvialScheduler` is made when it is asked for, because diffusers is imported only then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluvial.interop.diffusers_in import from_diffusers
from fluvial.interop.diffusers_out import to_diffusers
from fluvial.interop.diffusers_schedule import Schedule, read_schedule
from fluvial.interop.diffusers_times import sampling_times

if TYPE_CHECKING:
    FluvialScheduler: Any

__all__ = ["FluvialScheduler", "Schedule", "from_diffusers", "read_schedule", "sampling_times", "to_diffusers"]


def __getattr__(name: str) -> Any:
    if name == "FluvialScheduler":
        from fluvial.interop.diffusers_class import scheduler_class

        return scheduler_class()
    if name == "SchedulerMixin":
        # By this name a pipeline's loader, which looks for it beside the class, sees that the class is a scheduler.
        from diffusers.schedulers.scheduling_utils import SchedulerMixin

        return SchedulerMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
