"""From groups to what the loss meets: advantages, one alignment, mini-batches. And the files a batch is kept in.

All checks on a batch's numbers are here, on the host, before the step: a trained token without a version, from the
future, or with a log-prob, reward or advantage that is not finite names its trajectory and stops the run.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megatron_a3po.actor.packing import AlignedSequence
from megatron_a3po.algorithm.advantages import group_advantages
from megatron_a3po.algorithm.alignment import shift_to_predictions
from megatron_a3po.algorithm.loss_mean import denominator, loss_weights
from megatron_a3po.algorithm.staleness import trained_staleness
from megatron_a3po.config import Config
from megatron_a3po.config.actor import ActorSection
from megatron_a3po.config.rollout import RolloutSection
from megatron_a3po.errors import InputError, TrainingError
from megatron_a3po.rollout.trajectory import Group, Trajectory


@dataclass(frozen=True)
class Batch:
    """What one training step consumes: its groups and the version it begins with."""

    groups: Sequence[Group]
    version: int

    @property
    def trajectories(self) -> list[Trajectory]:
        return [trajectory for group in self.groups for trajectory in group.trajectories]


def align(batch: Batch, actor: ActorSection, rollout: RolloutSection) -> list[list[AlignedSequence]]:
    """The mini-batches of a step, cut in batch order; groups stay whole, sequences without a trained token go.

    Errors: TrainingError names the trajectory and the position of a number that must not be trained on.
    """
    rewards = np.array(
        [[_reward(trajectory) for trajectory in group.trajectories] for group in batch.groups],
        dtype=np.float64,
    )
    # The loss has them in float32, where finite rewards may have overflowed.
    with np.errstate(over="ignore", invalid="ignore"):
        advantages = group_advantages(rewards, actor.advantage).astype(np.float32)
    _check_advantages(batch, advantages)
    per_mini_batch = len(batch.groups) // actor.num_mini_batches
    mini_batches = []
    for first in range(0, len(batch.groups), per_mini_batch):
        sequences = [
            _align_one(trajectory, float(advantage), batch.version, actor, rollout)
            for group, row in zip(
                batch.groups[first : first + per_mini_batch],
                advantages[first : first + per_mini_batch],
                strict=True,
            )
            for trajectory, advantage in zip(group.trajectories, row, strict=True)
            if not (rollout.mask_truncated and trajectory.finish_reason == "length")
        ]
        mini_batches.append(sequences)
    return mini_batches


def supervised_sequence(name: str, prompt: np.ndarray, response: np.ndarray) -> AlignedSequence:
    """A demonstration for the warm start: every response token is trained, none has a behaviour."""
    tokens = np.concatenate([prompt, response]).astype(np.int32)
    trained = np.arange(len(tokens)) >= len(prompt)
    zeros = np.zeros(len(tokens), np.float32)
    return AlignedSequence(
        name=name,
        tokens=tokens,
        labels=shift_to_predictions(tokens, 0),
        loss_mask=shift_to_predictions(trained, False),
        staleness=np.zeros(len(tokens), np.int32),
        behave_logp=zeros,
        advantages=zeros,
        loss_weights=zeros + 1,
        denominator=len(response),
    )


def _reward(trajectory: Trajectory) -> float:
    if trajectory.reward is None or not np.isfinite(trajectory.reward):
        raise TrainingError(
            f"{trajectory.name}: the reward is {trajectory.reward}; the reward must return a number"
        )
    return trajectory.reward


def _check_advantages(batch: Batch, advantages: np.ndarray) -> None:
    finite = np.isfinite(advantages.ravel())
    if not finite.all():
        # One reward spoils a whole group: the largest is the one to look at.
        spoiled = [
            trajectory for trajectory, fine in zip(batch.trajectories, finite, strict=True) if not fine
        ]
        culprit = max(spoiled, key=lambda trajectory: abs(_reward(trajectory)))
        raise TrainingError(
            f"{culprit.name}: the advantage is not finite, from a reward of {culprit.reward}; rewards must be of a "
            "size whose differences float32 holds"
        )


def _align_one(
    trajectory: Trajectory, advantage: float, version: int, actor: ActorSection, rollout: RolloutSection
) -> AlignedSequence:
    trained = trajectory.generated
    try:
        stale = trained_staleness(trajectory.versions[trained], version, trajectory.name)
    except ValueError as error:
        raise TrainingError(str(error)) from None
    if not (finite := np.isfinite(trajectory.behave_logp) | ~trained).all():
        position = int(np.argmin(finite))
        raise TrainingError(
            f"{trajectory.name}: the behaviour log-prob of token {position} is "
            f"{trajectory.behave_logp[position]}; the engine must report finite log-probs"
        )
    lengths = np.array([np.count_nonzero(trained)])
    return AlignedSequence(
        name=trajectory.name,
        tokens=trajectory.tokens,
        labels=shift_to_predictions(trajectory.tokens, 0),
        loss_mask=shift_to_predictions(trained, False),
        staleness=shift_to_predictions(_at(trained, stale), 0),
        behave_logp=shift_to_predictions(trajectory.behave_logp, 0.0),
        advantages=np.full(len(trained), advantage, np.float32),
        loss_weights=shift_to_predictions(_at(trained, loss_weights(lengths, actor.loss_mean)), 0.0),
        denominator=denominator(lengths, actor.loss_mean, rollout.max_response_tokens),
    )


def _at(trained: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A field of the whole trajectory: `values` on its trained tokens, 0 on the others."""
    field = np.zeros(len(trained), values.dtype)
    field[trained] = values
    return field


