"""The rollout process's parts put together, and the calls that the trainer makes; `process.py` is the plumbing.

The service owns the engine, the scorer, the producer of batches and the held-out prompts. Its public coroutines are
what `client.RolloutClient` calls by name.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_a3po.config import Config, read_model_shape
from megatron_a3po.errors import ServersGone
from megatron_a3po.memory import peak_resident_bytes
from megatron_a3po.rollout.appetite import Appetite
from megatron_a3po.rollout.buffer import Buffer
from megatron_a3po.rollout.continuous import ContinuousProducer
from megatron_a3po.rollout.engines.base import RolloutEngine, SampleRequest
from megatron_a3po.rollout.engines.local import LocalEngine
from megatron_a3po.rollout.engines.vllm import create_vllm_engine
from megatron_a3po.rollout.evaluation import evaluate
from megatron_a3po.rollout.fixed_staleness import FixedStaleness
from megatron_a3po.rollout.messages import Start
from megatron_a3po.rollout.producer import Producer
from megatron_a3po.rollout.prompts import Prompt, PromptStream, read_examples, tokenize
from megatron_a3po.rollout.rewards.scorer import Scorer
from megatron_a3po.rollout.sampler import GroupSampler, trajectory_of
from megatron_a3po.rollout.spans import Span
from megatron_a3po.rollout.staleness_gate import StalenessGate
from megatron_a3po.rollout.statistics import RolloutCounters
from megatron_a3po.rollout.tokenizer import load_tokenizer
from megatron_a3po.rollout.trajectory import Evaluation, Group, RolloutBatch, Trajectory
from megatron_a3po.rollout.waves import WaveProducer
from megatron_a3po.rollout.workflow import Stage, load_workflow

logger = logging.getLogger(__name__)

T = TypeVar("T")
CANARY_TOKENS = 16


class RolloutService:
    """Create it inside the event loop, then keep `run` running."""

    def __init__(self, start: Start) -> None:
        config, rollout = start.config, start.config.rollout
        self._config = config
        self._tokenizer = load_tokenizer(config.model.hf_path)
        self._prompts = PromptStream(self._read_prompts(config.data.train), config.trainer.seed)
        self._held_out = [] if config.data.held_out is None else self._read_prompts(config.data.held_out)
        self._engine = create_engine(start)
        assert config.reward is not None
        self._scorer = Scorer(config.reward)
        self._stage = Stage(load_workflow(rollout.workflow), self._tokenizer)
        self._counters = RolloutCounters()
        sampler = GroupSampler(
            self._engine,
            self._scorer,
            self._stage,
            self._counters,
            samples_per_prompt=rollout.samples_per_prompt,
            max_response_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
        )
        self._producer = create_producer(config, sampler, self._prompts, start.consumed_steps)
        if start.state is not None:
            self._producer.restore(start.state["producer"], start.first_version)
            self._counters.restore(start.state["counters"])
        self._idle, self._spans = sampler.idle, sampler.spans
        self._evaluating = asyncio.Lock()
        self._updated = asyncio.Condition()
        self._gone: asyncio.Future[ServersGone] = asyncio.get_running_loop().create_future()
        self._batch_time = time.monotonic()
        self._num_batches = 0
        self._last_batch: tuple[int, list[Group]] = (0, [])

    async def run(self) -> None:
        """Generate until cancelled."""
        await self._scorer.start()
        await self._producer.run()

    async def engine_failed(self) -> None:
        """Raises what ended the engine. Servers that are gone end only the calls that need them: the trainer still
        asks for what has finished, and for the state of a checkpoint."""
        try:
            await self._engine.failed()
        except ServersGone as error:
            logger.error("%s", error)
            self._gone.set_result(error)

    async def close(self) -> None:
        await self._engine.close()
        await self._scorer.close()

    # What the trainer calls.

    async def publish(self, version: int, directory: Path) -> None:
        with self._spans("new weights", f"version {version}"):
            await self._producer.publish(version, directory)
        async with self._updated:
            self._updated.notify_all()

    async def next_batch(self, version: int) -> RolloutBatch:
        groups = await self._unless_gone(self._producer.take(version))
        since, self._batch_time = self._batch_time, time.monotonic()
        num_tokens = self._engine.sampled_between(since, self._batch_time)
        statistics = self._counters.take()
        statistics |= self._engine.publication_metrics()
        statistics["rollout/lost_requests"] = float(self._engine.take_num_lost())
        statistics["rollout/discarded_tokens"] = float(self._engine.take_num_discarded())
        statistics["rollout/idle_s"] = self._idle.take()
        statistics["rollout/tokens_per_s"] = num_tokens / (self._batch_time - since)
        if (memory := peak_resident_bytes()) is not None:
            statistics["memory/rollout_bytes"] = float(memory)
        self._num_batches += 1
        self._last_batch = (version, groups)
        return RolloutBatch(groups, statistics)

    async def state(self, num_received: int) -> dict[str, Any]:
        """`num_received` batches have reached the trainer; one more may be on its way, and belongs to the state."""
        on_its_way = self._last_batch if self._num_batches > num_received else None
        producer_state = await self._producer.state()  # which may wait, while the trainer takes more
        if on_its_way is not None:
            version, groups = on_its_way
            self._producer.put_back(producer_state, groups, version)
        return {"producer": producer_state, "counters": self._counters.state()}

    async def evaluate(self, version: int) -> Evaluation:
        """One at a time: the engine keeps one set of weights for evaluation."""
        return await self._unless_gone(self._evaluate(version))

    async def _evaluate(self, version: int) -> Evaluation:
        async with self._evaluating:
            await self._wait_for_version(version)
            with self._spans("evaluation", f"version {version}"):
                return await evaluate(
                    self._engine,
                    self._scorer,
                    self._stage,
                    self._held_out,
                    max_response_tokens=self._config.rollout.max_response_tokens,
                    temperature=self._config.rollout.temperature,
                )

    async def probe(self, version: int, prompt_index: int) -> Trajectory:
        """A greedy response whose tokens are all of one version, `version` or the newest."""
        return await self._unless_gone(self._probe(version, prompt_index))

    async def _probe(self, version: int, prompt_index: int) -> Trajectory:
        async with self._evaluating:
            await self._wait_for_version(version)
            prompt = self._prompts.at(prompt_index)
            length, temperature = self._config.rollout.max_response_tokens, self._config.rollout.temperature
            # A vLLM server reports a greedy token's log-prob at temperature 1, whatever was asked.
            greedy = self._config.rollout.engine == "local"
            request = SampleRequest(prompt_index, 0, prompt.tokens, length, temperature, greedy=greedy)
            (sample,) = await self._engine.generate([request])
            return trajectory_of(prompt, 0, sample, reward=None)

    async def canary(self, version: int) -> dict[str, Trajectory]:
        """From each server a response of `version`, to compare with the trainer."""
        return await self._unless_gone(self._canary(version))

    async def _canary(self, version: int) -> dict[str, Trajectory]:
        await self._wait_for_version(version)
        prompt = self._prompts.at(0)
        length = min(CANARY_TOKENS, self._config.rollout.max_response_tokens)
        request = SampleRequest(0, 0, prompt.tokens, length, self._config.rollout.temperature)
        samples = await self._engine.respond_each(request)
        return {name: trajectory_of(prompt, 0, sample, reward=None) for name, sample in samples.items()}

    async def num_filtered(self) -> int:
        return self._counters.filtered_groups

    async def sampled_between(self, start: float, end: float) -> int:
        return self._engine.sampled_between(start, end)

    async def spans(self, start: float, end: float) -> list[Span]:
        return [*self._spans.between(start, end), *self._engine.spans(start, end)]

    async def _unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives, at once or later; ServersGone where it would wait for servers that do not come back."""
        task = asyncio.ensure_future(work)
        await asyncio.wait([task, self._gone], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        raise self._gone.result()

    async def _wait_for_version(self, version: int) -> None:
        async with self._updated:
            await self._updated.wait_for(lambda: self._engine.version >= version)

    def _read_prompts(self, path: str) -> list[Prompt]:
        return tokenize(read_examples(path), self._tokenizer, self._config.data.max_prompt_tokens)


def create_engine(start: Start) -> RolloutEngine:
    """The engine `rollout.engine` names."""
    config, weights_dir, version = start.config, start.weights_dir, start.first_version
    match config.rollout.engine:
        case "local":
            return create_local_engine(config, weights_dir, version)
        case "vllm":
            return create_vllm_engine(config, start.run_dir, start.attempt, weights_dir, version)


def create_local_engine(config: Config, weights_dir: Path, version: int) -> LocalEngine:
    on_gpu = torch.cuda.is_available()
    return LocalEngine(
        weights_dir,
        version=version,
        eos_token_ids=read_model_shape(config.model.hf_path).eos_token_ids,
        seed=config.trainer.seed,
        max_concurrent_samples=config.rollout.max_concurrent_samples,
        dtype=torch.bfloat16 if on_gpu and config.actor.bf16 else torch.float32,
    )


def create_producer(
    config: Config, sampler: GroupSampler, prompts: PromptStream, consumed_steps: int
) -> Producer:
    rollout, groups_per_step = config.rollout, config.trainer.prompts_per_step
    if rollout.fixed_staleness is not None:
        schedule = FixedStaleness(rollout.fixed_staleness, groups_per_step, consumed_steps)
        return WaveProducer(sampler, prompts, schedule)
    gate = StalenessGate(rollout.bound, groups_per_step, consumed=consumed_steps * groups_per_step)
    buffer = Buffer(rollout.policy, rollout.bound, groups_per_step)
    appetite = Appetite(groups_per_step)
    return ContinuousProducer(
        sampler, prompts, gate, buffer, appetite, drops_no_signal=rollout.drops_no_signal
    )
