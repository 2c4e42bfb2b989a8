"""What will happen, in a few lines: said at start and by --dry-run.

The process grid, the batch arithmetic in words and numbers, which forwards each token gets and why, the anchor and
the weight, the staleness bound and policy. Nothing is decided here.
"""

from collections.abc import Iterator

from megatron_a3po.config.cautions import cautions
from megatron_a3po.config.config import Config
from megatron_a3po.config.model_shape import ModelShape


def plan_lines(config: Config, shape: ModelShape, data_parallel_size: int) -> list[str]:
    """The plan of a run over `data_parallel_size` copies of the model, then what may surprise about it."""
    lines = [
        *_grid(config, data_parallel_size),
        *_model(config, shape),
        *_batch(config, data_parallel_size),
        *_forwards(config),
        *_objective(config),
        *_engine(config),
        *_staleness(config),
        *_warm_start(config),
        *_checkpoints(config),
    ]
    return [*lines, *(f"note       {sentence}" for sentence in cautions(config, shape))]


def expected_forwards(config: Config) -> float:
    """Forwards per trained token if mini-batches had equal lengths; the run counts the real ones."""
    actor = config.actor
    of_the_reference = 1.0 if actor.kl_coef else 0.0
    if not actor.use_decoupled_loss or actor.prox_logp_method in ("loglinear", "linear"):
        return 1.0 + of_the_reference
    if actor.recompute_every_token:
        return 2.0 + of_the_reference
    return 1.0 + (actor.num_mini_batches - 1) / actor.num_mini_batches + of_the_reference


def _grid(config: Config, data_parallel_size: int) -> Iterator[str]:
    actor = config.actor
    tensor_size, stages = actor.tensor_model_parallel_size, actor.pipeline_model_parallel_size
    num_ranks = data_parallel_size * stages * tensor_size
    yield (
        f"ranks      {_count(num_ranks, 'rank')} = data {data_parallel_size} x pipeline {stages} x tensor "
        f"{tensor_size}{', sequence parallel' if actor.sequence_parallel else ''}"
    )
    shown = min(data_parallel_size, 4)
    for dp_rank in range(shown):  # Megatron-Core's own order: TP varies fastest, then DP, then PP
        places = []
        for pp_rank in range(stages):
            first = (pp_rank * data_parallel_size + dp_rank) * tensor_size
            ranks = str(first) if tensor_size == 1 else f"{first}-{first + tensor_size - 1}"
            places.append(f"pp {pp_rank}: {'rank' if tensor_size == 1 else 'ranks'} {ranks}")
        yield f"           dp {dp_rank}: {', '.join(places)}"
    if data_parallel_size > shown:
        yield f"           and so on for {data_parallel_size - shown} more copies"


def _model(config: Config, shape: ModelShape) -> Iterator[str]:
    actor = config.actor
    stages = actor.pipeline_model_parallel_size
    chunks = actor.virtual_pipeline_model_parallel_size
    per_stage = "" if stages == 1 else f", {shape.num_layers // stages} on each stage"
    if chunks is not None:
        per_stage += f" in {chunks} chunks"
    yield (
        f"model      {shape.model_type}, {config.model.initialization}, {_count(shape.num_layers, 'layer')} "
        f"of width {shape.hidden_size}{per_stage}, computed in {'bf16' if actor.bf16 else 'fp32'}"
    )
    padded, tensor_size = actor.padded_vocab_size(shape.vocab_size), actor.tensor_model_parallel_size
    padding = "" if padded == shape.vocab_size else f", padded to {padded}"
    per_rank = "" if tensor_size == 1 else f", {padded // tensor_size} on each tensor rank"
    yield f"           vocabulary of {shape.vocab_size} tokens{padding}{per_rank}"


def _batch(config: Config, data_parallel_size: int) -> Iterator[str]:
    actor, rollout, trainer = config.actor, config.rollout, config.trainer
    prompts, samples, parts = trainer.prompts_per_step, rollout.samples_per_prompt, actor.num_mini_batches
    yield (
        f"batch      a training step has {_count(prompts, 'prompt')} x {_count(samples, 'sample')} = "
        f"{_count(prompts * samples, 'trajectory', 'trajectories')}"
    )
    if parts == 1:
        cut = "in 1 mini-batch and so 1 optimizer step"
    else:
        cut = f"in {parts} mini-batches of {prompts * samples // parts} and so {parts} optimizer steps"
    yield (
        f"           {cut}; {_count(trainer.steps, 'training step')} make "
        f"{_count(config.optimizer_steps, 'optimizer step')} in total"
    )
    even = ""
    if data_parallel_size > 1:
        even = f"; the {data_parallel_size} copies of the model run equally many"
    yield f"           a forward packs at most {actor.max_tokens_per_micro_batch} tokens (a micro-batch){even}"
    if config.needs_rollouts:
        longest = config.data.max_prompt_tokens + rollout.max_response_tokens
        yield f"           a trajectory has at most {longest} tokens, {rollout.max_response_tokens} of them trained"


