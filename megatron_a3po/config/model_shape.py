"""The shape of a language model: everything the actor's construction and the weight tables depend on.

Plain data. It is read from a Hugging Face `config.json` by `model_families.py`, which also says which families there
are and refuses what they cannot express.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings. `scaling` has the further keys of transformers' `rope_parameters` as they are."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    scaling: Mapping[str, float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Experts:
    """The sparse layers of a mixture of experts. Source: TransformerConfig's `moe_*` fields."""

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int | None  # of all shared experts together; None: there are none
    scores: Literal["softmax", "sigmoid"]
    normalize_top_k: bool
    scaling: float = 1.0
    num_groups: int | None = None  # experts are chosen within the best `top_groups` of so many groups
    top_groups: int | None = None
    has_score_bias: bool = False  # a bias that steers the choice of experts and not their weight


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek): keys and values from a low-rank latent. Sizes are per head but ranks."""

    query_rank: int | None
    key_value_rank: int
    plain_head_dim: int
    rotary_head_dim: int
    value_head_dim: int

    @property
    def query_head_dim(self) -> int:
        """Of queries and keys: the part without positions and the rotated one."""
        return self.plain_head_dim + self.rotary_head_dim


@dataclass(frozen=True)
class ModelShape:
    """What a model's layers look like."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope: Rope
    norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    add_qkv_bias: bool = False
    qk_norm: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    softmax_scale: float | None = None  # None: 1 / sqrt(head_dim)
    windows: tuple[
        int | None, ...
    ] = ()  # per layer, tokens that attention sees; None: all; (): all in every layer
    local_rope: Rope | None = None  # of the layers with a window, where they have their own
    embedding_scale: float | None = None
    zero_centered_norms: bool = False  # a norm multiplies by 1 + weight
    sandwich_norms: bool = False  # norms behind attention and MLP too, before the residual is added
    experts: Experts | None = None
    sparse_layers: tuple[bool, ...] = ()  # per layer, whether its MLP is the experts; (): none
    latent_attention: LatentAttention | None = None

    def window(self, layer: int) -> int | None:
        """Tokens that attention of `layer` (from 0) sees, itself included; None: all before it."""
        return self.windows[layer] if self.windows else None

    def is_sparse(self, layer: int) -> bool:
        """Whether the MLP of `layer` (from 0) is a mixture of experts."""
        return bool(self.sparse_layers) and self.sparse_layers[layer]
