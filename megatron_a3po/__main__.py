"""The command line: `python -m megatron_a3po train | evaluate | report | doctor`.

Only the arguments and the error boundary are here: a user's mistake ends with one sentence for each problem and exit
code 2. Commands are in `trainer/commands/`, one file each, imported when asked for; this file imports next to
nothing, because processes that a library spawns import it again.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from megatron_a3po.errors import EXIT_INTERRUPTED, EXIT_NEEDS_PERSON, A3POError, ConfigError, InputError
from megatron_a3po.lifetime import StopWish

PACKAGE = "megatron_a3po"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parse_arguments(argv)
    try:
        if arguments.command == "train":
            arguments.stop = StopWish.listening()
        command = importlib.import_module(f"megatron_a3po.trainer.commands.{arguments.command}")
        return command.run(arguments)
    except (ConfigError, InputError) as error:
        _say(error.problems)
        return error.exit_code
    except A3POError as error:
        for problem in error.problems:
            logging.getLogger(PACKAGE).error("%s", problem)
        return error.exit_code
    except KeyboardInterrupt:
        # An interrupt that passed through exec, which makes dataclasses while a module loads, stays noted in CPython,
        # and the process would end by the signal whatever its exit code; the next exec takes the note away.
        exec("")
        return EXIT_INTERRUPTED
    except SystemExit:
        raise
    except BaseException:  # torch's checkpoint errors are no Exceptions
        # The process boundary: Python would answer 1, which here means that two checkpoints differ.
        logging.getLogger(PACKAGE).exception("%s ended by an error of its own", arguments.command)
        return EXIT_NEEDS_PERSON


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments; overrides may stand anywhere among the options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options, as `--help` shows them."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_a3po",
        description="Asynchronous RL post-training on Megatron-Core with A-3PO.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train, or continue a run that was stopped")
    train.add_argument("config", metavar="CONFIG", help="YAML file, or a folder with a config.yaml")
    _add_overrides(train)
    train.add_argument(
        "--dry-run", action="store_true", help="validate, print the configuration and the plan, stop"
    )
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="continue an unfinished run (auto), move an old one aside (never), or start from a checkpoint (PATH)",
    )
    evaluate = commands.add_parser("evaluate", help="accuracy of a run or of a Hugging Face checkpoint")
    evaluate.add_argument("config", metavar="CONFIG_OR_RUN", help="YAML file or run directory")
    _add_overrides(evaluate)
    evaluate.add_argument(
        "--checkpoint", metavar="HF_DIR", help="Hugging Face checkpoint to evaluate instead"
    )
    report = commands.add_parser(
        "report", help="what runs did, side by side: a table here, and a page of figures"
    )
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    report.add_argument(
        "--out",
        metavar="FILE",
        help="the page; report.html in the run directory, or in the folder above several of them, when left out",
    )
    report.add_argument("--watch", action="store_true", help="write the page again as the runs grow")
    doctor = commands.add_parser("doctor", help="what this machine has, and which code paths will be used")
    doctor.add_argument(
        "--slurm",
        nargs="?",
        const="",
        metavar="JOB",
        help="what this Slurm job sees, or how JOB stands, in words",
    )
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="replaces a key of the file"
    )


def _say(problems: Sequence[str]) -> None:
    sys.stderr.write("".join(f"{problem}\n" for problem in problems))


if __name__ == "__main__":
    sys.exit(main())
