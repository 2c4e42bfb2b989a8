"""The parts of `gpu_check.py`: `gpu_parts.py NAME --json FILE` runs one and writes what it found.

A part returns rows of figures and complaints; one complaint fails it. What the machine lacks leaves it out. Without a
GPU a part runs on the CPU where it can, at the same sizes: that is how they are tried out.
"""

import argparse
import asyncio
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_a3po.environment import child_environment

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
Outcome = tuple[list[Row], list[str]]  # figures, complaints


@dataclass(frozen=True)
class Part:
    """A title, the modules it needs beside torch, and how long it may take."""

    title: str
    run: Callable[[], Outcome]
    needs: tuple[str, ...]
    limit_s: float


def find_device() -> tuple[str | None, str]:
    """The GPU torch sees, or None and why there is none."""
    if find_spec("torch") is None:
        return None, "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return None, f"torch {torch.__version__} sees no GPU on this machine"
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}", ""


def environment() -> Outcome:
    from megatron_a3po.trainer.commands import doctor

    machine = doctor.look()
    sections = doctor.hardware(machine), doctor.packages(machine), doctor.paths(machine)
    return [{"what": name, "found": found} for section in sections for name, found in section], []


# --- the loss layer ---

# Largest errors over the largest reference value. In bf16 exponentials and rows are rounded to 8 bits on their way into
# the gradients' products, nothing else is.
LOSS_BOUNDS = {
    "float32": {"loss": 1e-6, "logp": 1e-6, "entropy": 5e-6, "hidden_grad": 5e-6, "weight_grad": 5e-6},
    "bfloat16": {"loss": 1e-6, "logp": 1e-6, "entropy": 5e-6, "hidden_grad": 5e-3, "weight_grad": 5e-3},
}


def loss_agreement() -> Outcome:
    """The layer in float32 and bfloat16 against dense float64 on the very same numbers."""
    import torch
    from loss_problem import layer_answer, random_problem, reference_answer

    rows, complaints = [], []
    for name, bounds in LOSS_BOUNDS.items():
        problem = random_problem(getattr(torch, name), tokens=1000, hidden=256, vocab_size=5003, scale=0.2)
        expected = reference_answer(problem)
        for chunk_tokens in (256, 4096):
            found = layer_answer(problem, chunk_tokens)
            for what, bound in bounds.items():
                size = expected["loss_size"] if what == "loss" else expected[what].abs().max()
                error = ((found[what].double() - expected[what]).abs().max() / size).item()
                rows.append(
                    {"dtype": name, "chunk": chunk_tokens, "what": what, "error": error, "bound": bound}
                )
                if not error <= bound:
                    complaints.append(
                        f"{name}, chunks of {chunk_tokens}: {what} is off by {error:.1e} (> {bound})"
                    )
    return rows, complaints


# Tokens, hidden, vocabulary; the first is the one the aims are for.
AIMED_SHAPE = (8192, 4096, 151936)
TIMED_SHAPES = (
    AIMED_SHAPE,
    *((tokens, 4096, 151936) for tokens in (2048, 32768, 131072)),
    *((8192, hidden, 151936) for hidden in (1024, 2048, 8192)),
)
AIMED_RATIO, AIMED_SECONDS = 1.12, 0.045  # the latter on an H200


def loss_timing() -> Outcome:
    """Forward and backward of the layer against its three matrix products alone, in bfloat16."""
    import torch
    from loss_problem import layer_run, random_problem, three_products

    from megatron_a3po.vocab_parallel import choose_chunk_tokens

    if not torch.cuda.is_available():
        raise LeftOut("no GPU")
    rows, complaints = [], []
    for tokens, hidden, vocab_size in TIMED_SHAPES:
        case = f"T {tokens} H {hidden} V {vocab_size} bf16"
        try:
            problem = random_problem(
                torch.bfloat16, tokens=tokens, hidden=hidden, vocab_size=vocab_size, scale=0.02
            )
            chunk_tokens = choose_chunk_tokens(hidden, vocab_size, problem.weight.device)
            floor, floor_mb = timed(three_products(problem.hidden, problem.weight, chunk_tokens))
            layer, layer_mb = timed(layer_run(problem))
        except torch.cuda.OutOfMemoryError:
            rows.append({"case": case, "implementation": "LEFT OUT: it does not fit into this GPU's memory"})
            continue
        rows.append(_timing(case, "three products", floor, 1.0, floor_mb, problem))
        rows.append(_timing(case, "loss layer", layer, layer / floor, layer_mb, problem))
        too_slow = "H200" in torch.cuda.get_device_name() and layer > AIMED_SECONDS
        if (tokens, hidden, vocab_size) == AIMED_SHAPE and (layer / floor > AIMED_RATIO or too_slow):
            complaints.append(
                f"{case}: {layer / floor:.2f} of the three products and {layer * 1e3:.0f} ms, where {AIMED_RATIO} and "
                f"{AIMED_SECONDS * 1e3:.0f} ms are the aims"
            )
    return rows, complaints


