"""The `warm_start` section: supervised steps before the first reinforcement-learning step."""

from pydantic import Field

from megatron_a3po.config.section import Section


class WarmStartSection(Section):
    """A supervised warm start through the same actor; it ends as version 0."""

    steps: int = Field(ge=1)
    """Optimizer steps."""

    batch_size: int = Field(default=64, ge=1)
    """Examples in a step."""

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate."""

    lr_warmup_iters: int = Field(default=10, ge=0)
    """Steps over which the rate rises evenly from lr / (lr_warmup_iters + 1) to lr."""

    data: str | None = Field(default=None, min_length=1)
    """JSONL file whose rows have a `response`; left out, data.train."""
