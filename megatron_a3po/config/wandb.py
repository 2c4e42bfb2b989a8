"""The `trainer.wandb` section: where Weights & Biases files a run."""

from typing import Literal

from pydantic import Field

from megatron_a3po.config.section import Section


class WandbSection(Section):
    """Weights & Biases, which mirrors metrics.jsonl; needs the extra `wandb`."""

    project: str = Field(min_length=1)
    """The project a run is filed under; the run has the name of its directory."""

    entity: str | None = Field(default=None, min_length=1)
    """User or team; left out, the account's own."""

    mode: Literal["online", "offline"] = "online"
    """`offline` sends nothing: everything lies in <run_dir>/wandb, for `wandb sync`."""
