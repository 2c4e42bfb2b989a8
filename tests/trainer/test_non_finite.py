"""Numbers that must not reach the weights, through the production command on replayed batches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.rollout.trajectory import Group, Trajectory
from megatron_a3po.trainer.batch import Batch, batch_path, load_batch, save_batch
from tests.trainer.checkpoints import read_plain, read_tensors
from tests.trainer.replay import Replays, identical, logs_of

Change = Callable[[Trajectory], Trajectory]
NO_CORRECTION = ["actor.use_decoupled_loss=false", "actor.num_mini_batches=2"]
DECAY = ["actor.lr_decay_style=linear", "actor.lr_decay_iters=50"]
GROUP, SAMPLE = 5, 2  # the trajectory that is changed: in mini-batch 2 of 2


def with_token(field: str, value: float, token: int = 0) -> Change:
    """Trajectory -> the same with another value at its `token`-th response token."""

    def change(trajectory: Trajectory) -> Trajectory:
        values = getattr(trajectory, field).copy()
        values[trajectory.prompt_length + token] = value
        return replace(trajectory, **{field: values})

    return change


def with_reward(value: float) -> Change:
    return lambda trajectory: replace(trajectory, reward=value)


# A vanishing behaviour: without an anchor near the target the ratio overflows.
spoil_token = with_token("behave_logp", -1e4)


def spoil(trajectory: Trajectory) -> Trajectory:
    """The same, with a negative advantage: the clip silences a positive one."""
    return with_reward(-1.0)(spoil_token(trajectory))


def of_all(group: Group, change: Change) -> Group:
    return replace(group, trajectories=tuple(change(trajectory) for trajectory in group.trajectories))


def changed(replays: Replays, name: str, changes: dict[int, Change]) -> tuple[Path, Trajectory]:
    """A copy of the batches, one trajectory changed in the steps named; and that trajectory of the last one."""
    folder = replays.folder / name
    trajectory = load_batch(batch_path(replays.folder / "batches", 1)).groups[GROUP].trajectories[SAMPLE]
    for step in range(1, 5):
        batch = load_batch(batch_path(replays.folder / "batches", step))
        if step in changes:
            groups = list(batch.groups)
            trajectories = list(groups[GROUP].trajectories)
            trajectories[SAMPLE] = changes[step](trajectories[SAMPLE])
            groups[GROUP] = Group(groups[GROUP].prompt_index, "p", "1", tuple(trajectories))
            batch = Batch(groups, batch.version)
        trajectory = batch.groups[GROUP].trajectories[SAMPLE] if step in changes else trajectory
        save_batch(batch_path(folder, step), batch)
    return folder, trajectory


REFUSED: dict[str, tuple[Change, str]] = {
    "nan log-prob": (with_token("behave_logp", np.nan, 1), "log-prob of token {second} is nan"),
    "infinite log-prob": (with_token("behave_logp", -np.inf), "log-prob of token {first} is -inf"),
    "infinite reward": (with_reward(np.inf), "the reward is inf"),
    "missing reward": (with_reward(np.nan), "the reward is nan"),
    "overflowing advantage": (with_reward(-1e305), "the advantage is not finite, from a reward of -1e+305"),
    "no version": (with_token("versions", -1, 1), "trained token 1 has version -1"),
    "from the future": (with_token("versions", 9), "trained token 0 has version 9, newer than"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("layout", [[], ["actor.data_parallel_size=2"]], ids=["1 rank", "2 ranks"])
def test_what_is_wrong_in_a_batch_stops_the_run_before_the_step(
    replays: Replays, case: str, layout: list[str]
) -> None:
    change, message = REFUSED[case]
    name = f"{case}-{len(layout)}".replace(" ", "-")
    folder, trajectory = changed(replays, f"batches-{name}", {2: change})
    ended = replays.ended(
        name, f"trainer.replay={folder}", "trainer.steps=2", "actor.advantage=rloo", *layout
    )
    assert ended.code == 3, ended.output
    first = trajectory.prompt_length
    assert f"{trajectory.name}: {message.format(first=first, second=first + 1)}" in " ".join(
        ended.output.split()
    ).replace("the behaviour ", "")
    assert "Traceback" not in ended.output
    assert [row["step"] for row in replays.rows(name)] == [1]
    assert not (replays.folder / name / "summary.json").exists()


LAYOUTS = {"1 rank": [], "TP 2": ["actor.tensor_model_parallel_size=2"]}
LAYOUTS["PP 2, DP 2"] = ["actor.pipeline_model_parallel_size=2", "actor.data_parallel_size=2"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_that_is_not_finite_is_applied_on_no_rank(replays: Replays, layout: str) -> None:
    """The ratio of one token of the second of two mini-batches overflows. Weights, moments and schedule are those of a
    run without that mini-batch, to the last bit; the trajectory is named."""
    name = f"skipped-{layout}".replace(" ", "-").replace(",", "")
    spoiled, trajectory = changed(replays, f"batches-{name}", {2: spoil})
    without = replays.folder / f"batches-{name}-without"
    for step in (1, 2):
        batch = load_batch(batch_path(spoiled, step))
        groups = list(batch.groups)
        if step == 2:
            groups[4:] = [of_all(group, lambda t: replace(t, finish_reason="length")) for group in groups[4:]]
        save_batch(batch_path(without, step), Batch(groups, batch.version))
    overrides = [*NO_CORRECTION, *DECAY, *LAYOUTS[layout], "trainer.steps=2", "trainer.save_every=2"]
    overrides.append("rollout.mask_truncated=true")
    rows, _ = replays.run(name, f"trainer.replay={spoiled}", *overrides)
    assert [row["steps_skipped"] for row in rows] == [0.0, 1.0]
    said = logs_of(replays.folder / name)
    assert f"first at {trajectory.name}, token {trajectory.prompt_length};" in said
    assert "mini-batch 2: loss or gradient is not finite" in said

    replays.run(f"{name}-without", f"trainer.replay={without}", *overrides)
    one, other = (replays.folder / run / "checkpoints/step-2/actor" for run in (name, f"{name}-without"))
    assert identical(read_tensors(one), read_tensors(other))
    assert read_plain(one) == read_plain(other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_of_nothing_but_skipped_updates_changes_nothing(replays: Replays, layout: str) -> None:
    name = f"all-skipped-{layout}".replace(" ", "-").replace(",", "")
    folder, _ = changed(replays, f"batches-{name}", {})
    batch = load_batch(batch_path(folder, 2))
    save_batch(
        batch_path(folder, 2), Batch([of_all(group, spoil_token) for group in batch.groups], batch.version)
    )
    overrides = [f"trainer.replay={folder}", *NO_CORRECTION, *DECAY, *LAYOUTS[layout]]
    rows, _ = replays.run(name, "trainer.steps=3", "trainer.save_every=1", "trainer.keep_last=4", *overrides)
    assert [row["steps_skipped"] for row in rows] == [0.0, 2.0, 0.0]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1]["loss"] is None or not np.isfinite(rows[1]["loss"])
    actors = [replays.folder / name / f"checkpoints/step-{step}/actor" for step in (1, 2, 3)]
    one, two, three = map(read_tensors, actors)
    assert any("exp_avg_sq" in key for key in one)
    assert identical(one, two)
    assert not identical(two, three)
    # The rate and every count of Adam's and the schedule's are in the part that is no tensor of the model.
    assert read_plain(actors[0]) == read_plain(actors[1]) != read_plain(actors[2])


def test_too_many_skipped_steps_in_a_row_end_the_run(replays: Replays) -> None:
    folder, trajectory = changed(replays, "batches-in-a-row", dict.fromkeys((1, 3, 4), spoil))
    ended = replays.ended(
        "in-a-row",
        f"trainer.replay={folder}",
        "trainer.steps=4",
        "trainer.max_skipped_steps=2",
        *NO_CORRECTION,
    )
    assert ended.code == 3
    assert "2 steps in a row" in ended.output
    assert "trainer.max_skipped_steps" in ended.output
    assert trajectory.name in ended.output
    # Step 2 was good and began the count anew.
    assert [row["steps_skipped"] for row in replays.rows("in-a-row")] == [1.0, 0.0, 1.0, 1.0]
