"""The `trainer` section: how long the run is, what a step holds, what is written down."""

from pydantic import Field

from megatron_a3po.config.section import Section
from megatron_a3po.config.wandb import WandbSection

TRACED_BY_DEFAULT = (3, 5)


class TrainerSection(Section):
    """The training loop."""

    steps: int = Field(ge=1)
    """Training steps of the whole run, resumes included; a warm start is counted apart."""

    seed: int = Field(default=1, ge=0)
    """Decides the order of prompts, every sampled token and random initial weights."""

    prompts_per_step: int = Field(default=32, ge=1)
    """Prompts, and so groups, in a training step."""

    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on data.held_out; they never pause the rollouts. Left out: only
    before and after."""

    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints. Left out: only when stopped, and after a warm start."""

    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept; an older one goes when a newer one is complete."""

    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints whose step is a multiple of this are kept for good."""

    dump_batches: bool = False
    """Save what each step trained on to <run_dir>/batches/."""

    replay: str | None = Field(default=None, min_length=1)
    """Folder of dumped batches to train on, without any engine."""

    max_skipped_steps: int = Field(default=3, ge=1)
    """That many training steps in a row with a skipped update end the run."""

    sample_every: int = Field(default=10, ge=1)
    """Steps between the trajectories shown in samples.jsonl."""

    probe_every: int = Field(default=10, ge=1)
    """Steps between probes of sampler against trainer where a step has no token of its own version."""

    trace: bool | tuple[int, int] = False
    """Write <run_dir>/trace.json, a timeline of a few steps: true is three of them, [first, last] those."""

    wandb: WandbSection | None = None
    """Mirror metrics.jsonl to Weights & Biases too."""

    @property
    def traced_steps(self) -> range:
        """The steps on the timeline; by default from the third on, when the pipeline has filled."""
        match self.trace:
            case (first, last):
                return range(first, last + 1)
            case True:
                last = min(TRACED_BY_DEFAULT[1], self.steps)
                return range(max(last - 2, 1), last + 1)
            case _:
                return range(0)
