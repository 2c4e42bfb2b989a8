"""How servers of a run are started, for whoever starts them elsewhere.

`python -m megatron_a3po.rollout.vllm.recipe CONFIG TOKEN_FILE [key=value ...]` prints JSON with the arguments and the
environment of vLLM's server, without host, port and interpreter: those are of the machine it will run on, where
`a3po_vllm.registered` takes it. No torch here.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_a3po.config import Config, load_config
from megatron_a3po.config.vllm_checks import NVIDIA_DRIVER
from megatron_a3po.rollout.vllm.places import Launch


def launch_of(config: Config, token_file: Path, num_servers: int, *, on_cpu: bool) -> Launch:
    """What each of `num_servers` equal servers is started with."""
    rollout = config.rollout
    return Launch(
        python=rollout.vllm_python or sys.executable,
        model_dir=Path(config.model.hf_path),
        dtype="float32" if on_cpu or not config.actor.bf16 else "bfloat16",
        max_tokens=config.data.max_prompt_tokens + rollout.max_response_tokens,
        max_samples=max(1, -(-rollout.max_concurrent_samples // num_servers)),
        seed=config.trainer.seed,
        num_threads=rollout.num_threads,
        token_file=token_file,
        timeout_s=rollout.timeout_s,
        on_cpu=on_cpu,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_a3po.rollout.vllm.recipe")
    parser.add_argument("config", type=Path, help="a configuration, or a run directory")
    parser.add_argument("token_file", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides, check_files=False)
    # Any number of servers may join, so that each takes as many samples as there can be.
    launch = launch_of(config, arguments.token_file, 1, on_cpu=not NVIDIA_DRIVER.exists())
    recipe = {"arguments": launch.arguments(), "environment": launch.variables()}
    sys.stdout.write(json.dumps(recipe, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
