"""Accuracy of a Hugging Face checkpoint on its own, in this process: no run, no training rollouts."""

import asyncio
from pathlib import Path

from transformers import AutoTokenizer

from megatron_a3po.config import Config
from megatron_a3po.errors import ConfigError
from megatron_a3po.rollout.evaluation import evaluate
from megatron_a3po.rollout.prompts import read_examples, tokenize
from megatron_a3po.rollout.rewards.scorer import Scorer
from megatron_a3po.rollout.service import create_engine
from megatron_a3po.rollout.trajectory import Evaluation


def evaluate_checkpoint(config: Config, directory: Path, limit: int | None = None) -> Evaluation:
    """Greedy accuracy of the weights in `directory` on the (first `limit`) held-out prompts of `config`."""
    if config.data.held_out is None or config.reward is None:
        raise ConfigError("data.held_out and reward are needed to evaluate: give both.")
    tokenizer = AutoTokenizer.from_pretrained(config.model.hf_path, local_files_only=True)
    prompts = tokenize(read_examples(config.data.held_out), tokenizer, config.data.max_prompt_tokens)

    async def run(scorer: Scorer) -> Evaluation:
        engine = create_engine(config, directory, version=0)
        try:
            await scorer.start()
            return await evaluate(
                engine,
                scorer,
                tokenizer,
                prompts[:limit],
                max_response_tokens=config.rollout.max_response_tokens,
                temperature=config.rollout.temperature,
            )
        finally:
            await engine.close()
            await scorer.close()

    return asyncio.run(run(Scorer(config.reward)))
