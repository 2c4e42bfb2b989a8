"""The `rollout` section: how responses are sampled and how stale they may become."""

from typing import Literal

from pydantic import Field

from megatron_a3po.config.section import Section

DEFAULT_MAX_STALENESS = 1
DEFAULT_SEGMENT_TOKENS = 512
DEFAULT_SERVER_TIMEOUT_S = 600.0
DEFAULT_CANARY_EVERY = 50
DEFAULT_BUCKET_BYTES = 256 * 2**20


class RolloutSection(Section):
    """Generation, and the bound between the sampler and the trainer."""

    engine: Literal["local", "vllm"] = "local"
    """`local` runs the Hugging Face model inside the rollout process, `vllm` asks vLLM servers over HTTP."""

    servers: list[str] | None = None
    """vllm: URLs of servers that are there already, such as http://10.0.0.5:8000."""

    servers_file: str | None = None
    """vllm: a file with one such URL a line, or a folder with a file NAME.url for each server; looked up
    again and again, so that servers may come and go."""

    launch: int | None = Field(default=None, ge=1)
    """vllm: start this many servers on this machine, and end them with the run."""

    vllm_python: str | None = None
    """The interpreter launched servers run with, of an environment with vLLM; left out it is this one."""

    token_file: str | None = None
    """A file with the bearer token that servers given by URL ask for."""

    segment_tokens: int | None = Field(default=None, ge=1)
    """vllm: a request asks for at most so many tokens (512 when left out); what a dead server loses is one
    request."""

    on_update: Literal["recompute_kv", "keep_kv", "restart"] | None = None
    """vllm: what new weights do to responses under way. `recompute_kv` (when left out): they go on, their
    caches computed again; `keep_kv`: they go on with the caches of the old weights; `restart`: they begin
    anew."""

    server_timeout_s: float | None = Field(default=None, gt=0)
    """vllm: the time a server has to start or to answer, and a run without any server to get one back
    (600 when left out)."""

    canary_every: int | None = Field(default=None, ge=1)
    """vllm: after the first publication and every so many (50 when left out) each server's log-probs are
    compared with the trainer's; a difference ends the run."""

    weight_transport: Literal["files", "collective"] | None = None
    """vllm: how published weights reach the servers. `files` (when left out): they read them from run_dir;
    `collective`: the trainer sends them to the workers of all servers at once, over NCCL or, without GPUs, gloo."""

    weight_staging: Literal["none", "host"] | None = None
    """vllm: `none` (when left out): a server stands still while it receives weights; `host`: it receives them
    into host memory while it generates, one model for each of its workers, and stands still to put them in place."""

    weight_bucket_bytes: int | None = Field(default=None, ge=1)
    """vllm, collective: tensors travel together in so many bytes (256 MiB when left out)."""

    workflow: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """What happens between a prompt and its trajectory, an async function given as `module:function`; left out
    it is one response to the prompt."""

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
    def segment(self) -> int:
        """The most tokens a request asks for."""
        return self.segment_tokens or DEFAULT_SEGMENT_TOKENS

    @property
    def update_mode(self) -> Literal["recompute_kv", "keep_kv", "restart"]:
        """What holds of on_update."""
        return self.on_update or "recompute_kv"

    @property
    def timeout_s(self) -> float:
        """What holds of server_timeout_s."""
        return self.server_timeout_s or DEFAULT_SERVER_TIMEOUT_S

    @property
    def transport(self) -> Literal["files", "collective"]:
        """What holds of weight_transport."""
        return self.weight_transport or "files"

    @property
    def is_staged(self) -> bool:
        """Whether servers receive weights into host memory first."""
        return self.weight_staging == "host"

    @property
    def bucket_bytes(self) -> int:
        """What holds of weight_bucket_bytes."""
        return self.weight_bucket_bytes or DEFAULT_BUCKET_BYTES

    @property
    def canary_period(self) -> int:
        """Publications from one comparison of the servers with the trainer to the next."""
        return self.canary_every or DEFAULT_CANARY_EVERY

    @property
    def policy(self) -> Literal["wait", "drop", "train"]:
        """The staleness policy that holds."""
        return self.staleness_policy or "wait"

    @property
    def drops_no_signal(self) -> bool:
        """Whether groups without signal are left out: under fixed_staleness every batch has the
        same composition."""
        return self.filter_no_signal and self.fixed_staleness is None
