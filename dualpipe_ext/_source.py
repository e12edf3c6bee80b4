"""Where a pipeline's schedules come from: a planner, for any number of micro-batches, or the user."""

from __future__ import annotations

from dataclasses import dataclass

from dualpipe_ext.schedule import Schedule, plan, schedules

__all__ = ["ScheduleSource"]


@dataclass(frozen=True)
class ScheduleSource:
    """A planner's name and the sizes it needs, or one fixed schedule."""

    name: str
    num_ranks: int
    stages_per_rank: int
    fixed: Schedule | None = None

    @classmethod
    def of(cls, schedule: str | Schedule, num_ranks: int, num_modules: int) -> ScheduleSource:
        """Returns the source for a pipeline whose ranks have ``num_modules`` modules each.

        An unknown name is left to :meth:`plan` to report, a wrong number of modules to the caller.

        Raises:
            ValueError: ``schedule`` is for another number of ranks.
            TypeError: ``schedule`` is neither a name nor a schedule.
        """
        if isinstance(schedule, Schedule):
            source = cls(schedule.name, num_ranks, num_modules, schedule)
            if schedule.num_ranks != num_ranks:
                raise ValueError(
                    f"the schedule {schedule.name!r} is for {schedule.num_ranks} ranks; "
                    f"the group has {num_ranks}"
                )
        elif isinstance(schedule, str):
            source = cls(schedule, num_ranks, _stages_per_rank(schedule, num_modules))
        else:
            raise TypeError(
                f"schedule must be a name or a dualpipe_ext.schedule.Schedule; "
                f"found {type(schedule).__name__}"
            )
        return source

    def smallest(self) -> Schedule:
        """Returns a schedule that shows which rank holds which stages, for any number of chunks."""
        return self.fixed or self.plan(2 * self.num_ranks)

    def plan(self, num_microbatches: int) -> Schedule:
        """Returns the verified compute actions of a step.

        Raises:
            ScheduleError: an unknown planner, or sizes that it does not support.
            ValueError: the fixed schedule has another number of micro-batches.
        """
        if self.fixed is None:
            return plan(self.name, self.num_ranks, num_microbatches, self.stages_per_rank)
        if self.fixed.num_microbatches != num_microbatches:
            raise ValueError(
                f"num_chunks={num_microbatches}, but the schedule {self.name!r} is one of "
                f"{self.fixed.num_microbatches} micro-batches; pass that number, or plan another"
            )
        return self.fixed


def _stages_per_rank(name: str, num_modules: int) -> int:
    for info in schedules():
        if info.name == name:
            return num_modules if info.stages_per_rank == 0 else info.stages_per_rank
    return num_modules  # unknown: plan() raises, and says which ones there are