def _timing(case: str, name: str, seconds: float, ratio: float, peak_mb: float, problem: Any) -> Row:
    flops = 6 * math.prod(problem.sizes)
    row = {"case": case, "implementation": name, "seconds": seconds, "ratio": ratio, "peak_mb": peak_mb}
    return row | {"tflop_per_s": flops / seconds / 1e12}


def timed(run: Callable[[], object], rounds: int = 10) -> tuple[float, float]:
    """(median seconds, peak MB over what was there before) of a call on the GPU."""
    import torch

    for _ in range(3):
        run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**20


# --- the actor ---


def actor_local() -> Outcome:
    return _actor("local")


def actor_transformer_engine() -> Outcome:
    return _actor("transformer_engine")


def _actor(transformer_impl: str) -> Outcome:
    """The actor here in bf16 against a CPU in fp32: the same weights and batches, RL steps, then supervised ones."""
    import torch

    if transformer_impl == "transformer_engine" and not torch.cuda.is_available():
        raise LeftOut("Transformer Engine needs a GPU")
    found, expected = (
        _in_process("bf16", transformer_impl),
        _in_process("fp32", "local", CUDA_VISIBLE_DEVICES=""),
    )
    rows, complaints = [], []
    for stage in ("rl", "supervised"):
        for number, (here, there) in enumerate(zip(found[stage], expected[stage], strict=True), start=1):
            # Advantages of a group cancel out: what a loss of RL is judged by is the mean of |loss_t|.
            size = expected["mean_abs_advantage"] if stage == "rl" else abs(there)
            error = abs(here - there) / size
            rows.append(
                {"stage": stage, "step": number, "loss": here, "CPU fp32": there, "difference": error}
            )
            if not error <= 0.02:
                complaints.append(
                    f"{stage} step {number}: the loss {here:.5f} is not within 2% of {there:.5f}"
                )
    return [*rows, {"stage": f"{found['seconds_per_step']:.3f} s a supervised step"}], complaints


