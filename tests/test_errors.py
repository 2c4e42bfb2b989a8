"""The exception tree: exit codes, and that problems survive a process boundary."""

import pickle

import pytest

from megatron_a3po import errors


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [
        (errors.ConfigError, 2),
        (errors.InputError, 2),
        (errors.OutputError, 3),
        (errors.TrainingError, 3),
        (errors.RolloutError, 3),
        (errors.RewardError, 3),
        (errors.FencedError, 3),
    ],
)
def test_exit_codes_and_problems(kind: type[errors.A3POError], exit_code: int):
    error = kind(["one", "two"])
    assert error.exit_code == exit_code
    assert str(error) == "one\ntwo"
    assert kind("one").problems == ["one"]
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.problems) == (kind, ["one", "two"])


def test_the_drawn_tree_is_the_real_one():
    kinds = [
        item
        for item in vars(errors).values()
        if isinstance(item, type) and item.__module__ == errors.__name__
    ]
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)
