"""The `actor` section: the model's parallel layout, its optimizer, and the method.

Keys that Megatron-Core has a name for keep that name. Which combinations are refused is in `checks.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_a3po.config.section import Section


def _off_is_text(value: Any) -> Any:
    """YAML reads an unquoted `off` as false; where `off` is a choice it is meant."""
    return "off" if value is False else value


class ActorSection(Section):
    """The trained policy: layout, precision, optimizer, objective."""

    # -- layout ------------------------------------------------------------------------------------

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share every matrix (TP)."""

    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Stages the layers are spread over (PP)."""

    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2)
    """Chunks of layers on each stage, for the interleaved schedule (VPP)."""

    context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share every sequence (CP). Only 1 for now."""

    expert_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the experts (EP). Only 1 for now."""

    data_parallel_size: int | None = Field(default=None, ge=1)
    """Copies of the model (DP). Left out: 1 for a self-launched run; under torchrun or srun what
    the ranks allow."""

    sequence_parallel: bool = False
    """Split the activations outside of attention and MLP over the TP ranks, by sequence."""

    # -- how the model is computed -----------------------------------------------------------------

    bf16: bool = False
    """Compute in bfloat16, with fp32 master weights and main gradients. Else everything is fp32."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose layers: `auto` takes Transformer Engine where it is installed and there is a GPU, else
    plain torch."""

    recompute_granularity: Literal["full"] | None = None
    """`full` recomputes every layer's activations in backward: less memory, a third more time."""

    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Only 0: with dropout the ratio of two policies would be noise."""

    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Only 0, as `hidden_dropout`."""

    make_vocab_size_divisible_by: int = Field(default=1, ge=1)
    """The vocabulary is padded to a multiple of this times TP."""

    max_tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Tokens in one packed forward, at most."""

    loss_chunk_tokens: int | None = Field(default=None, ge=1)
    """Trained tokens whose logits exist at one time; left out, the loss layer chooses."""

    # -- optimizer ---------------------------------------------------------------------------------

    lr: float = Field(default=1e-6, gt=0)
    """Learning rate of Adam."""

    min_lr: float = Field(default=0.0, ge=0)
    """Where the decay ends."""

    lr_warmup_iters: int = Field(default=0, ge=0)
    """Optimizer steps over which the rate rises evenly from lr / (lr_warmup_iters + 1) to lr."""

    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up."""

    lr_decay_iters: int | None = Field(default=None, ge=1)
    """Optimizer steps until `min_lr` is reached; left out, all of them."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (AdamW); norms and biases are left out."""

    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""

    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of Adam's second moment."""

    adam_eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""

    clip_grad: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient of an update; 0 switches clipping off."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while backward still runs."""

    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward already runs."""

    # -- the method --------------------------------------------------------------------------------

    num_mini_batches: int = Field(default=1, ge=1)
    """Optimizer steps in a training step; divides trainer.prompts_per_step."""

    use_decoupled_loss: bool = True
    """Decoupled PPO: clip around the proximal policy, weigh by it. False is standard PPO, clipped
    around the behaviour policy."""

    prox_logp_method: Literal["recompute", "loglinear", "linear", "metrics"] = "recompute"
    """Where the proximal log-probs come from: a forward pass (`recompute`), A-3PO's interpolation in log
    space (`loglinear`) or in probabilities (`linear`); `metrics` trains as `recompute` and measures the
    approximations."""

    recompute_every_token: bool = False
    """Make `recompute` run its pass for the first mini-batch too, whose result is known: the same weights,
    slower."""

    eps_low: float = Field(default=0.2, gt=0, lt=1)
    """The importance weight is clipped below at 1 - eps_low."""

    eps_high: float = Field(default=0.2, gt=0)
    """The importance weight is clipped above at 1 + eps_high."""

    dual_clip: float | None = Field(default=None, gt=1)
    """For negative advantages, the largest importance weight that still counts."""

    behave_weight: Annotated[
        Literal["clamp", "mask", "off", "off_at_any_staleness"], BeforeValidator(_off_is_text)
    ] = "clamp"
    """The off-policy weight pi_prox / pi_behave: limited to its cap (`clamp`), tokens over the cap left out of
    the loss (`mask`), not applied (`off`), not applied although samples are stale (`off_at_any_staleness`)."""

    behave_weight_cap: float = Field(default=5.0, gt=0)
    """The cap that `clamp` and `mask` mean."""

    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """Mean over the trained tokens of the mini-batch; over sequences of their token means; or sum divided by
    sequences times rollout.max_response_tokens."""

    importance_ratio: Literal["token", "sequence"] = "token"
    """One ratio for each token, or one for each sequence (GSPO): the geometric mean of its tokens' ratios,
    clipped as a whole. It moves far less than a token's, so eps_low and eps_high are far smaller; GSPO's loss_mean is
    `sequence`."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"] = "grpo"
    """How rewards become advantages."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus: this times the mean entropy, by `loss_mean`, is subtracted from the loss."""

    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of a KL penalty that holds the policy near the one the RL steps began with. Above 0 every token takes one
    forward more, with that policy's weights, which wait in host memory meanwhile."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    def padded_vocab_size(self, vocab_size: int) -> int:
        """The vocabulary as the ranks hold it: rounded up, so that every tensor rank has the same number of rows."""
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-vocab_size // multiple) * multiple
