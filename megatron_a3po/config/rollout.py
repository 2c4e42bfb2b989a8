"""The `rollout` section: how responses are sampled and how stale they may become."""

from typing import Literal

from pydantic import Field

from megatron_a3po.config.section import Section

DEFAULT_MAX_STALENESS = 1


class RolloutSection(Section):
    """Generation, and the bound between the sampler and the trainer."""

    engine: Literal["local"] = "local"
    """`local` runs the Hugging Face model inside the rollout process."""

    samples_per_prompt: int = Field(default=8, ge=1)
    """Responses to each prompt: the size of a group."""

    max_response_tokens: int = Field(default=1024, ge=1)
    """A response that reaches this length is cut there and counted as truncated."""

    max_staleness: int | None = Field(default=None, ge=0)
    """The bound: how many versions older than the trainer's a trained token may be. 0 is on-policy; left
    out it is 1."""

    fixed_staleness: int | None = Field(default=None, ge=0)
    """Train every step on samples exactly this many versions old, repeatable bit for bit. Instead of a
    bound."""

    staleness_policy: Literal["wait", "drop", "train"] | None = None
    """`wait` (when left out) takes groups in the order they were admitted; `drop` takes the first finished
    and evicts what is over the bound; `train` takes the first finished, and the bound is soft."""

    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; log-probs on both sides are those of the distribution at this temperature."""

    top_p: float = 1.0
    """Only 1.0: the trainer scores the whole distribution."""

    top_k: int = -1
    """Only -1 or 0, which both mean off."""

    repetition_penalty: float = 1.0
    """Only 1.0, which means off."""

    max_concurrent_samples: int = Field(default=256, ge=1)
    """Responses generated at one time, at most."""

    filter_no_signal: bool = True
    """Leave out groups whose rewards are all equal (their advantages are 0); never under fixed_staleness."""

    mask_truncated: bool = False
    """Leave truncated responses out of the loss."""

    num_threads: int = Field(default=1, ge=1)
    """CPU threads of the rollout process."""

    @property
    def bound(self) -> int:
        """The staleness bound that holds."""
        if self.fixed_staleness is not None:
            return self.fixed_staleness
        return DEFAULT_MAX_STALENESS if self.max_staleness is None else self.max_staleness

    @property
    def policy(self) -> Literal["wait", "drop", "train"]:
        """The staleness policy that holds."""
        return self.staleness_policy or "wait"

    @property
    def drops_no_signal(self) -> bool:
        """Whether groups without signal are left out: under fixed_staleness every batch has the
        same composition."""
        return self.filter_no_signal and self.fixed_staleness is None
