"""Each rank holds its part and no more, and no rank ever makes logits over the whole vocabulary: watched in real runs.

The command's ranks run their real training step under a dispatch mode that sees the result of every operation.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_a3po.trainer import loop
from tests.actor.replay import HIDDEN_SIZE, VOCAB_SIZE, layout, replay

CHUNK = 8
PADDED = {VOCAB_SIZE, VOCAB_SIZE + 1}
SHARD = (VOCAB_SIZE + 1) // 2
Seen = list[dict[str, Any]]


class Shapes(TorchDispatchMode):
    """The shape of every tensor of two dimensions or more that any operation makes in the precision of the model.

    Statistics are gathered in float64 and objects as bytes: of how many, says nothing here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.dtype == torch.float32:
                self.seen.add(tuple(tensor.shape))
        return result


def watching(folder: Path) -> Callable[[], None]:
    """Before a command: have each of its ranks write down what it holds and what its training step makes."""
    original = loop.train_step

    def watched(actor: Any, *args: Any) -> Any:
        with Shapes() as shapes:
            metrics = original(actor, *args)
        held = {name: list(tensor.shape) for name, tensor, _ in actor._parameters()}
        seen = {"tp_rank": actor.grid.tp.rank, "pp_rank": actor.grid.pp.rank, "held": held}
        seen["shapes"] = sorted(shapes.seen)
        (folder / f"seen-{actor.grid.world_rank}.json").write_text(json.dumps(seen))
        return metrics

    def replace() -> None:
        loop.train_step = watched

    return replace


@pytest.fixture(scope="module")
def seen(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """Layout -> what each rank saw in one step of `metrics`, which has every pass there is."""
    found = {}
    for name, overrides in {
        "one rank": layout(),
        "tp 2": layout(tp=2),
        "tp 2 sp": layout(tp=2, sp=True),
        "tp 2 pp 2": layout(tp=2, pp=2),
    }.items():
        folder = tmp_path_factory.mktemp("seen")
        switches = ["actor.prox_logp_method=metrics", "trainer.steps=1", f"actor.loss_chunk_tokens={CHUNK}"]
        replay(config, f"watched, {name}", *overrides, *switches, before=watching(folder))
        found[name] = [json.loads(file.read_text()) for file in sorted(folder.glob("seen-*.json"))]
    return found


def test_each_tensor_rank_holds_half_of_each_matrix(seen: dict[str, Seen]):
    whole = {name: torch.Size(shape).numel() for name, shape in seen["one rank"][0]["held"].items()}
    whole["output_layer.weight"] = whole["embedding.word_embeddings.weight"] = (VOCAB_SIZE + 1) * HIDDEN_SIZE
    for name in ("tp 2", "tp 2 sp"):
        assert [rank["tp_rank"] for rank in seen[name]] == [0, 1]
        for rank in seen[name]:
            assert rank["held"].keys() == whole.keys()
            for parameter, shape in rank["held"].items():
                share = 1 if "norm" in parameter else 2
                assert torch.Size(shape).numel() * share == whole[parameter], parameter


def test_stages_hold_disjoint_layers_that_make_the_model(seen: dict[str, Seen]):
    held = {0: set(), 1: set()}
    for rank in seen["tp 2 pp 2"]:
        held[rank["pp_rank"]] |= rank["held"].keys()
    assert not held[0] & held[1]
    assert held[0] | held[1] == seen["one rank"][0]["held"].keys()
    layers = [{name.split(".")[2] for name in stage if "layers" in name} for stage in held.values()]
    assert layers == [{"0", "1"}, {"2", "3"}]


def test_the_watch_sees_whole_logits_where_there_are_some(seen: dict[str, Seen]):
    assert any(shape[-1] == VOCAB_SIZE for shape in map(tuple, seen["one rank"][0]["shapes"]))


@pytest.mark.parametrize("name", ["tp 2", "tp 2 sp", "tp 2 pp 2"])
def test_no_tensor_has_the_whole_vocabulary(seen: dict[str, Seen], name: str):
    for rank in seen[name]:
        assert not [shape for shape in rank["shapes"] if PADDED & set(shape)]


@pytest.mark.parametrize("name", ["one rank", "tp 2", "tp 2 sp", "tp 2 pp 2"])
def test_only_one_chunk_of_logits_exists_at_a_time(seen: dict[str, Seen], name: str):
    size = {VOCAB_SIZE} if name == "one rank" else {SHARD, SHARD - 1}
    shapes = [tuple(shape) for rank in seen[name] for shape in rank["shapes"]]
    # The projection's weight, transposed, has as many rows as the model is wide.
    logits = {s for s in shapes if len(s) == 2 and s[1] in size and s[0] != HIDDEN_SIZE}
    # Slices of a sequence share a chunk evenly, which may round up by a row.
    assert max(shape[0] for shape in logits) in ((CHUNK, CHUNK + 1) if "sp" in name else (CHUNK,)), logits
