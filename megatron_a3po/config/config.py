"""The whole configuration as one typed tree. A function receives the section it needs, never this.

Reading a file is in `load.py`, what goes together and what does not in `checks.py`.
"""

from pydantic import Field

from megatron_a3po.config.actor import ActorSection
from megatron_a3po.config.data import DataSection
from megatron_a3po.config.distributed import DistributedSection
from megatron_a3po.config.model import ModelSection
from megatron_a3po.config.reward import RewardSection
from megatron_a3po.config.rollout import RolloutSection
from megatron_a3po.config.section import Section
from megatron_a3po.config.trainer import TrainerSection
from megatron_a3po.config.warm_start import WarmStartSection


class Config(Section):
    """Everything a run depends on."""

    run_dir: str = Field(min_length=1)
    """Folder the run writes to; left out of the file, runs/<name of the file, or of its folder if it is
    config.yaml>."""

    model: ModelSection
    data: DataSection

    reward: RewardSection | None = None
    """How responses are scored. Needed unless trainer.replay brings scored batches."""

    actor: ActorSection = ActorSection()
    rollout: RolloutSection = RolloutSection()
    trainer: TrainerSection

    warm_start: WarmStartSection | None = None
    """Supervised steps first; null leaves them out."""

    distributed: DistributedSection = DistributedSection()

    @property
    def optimizer_steps(self) -> int:
        """Updates of the weights in the whole run, warm start apart."""
        return self.trainer.steps * self.actor.num_mini_batches

    @property
    def needs_rollouts(self) -> bool:
        """Whether anything is generated and scored: not where batches are replayed."""
        return self.trainer.replay is None
