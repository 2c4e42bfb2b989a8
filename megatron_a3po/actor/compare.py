"""Two checkpoints on one prompt: how far their logits are apart, and where inside the model they part.

A Hugging Face folder is computed by transformers, a distributed checkpoint by our own target policy on one rank: so a
folder and what was converted from it are compared through two implementations. Both compute in float32 whatever they
are stored in.
"""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_a3po.actor.attention import PackedSequences
from megatron_a3po.actor.experts import score_biases
from megatron_a3po.actor.grid import Grid, build_grid, leave_grid
from megatron_a3po.actor.model import TargetPolicy, transformer_config, uses_transformer_engine
from megatron_a3po.config import ModelShape, read_model_shape
from megatron_a3po.config.actor import ActorSection
from megatron_a3po.config.tokenizer_files import has_tokenizer
from megatron_a3po.errors import InputError
from megatron_a3po.weights.families import table_of
from megatron_a3po.weights.megatron_reader import MegatronReader, megatron_directory
from megatron_a3po.weights.sources import SafetensorsSource

PROMPT = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
FEW_TOKENS = 8
NUM_PLAIN_TOKENS = 32  # where no tokenizer knows the prompt
HEAD = "head"
Encode = Callable[[Path, str], list[int]]  # text to tokens, by the tokenizer in a folder
Observed = dict[str, Tensor]  # the outputs of the model's parts, in the order they are computed


@dataclass(frozen=True)
class Distance:
    """Between two outputs: the largest difference, and the largest number of the first."""

    difference: float
    largest: float

    @property
    def relative(self) -> float:
        # A difference that is not a number is none to be tolerated.
        return self.difference / self.largest if self.largest else float(self.difference != 0) * float("inf")


@dataclass(frozen=True)
class Comparison:
    """`tensors`: names and shapes that only one side has; where there are any, nothing is computed.

    is_made_up: the tokens are numbers spread over the vocabulary, not a text's.
    """

    tensors: list[str]
    distances: dict[str, Distance]
    num_tokens: int
    tolerance: float
    is_made_up: bool = False

    @property
    def equal(self) -> bool:
        return not self.tensors and self.distances[HEAD].relative <= self.tolerance

    @property
    def first_divergence(self) -> str | None:
        far = (name for name, one in self.distances.items() if not one.relative <= self.tolerance)
        return next(far, None)

    def lines(self) -> list[str]:
        """What to tell a person."""
        if self.tensors:
            return [*self.tensors, "different: not the same tensors"]
        head, first = self.distances[HEAD], self.first_divergence
        made_up = " (made up: no tokenizer for the prompt)" if self.is_made_up else ""
        found = [
            f"logits of {self.num_tokens} tokens{made_up}: max difference {head.difference:.3g}, {head.relative:.2g} "
            f"of the largest ({head.largest:.3g})"
        ]
        if first is not None:
            where = self.distances[first]
            found.append(
                f"first divergence: {first} (max difference {where.difference:.3g}, {where.relative:.2g} of its "
                "largest)"
            )
        return [*found, f"{'equal' if self.equal else 'different'} (tolerance {self.tolerance:.0e})"]


def compare(
    a: Path, b: Path, encode: Encode, *, prompt: str | None = None, tolerance: float = 1e-5
) -> Comparison:
    """Errors: InputError where a side is no checkpoint, or damaged."""
    sides = [_side(path) for path in (a, b)]
    if differing := _differing_tensors(sides[0], sides[1]):
        return Comparison(differing, {}, 0, tolerance)
    tokens, is_made_up = _tokens(sides, encode, prompt)
    # Megatron-Core without a GPU changes torch for good, so transformers goes first.
    order = sorted((0, 1), key=lambda index: sides[index].is_megatron)
    observed = {index: sides[index].observe(tokens) for index in order}
    return Comparison([], _distances(observed[0], observed[1]), len(tokens), tolerance, is_made_up)


@dataclass(frozen=True)
class _Side:
    path: Path
    folder: Path  # with config.json and the tokenizer
    tensors: dict[str, tuple[int, ...]]
    observe: Callable[[Tensor], Observed]
    is_megatron: bool


def _side(path: Path) -> _Side:
    if megatron_directory(path) is not None:
        reader = MegatronReader(path)
        tensors = {one.name: one.shape for one in reader.announced()}
        return _Side(path, reader.template, tensors, lambda tokens: _by_megatron(reader, tokens), True)
    shape = read_model_shape(path)
    table = table_of(shape)
    SafetensorsSource(path, table)
    return _Side(path, path, table.tensors, lambda tokens: _by_transformers(path, shape, tokens), False)


def _differing_tensors(a: _Side, b: _Side) -> list[str]:
    found = []
    for one, other in ((a, b), (b, a)):
        if only := [name for name in one.tensors if name not in other.tensors]:
            found.append(f"only in {one.path}: {', '.join(only)}")
    for name in a.tensors.keys() & b.tensors.keys():
        if a.tensors[name] != b.tensors[name]:
            found.append(f"{name} is {a.tensors[name]} in {a.path}, but {b.tensors[name]} in {b.path}")
    return sorted(found)


