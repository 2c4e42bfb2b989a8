"""The target policy: a small language model of Megatron-Core's parts that returns hidden states, never logits.

Parameter names are GPTModel's, so that checkpoints and weight tables fit both. The projection onto the vocabulary
belongs to the loss layer; the model only owns its weight (`output_weight`).
"""

from functools import partial
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_a3po.actor.attention import PackedSequences
from megatron_a3po.actor.experts import expert_settings, keep_score_bias_in_fp32
from megatron_a3po.actor.grid import Grid
from megatron_a3po.actor.latent_attention import latent_settings
from megatron_a3po.actor.layers import block_spec, has_transformer_engine
from megatron_a3po.actor.rotary import Rotary
from megatron_a3po.config import ModelShape
from megatron_a3po.config.actor import ActorSection

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}


class TargetPolicy(LanguageModule):
    """One pipeline stage (or one virtual stage) of the target policy."""

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        *,
        padded_vocab_size: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        pp_rank: int,
        transformer_engine: bool,
    ) -> None:
        super().__init__(config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = shape.tie_word_embeddings
        self.model_type = ModelType.encoder_or_decoder
        self.max_position_embeddings = shape.max_position_embeddings
        # transformers rounds the scale to the precision of the weights.
        scale = shape.embedding_scale
        self.embedding_scale = (
            None if scale is None else torch.tensor(scale, dtype=config.params_dtype).item()
        )
        self.tokens_forwarded = 0
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, padded_vocab_size, shape.max_position_embeddings, position_embedding_type="rope"
            )
        ropes = [rope for rope in (shape.rope, shape.local_rope) if rope is not None]
        latent = shape.latent_attention
        rotary_dim = latent.rotary_head_dim if latent else shape.head_dim
        self.rotary_pos_emb = Rotary(ropes, rotary_dim, shape.max_position_embeddings)
        spec = block_spec(
            shape, config, vp_stage=vp_stage, pp_rank=pp_rank, transformer_engine=transformer_engine
        )
        self.decoder = TransformerBlock(
            config, spec, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                padded_vocab_size,
                config=config,
                init_method=cast(Any, config.init_method),
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and shape.tie_word_embeddings,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        """Megatron-Core's schedule hands a later stage its input here."""
        self.decoder.set_input_tensor(input_tensor[0])

    @property
    def output_weight(self) -> Tensor:
        """[padded vocabulary / TP, hidden] on the last stage: the embedding's where tied and here, else the head's."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return cast(Tensor, self.output_layer.weight)

    def forward(self, tokens: Tensor, position_ids: Tensor, packed: PackedSequences) -> Tensor:
        """tokens, position_ids int64 [1, rows] -> hidden [rows (/TP under sequence parallelism), 1, hidden]."""
        self.tokens_forwarded += packed.num_tokens
        hidden = self.embedding(tokens, position_ids) if self.pre_process else None
        if hidden is not None and self.embedding_scale is not None:
            hidden = hidden * self.embedding_scale
        rotary = self.rotary_pos_emb(position_ids[0])
        return self.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=packed
        )


class HalfPrecision(Float16Module):
    """Megatron-Core's wrapper, but the last stage's hidden states stay in the precision of the weight they meet."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, super().forward(*inputs, fp32_output=False, **kwargs))


def transformer_config(actor: ActorSection, shape: ModelShape) -> TransformerConfig:
    """Megatron-Core's configuration of this model in this layout. Fusions that need CUDA extensions are off."""
    dtype = torch.bfloat16 if actor.bf16 else torch.float32
    interleaved = actor.virtual_pipeline_model_parallel_size is not None
    latent = latent_settings(actor, shape)
    kind = MLATransformerConfig if latent else TransformerConfig
    return kind(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[shape.activation],
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_norm,
        layernorm_zero_centered_gamma=shape.zero_centered_norms,
        softmax_scale=shape.softmax_scale,
        **_windows(shape),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=actor.tensor_model_parallel_size,
        pipeline_model_parallel_size=actor.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=actor.virtual_pipeline_model_parallel_size,
        sequence_parallel=actor.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=actor.bf16,
        # Packs of a mini-batch are padded to one length: no shape exchange, and gloo cannot mix up two directions.
        variable_seq_lengths=False,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # On gloo a sent tensor must live until it has left: only CUDA's streams order freeing after sending.
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        calculate_per_token_loss=True,
        # Weights always come from full tensors by Hugging Face name, sliced per rank: one start for every layout.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        recompute_granularity=actor.recompute_granularity,
        recompute_method="uniform" if actor.recompute_granularity == "full" else None,
        recompute_num_layers=1 if actor.recompute_granularity == "full" else None,
        **expert_settings(actor, shape),
        **latent,
    )


def _windows(shape: ModelShape) -> dict[str, Any]:
    """Megatron-Core's keys: how far the layers with a window look back and ahead, and which layers these are."""
    sizes = {window for window in shape.windows if window is not None}
    if not sizes:
        return {}
    (size,) = sizes
    windowed = [int(window is not None) for window in shape.windows]
    return {"window_size": (size - 1, 0), "window_attn_skip_freq": windowed}


def build_model(actor: ActorSection, shape: ModelShape, grid: Grid) -> list[DistributedDataParallel]:
    """This rank's stages, each wrapped for bf16 and data parallelism: one, or as many as virtual stages."""
    config = transformer_config(actor, shape)
    transformer_engine = uses_transformer_engine(actor, shape)
    vp_size = actor.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(vp_size) if vp_size else [None]:
        first_virtual, last_virtual = vp_stage in (None, 0), vp_stage in (None, (vp_size or 0) - 1)
        stage: Any = TargetPolicy(
            config,
            shape,
            padded_vocab_size=actor.padded_vocab_size(shape.vocab_size),
            pre_process=grid.pp.is_first and first_virtual,
            post_process=grid.pp.is_last and last_virtual,
            vp_stage=vp_stage,
            pp_rank=grid.pp.rank,
            transformer_engine=transformer_engine,
        ).to(grid.device)
        _mark_shards(stage)
        # In training mode Megatron-Core wants sequence parallelism beside experts; they are not trained yet.
        stage.train(shape.experts is None)
        chunk = HalfPrecision(config, stage) if actor.bf16 else stage
        keep_score_bias_in_fp32(chunk)
        chunks.append(chunk)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=actor.overlap_grad_reduce,
        overlap_param_gather=actor.overlap_param_gather,
        check_for_nan_in_grad=False,  # non-finite gradients skip one update instead of ending the run
    )
    return [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def _mark_shards(stage: torch.nn.Module) -> None:
    """Say which parameters are shards. Megatron-Core 0.16 does so only while initialising them, and then counts an
    unmarked shard as a replica: the gradient norm would leave out every tensor rank's but the first."""
    shard_dims = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in stage.modules():
        dim = next((dim for kind, dim in shard_dims.items() if isinstance(module, kind)), None)
        weight = getattr(module, "weight", None)
        if dim is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def uses_transformer_engine(actor: ActorSection, shape: ModelShape) -> bool:
    """Gemma's norms behind attention and MLP are not among its layers: start-up refuses to ask for both."""
    return actor.transformer_impl == "transformer_engine" or (
        actor.transformer_impl == "auto" and has_transformer_engine() and not shape.sandwich_norms
    )


def unwrap(chunk: torch.nn.Module) -> TargetPolicy:
    """The stage under its data-parallel and precision wrappers."""
    while not isinstance(chunk, TargetPolicy):
        chunk = chunk.module  # pyright: ignore[reportAssignmentType]
    return chunk
