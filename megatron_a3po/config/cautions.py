"""What is allowed but may surprise: sentences said once at start. Refusals are in `checks.py`."""

from collections.abc import Iterator
from pathlib import Path

from megatron_a3po.config.actor import ActorSection
from megatron_a3po.config.config import Config
from megatron_a3po.config.model_shape import ModelShape

LARGE_SEQUENCE_EPS = 0.1


def cautions(config: Config, shape: ModelShape | None = None) -> list[str]:
    """One sentence for each thing about `config` that a user would want to know before the run, not after."""
    found = [*_objective(config), *_rollout(config), *_own_code(Path(config.model.hf_path))]
    if shape is not None and not shape.eos_token_ids and config.needs_rollouts:
        found.append(
            "the model's config.json names no eos_token_id, so that every response runs to "
            "rollout.max_response_tokens."
        )
    return found


def _objective(config: Config) -> Iterator[str]:
    actor, bound = config.actor, config.rollout.bound
    if actor.importance_ratio == "sequence":
        yield from _sequence_ratio(actor)
    if not actor.use_decoupled_loss:
        if bound > 0:
            yield (
                f"actor.use_decoupled_loss is false at a staleness bound of {bound}: the clip around the "
                "behaviour policy is the only correction stale tokens get."
            )
        return
    limit = 1 + 1 / actor.eps_high
    if actor.prox_logp_method == "linear" and bound >= limit - 1e-9:
        yield (
            "the linear anchor bounds the importance weight by d / (d - 1), so that tokens of staleness "
            f"{limit:g} or more are never clipped from above; the bound here is {bound}: loglinear has no "
            "such limit."
        )
    if actor.prox_logp_method in ("recompute", "metrics") and actor.num_mini_batches == 1:
        yield (
            f"actor.prox_logp_method={actor.prox_logp_method} with one mini-batch never clips: every "
            "importance weight is exactly 1 when the only update is made."
        )
    if actor.behave_weight == "off_at_any_staleness" and bound > 0:
        yield f"stale tokens are trained on uncorrected: actor.behave_weight is off at a staleness bound of {bound}."


def _sequence_ratio(actor: ActorSection) -> Iterator[str]:
    if actor.loss_mean != "sequence":
        yield (
            f"actor.importance_ratio=sequence with actor.loss_mean={actor.loss_mean} counts a sequence once for "
            "each of its tokens; GSPO counts it once: actor.loss_mean=sequence."
        )
    if max(actor.eps_low, actor.eps_high) >= LARGE_SEQUENCE_EPS:
        yield (
            "a sequence's ratio is a mean over its tokens and moves far less than a token's: with actor.eps_low="
            f"{actor.eps_low:g} and actor.eps_high={actor.eps_high:g} it may never be clipped (GSPO: 3e-4 and 4e-4)."
        )


def _rollout(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.policy == "train" and rollout.fixed_staleness is None:
        yield (
            "rollout.staleness_policy=train takes what is finished first: the staleness bound of "
            f"{rollout.bound} is soft, and a slow response may exceed it."
        )
    if rollout.fixed_staleness is not None and rollout.filter_no_signal:
        yield "rollout.fixed_staleness keeps groups without signal, so that every batch has the same composition."


def _own_code(folder: Path) -> Iterator[str]:
    """Many a folder asks to run the Python files beside it; what is supported here needs none of them."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.is_file() and b'"auto_map"' in file.read_bytes():
            yield f"{file} names code of its own (auto_map), which is never run: this program's own is used instead."