def _tokens(sides: list[_Side], encode: Encode, prompt: str | None) -> tuple[Tensor, bool]:
    """int64 [tokens] of the prompt; without a tokenizer that knows it, numbers spread over the vocabulary.

    And whether it is those numbers. Errors: InputError where `prompt` cannot be what is computed.
    """
    vocab_size = min(read_model_shape(side.folder).vocab_size for side in sides)
    folder = next((side.folder for side in sides if has_tokenizer(side.folder)), None)
    tokens = [] if folder is None else encode(folder, PROMPT if prompt is None else prompt)
    if prompt is None and len(tokens) < FEW_TOKENS:  # a tokenizer of another alphabet
        return torch.arange(NUM_PLAIN_TOKENS) * 7919 % vocab_size, True
    if folder is None:
        raise InputError(f"--prompt needs a tokenizer, which neither {sides[0].path} nor {sides[1].path} has")
    if not tokens:
        raise InputError(f"--prompt is no token to the tokenizer in {folder}: give a text that it knows")
    if max(tokens) >= vocab_size:
        raise InputError(
            f"the tokenizer in {folder} makes the token {max(tokens)} of the prompt, but config.json has "
            f"vocab_size={vocab_size}: take the tokenizer that belongs to the model."
        )
    return torch.tensor(tokens), False


def _distances(a: Observed, b: Observed) -> dict[str, Distance]:
    return {name: Distance(float((a[name] - b[name]).abs().max()), float(a[name].abs().max())) for name in a}


class _Recorder:
    """Keeps what modules put out, as [tokens, width] in float32 on the host."""

    def __init__(self) -> None:
        self.observed: Observed = {}

    def watch(self, module: torch.nn.Module, name: str) -> None:
        module.register_forward_hook(lambda module, inputs, output: self.keep(name, output))

    def keep(self, name: str, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        # Megatron-Core adds the residual in place where there is no gradient.
        self.observed[name] = tensor.detach().float().cpu().reshape(-1, tensor.shape[-1]).clone()


@torch.no_grad()
def _by_transformers(path: Path, shape: ModelShape, tokens: Tensor) -> Observed:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        # The tensors, not the folder: transformers asks for files of its own names, and takes pickles too.
        tensors = dict(SafetensorsSource(path, table_of(shape)))
        model: Any = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    model.to(device).eval()
    recorder = _Recorder()
    recorder.watch(model.get_input_embeddings(), "embedding")
    for number, layer in enumerate(model.model.layers):
        # What is added to the residual: behind the norm, where there is one behind.
        attention = layer.post_attention_layernorm if shape.sandwich_norms else layer.self_attn
        mlp = layer.post_feedforward_layernorm if shape.sandwich_norms else layer.mlp
        recorder.watch(attention, f"layer {number} attention")
        recorder.watch(mlp, f"layer {number} MLP")
    recorder.keep(HEAD, model(tokens[None].to(device)).logits)
    return recorder.observed


@torch.no_grad()
def _by_megatron(reader: MegatronReader, tokens: Tensor) -> Observed:
    with tempfile.TemporaryDirectory(prefix="a3po-") as folder:
        actor = ActorSection()
        grid = build_grid(
            actor,
            rank=0,
            world_size=1,
            local_rank=0,
            init_method=f"file://{folder}/rendezvous",
            seed=0,
            timeout_s=600,
        )
        try:
            return _of_policy(_policy(actor, reader, grid), reader.shape, tokens.to(grid.device))
        finally:
            leave_grid()


def _policy(actor: ActorSection, reader: MegatronReader, grid: Grid) -> TargetPolicy:
    shape = reader.shape
    policy = TargetPolicy(
        transformer_config(actor, shape),
        shape,
        padded_vocab_size=actor.padded_vocab_size(shape.vocab_size),
        pre_process=True,
        post_process=True,
        vp_stage=None,
        pp_rank=0,
        transformer_engine=uses_transformer_engine(actor, shape),
    ).to(grid.device)
    for name, parameter in chain(policy.named_parameters(), score_biases(policy)):
        # On one rank every other parameter has its stored size; the vocabulary may be padded.
        parameter.copy_(reader.read(reader.table.parameter(name))[: len(parameter)])
    return policy.eval()


def _of_policy(policy: TargetPolicy, shape: ModelShape, tokens: Tensor) -> Observed:
    recorder = _Recorder()
    policy.decoder.register_forward_pre_hook(
        lambda module, inputs, keys: recorder.keep("embedding", keys["hidden_states"]), with_kwargs=True
    )
    for number, layer in enumerate(policy.decoder.layers):
        parts: Any = layer
        recorder.watch(parts.self_attention, f"layer {number} attention")
        recorder.watch(parts.mlp, f"layer {number} MLP")
    num_tokens = len(tokens)
    packed = PackedSequences(
        qkv_format="sbhd",
        cu_seqlens_q=torch.tensor([0, num_tokens], dtype=torch.int32, device=tokens.device),
        lengths=(num_tokens,),
        num_tokens=num_tokens,
    )
    positions = torch.arange(num_tokens, device=tokens.device)[None]
    hidden = policy(tokens[None], positions, packed)
    recorder.keep(HEAD, hidden[:, 0] @ policy.output_weight[: shape.vocab_size].T)
    return recorder.observed
