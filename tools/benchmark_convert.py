"""What a conversion costs: memory against the largest rank's own weights, time against a plain copy of the files.

Writes a random checkpoint of Qwen2.5-3B's shape (bf16, 6 GB), then in processes of their own: copies it, converts it
for TP 2 x PP 2, converts that back, and copies again. Memory is the largest RssAnon of the process, looked at every few
milliseconds: files that are mapped do not count, and importing torch, which is shown by itself, does. What came back
must be what there was, by the checksums in the manifests. Needs 25 GB below FOLDER. Figures are in docs/benchmarks.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_a3po.config import read_model_shape
from megatron_a3po.weights.families import table_of
from megatron_a3po.weights.hugging_face import write_hugging_face
from megatron_a3po.weights.manifest import MANIFEST
from megatron_a3po.weights.safetensors_file import Announced
from megatron_a3po.weights.sources import RandomSource

TOOL = Path(__file__).with_name("convert_checkpoint.py")
POLL_S = 0.005
TP_SIZE, PP_SIZE = 2, 2
RANKS = [f"--tensor-model-parallel-size={TP_SIZE}", f"--pipeline-model-parallel-size={PP_SIZE}"]
# Qwen2.5-3B.
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak_bytes: int


def measure(command: list[Any]) -> Measured:
    """Of a process that must succeed."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return Measured(time.perf_counter() - start, peak)


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def write_random(folder: Path, num_layers: int) -> None:
    """A Hugging Face folder with random weights, written a tensor at a time."""
    template = folder.with_name("template")
    template.mkdir()
    (template / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}, indent=1))
    table = table_of(read_model_shape(template))
    source = RandomSource(table, seed=0)
    write_hugging_face(
        ((name, source[name].bfloat16()) for name in table.tensors),
        [Announced(name, size, torch.bfloat16) for name, size in table.tensors.items()],
        folder,
        template=template,
        peers=None,
        lasting=True,
    )


def checksums(folder: Path) -> dict[str, str]:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def run(folder: Path, num_layers: int) -> list[dict[str, Any]]:
    source, megatron, back, copy = (folder / name for name in ("hf", "megatron", "back", "copy"))
    write_random(source, num_layers)
    imports = measure([sys.executable, "-c", "import megatron_a3po.weights.conversion"])
    rows = [_row("import", "python and torch", imports, 0, 0, None)]
    plain: dict[str, Measured] = {}
    for case, command, output in (
        ("hf-to-megatron", [sys.executable, TOOL, "hf-to-megatron", source, megatron, *RANKS], megatron),
        ("megatron-to-hf", [sys.executable, TOOL, "megatron-to-hf", megatron, back], back),
    ):
        plain[case] = measure(["cp", "-r", command[3], copy])
        shutil.rmtree(copy)
        found = measure(command)
        size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        rank = max(file.stat().st_size for file in megatron.glob("*.distcp"))
        rows.append(_row(case, "cp", plain[case], size, rank, plain[case]))
        rows.append(_row(case, "convert_checkpoint", found, size, rank, plain[case]))
    if checksums(back) != checksums(source):
        raise SystemExit("what came back is not what there was")
    return rows


def _row(
    case: str, implementation: str, found: Measured, size: int, rank: int, plain: Measured | None
) -> dict[str, Any]:
    return {
        "case": case,
        "implementation": implementation,
        "seconds": round(found.seconds, 2),
        "ratio": round(found.seconds / plain.seconds, 2) if plain else None,
        "gb_per_s": round(size / found.seconds / 1e9, 2) if size else None,
        "peak_mb": round(found.peak_bytes / 1e6),
        "peak_of_largest_rank": round(found.peak_bytes / rank, 3) if rank else None,
        "largest_rank_mb": round(rank / 1e6) if rank else None,
    }


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="where 25 GB are free; emptied afterwards"
    )
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="fewer for a try")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmark-convert-") as folder:
        rows = run(Path(folder), arguments.layers)
    columns = list(rows[0])
    print("  ".join(f"{name:>20}" for name in columns))
    for row in rows:
        print("  ".join(f"{'' if row[name] is None else row[name]:>20}" for name in columns))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
