"""A workflow with a tool: the policy asks a calculator for the sums of digits, and answers.

    47+85=   7+5+0#  =12;  4+8+1#  =13;   :132#

`#` ends a turn. What the calculator says is given: it is context for the next turn and never trained. An episode whose
calls do not end is cut at rollout.max_response_tokens.
"""

import re

from megatron_a3po.rollout.workflow import Episode

CALL = re.compile(r"(\d)\+(\d)\+(\d)")


async def with_a_calculator(episode: Episode) -> None:
    """Turns until one is no call; that one is scored by the reward."""
    while call := CALL.fullmatch(await episode.generate()):
        episode.give(f"={sum(map(int, call.groups()))};")
