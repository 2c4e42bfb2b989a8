"""How many tokens the loss layer projects at a time.

Each chunk reads and writes the whole float32 weight gradient once, so chunks want to be long; the logits of
one chunk are the layer's workspace, so they want to be short. Per token, hidden and vocabulary element the
work is 6 flops, and per chunk the traffic is 8 bytes per hidden and vocabulary element: its share falls as 1
/ chunk, whatever the shapes. On a GPU it is 19% at 1,024 tokens and 3% at 4,096; a CPU, with fewer flops to a
byte, is there at 256.
"""

import torch

WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
FEWEST_TOKENS = {"cpu": 256, "cuda": 4096}
MOST_TOKENS = {"cpu": 2048, "cuda": 16384}
MULTIPLE = 64


def choose_chunk_tokens(hidden: int, vocab_shard: int, device: torch.device) -> int:
    """As many tokens as the workspace holds (float32 logits, the rows and their gradient), within bounds."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    fitting = WORKSPACE_BYTES[kind] // (4 * (vocab_shard + 2 * hidden))
    chosen = min(max(fitting, FEWEST_TOKENS[kind]), MOST_TOKENS[kind])
    return chosen // MULTIPLE * MULTIPLE
