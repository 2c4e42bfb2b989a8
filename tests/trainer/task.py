"""A task that a tiny model trains on in seconds: sums to do, their configuration, runs of the production command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megatron_a3po.trainer.batch import Batch, batch_path, load_batch
from megatron_a3po.trainer.recording import read_metrics
from tests.rollout.tiny import tiny_tokenizer
from tests.run_files import write_rows
from tests.trainer import command
from tests.trainer.replay import logs_of, write_tiny_model
from tests.vllm_server import write_version

GROUPS, SAMPLES = 4, 4
STEPS = 12


def write_model_for_vllm(folder: Path) -> None:
    write_version(folder, seed=0)
    tiny_tokenizer().save_pretrained(folder)


class Task:
    """A folder with all a run needs; each `run` is another run directory in it. `changes` are sections of the
    configuration with what differs from the one here."""

    def __init__(
        self,
        folder: Path,
        write_model: Callable[[Path], object] = write_tiny_model,
        **changes: dict[str, Any],
    ) -> None:
        self.folder = folder
        write_model(folder / "model")
        sums = [{"prompt": f"{i}+{j}=", "answer": str(i + j)} for i in range(9) for j in range(9)]
        sums = [{**row, "response": f"{row['answer']} :{row['answer']}"} for row in sums]
        write_rows(folder / "train.jsonl", sums[:-8])
        write_rows(folder / "held_out.jsonl", sums[-8:])
        sections = self._sections()
        for name, change in changes.items():
            sections[name] |= change
        self.config = folder / "task.yaml"
        self.config.write_text(yaml.safe_dump(sections))

    def _sections(self) -> dict[str, dict[str, Any]]:
        return {
            "model": {"hf_path": f"{self.folder}/model"},
            "data": {"train": f"{self.folder}/train.jsonl", "max_prompt_tokens": 16},
            "reward": {"type": "function", "path": "tests.trainer.rewards:any_response"},
            "actor": {"prox_logp_method": "loglinear", "lr": 1e-3, "max_tokens_per_micro_batch": 512},
            "rollout": {"samples_per_prompt": SAMPLES, "max_response_tokens": 24},
            "trainer": {"steps": STEPS, "prompts_per_step": GROUPS, "dump_batches": True},
        }

    def argv(self, name: str, *overrides: str) -> list[str]:
        return ["train", str(self.config), f"run_dir={self.folder / name}", *overrides]

    def start(self, name: str, *overrides: str, before: Callable[[], None] | None = None) -> command.Command:
        return command.fork(self.folder / "out" / name, *self.argv(name, *overrides), before=before)

    def run(self, name: str, *overrides: str) -> list[dict[str, Any]]:
        """The rows of a run that must succeed."""
        ended = self.start(name, *overrides).wait()
        assert ended.code == 0, ended.output + logs_of(self.folder / name)
        return read_metrics(self.folder / name)

    def batch(self, name: str, step: int) -> Batch:
        return load_batch(batch_path(self.folder / name / "batches", step))

    def trained(self, name: str, num_steps: int) -> list[list[int]]:
        """The prompts of every step."""
        return [
            [group.prompt_index for group in self.batch(name, step).groups]
            for step in range(1, num_steps + 1)
        ]


def num_rows(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0
