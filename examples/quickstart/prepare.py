"""Write the quickstart's inputs: addition problems, a character tokenizer and a small Qwen2 configuration.

Everything follows from one fixed seed, so running it again changes nothing. No weights are written: the run draws
them itself (`model.initialization: random`). A problem is a two-digit sum whose answer writes the working out, the
ones first:

    47+85=   ->   7+5+0=12;4+8+1=13 :132#

so that a response is twenty-odd tokens long and newer weights can land in the middle of it. `#` ends a response.
Held-out problems share no pair of numbers with the training problems, in either order.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SEED = 20
NUM_HELD_OUT = 512
FOLDER = Path(__file__).parent / "inputs"

PAD, EOS = "<|endoftext|>", "#"
SPACE = "Ġ"  # how byte-level vocabularies write a space
CHARACTERS = "0123456789+=;: "


def working(a: int, b: int) -> str:
    """The response to `a+b=`: the sum of the ones, the sum of the tens with the carry, the answer."""
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + ones // 10
    return f"{a % 10}+{b % 10}+0={ones};{a // 10}+{b // 10}+{ones // 10}={tens} :{a + b}"


def problem(a: int, b: int) -> dict[str, str]:
    """One row of the data files; `response` is what the supervised warm start learns from."""
    return {"prompt": f"{a}+{b}=", "answer": str(a + b), "response": working(a, b)}


def split_problems(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, held out): every ordered pair of two-digit numbers, both orders of a pair on the same side."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(pairs)
    ordered = [list(dict.fromkeys([(a, b), (b, a)])) for a, b in pairs]
    held_out: list[tuple[int, int]] = []
    while len(held_out) < NUM_HELD_OUT:
        held_out += ordered.pop()
    training = [pair for both in ordered for pair in both]
    rng.shuffle(training)
    rng.shuffle(held_out)
    return [problem(a, b) for a, b in training], [problem(a, b) for a, b in held_out]


def tokenizer_files() -> dict[str, str]:
    """A Qwen2 tokenizer of single characters: byte-level BPE without a merge; `#` is the end of a response."""
    bytes_written = [SPACE if character == " " else character for character in CHARACTERS]
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *bytes_written])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, EOS])
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }


def model_config() -> dict[str, object]:
    """A Qwen2 of 0.7 million parameters, embeddings tied as in the small Qwen2.5 models."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 2 + len(CHARACTERS),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "float32",
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def write(path: Path, text: str) -> None:
    """Written aside and renamed, so that a file is there whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    aside.replace(path)


def main() -> None:
    training, held_out = split_problems(SEED)
    files = {
        "train.jsonl": "".join(json.dumps(row) + "\n" for row in training),
        "held_out.jsonl": "".join(json.dumps(row) + "\n" for row in held_out),
        "model/config.json": json.dumps(model_config(), indent=2),
        **{f"model/{name}": text for name, text in tokenizer_files().items()},
    }
    (FOLDER / "model").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write(FOLDER / name, text)
    print(f"{len(training)} training and {len(held_out)} held-out problems, tokenizer and model in {FOLDER}")


if __name__ == "__main__":
    main()
