"""The protocol of what turns prompts and published weights into batches: `continuous.py` or `waves.py`."""

from pathlib import Path
from typing import Any, Protocol

from megatron_a3po.rollout.trajectory import Group


class Producer(Protocol):
    def restore(self, state: dict[str, Any], version: int) -> None:
        """Before `run`: go on from what `state` returned, in a run that resumes at `version`."""
        ...

    async def run(self) -> None:
        """Generate until cancelled; whatever goes wrong is raised here."""
        ...

    async def publish(self, version: int, directory: Path) -> None:
        """Hand new weights to the engine. Returns when the directory is no longer needed."""
        ...

    async def take(self, version: int) -> list[Group]:
        """The groups of the step that begins with `version`, once there are enough."""
        ...

    async def state(self) -> dict[str, Any]:
        """What `restore` needs so that no prompt is lost and none trained on twice."""
        ...

    def put_back(self, state: dict[str, Any], groups: list[Group], version: int) -> None:
        """Into a state: a batch that was taken for `version`, but never reached the trainer."""
        ...
