"""A process that calls a reward function, so that one which hangs or crashes can be ended.

`python -m megatron_a3po.rollout.rewards.worker` reads frames from standard input (a length, then a pickle): the reward
section first, then one (prompt, response, answer) per call, and answers each with one frame. It ends with its input.
What the function prints goes to the log. The other side is `scorer.py`.
"""

import os
import pickle
import struct
import sys
import traceback
from typing import Any, BinaryIO

from megatron_a3po.rollout.rewards.base import load_reward

HEADER = struct.Struct("<Q")


def frame(value: object) -> bytes:
    payload = pickle.dumps(value)
    return HEADER.pack(len(payload)) + payload


def main() -> None:
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    reward = None
    while (request := _read(requests)) is not None:
        try:
            if reward is None:
                reward, answer = load_reward(request), (True, 0.0)
            else:
                answer = (True, as_float(reward(*request)))
        except BaseException:  # the process boundary: the caller gets the traceback as text
            answer = (False, traceback.format_exc())
        answers.write(frame(answer))
        answers.flush()


def as_float(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # the point is to find out
    except (TypeError, ValueError):
        raise TypeError(f"the reward function returned {value!r}, wanted a number") from None


def _read(stream: BinaryIO) -> Any:
    header = stream.read(HEADER.size)
    return pickle.loads(stream.read(HEADER.unpack(header)[0])) if len(header) == HEADER.size else None


if __name__ == "__main__":
    main()
