"""The commands on models of other families than the tests' usual one."""

from pathlib import Path

import pytest

from megatron_a3po.__main__ import main
from tests.actor.replay import VOCAB_SIZE, character_tokenizer, layout, replay, write_config
from tests.run_files import write_rows
from tests.weights.checkpoints import DENSE, read_model, write_dense

RUN = [
    "trainer.replay=null",
    "reward.type=exact_number",
    "rollout.max_staleness=0",
    "rollout.filter_no_signal=false",
    "actor.num_mini_batches=1",
    "actor.lr=1e-2",
    "actor.behave_weight_cap=50",
]


def overrides_of(folder: Path) -> list[str]:
    """A warm start of two steps, then rollouts, on four stages and shards."""
    rows = [{"prompt": f"{n}+{n}=", "response": str(2 * n), "answer": str(2 * n)} for n in range(10, 30)]
    write_rows(folder / "shown.jsonl", rows)
    warm_start = f"{{data: {folder}/shown.jsonl, steps: 2, lr_warmup_iters: 0, batch_size: 8}}"
    held_out = f"data.held_out={folder}/shown.jsonl"
    return [*RUN, f"warm_start={warm_start}", held_out, *layout(tp=2, pp=2, sp=True)]


def config_of(folder: Path, family: str) -> Path:
    """A configuration of a tiny checkpoint of this family, with its data and a tokenizer."""
    model = write_dense(folder / "model", family, vocab_size=VOCAB_SIZE)
    character_tokenizer().save_pretrained(model)
    return write_config(folder, model, folder, num_steps=3)


@pytest.mark.parametrize("family", DENSE)
def test_a_run_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str):
    config = config_of(tmp_path, family)
    argv = ["train", str(config), "--dry-run", *overrides_of(tmp_path), f"run_dir={tmp_path}/run"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "pretrained, 4 layers of width 48, 2 on each stage" in said
    assert "151 tokens, padded to 152" in said


def test_gemma_is_warmed_up_trained_evaluated_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = config_of(tmp_path, "gemma3_text")
    run = replay(config, "run", *overrides_of(tmp_path), "trainer.save_every=2")
    assert len(run.rows) == 3
    assert (run.column("sampler_trainer/tokens") == run.column("tokens/trained")).all()
    print(run.column("sampler_trainer/abs_diff/max"))
    assert (run.column("sampler_trainer/abs_diff/max") < 1e-4).all()
    exported = read_model(run.run_dir / "export").state_dict()
    assert all(exported[name].equal(tensor) for name, tensor in run.weights.items())
    assert main(["evaluate", str(run.run_dir)]) == 0
    assert "accuracy" in capsys.readouterr().out
    again = replay(config, "again", *overrides_of(tmp_path), f"--resume={run.run_dir}/checkpoints/step-2")
    assert again.rows[-1]["loss"] == run.rows[-1]["loss"]
    assert all(again.weights[name].equal(tensor) for name, tensor in run.weights.items())
