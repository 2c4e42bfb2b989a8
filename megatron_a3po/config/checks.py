"""What goes together and what does not: the refusals that need no file.

Nothing is adjusted here: a combination is accepted as it is or refused with the mend. Each function is one
subject and yields Problems. What needs the model's or the data's files is in `file_checks.py`, what is allowed but
surprising in `cautions.py`.
"""

from collections.abc import Iterator

from megatron_a3po.config.config import Config
from megatron_a3po.config.problem import Problem
from megatron_a3po.config.vllm_checks import vllm_problems
from megatron_a3po.errors import ConfigError

GROUP_ADVANTAGES = ("grpo", "dr_grpo", "rloo")


def config_problems(config: Config, world_size: int | None = None) -> Iterator[Problem]:
    """Everything wrong with `config` itself; `world_size` is what a launcher started, None without one."""
    yield from _not_implemented(config)
    yield from _sampling(config)
    yield from _objective(config)
    yield from _behave_weight(config)
    yield from _staleness(config)
    yield from vllm_problems(config)
    yield from _groups(config)
    yield from _layout(config)
    yield from _optimizer(config)
    yield from _lengths(config)
    yield from _evaluation(config)
    yield from _trace(config)
    yield from world_size_problems(config, world_size)


def data_parallel_size(config: Config, world_size: int | None) -> int:
    """Copies of the model that train: derived from the ranks under a launcher, else as configured, or 1."""
    if problems := list(world_size_problems(config, world_size)):
        raise ConfigError(problem.sentence for problem in problems)
    if world_size is not None:
        return world_size // config.actor.model_parallel_size
    return config.actor.data_parallel_size or 1


def world_size_problems(config: Config, world_size: int | None) -> Iterator[Problem]:
    """A launcher's number of ranks against the layout, and the copies against what there is to spread."""
    actor = config.actor
    one_copy = actor.model_parallel_size
    keys = (
        "actor.tensor_model_parallel_size",
        "actor.pipeline_model_parallel_size",
        "actor.context_parallel_size",
        "actor.data_parallel_size",
    )
    wanted = actor.data_parallel_size
    copies = wanted or 1
    if world_size is not None:
        copies = world_size // one_copy
        if world_size % one_copy:
            yield Problem(
                keys,
                f"the launcher started {world_size} ranks, but actor.tensor_model_parallel_size times "
                f"actor.pipeline_model_parallel_size is {one_copy}: start a multiple of {one_copy}.",
            )
        elif wanted is not None and wanted != copies:
            yield Problem(
                keys,
                f"actor.data_parallel_size is {wanted}, but {world_size} ranks hold {copies} copies of "
                f"{one_copy} ranks each: leave it out, or start {wanted * one_copy} ranks.",
            )
    trajectories = (
        config.trainer.prompts_per_step // actor.num_mini_batches * config.rollout.samples_per_prompt
    )
    if copies > trajectories > 0:
        yield Problem(
            (
                *keys,
                "trainer.prompts_per_step",
                "rollout.samples_per_prompt",
                "actor.num_mini_batches",
            ),
            f"actor.data_parallel_size is {copies}, but a mini-batch has only {trajectories} trajectories: "
            "use fewer ranks or raise trainer.prompts_per_step.",
        )


def _not_implemented(config: Config) -> Iterator[Problem]:
    actor = config.actor
    for name, why in (
        ("context_parallel_size", "only 1 is supported"),
        ("expert_model_parallel_size", "models with experts can be converted but not trained yet"),
    ):
        if (value := getattr(actor, name)) != 1:
            yield Problem((f"actor.{name}",), f"actor.{name} is {value}, but {why}: leave it out.")
    for name in ("hidden_dropout", "attention_dropout"):
        if (value := getattr(actor, name)) != 0:
            yield Problem(
                (f"actor.{name}",),
                f"actor.{name} is {value:g}, but must be 0: with dropout the ratio of two policies would be "
                "noise.",
            )


