"""Actors on forked ranks, where a test asks the actor itself and not a run."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.grid import build_grid
from megatron_a3po.actor.packing import AlignedSequence, MicroBatch
from megatron_a3po.config import read_model_shape
from megatron_a3po.config.actor import ActorSection
from megatron_a3po.config.model import ModelSection
from megatron_a3po.trainer.batch import supervised_sequence
from tests.distributed.ranks import run_ranks


def on_actors(
    function: Callable[[Actor], Any],
    model: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    temperature: float = 1.0,
    initialization: str = "pretrained",
    run_s: float = 60.0,
    **keys: Any,
) -> list[Any]:
    """[function(actor) on each rank], the actors having loaded `model`."""
    section = ActorSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **keys)
    model_section = ModelSection(hf_path=str(model), initialization=initialization)  # pyright: ignore[reportArgumentType]

    def on_rank(rank: int, world_size: int, rendezvous: str) -> Any:
        grid = build_grid(
            section,
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            init_method=f"file://{rendezvous}",
            seed=1,
            timeout_s=run_s,
        )
        shape = read_model_shape(str(model))
        return function(Actor(section, model_section, shape, grid, temperature=temperature, seed=1))

    with TemporaryDirectory(prefix="actors-") as folder:
        return run_ranks(on_rank, tp * pp * dp, f"{folder}/rendezvous", joined=False, timeout_s=run_s)


def random_sequences(lengths: list[int], vocab_size: int, seed: int = 3) -> list[AlignedSequence]:
    """Sequences of random tokens whose every token but the first is trained."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(2, vocab_size, length).astype(np.int32) for length in lengths]
    return [supervised_sequence(f"sequence {i}", one[:1], one[1:]) for i, one in enumerate(tokens)]


def by_sequence(packs: list[MicroBatch], vectors: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Vectors over the trained tokens of packs, taken apart again."""
    found = {}
    for pack, vector in zip(packs, vectors, strict=True):
        bounds = np.cumsum([int(s.loss_mask.sum()) for s in pack.sequences])[:-1]
        found |= {s.name: part for s, part in zip(pack.sequences, np.split(vector, bounds), strict=True)}
    return found
