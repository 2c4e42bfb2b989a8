"""What a Hugging Face `config.json` may say, per family: each key that is read, its type, its range, its default.

Sizes have to be there. Any other default is that of the family's configuration in transformers, null included where it
means something there. What the values mean is in `model_families.py`; what is refused of them, in `model_refusals.py`.
"""

from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from megatron_a3po.config.problem import shown
from megatron_a3po.config.validate import wanted
from megatron_a3po.errors import InputError

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
TokenIds = Annotated[
    list[Index],
    BeforeValidator(lambda ids: ids if isinstance(ids, list) else [] if ids is None else [ids]),
]


class Keys(BaseModel, frozen=True):
    """Read strictly: text is no number. Keys that nobody reads are left alone."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class RopeKeys(Keys, frozen=True):
    """`rope_parameters`, and what was `rope_scaling` before; only what is set counts. Gemma 3 has two of them."""

    rope_theta: Positive = 10000.0
    rope_type: str | None = None
    type: str | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    full_attention: "RopeKeys | None" = None
    sliding_attention: "RopeKeys | None" = None

    def given(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True, exclude_none=True)


class GenerationKeys(Keys, frozen=True):
    """Of `generation_config.json`."""

    eos_token_id: TokenIds = []


class ModelKeys(GenerationKeys, frozen=True):
    """What all families have."""

    num_hidden_layers: Count
    hidden_size: Count
    intermediate_size: Count
    num_attention_heads: Count
    vocab_size: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count
    rms_norm_eps: Positive = 1e-6
    initializer_range: Annotated[float, Field(ge=0)] = 0.02
    tie_word_embeddings: bool = False
    rope_theta: Positive = 10000.0
    rope_parameters: RopeKeys | None = None
    rope_scaling: RopeKeys | None = None
    layer_types: list[str] | None = None


class LlamaKeys(ModelKeys, frozen=True):
    max_position_embeddings: Count = 2048


class MistralKeys(ModelKeys, frozen=True):
    num_key_value_heads: Count = 8
    max_position_embeddings: Count = 131072
    sliding_window: Count | None = 4096


class Qwen2Keys(ModelKeys, frozen=True):
    num_key_value_heads: Count | None = 32
    max_position_embeddings: Count = 32768
    use_sliding_window: bool = False
    sliding_window: Count | None = 4096
    max_window_layers: Index = 28


class Qwen3Keys(Qwen2Keys, frozen=True):
    head_dim: Count = 128


class Qwen3MoeKeys(ModelKeys, frozen=True):
    num_key_value_heads: Count = 4
    max_position_embeddings: Count = 32768
    use_sliding_window: bool = False
    sliding_window: Count | None = 4096
    num_experts: Count = Field(validation_alias=AliasChoices("num_experts", "num_local_experts"))
    num_experts_per_tok: Count
    moe_intermediate_size: Count
    norm_topk_prob: bool = False
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[Index] | None = None


class Gemma3Keys(ModelKeys, frozen=True):
    num_key_value_heads: Count = 4
    head_dim: Count = 256
    max_position_embeddings: Count = 131072
    tie_word_embeddings: bool = True
    rope_theta: Positive = 1e6
    rope_local_base_freq: Positive = 1e4
    query_pre_attn_scalar: Positive = 256
    sliding_window: Count | None = 4096
    sliding_window_pattern: Count = Field(
        6, validation_alias=AliasChoices("sliding_window_pattern", "_sliding_window_pattern")
    )


class DeepseekV3Keys(ModelKeys, frozen=True):
    max_position_embeddings: Count = 4096
    q_lora_rank: Count | None = 1536
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count
    n_routed_experts: Count
    n_shared_experts: Count
    n_group: Count
    topk_group: Count
    num_experts_per_tok: Count
    moe_intermediate_size: Count
    first_k_dense_replace: Index
    routed_scaling_factor: Positive = 2.5


KindOfKeys = TypeVar("KindOfKeys", bound=Keys)


def read_keys(kind: type[KindOfKeys], values: dict[str, Any]) -> KindOfKeys:
    """Errors: InputError with a sentence for each key that is missing or is not what it must be."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(_sentence(item) for item in error.errors(include_url=False)) from None


def _sentence(item: Any) -> str:
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "missing":
        return f"{key} is missing, but must be a whole number of at least 1."  # only sizes have no default
    return f"{key} is {shown(item['input'])}, but must be {wanted(item)}."
