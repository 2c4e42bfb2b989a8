"""`evaluate CONFIG_OR_RUN [--checkpoint HF_DIR] [key=value ...]`: greedy accuracy on data.held_out; writes nothing.

Evaluates the export of a run unless a checkpoint is given. What is missing is said before anything heavy is imported.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_a3po.config import Config, load_config, read_model_shape
from megatron_a3po.config.data_file import count_rows
from megatron_a3po.errors import EXIT_DONE, ConfigError, InputError

EXPORT = "export"


def run(arguments: argparse.Namespace) -> int:
    """Check, generate, score, print one line."""
    # The files that only training needs may be gone.
    config = load_config(arguments.config, arguments.overrides, check_files=False)
    if missing := list(_missing(config)):
        raise ConfigError(missing)
    assert config.data.held_out is not None
    count_rows(config.data.held_out)
    checkpoint = _checkpoint(arguments, config)

    from megatron_a3po.trainer.evaluation import evaluate_checkpoint

    found = evaluate_checkpoint(config, checkpoint)
    right = found.accuracy * found.num_prompts
    parts = [f"accuracy {found.accuracy:.3f} on {found.num_prompts} held-out prompts"]
    if abs(right - round(right)) < 1e-6:  # a reward of one's own may give half a point
        parts[0] += f" ({round(right)} right)"
    parts.append(f"{found.num_truncated} cut off at {config.rollout.max_response_tokens} tokens")
    sys.stdout.write(f"{', '.join(parts)}, greedy, {checkpoint}\n")
    return EXIT_DONE


def _missing(config: Config) -> Iterator[str]:
    if config.data.held_out is None:
        yield "data.held_out is missing, and accuracy is measured on it: give data.held_out=FILE."
    if config.reward is None:
        yield "reward is missing, and says which responses are right: give reward.type=exact_number or another."


def _checkpoint(arguments: argparse.Namespace, config: Config) -> Path:
    """The folder to evaluate. A run directory may have been moved since its configuration was written."""
    if arguments.checkpoint is not None:
        folder = Path(arguments.checkpoint)
    else:
        folder = Path(arguments.config) / EXPORT
        folder = folder if folder.is_dir() else Path(config.run_dir) / EXPORT
        if not folder.is_dir():
            raise InputError(
                f"{folder} is not there, the run has not ended: give a checkpoint with --checkpoint DIR."
            )
    read_model_shape(folder)
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no *.safetensors: give the folder of a Hugging Face checkpoint.")
    return folder
