"""A tiny random Qwen2 and a character tokenizer."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHARACTERS = "0123456789+=;: "
EOS_ID = 1


def tiny_model(seed: int, *, scale: float = 0.3, vocab_size: int = len(CHARACTERS) + 2) -> Qwen2ForCausalLM:
    """Weights large enough that versions differ clearly and distributions are not flat."""
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=EOS_ID,
        pad_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, scale) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn(()))
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    written = ["Ġ" if character == " " else character for character in CHARACTERS]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *written])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