def _sampling(config: Config) -> Iterator[Problem]:
    """Law: the trainer scores the distribution that was sampled from."""
    rollout = config.rollout
    reason = "the trainer scores the whole distribution, so behaviour log-probs would be of another one"
    if rollout.top_p != 1.0:
        yield Problem(("rollout.top_p",), f"rollout.top_p is {rollout.top_p:g}, but must be 1.0: {reason}.")
    if rollout.top_k not in (-1, 0):
        yield Problem(
            ("rollout.top_k",), f"rollout.top_k is {rollout.top_k}, but must be -1 (off): {reason}."
        )
    if rollout.repetition_penalty != 1.0:
        yield Problem(
            ("rollout.repetition_penalty",),
            f"rollout.repetition_penalty is {rollout.repetition_penalty:g}, but must be 1.0 (off): {reason}.",
        )


def _objective(config: Config) -> Iterator[Problem]:
    actor = config.actor
    method = actor.prox_logp_method
    if not actor.use_decoupled_loss:
        if method != "recompute":
            yield Problem(
                ("actor.prox_logp_method", "actor.use_decoupled_loss"),
                f'actor.prox_logp_method is "{method}", but with actor.use_decoupled_loss=false there is no '
                "proximal policy: leave the method out, or set actor.use_decoupled_loss=true.",
            )
        if actor.behave_weight == "mask":
            yield Problem(
                ("actor.behave_weight", "actor.use_decoupled_loss"),
                'actor.behave_weight is "mask", but with actor.use_decoupled_loss=false the weight is 1 '
                "everywhere: leave it out, or set actor.use_decoupled_loss=true.",
            )
    if actor.recompute_every_token and (
        not actor.use_decoupled_loss or method not in ("recompute", "metrics")
    ):
        yield Problem(
            (
                "actor.recompute_every_token",
                "actor.prox_logp_method",
                "actor.use_decoupled_loss",
            ),
            "actor.recompute_every_token is true, but nothing is recomputed here: leave it out, or set "
            "actor.prox_logp_method=recompute with the decoupled loss.",
        )
    if actor.advantage == "dr_grpo" and actor.loss_mean != "constant":
        yield Problem(
            ("actor.advantage", "actor.loss_mean"),
            f'actor.loss_mean is "{actor.loss_mean}", but actor.advantage=dr_grpo needs the constant mean: '
            "set actor.loss_mean=constant.",
        )


def _behave_weight(config: Config) -> Iterator[Problem]:
    actor, bound = config.actor, config.rollout.bound
    if actor.behave_weight == "off" and actor.use_decoupled_loss and bound > 0:
        yield Problem(
            (
                "actor.behave_weight",
                "actor.use_decoupled_loss",
                "rollout.max_staleness",
                "rollout.fixed_staleness",
            ),
            f'actor.behave_weight is "off" at a staleness bound of {bound}, so stale samples would go '
            "uncorrected: use clamp or mask, or say off_at_any_staleness if that is what you want.",
        )


def _staleness(config: Config) -> Iterator[Problem]:
    rollout = config.rollout
    if rollout.fixed_staleness is None:
        return
    for name in ("max_staleness", "staleness_policy"):
        if (value := getattr(rollout, name)) is not None:
            yield Problem(
                (f"rollout.{name}", "rollout.fixed_staleness"),
                f"rollout.{name} is {value}, but rollout.fixed_staleness={rollout.fixed_staleness} already "
                "decides which samples a step takes: leave one of the two out.",
            )


def _groups(config: Config) -> Iterator[Problem]:
    actor, rollout, trainer = config.actor, config.rollout, config.trainer
    if trainer.prompts_per_step % actor.num_mini_batches:
        yield Problem(
            ("actor.num_mini_batches", "trainer.prompts_per_step"),
            f"actor.num_mini_batches is {actor.num_mini_batches}, but must divide "
            f"trainer.prompts_per_step={trainer.prompts_per_step}, because groups are never split: take a "
            "divisor.",
        )
    if rollout.samples_per_prompt < 2:
        keys = ("rollout.samples_per_prompt", "actor.advantage", "rollout.filter_no_signal")
        if actor.advantage in GROUP_ADVANTAGES:
            yield Problem(
                keys,
                f"rollout.samples_per_prompt is 1, but actor.advantage={actor.advantage} compares the "
                "samples of a prompt: set it to at least 2, or take actor.advantage=reinforce_pp.",
            )
        elif rollout.drops_no_signal and config.needs_rollouts:
            yield Problem(
                keys,
                "rollout.samples_per_prompt is 1 and rollout.filter_no_signal is true, so every group "
                "would be left out: set rollout.filter_no_signal=false.",
            )


