"""What rollouts hand to the trainer: trajectories, groups, batches, and the result of an evaluation.

Plain numpy and plain values, so that they can be pickled between processes and kept in a checkpoint. A trajectory is
*not* shifted to prediction positions here: token t, its version and its log-prob share one index, and
`algorithm.alignment` moves all fields at once when a batch is built. Next: `buffer.py`, where groups wait.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One prompt and one response. All arrays have the length of prompt and response together.

    `given` are the spans [start, end) of the response that a workflow wrote, not the policy: tool results, later
    prompts. There, as on the prompt, `versions` is -1 and `behave_logp` 0, and nothing is trained. An EOS the policy
    produced is an ordinary response token.
    `prompt_index` is the position in the endless prompt stream, so that (seed, prompt_index, sample) determines the
    random numbers of the response.
    """

    prompt_index: int
    sample: int
    tokens: npt.NDArray[np.int32]
    prompt_length: int
    versions: npt.NDArray[np.int32]
    behave_logp: npt.NDArray[np.float32]
    finish_reason: FinishReason
    reward: float | None = None
    given: tuple[tuple[int, int], ...] = ()

    @property
    def generated(self) -> npt.NDArray[np.bool_]:
        """The tokens that the policy produced, and that are trained."""
        mask = np.arange(len(self.tokens)) >= self.prompt_length
        for start, end in self.given:
            mask[start:end] = False
        return mask

    @property
    def response_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def oldest_version(self) -> int:
        return int(self.versions[self.generated].min())

    @property
    def name(self) -> str:
        return f"prompt {self.prompt_index}, sample {self.sample}"


@dataclass(frozen=True, eq=False)
class Group:
    """All samples of one prompt: the unit that is admitted, filtered, dropped and trained on."""

    prompt_index: int
    prompt: str
    answer: str
    trajectories: tuple[Trajectory, ...]

    @property
    def oldest_version(self) -> int:
        return min(trajectory.oldest_version for trajectory in self.trajectories)

    @property
    def newest_version(self) -> int:
        return max(int(trajectory.versions.max()) for trajectory in self.trajectories)

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ. Equal rewards give every sample an advantage of exactly 0."""
        return len({trajectory.reward for trajectory in self.trajectories}) > 1


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """What one training step consumes, and what happened in the rollout process since the batch before."""

    groups: list[Group]
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Greedy accuracy on held-out prompts, of `version`. The tokens' own versions lie in [min_version, max_version]:
    all three are equal, unless vLLM servers were lost or took longer than they may."""

    accuracy: float
    num_prompts: int
    version: int
    min_version: int
    max_version: int
    num_truncated: int