def _in_process(dtype: str, transformer_impl: str, **environment: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        output = Path(folder) / "curve.json"
        command = [sys.executable, str(ROOT / "tools/actor_curve.py"), dtype, transformer_impl, str(output)]
        subprocess.run(command, cwd=ROOT, env=child_environment(**environment), check=True)
        return json.loads(output.read_text())


# --- the local engine ---


def local_engine() -> Outcome:
    """Samples of the embedded engine on this device: their log-probs against a plain forward of the same model."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from megatron_a3po.rollout.engines.local import load_model

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        model: Any = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, initializer_range=0.1, dtype="float32"))
        model.save_pretrained(folder)
        samples, seconds = asyncio.run(_generate(Path(folder)))
        model = load_model(Path(folder), torch.float32)
        errors = [_largest_error(model, prompt, sample) for prompt, sample in samples]
    num_tokens = sum(len(sample.tokens) for _, sample in samples)
    rows = [
        {"what": "device", "found": str(next(model.parameters()).device)},
        {"what": "tokens", "found": num_tokens},
        {"what": "tokens/s", "found": num_tokens / seconds},
        {"what": "largest error of a log-prob (bound 1e-4)", "found": max(errors)},
    ]
    return rows, [] if max(errors) <= 1e-4 else [f"log-probs are off by {max(errors):.1e} (> 1e-4)"]


async def _generate(directory: Path) -> tuple[list[tuple[Any, Any]], float]:
    import numpy as np

    from megatron_a3po.rollout.engines.base import SampleRequest
    from megatron_a3po.rollout.engines.local import LocalEngine

    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, 512, 4 + index % 7).astype(np.int32) for index in range(32)]
    requests = [SampleRequest(index, 0, prompt, 16 + index) for index, prompt in enumerate(prompts)]
    engine = LocalEngine(directory, version=0, eos_token_ids=[1], seed=1, max_concurrent_samples=16)
    start = time.monotonic()
    samples = await engine.generate(requests)
    seconds = time.monotonic() - start
    await engine.close()
    return list(zip(prompts, samples, strict=True)), seconds


def _largest_error(model: Any, prompt: Any, sample: Any) -> float:
    import numpy as np
    import torch

    tokens = torch.from_numpy(np.concatenate([prompt, sample.tokens]).astype(np.int64)).to(model.device)
    with torch.inference_mode():
        logps = torch.log_softmax(model(tokens[None]).logits[0].float(), -1)
    plain = logps[:-1].gather(1, tokens[1:, None])[len(prompt) - 1 :, 0].cpu().numpy()
    return float(np.abs(plain - sample.logps).max())


# --- the whole ---

QUICKSTART_STEPS = 24


def quickstart() -> Outcome:
    """A short quickstart on one rank: NCCL, warm start, rollouts and training on the same device."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        run_dir = Path(folder) / "quickstart"
        subprocess.run([sys.executable, "examples/quickstart/prepare.py"], cwd=ROOT, check=True)
        changes = ["actor.tensor_model_parallel_size=1", "actor.pipeline_model_parallel_size=1"]
        changes += [f"trainer.steps={QUICKSTART_STEPS}", f"run_dir={run_dir}"]
        command = [
            sys.executable,
            "-m",
            "megatron_a3po",
            "train",
            "examples/quickstart/config.yaml",
            *changes,
        ]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code != 0:
            for log in sorted((run_dir / "logs").glob("*.log")):
                print(f"--- the end of {log.name}\n{log.read_text()[-4000:]}")
            return [], [f"train ended with {code}; the ends of its logs are in quickstart.log"]
        summary = json.loads((run_dir / "summary.json").read_text())
        losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("steps", "wall_seconds", "accuracy_before", "accuracy_after", "forwards_per_token")
    rows = [{"what": name, "found": summary[name]} for name in names]
    complaints = []
    if len(losses) != QUICKSTART_STEPS or not all(map(math.isfinite, losses)):
        complaints.append(
            f"{len(losses)} steps, {sum(map(math.isfinite, losses))} of them with a finite loss"
        )
    if not summary["accuracy_after"] > summary["accuracy_before"]:
        complaints.append("held-out accuracy did not rise")
    return rows, complaints


PARTS = {
    "environment": Part("This machine", environment, (), 60),
    "loss_agreement": Part("Loss layer against float64", loss_agreement, ("jaxtyping",), 120),
    "loss_timing": Part("Loss layer against its three matrix products", loss_timing, ("jaxtyping",), 120),
    "actor_local": Part(
        "Actor in bf16 without Transformer Engine, against fp32 on the CPU",
        actor_local,
        ("megatron.core",),
        150,
    ),
    "actor_transformer_engine": Part(
        "Actor in bf16 with Transformer Engine, against fp32 on the CPU",
        actor_transformer_engine,
        ("megatron.core", "transformer_engine"),
        180,
    ),
    "local_engine": Part("The local engine on this device", local_engine, ("transformers",), 90),
    "quickstart": Part("Quickstart on one rank", quickstart, ("megatron.core", "transformers"), 270),
}


class LeftOut(Exception):
    """This machine lacks what the part needs."""


def main() -> int:
    parser = argparse.ArgumentParser(description="One part of the GPU check.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    result = _result(PARTS[arguments.part])
    arguments.json.write_text(json.dumps(result))
    print(json.dumps(result, indent=1))
    return 1 if result["status"] == "failed" else 0


def _result(part: Part) -> Row:
    try:
        if missing := [name for name in part.needs if not _is_installed(name)]:
            raise LeftOut(f"not installed: {', '.join(missing)}")
        rows, complaints = part.run()
    except LeftOut as reason:
        return {"status": "left out", "notes": [str(reason)], "rows": []}
    except Exception as error:  # the process boundary: the report shows it, the log has the traceback
        traceback.print_exc()
        return {"status": "failed", "notes": [f"{type(error).__name__}: {error}"], "rows": []}
    partly = [
        f"{row['case']}: {row['implementation']}"
        for row in rows
        if "LEFT OUT" in str(row.get("implementation"))
    ]
    return {"status": "failed" if complaints else "passed", "notes": complaints + partly, "rows": rows}


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


if __name__ == "__main__":
    sys.exit(main())
