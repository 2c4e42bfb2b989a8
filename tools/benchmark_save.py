"""What a checkpoint costs the training: held up by it, and the step that follows while it is written.

One rank in one process, so that one core is busy with training and another is free for the writing. Every round takes
a step, a checkpoint that is waited for, a step, a checkpoint beside the training, and steps until that one is there;
ratios are medians over rounds of times of the same round:

    held up     seconds of `begin` and of every `go_on`, to the seconds of the checkpoint that is waited for
    next step   the step right after `begin`, its `go_on` included, to the step before it

Synchronous is the same code, waited for: copy, write, checksums, fsync, manifest, rename. Figures are in
docs/reliability.md.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about what is not installed; `doctor` tells that in words
    from megatron_a3po.actor.actor import Actor
    from megatron_a3po.actor.grid import build_grid, leave_grid
    from megatron_a3po.actor.optimizer import Schedule
    from megatron_a3po.config import Config, read_model_shape
    from megatron_a3po.trainer.attempt import Attempt
    from megatron_a3po.trainer.batch import supervised_sequence
    from megatron_a3po.trainer.saving import Saving
    from megatron_a3po.vocab_parallel.policy_objective import supervised_objective

Row = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no dependence on the machine's host name
    with tempfile.TemporaryDirectory(prefix="benchmark-save-", dir=arguments.folder) as folder:
        row = Benchmark(arguments, Path(folder)).row()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"{datetime.date.today()}  {platform.machine()}, {os.cpu_count()} CPUs, load {load}; "
        f"torch {torch.__version__}\n{row['state_mb']:.0f} MB of state, {arguments.rounds} rounds, medians\n\n"
        "| step s | synchronous s | held up s | to synchronous | next step s | to a step | complete after s |\n"
        "|---|---|---|---|---|---|---|\n"
        f"| {row['step_s']:.3f} | {row['synchronous_s']:.3f} | {row['held_up_s']:.3f} | {row['ratio']:.3f} "
        f"| {row['next_step_s']:.3f} | {row['next_step_ratio']:.3f} | {row['complete_s']:.3f} |"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps([row], indent=1) + "\n")
    return 0


class Benchmark:
    """One rank with a model of random weights, and its checkpoints in `folder`."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.config = _config(arguments, folder)
        section, model = self.config.actor, self.config.model
        self.grid = build_grid(
            section,
            rank=0,
            world_size=1,
            local_rank=0,
            init_method=f"file://{folder}/meet",
            seed=1,
            timeout_s=300,
        )
        shape = read_model_shape(model.hf_path)
        self.actor = Actor(section, model, shape, self.grid, temperature=1.0, seed=1)
        self.actor.start_stage(Schedule(1e-4, 0.0, 0, "constant", 1000))
        tokens = np.random.default_rng(1).integers(2, arguments.vocab, arguments.tokens).astype(np.int32)
        self.packs = self.actor.pack([supervised_sequence("tokens", tokens[:1], tokens[1:])])
        self.saving = Saving(self.config, self.actor, Attempt.take(Path(self.config.run_dir)))
        self.num_steps = 0

    def row(self) -> Row:
        for _ in range(2):
            self._round()
        rounds = [self._round() for _ in range(self.arguments.rounds)]
        leave_grid()
        row: Row = {"case": "checkpoint", "implementation": "asynchronous"}
        row |= {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        return row | {"rounds": rounds, "seconds": row["held_up_s"]}

    def _round(self) -> dict[str, float]:
        self._step()
        synchronous = _seconds(lambda: (self._begin(), self.saving.finish()))
        step = self._step()
        since = time.perf_counter()
        held_up = _seconds(self._begin)
        next_step, following = 0.0, self._step()
        while self.saving.is_under_way:
            going_on = _seconds(self.saving.go_on)
            held_up, next_step = held_up + going_on, next_step or following + going_on
            if self.saving.is_under_way:
                self._step()
        complete = time.perf_counter() - since
        (checkpoint,) = (Path(self.config.run_dir) / "checkpoints").iterdir()
        return {
            "step_s": step,
            "synchronous_s": synchronous,
            "held_up_s": held_up,
            "ratio": held_up / synchronous,
            "next_step_s": next_step,
            "next_step_ratio": next_step / step,
            "complete_s": complete,
            "state_mb": sum(file.stat().st_size for file in checkpoint.rglob("*.distcp")) / 1e6,
        }

    def _begin(self) -> None:
        self.saving.begin({"step": self.num_steps}, None)

    def _step(self) -> float:
        self.num_steps += 1
        return _seconds(lambda: self.actor.update(self.packs, supervised_objective))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _config(arguments: argparse.Namespace, folder: Path) -> Config:
    """A Qwen2 of this size, and a run that keeps one checkpoint."""
    heads = max(1, arguments.hidden // 64)
    template = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": arguments.hidden,
        "intermediate_size": 4 * arguments.hidden,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": arguments.vocab,
        "max_position_embeddings": arguments.tokens,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(template))
    (folder / "run").mkdir()
    (folder / "none.jsonl").touch()
    return Config.model_validate(
        {
            "run_dir": str(folder / "run"),
            "model": {"hf_path": str(model), "initialization": "random"},
            "data": {"train": str(folder / "none.jsonl")},
            "actor": {"max_tokens_per_micro_batch": arguments.tokens},
            "rollout": {"max_response_tokens": arguments.tokens},
            "trainer": {"steps": 1000, "keep_last": 1},
        }
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1024, help="in a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; on the disk that is to be measured")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
