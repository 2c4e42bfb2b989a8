#!/usr/bin/env python
"""Converts, inspects and compares checkpoints: Hugging Face folders and distributed checkpoints of Megatron-Core.

    tools/convert_checkpoint.py hf-to-megatron INPUT OUTPUT --tensor-model-parallel-size 2
    tools/convert_checkpoint.py megatron-to-hf INPUT OUTPUT --dtype bfloat16
    tools/convert_checkpoint.py inspect PATH --all
    tools/convert_checkpoint.py verify A B

Exit codes: 0 done or equal, 1 different (verify), 2 bad input, 3 a file that cannot be written or an error nobody
foresaw, 130 interrupted.
"""

import argparse
import math
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_a3po.errors import (
    EXIT_DIFFERENT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_NEEDS_PERSON,
    A3POError,
)

if TYPE_CHECKING:
    from megatron_a3po.weights.conversion import Conversion


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    warnings.simplefilter("ignore")  # of libraries, about what is not installed
    try:
        return arguments.command(arguments)
    except A3POError as error:
        sys.stderr.write("".join(f"{problem}\n" for problem in error.problems))
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    except Exception:
        traceback.print_exc()
        return EXIT_NEEDS_PERSON  # Python's own 1 means "different"


def hf_to_megatron(arguments: argparse.Namespace) -> int:
    from megatron_a3po.weights.conversion import DTYPES, hugging_face_to_megatron
    from megatron_a3po.weights.megatron_checkpoint import Ranks

    conversion = hugging_face_to_megatron(
        arguments.input,
        arguments.output,
        ranks=Ranks(
            arguments.tensor_model_parallel_size,
            arguments.pipeline_model_parallel_size,
            arguments.expert_model_parallel_size,
        ),
        dtype=DTYPES.get(arguments.dtype),
        overwrite=arguments.overwrite,
    )
    return _run(conversion, arguments.output)


def megatron_to_hf(arguments: argparse.Namespace) -> int:
    from megatron_a3po.weights.conversion import DTYPES, megatron_to_hugging_face

    conversion = megatron_to_hugging_face(
        arguments.input,
        arguments.output,
        dtype=DTYPES.get(arguments.dtype),
        max_shard_bytes=round(arguments.max_shard_gb * 1e9),
        overwrite=arguments.overwrite,
    )
    return _run(conversion, arguments.output)


def inspect(arguments: argparse.Namespace) -> int:
    from megatron_a3po.weights.inspection import by_pattern, in_words
    from megatron_a3po.weights.inspection import inspect as inspected

    found = inspected(arguments.path)
    facts = [[label, value] for label, value in found.facts.items()]
    tensors = [["tensor", "shape", "dtype", "number", "bytes"]]
    for one in found.tensors if arguments.all else by_pattern(found.tensors):
        shape = " x ".join(map(str, one.shape))
        tensors.append([one.name, shape, one.dtype, str(one.count), in_words(one.num_bytes)])
    print(_aligned(facts), _aligned(tensors), sep="\n\n")
    return EXIT_DONE


def _aligned(rows: list[list[str]]) -> str:
    """Columns as wide as they need: a terminal may fold a line, but nothing is left out."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def verify(arguments: argparse.Namespace) -> int:
    from megatron_a3po.actor.compare import compare
    from megatron_a3po.rollout.tokenizer import load_tokenizer

    found = compare(
        arguments.a,
        arguments.b,
        lambda folder, text: load_tokenizer(folder).encode(text),
        prompt=arguments.prompt,
        tolerance=arguments.tolerance,
    )
    print("\n".join(found.lines()))
    return EXIT_DONE if found.equal else EXIT_DIFFERENT


def _run(conversion: "Conversion", output: Path) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(output.resolve().name, total=conversion.num_elements)
        conversion.run(lambda num_elements: progress.advance(task, num_elements))
    print(f"wrote {output}")
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    to_megatron = commands.add_parser("hf-to-megatron", help="cut a Hugging Face checkpoint for ranks")
    to_megatron.set_defaults(command=hf_to_megatron)
    for axis in ("tensor", "pipeline", "expert"):
        to_megatron.add_argument(f"--{axis}-model-parallel-size", type=_positive, default=1, metavar="N")

    to_hf = commands.add_parser("megatron-to-hf", help="also from a run's checkpoints/step-<n>")
    to_hf.set_defaults(command=megatron_to_hf)
    to_hf.add_argument("--max-shard-gb", type=_size, default=5.0, help="largest weight file (default 5)")

    for command in (to_megatron, to_hf):
        command.add_argument("input", type=Path, metavar="INPUT")
        command.add_argument("output", type=Path, metavar="OUTPUT")
        command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as it is")
        command.add_argument("--overwrite", action="store_true", help="replace OUTPUT where it exists")

    comparing = commands.add_parser("verify", help="compare the logits of two checkpoints on a prompt")
    comparing.set_defaults(command=verify)
    comparing.add_argument("a", type=Path, metavar="A")
    comparing.add_argument("b", type=Path, metavar="B")
    comparing.add_argument("--prompt", help="text, for the tokenizer of A or B")
    comparing.add_argument(
        "--tolerance", type=_tolerance, default=1e-5, help="of the largest logit (default 1e-5)"
    )

    inspecting = commands.add_parser("inspect", help="what a checkpoint holds")
    inspecting.set_defaults(command=inspect)
    inspecting.add_argument("path", type=Path, metavar="PATH")
    inspecting.add_argument("--all", action="store_true", help="every tensor, not one line for each kind")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def _size(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no finite number above 0")
    return value


def _tolerance(text: str) -> float:
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number") from None


if __name__ == "__main__":
    sys.exit(main())