def _layout(config: Config) -> Iterator[Problem]:
    actor = config.actor
    if actor.sequence_parallel and actor.tensor_model_parallel_size == 1:
        yield Problem(
            ("actor.sequence_parallel", "actor.tensor_model_parallel_size"),
            "actor.sequence_parallel is true, but actor.tensor_model_parallel_size is 1, so there is "
            "nothing to split: leave it out, or raise the size.",
        )
    chunks = actor.virtual_pipeline_model_parallel_size
    if chunks is not None and actor.pipeline_model_parallel_size == 1:
        yield Problem(
            ("actor.virtual_pipeline_model_parallel_size", "actor.pipeline_model_parallel_size"),
            f"actor.virtual_pipeline_model_parallel_size is {chunks}, but "
            "actor.pipeline_model_parallel_size is 1: leave it out, or raise the number of stages.",
        )
    if actor.overlap_param_gather and not actor.overlap_grad_reduce:
        yield Problem(
            ("actor.overlap_param_gather", "actor.overlap_grad_reduce"),
            "actor.overlap_param_gather is true, but needs actor.overlap_grad_reduce=true: set both, or neither.",
        )


def _optimizer(config: Config) -> Iterator[Problem]:
    actor, warm_start = config.actor, config.warm_start
    if actor.min_lr > actor.lr:
        yield Problem(
            ("actor.min_lr", "actor.lr"),
            f"actor.min_lr is {actor.min_lr:g}, but must not be above actor.lr={actor.lr:g}: lower it.",
        )
    last = actor.lr_decay_iters or config.optimizer_steps
    if actor.lr_warmup_iters >= last:
        what = (
            "actor.lr_decay_iters"
            if actor.lr_decay_iters
            else "the optimizer steps of the run (trainer.steps)"
        )
        yield Problem(
            (
                "actor.lr_warmup_iters",
                "actor.lr_decay_iters",
                "actor.num_mini_batches",
                "trainer.steps",
            ),
            f"actor.lr_warmup_iters is {actor.lr_warmup_iters}, but must be less than {what}, {last}: lower "
            "it.",
        )
    if warm_start is not None and warm_start.lr_warmup_iters >= warm_start.steps:
        yield Problem(
            ("warm_start.lr_warmup_iters", "warm_start.steps"),
            f"warm_start.lr_warmup_iters is {warm_start.lr_warmup_iters}, but must be less than "
            f"warm_start.steps={warm_start.steps}: lower it.",
        )


def _lengths(config: Config) -> Iterator[Problem]:
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    limit = config.actor.max_tokens_per_micro_batch
    if config.needs_rollouts and longest > limit:
        yield Problem(
            (
                "actor.max_tokens_per_micro_batch",
                "data.max_prompt_tokens",
                "rollout.max_response_tokens",
            ),
            f"actor.max_tokens_per_micro_batch is {limit}, but one trajectory may have {longest} tokens "
            "(data.max_prompt_tokens + rollout.max_response_tokens): raise it, or lower one of the two.",
        )


def _trace(config: Config) -> Iterator[Problem]:
    match config.trainer.trace:
        case (first, last) if not 1 <= first <= last <= config.trainer.steps:
            yield Problem(
                ("trainer.trace", "trainer.steps"),
                f"trainer.trace is [{first}, {last}], but must be the first and the last step of a window within "
                f"1 to trainer.steps={config.trainer.steps}; true takes three steps by itself.",
            )


def _evaluation(config: Config) -> Iterator[Problem]:
    trainer = config.trainer
    if config.reward is None and config.needs_rollouts:
        yield Problem(
            ("reward", "trainer.replay"),
            "reward is missing, so no response could be scored: write reward.type=exact_number, math or "
            "function.",
        )
    if trainer.evaluate_every is None:
        return
    if not config.needs_rollouts:
        yield Problem(
            ("trainer.evaluate_every", "trainer.replay"),
            f"trainer.evaluate_every is {trainer.evaluate_every}, but with trainer.replay there is no "
            "engine to evaluate with: leave it out.",
        )
    elif config.data.held_out is None:
        yield Problem(
            ("trainer.evaluate_every", "data.held_out"),
            f"trainer.evaluate_every is {trainer.evaluate_every}, but data.held_out is missing: give the "
            "file, or leave trainer.evaluate_every out.",
        )