# Batches on disk: one .npz a step, arrays and plain strings only, so that loading one runs no code.


def save_batch(path: Path, batch: Batch) -> None:
    """Keep a batch for replay. Written aside and renamed. Errors: OSError leaves nothing."""
    trajectories = batch.trajectories
    arrays: dict[str, Any] = {
        "current_version": np.int64(batch.version),
        "group_sizes": np.array([len(group.trajectories) for group in batch.groups], np.int64),
        "group_prompt_index": np.array([group.prompt_index for group in batch.groups], np.int64),
        "group_prompt": np.array([group.prompt for group in batch.groups]),
        "group_answer": np.array([group.answer for group in batch.groups]),
        "lengths": np.array([len(t.tokens) for t in trajectories], np.int64),
        "prompt_lengths": np.array([t.prompt_length for t in trajectories], np.int64),
        "sample": np.array([t.sample for t in trajectories], np.int64),
        "reward": np.array([np.nan if t.reward is None else t.reward for t in trajectories], np.float64),
        "finish_reason": np.array([t.finish_reason for t in trajectories]),
        # Of the trajectory with this number, from where to where.
        "given": np.array(
            [(i, *span) for i, t in enumerate(trajectories) for span in t.given], np.int64
        ).reshape(-1, 3),
    }
    for name in ("tokens", "versions", "behave_logp"):
        arrays[name] = np.concatenate([getattr(t, name) for t in trajectories])
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    try:
        with aside.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def load_batch(path: Path) -> Batch:
    """A batch that `save_batch` kept. Errors: InputError names the file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
        return _batch_of(arrays)
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} is no batch of this program ({error}); write it with trainer.dump_batches"
        ) from None


def _batch_of(arrays: dict[str, np.ndarray]) -> Batch:
    bounds = np.cumsum(arrays["lengths"])[:-1]
    fields = {name: np.split(arrays[name], bounds) for name in ("tokens", "versions", "behave_logp")}
    given: dict[int, list[tuple[int, int]]] = {}
    for number, start, end in arrays.get("given", np.zeros((0, 3), np.int64)).tolist():
        given.setdefault(number, []).append((start, end))
    groups, first = [], 0
    for number, size in enumerate(arrays["group_sizes"]):
        prompt_index = int(arrays["group_prompt_index"][number])
        trajectories = tuple(
            Trajectory(
                prompt_index=prompt_index,
                sample=int(arrays["sample"][i]),
                tokens=fields["tokens"][i],
                prompt_length=int(arrays["prompt_lengths"][i]),
                versions=fields["versions"][i],
                behave_logp=fields["behave_logp"][i],
                finish_reason=str(arrays["finish_reason"][i]),  # pyright: ignore[reportArgumentType]
                reward=float(arrays["reward"][i]),
                given=tuple(given.get(i, ())),
            )
            for i in range(first, first + int(size))
        )
        groups.append(
            Group(
                prompt_index,
                str(arrays["group_prompt"][number]),
                str(arrays["group_answer"][number]),
                trajectories,
            )
        )
        first += int(size)
    return Batch(groups, int(arrays["current_version"]))


def batch_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}.npz"


def check_replayed(batch: Batch, path: Path, config: Config, vocab_size: int) -> None:
    """A kept batch must be what the configuration describes. Errors: InputError names file, key and both values."""
    problems = []
    if len(batch.groups) != config.trainer.prompts_per_step:
        wanted = config.trainer.prompts_per_step
        problems.append(f"{path} has {len(batch.groups)} groups, but trainer.prompts_per_step={wanted}")
    sizes = {len(group.trajectories) for group in batch.groups}
    if sizes != {config.rollout.samples_per_prompt}:
        wanted = config.rollout.samples_per_prompt
        problems.append(
            f"{path} has groups of {sorted(sizes)} samples, but rollout.samples_per_prompt={wanted}"
        )
    largest = max(int(trajectory.tokens.max()) for trajectory in batch.trajectories)
    if largest >= vocab_size:
        problems.append(f"{path} has the token {largest}, but model.hf_path has a vocabulary of {vocab_size}")
    if problems:
        raise InputError(f"{problem}; set it to what the batch was made with" for problem in problems)
