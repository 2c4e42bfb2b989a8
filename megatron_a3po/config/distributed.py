"""The `distributed` section: the process group itself."""

from pydantic import Field

from megatron_a3po.config.section import Section


class DistributedSection(Section):
    """How ranks talk."""

    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds the ranks may wait for one of them; then the run ends and says for which."""
