"""`evaluate CONFIG_OR_RUN [--checkpoint HF_DIR] [key=value ...]`: greedy accuracy on data.held_out; writes nothing.

Evaluates the export of a run unless a checkpoint is given. What is missing is said before anything heavy is imported.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_a3po.config import Config, load_config, read_model_shape
from megatron_a3po.config.data_file import check_rows
from megatron_a3po.config.reward import ExactNumberReward
from megatron_a3po.config.tokenizer_files import has_chat_template, has_tokenizer, tokenizer_problems
from megatron_a3po.config.weight_files import weight_problems
from megatron_a3po.errors import EXIT_DONE, InputError

EXPORT = "export"


def run(arguments: argparse.Namespace) -> int:
    """Check, generate, score, print one line."""
    # The files that only training needs may be gone.
    config = load_config(arguments.config, arguments.overrides, check_files=False)
    checkpoint = _checkpoint(arguments, config)
    if problems := [*_missing_keys(config), *_bad_files(config, checkpoint)]:
        raise InputError(problems)

    from megatron_a3po.trainer.evaluation import evaluate_checkpoint

    found = evaluate_checkpoint(config, checkpoint)
    right = found.accuracy * found.num_prompts
    parts = [f"accuracy {found.accuracy:.3f} on {found.num_prompts} held-out prompts"]
    if abs(right - round(right)) < 1e-6:  # a reward of one's own may give half a point
        parts[0] += f" ({round(right)} right)"
    parts.append(f"{found.num_truncated} cut off at {config.rollout.max_response_tokens} tokens")
    sys.stdout.write(f"{', '.join(parts)}, greedy, {checkpoint}\n")
    return EXIT_DONE


def _checkpoint(arguments: argparse.Namespace, config: Config) -> Path:
    """The folder to evaluate. A run directory may have been moved since its configuration was written."""
    if arguments.checkpoint is not None:
        return Path(arguments.checkpoint)
    moved = Path(arguments.config) / EXPORT
    folder = moved if moved.is_dir() else Path(config.run_dir) / EXPORT
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not there, the run has not ended: give a checkpoint with --checkpoint HF_DIR."
        )
    return folder


def _missing_keys(config: Config) -> Iterator[str]:
    if config.data.held_out is None:
        yield "data.held_out is missing, and accuracy is measured on it: give data.held_out=FILE."
    if config.reward is None:
        yield "reward is missing, and says which responses are right: give reward.type=exact_number or another."


def _bad_files(config: Config, checkpoint: Path) -> Iterator[str]:
    folder = checkpoint if has_tokenizer(checkpoint) else Path(config.model.hf_path)
    try:
        shape = read_model_shape(checkpoint)
    except InputError as error:
        yield from error.problems
    else:
        yield from weight_problems(checkpoint, shape)
        if has_tokenizer(folder):
            yield from tokenizer_problems(folder, shape.vocab_size)
        else:
            base = f"model.hf_path={folder}"
            yield f"{checkpoint} has no tokenizer, and {base} has none either: copy the tokenizer's files there."
    if config.data.held_out is not None:
        try:
            with_number = isinstance(config.reward, ExactNumberReward)
            check_rows(config.data.held_out, with_number=with_number, with_chats=has_chat_template(folder))
        except InputError as error:
            yield f"data.held_out: {error}"