def _forwards(config: Config) -> Iterator[str]:
    actor = config.actor
    parts, expected = actor.num_mini_batches, expected_forwards(config)
    head = f"forwards   {expected:.4g} for each token, "
    if not actor.use_decoupled_loss:
        yield f"{head}the update's own: the clip is around the behaviour policy, no other is needed"
    elif actor.prox_logp_method in ("loglinear", "linear"):
        yield f"{head}the update's own: the proximal policy is interpolated from log-probs that are there already"
    elif actor.recompute_every_token:
        yield f"{head}the update's own and one before the first update for every token, because "
        yield "           actor.recompute_every_token asks for it; the weights are those without it"
    elif parts == 1:
        yield f"{head}the update's own: with one mini-batch its own log-probs are the proximal policy's"
    else:
        yield f"{head}about: 1 in mini-batch 1, whose own log-probs are the proximal policy's, and 2 in mini-batches"
        yield f"           2 to {parts}, whose proximal log-probs are recomputed before the first update"
    if actor.kl_coef:
        yield "           and 1 with the weights of the frozen reference, before the first update, for the KL term"


def _objective(config: Config) -> Iterator[str]:
    actor = config.actor
    anchors = {
        "loglinear": "A-3PO's, interpolated in log space by each token's staleness",
        "linear": "A-3PO's, interpolated in probabilities by each token's staleness",
        "recompute": "the policy each training step begins with, recomputed",
        "metrics": "the policy each training step begins with, recomputed; the approximations are measured beside it",
    }
    weights = {
        "clamp": f"pi_prox / pi_behave, at most {actor.behave_weight_cap:g}",
        "mask": f"pi_prox / pi_behave, tokens above {actor.behave_weight_cap:g} left out of the loss",
        "off": "1, switched off",
        "off_at_any_staleness": "1, switched off by name",
    }
    decoupled = actor.use_decoupled_loss
    anchor = anchors[actor.prox_logp_method] if decoupled else "the behaviour policy (coupled loss)"
    weight = weights[actor.behave_weight] if decoupled else "1 (coupled loss)"
    yield f"anchor     {anchor}"
    dual = "" if actor.dual_clip is None else f", dual clip at {actor.dual_clip:g}"
    yield f"           the ratio to it is clipped to [{1 - actor.eps_low:g}, {1 + actor.eps_high:g}]{dual}"
    if actor.importance_ratio == "sequence":
        yield "           one ratio and one weight for each sequence (GSPO), the mean of its tokens': the loss layer"
        yield "           takes two sweeps over the vocabulary, 4 matrix products instead of 3, still one forward"
    yield f"weight     {weight}"
    bonus = "" if actor.entropy_coef == 0 else f", less {actor.entropy_coef:g} times the entropy"
    penalty = (
        "" if actor.kl_coef == 0 else f", plus {actor.kl_coef:g} times the divergence from the reference"
    )
    yield f"advantage  {actor.advantage}, loss averaged by {actor.loss_mean}{bonus}{penalty}"
    if actor.kl_coef:
        yield "reference  the policy the training steps begin with, kept in the run directory as reference/; every rank"
        yield "           has a second copy of its weights in host memory, which takes the model's place for it"


def _engine(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if not config.needs_rollouts or rollout.engine != "vllm":
        return
    if rollout.launch is not None:
        where = f"{_count(rollout.launch, 'server')} launched on this machine"
    else:
        where = ", ".join(rollout.servers or [f"those of {rollout.servers_file}"])
    under_way = {
        "recompute_kv": "go on, their caches computed again",
        "keep_kv": "go on with the old weights' caches: their log-probs differ from the trainer's",
        "restart": "begin anew",
    }
    yield f"engine     vLLM: {where}"
    transport = "sent by the trainer" if rollout.transport == "collective" else f"read from {config.run_dir}"
    still = "while they load them" if rollout.is_staged else "until they have them"
    yield f"           weights are {transport}; servers stand still {still}"
    yield f"           responses that new weights reach {under_way[rollout.update_mode]}"


def _staleness(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if not config.needs_rollouts:
        yield f"samples    replayed from {config.trainer.replay}; nothing is generated"
    elif rollout.fixed_staleness is not None:
        yield f"staleness  every step trains on samples exactly {rollout.fixed_staleness} versions old"
    else:
        policies = {
            "wait": "groups are taken in the order they were admitted",
            "drop": "groups are taken as they finish, those over the bound are dropped",
            "train": "groups are taken as they finish, even over the bound",
        }
        yield f"staleness  at most {rollout.bound}, policy {rollout.policy}: {policies[rollout.policy]}"


def _warm_start(config: Config) -> Iterator[str]:
    if config.warm_start is not None:
        warm_start = config.warm_start
        yield (
            f"before     {_count(warm_start.steps, 'supervised step')} of {warm_start.batch_size} examples "
            f"from {warm_start.data or config.data.train}"
        )


def _checkpoints(config: Config) -> Iterator[str]:
    warm = "" if config.warm_start is None else "after the warm start, and "
    every, kept = config.trainer.save_every, _count(config.trainer.keep_last, "checkpoint")
    if every is None:
        cost = "a kill costs all its steps: trainer.save_every is not set"
        yield f"saved      {warm}when a signal stops the run; {cost}"
    else:
        yield f"saved      {warm}after every {'step' if every == 1 else f'{every} steps'}; {kept} kept"


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
