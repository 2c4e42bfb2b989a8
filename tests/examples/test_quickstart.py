"""The quickstart's inputs are what its README says, and every example's configuration loads."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_a3po.config import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("examples/*/*.yaml"))


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """examples/quickstart/prepare.py, run into a folder of its own."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "examples/quickstart/prepare.py")
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FOLDER = tmp_path_factory.mktemp("inputs")
    module.main()
    return module


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def operands(row: dict[str, str]) -> frozenset[str]:
    return frozenset(row["prompt"].removesuffix("=").split("+"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_loads(config: Path) -> None:
    load_config(config, check_files=False)


def test_working_is_the_one_of_a_hand_example(prepare: Any) -> None:
    assert prepare.working(47, 85) == "7+5+0=12;4+8+1=13 :132"
    assert prepare.working(10, 20) == "0+0+0=0;1+2+0=3 :30"


def test_held_out_problems_are_disjoint_by_content(prepare: Any) -> None:
    training, held_out = rows(prepare.FOLDER / "train.jsonl"), rows(prepare.FOLDER / "held_out.jsonl")
    assert len(held_out) >= 500
    assert len(training) + len(held_out) == 90 * 90
    assert not {operands(row) for row in training} & {operands(row) for row in held_out}


def test_answers_are_right_and_end_the_working(prepare: Any) -> None:
    for row in rows(prepare.FOLDER / "train.jsonl"):
        assert int(row["answer"]) == sum(map(int, row["prompt"].removesuffix("=").split("+")))
        assert row["response"].endswith(f":{row['answer']}")


def test_running_it_again_changes_nothing(prepare: Any) -> None:
    files = [path for path in prepare.FOLDER.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    prepare.main()
    assert {path: path.read_bytes() for path in prepare.FOLDER.rglob("*") if path.is_file()} == before


def test_tokenizer_is_one_token_a_character(prepare: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepare.FOLDER / "model")
    config = json.loads((prepare.FOLDER / "model/config.json").read_text())
    text = prepare.working(47, 85)
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.encode("#") == [config["eos_token_id"]] == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id == config["pad_token_id"]
    assert len(tokenizer) == config["vocab_size"]


def test_configuration_fits_the_inputs(prepare: Any) -> None:
    config = load_config(ROOT / "examples/quickstart/config.yaml", check_files=False)
    training = rows(prepare.FOLDER / "train.jsonl")
    assert max(len(row["response"]) + 1 for row in training) < config.rollout.max_response_tokens
    assert max(len(row["prompt"]) for row in training) <= config.data.max_prompt_tokens
