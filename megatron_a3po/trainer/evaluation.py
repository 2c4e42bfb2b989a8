"""Greedy accuracy of a checkpoint on its own: the engine and the reward of a run, in this process, without a trainer.

What a run measures while it trains is the same function on the same engine, see `rollout/evaluation.py`.
"""

import asyncio
from pathlib import Path

from transformers.utils import logging as transformers_logging

from megatron_a3po.config import Config
from megatron_a3po.config.tokenizer_files import has_tokenizer
from megatron_a3po.rollout.evaluation import evaluate
from megatron_a3po.rollout.prompts import read_examples, tokenize
from megatron_a3po.rollout.rewards.scorer import Scorer
from megatron_a3po.rollout.service import create_local_engine
from megatron_a3po.rollout.tokenizer import load_tokenizer
from megatron_a3po.rollout.trajectory import Evaluation
from megatron_a3po.rollout.workflow import Stage, load_workflow


def evaluate_checkpoint(config: Config, checkpoint: Path) -> Evaluation:
    """The Hugging Face folder `checkpoint` on data.held_out, by the configuration's reward and length limits."""
    transformers_logging.disable_progress_bar()
    return asyncio.run(_evaluate(config, checkpoint))


async def _evaluate(config: Config, checkpoint: Path) -> Evaluation:
    assert config.data.held_out is not None
    assert config.reward is not None
    # The checkpoint's own, or the one of the model it was trained from.
    tokenizer = load_tokenizer(checkpoint if has_tokenizer(checkpoint) else config.model.hf_path)
    prompts = tokenize(read_examples(config.data.held_out), tokenizer, config.data.max_prompt_tokens)
    # The checkpoint says itself which tokens end a response.
    model = config.model.model_copy(update={"hf_path": str(checkpoint)})
    engine = create_local_engine(config.model_copy(update={"model": model}), checkpoint, 0)
    scorer = Scorer(config.reward)
    try:
        await scorer.start()
        return await evaluate(
            engine,
            scorer,
            Stage(load_workflow(config.rollout.workflow), tokenizer),
            prompts,
            max_response_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
        )
    finally:
        await engine.close()
        await scorer.close()
