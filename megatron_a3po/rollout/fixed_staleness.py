"""The schedule of `rollout.fixed_staleness: d`: step s trains on samples generated with version max(s - d, 0), exactly.

The batch of a step is one wave: the same prompts in the same composition whenever it is generated, started when its
version is published. Pure book-keeping of which wave is due, which is waiting and which is consumed; `waves.py` runs
them. The waiting batches are part of a checkpoint, since their version may be gone by then.
"""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_a3po.errors import RolloutError
from megatron_a3po.rollout.trajectory import Group


class FixedStaleness:
    """Waves by step; `waiting` are those generated and not consumed."""

    def __init__(self, staleness: int, groups_per_step: int, consumed_steps: int = 0) -> None:
        self.staleness = staleness
        self.groups_per_step = groups_per_step
        self._next = consumed_steps
        self._waiting: dict[int, list[Group]] = {}

    @property
    def waiting(self) -> Mapping[int, list[Group]]:
        return MappingProxyType(self._waiting)

    def due(self, version: int) -> list[int]:
        """The steps whose waves `version` generates and that neither wait already nor are consumed."""
        steps = range(self.staleness + 1) if version == 0 else [version + self.staleness]
        return [step for step in steps if step >= self._next and step not in self._waiting]

    def prompt_indices(self, step: int) -> range:
        return range(step * self.groups_per_step, (step + 1) * self.groups_per_step)

    def finish(self, step: int, groups: list[Group]) -> None:
        wanted = max(step - self.staleness, 0)
        for group in groups:
            for trajectory in group.trajectories:
                found = {int(version) for version in trajectory.versions[trajectory.generated]}
                if found != {wanted}:
                    raise RolloutError(
                        f"{trajectory.name} of step {step} has versions {found}, wanted {wanted} alone."
                    )
        self._waiting[step] = groups

    def take(self, version: int) -> list[Group] | None:
        """The batch of the step that begins with `version`, or None while it is not generated."""
        return self._waiting.pop(version, None)

    def check_resume(self, version: int) -> None:
        """A resume at `version` can generate the waves of that version, but none of an older one."""
        needed = range(max(version, self._next), version + self.staleness)
        lost = [step for step in needed if step not in self._waiting]
        if version > 0 and lost:
            raise RolloutError(
                f"the checkpoint of version {version} lacks the waiting batches of steps {lost}, which "
                f"rollout.fixed_staleness={self.staleness} needs: resume from one that has them."
            )
