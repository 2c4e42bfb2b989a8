"""The trajectories of a step that samples.jsonl shows, with what the update made of their tokens.

Every rank chooses the same ones. The rank whose pack holds one keeps its importance weights and clips, as vectors on
the device; after the last update they are read and brought to rank 0, in the steps that show any.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_a3po.actor.grid import Grid
from megatron_a3po.actor.packing import MicroBatch
from megatron_a3po.rollout.trajectory import Group, Trajectory
from megatron_a3po.trainer.batch import Batch
from megatron_a3po.vocab_parallel import LossOutput
from megatron_a3po.vocab_parallel.policy_objective import ClippedObjective

LIMIT = 4
UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are no whole character yet


class Decoder(Protocol):
    """All that is needed of a tokenizer here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


Figures = dict[
    str, list[Any]
]  # logp, importance_weight and clipped of a trajectory's trained tokens, in order
FIGURES = ("logp", "importance_weight", "clipped")


@dataclass
class Shown:
    """The first trajectory of a few groups, spread over the batch; none in a step that shows none."""

    groups: list[Group]
    figures: dict[str, Figures] = field(default_factory=dict)  # by name; complete on every rank once gathered
    _kept: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, step: int, sample_every: int, limit: int = LIMIT) -> "Shown":
        """Every `sample_every`-th step shows some, and the first."""
        number = min(limit, len(batch.groups)) if step % sample_every == 0 or step == 1 else 0
        return cls([batch.groups[place * len(batch.groups) // number] for place in range(number)])

    @property
    def trajectories(self) -> list[tuple[Group, Trajectory]]:
        return [(group, group.trajectories[0]) for group in self.groups]

    def see(self, objective: ClippedObjective, output: LossOutput, micro_batch: MicroBatch) -> None:
        """Keep what concerns a shown trajectory in a pack that was just trained on. Reads nothing from the device."""
        names = {trajectory.name for _, trajectory in self.trajectories}
        if names.isdisjoint(sequence.name for sequence in micro_batch.sequences):
            return
        token_loss = objective.token_loss(output.logp, micro_batch.fields)
        first = 0
        for sequence in micro_batch.sequences:
            last = first + int(np.count_nonzero(sequence.loss_mask))
            if sequence.name in names:
                vectors = (output.logp, token_loss.importance_weight, token_loss.clipped)
                self._kept[sequence.name] = tuple(vector[first:last].detach() for vector in vectors)
            first = last

    def gather(self, grid: Grid) -> None:
        """Bring every rank's figures together. Collective, and only where something is shown."""
        if not self.groups:
            return
        own = {
            name: dict(zip(FIGURES, (vector.tolist() for vector in vectors), strict=True))
            for name, vectors in self._kept.items()
        }
        everyone: list[dict[str, Figures]] = [{} for _ in range(grid.world_size)]
        dist.all_gather_object(everyone, own, group=grid.host_group)
        for figures in everyone:
            self.figures |= figures
        self._kept.clear()

    def rows(self, tokenizer: Decoder) -> list[dict[str, Any]]:
        """Each trajectory for people: texts beside the arrays, all arrays as long as `tokens`, null where a token has
        no such number. As the reward sees it, the response has no EOS."""
        return [self._row(group, trajectory, tokenizer) for group, trajectory in self.trajectories]

    def _row(self, group: Group, trajectory: Trajectory, tokenizer: Decoder) -> dict[str, Any]:
        tokens = trajectory.tokens.tolist()
        figures = self.figures.get(trajectory.name, {name: [] for name in FIGURES})
        trained = np.flatnonzero(trajectory.generated).tolist()
        return {
            "prompt": group.prompt,
            "response": tokenizer.decode(tokens[trajectory.prompt_length :], skip_special_tokens=True),
            "tokens": tokens,
            "texts": token_texts(tokenizer, tokens),
            "versions": trajectory.versions,
            "behave_logp": trajectory.behave_logp,
            **{name: _at(trained, values, len(tokens)) for name, values in figures.items()},
            "reward": trajectory.reward,
            "finish_reason": trajectory.finish_reason,
        }


def _at(positions: list[int], values: list[Any], length: int) -> list[Any]:
    """A list with these values at these positions; a trajectory left out of the loss has none."""
    known = dict(zip(positions, values, strict=False))
    return [known.get(position) for position in range(length)]


def token_texts(tokenizer: Decoder, tokens: list[int]) -> list[str]:
    """What each token adds to the text. A character of several tokens is its last token's; one token is decoded
    beside the one before it, since some tokenizers write a word's space only between words."""
    texts: list[str] = []
    context = start = 0
    for end in range(1, len(tokens) + 1):
        before = tokenizer.decode(tokens[context:start], skip_special_tokens=False)
        text = tokenizer.decode(tokens[context:end], skip_special_tokens=False)
        if text.endswith(UNFINISHED) and end < len(tokens):
            texts.append("")
        else:
            texts.append(text[len(before) :])
            context, start = start, end
    return texts
