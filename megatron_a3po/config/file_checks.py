"""The refusals that need the files a configuration names: the model's shape, the data's lines, replayed batches.

Only json is used, no torch and no transformers.
"""

import importlib.util
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_a3po.config.config import Config
from megatron_a3po.config.data_file import check_rows
from megatron_a3po.config.model_families import read_model_shape
from megatron_a3po.config.model_shape import ModelShape
from megatron_a3po.config.problem import Problem, shown
from megatron_a3po.config.reward import ExactNumberReward, FunctionReward
from megatron_a3po.config.reward_module import why_not_found
from megatron_a3po.config.tokenizer_files import has_chat_template, tokenizer_problems
from megatron_a3po.config.vllm_checks import launch_problems
from megatron_a3po.config.weight_files import weight_problems
from megatron_a3po.errors import InputError

BATCH_FILE = re.compile(r"step-(\d{6,})\.npz")


def file_problems(config: Config) -> Iterator[Problem]:
    """Everything wrong with the files that `config` names, and with the layout of the model it names."""
    yield from _model(config)
    yield from _data(config)
    yield from _replay(config)
    yield from _modules(config)


def _model(config: Config) -> Iterator[Problem]:
    key = ("model.hf_path",)
    try:
        shape = read_model_shape(config.model.hf_path)
    except InputError as error:
        for problem in error.problems:
            yield Problem(key, f"model.hf_path: {problem}")
        return
    yield from _layout(config, shape)
    yield from launch_problems(config, shape)
    folder = Path(config.model.hf_path)
    if config.model.initialization == "pretrained":
        random = ", or start from random weights with model.initialization=random"
        for sentence in weight_problems(folder, shape, or_else=random):
            yield Problem((*key, "model.initialization"), f"model.hf_path: {sentence}")
    if config.needs_rollouts or config.warm_start is not None:
        for sentence in tokenizer_problems(folder, shape.vocab_size):
            yield Problem(key, f"model.hf_path: {sentence}")


def _layout(config: Config, shape: ModelShape) -> Iterator[Problem]:
    if shape.experts is not None:
        yield Problem(
            ("model.hf_path",),
            f"model.hf_path: {config.model.hf_path} is a {shape.model_type}, whose experts can be converted but not "
            "trained yet: take a dense model.",
        )
        return
    actor = config.actor
    tensor_size, stages = actor.tensor_model_parallel_size, actor.pipeline_model_parallel_size
    for what, number in (
        ("attention heads", shape.num_attention_heads),
        ("key-value heads", shape.num_query_groups),
        ("MLP columns", shape.ffn_hidden_size),
    ):
        if number % tensor_size:
            yield Problem(
                ("actor.tensor_model_parallel_size", "model.hf_path"),
                f"actor.tensor_model_parallel_size is {tensor_size}, but must divide the model's {number} "
                f"{what}: take a divisor.",
            )
    if actor.transformer_impl == "transformer_engine" and shape.sandwich_norms:
        yield Problem(
            ("actor.transformer_impl", "model.hf_path"),
            'actor.transformer_impl is "transformer_engine", but the norms of '
            f"{shape.model_type} behind attention and MLP are not covered there: take local, or leave the key out.",
        )
    chunks = actor.virtual_pipeline_model_parallel_size or 1
    if shape.num_layers % (stages * chunks):
        keys = ("actor.pipeline_model_parallel_size", "actor.virtual_pipeline_model_parallel_size")
        named = f"{keys[0]} is {stages}" if chunks == 1 else f"{keys[0]} times {keys[1]} is {stages * chunks}"
        yield Problem(
            (*keys, "model.hf_path"),
            f"{named}, but must divide the model's {shape.num_layers} layers: take a divisor.",
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if config.needs_rollouts and longest > shape.max_position_embeddings:
        yield Problem(
            ("data.max_prompt_tokens", "rollout.max_response_tokens", "model.hf_path"),
            f"data.max_prompt_tokens + rollout.max_response_tokens is {longest}, but the model has only "
            f"{shape.max_position_embeddings} positions (max_position_embeddings): lower one of the two.",
        )


def _data(config: Config) -> Iterator[Problem]:
    files: list[tuple[str, str, bool]] = []  # key, file, and whether its rows need a response
    if config.needs_rollouts:
        files.append(("data.train", config.data.train, False))
        if config.data.held_out is not None:
            files.append(("data.held_out", config.data.held_out, False))
    if config.warm_start is not None:
        if config.warm_start.data is not None:
            files.append(("warm_start.data", config.warm_start.data, True))
        else:
            files = [file for file in files if file[0] != "data.train"]
            files.append(("data.train", config.data.train, True))
    with_chats = has_chat_template(Path(config.model.hf_path))
    for key, path, with_response in files:
        try:
            scored = config.needs_rollouts and key != "warm_start.data"
            with_number = scored and isinstance(config.reward, ExactNumberReward)
            check_rows(path, with_response=with_response, with_number=with_number, with_chats=with_chats)
        except InputError as error:
            yield Problem((key,), f"{key}: {error}")


def _replay(config: Config) -> Iterator[Problem]:
    if config.trainer.replay is None:
        return
    folder = Path(config.trainer.replay)
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    kept = {int(match[1]) for name in names if (match := BATCH_FILE.fullmatch(name))}
    if not kept:
        state = "has no batches (step-*.npz)" if folder.is_dir() else "is not there"
        yield Problem(
            ("trainer.replay",),
            f"trainer.replay: {folder} {state}: give the batches/ folder of a run with "
            "trainer.dump_batches=true.",
        )
        return
    # A run that began with a later checkpoint has kept only the steps after it, and can be replayed from there.
    missing = next((step for step in range(min(kept), config.trainer.steps + 1) if step not in kept), None)
    if missing is not None or min(kept) > config.trainer.steps:
        keys = ("trainer.replay", "trainer.steps")
        yield Problem(
            keys,
            f"trainer.replay: {folder} has no batch for step {missing or config.trainer.steps}, but trainer.steps is "
            f"{config.trainer.steps}: lower it, or give the batches/ of a longer run.",
        )


def _modules(config: Config) -> Iterator[Problem]:
    """Optional packages and the user's own module, looked for without importing them."""
    if config.actor.transformer_impl == "transformer_engine" and not _exists("transformer_engine"):
        yield Problem(
            ("actor.transformer_impl",),
            'actor.transformer_impl is "transformer_engine", but Transformer Engine is not installed: '
            "install it, or leave the key out.",
        )
    if config.trainer.wandb is not None and not _is_installed("wandb"):
        yield Problem(
            ("trainer.wandb",),
            "trainer.wandb is set, but the package wandb is not installed: install megatron_a3po[wandb], or leave the "
            "section out.",
        )
    reward = config.reward
    if isinstance(reward, FunctionReward) and (why := why_not_found(reward.path)):
        yield Problem(("reward.path",), f"reward.path is {shown(reward.path)}, but {why}.")
    workflow = config.rollout.workflow
    if workflow is not None and (why := why_not_found(workflow)):
        yield Problem(("rollout.workflow",), f"rollout.workflow is {shown(workflow)}, but {why}.")


def _is_installed(package: str) -> bool:
    """By its name on the package index: a folder wandb/ that lies about could be imported too."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
