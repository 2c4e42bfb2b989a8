"""The Weights & Biases mirror: a process of its own that reads metrics.jsonl while a run writes it.

    python -m megatron_a3po.trainer.wandb_mirror RUN_DIR [--follow SECONDS]

The run never waits for it but a little at its end, so that a slow or dead server costs no step anything. How far the
files have been sent is kept beside what W&B writes: the run's next attempt, or the command above, goes on from there.
With --follow the end of the run is the end of standard input. `mirror.py` is the run's side. No torch here.
"""

import argparse
import importlib
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_a3po.environment import set_default
from megatron_a3po.errors import EXIT_DONE, A3POError, InputError
from megatron_a3po.lifetime import STOP_SIGNALS
from megatron_a3po.trainer.json_lines import plain
from megatron_a3po.trainer.recording import METRICS
from megatron_a3po.weights.aside import write_aside

WANDB = "wandb"
SENT = "sent.json"
WARM_START = "warm_start"
POLL_S = 1.0
ORPHANED_S = 5.0  # from the end of a run that was killed to giving up
INIT_S = "25"
NO_NUMBERS = ("version", "attempt")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_a3po.trainer.wandb_mirror")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument(
        "--follow", type=float, metavar="SECONDS", help="until standard input ends, then at most so long"
    )
    arguments = parser.parse_args()
    for number in STOP_SIGNALS if arguments.follow else ():  # they are the run's to answer
        signal.signal(number, signal.SIG_IGN)
    ended = threading.Event()
    if arguments.follow:
        watch = (ended, os.getppid(), arguments.follow)
        threading.Thread(target=_watch, args=watch, daemon=True).start()
    else:
        ended.set()
    try:
        follow(arguments.run_dir, ended)
    except A3POError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return EXIT_DONE


def follow(run_dir: Path, ended: threading.Event) -> None:
    """Mirror what is there and what comes, until the run has ended and all of it is mirrored."""
    files = {prefix: run_dir / prefix / METRICS for prefix in (f"{WARM_START}/", "")}
    kept = run_dir / WANDB / SENT
    sent: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {"id": secrets.token_hex(4)}
    run, online = start(run_dir, sent["id"])
    # `wandb sync` takes a file for a whole run: each begins at the beginning, so that the latest has everything.
    read = dict(sent) if online else {}
    known: set[str] = set()
    last, said = False, ""
    while not last:
        last = ended.wait(POLL_S)
        for prefix, file in files.items():
            rows, read[prefix] = new_rows(file, read.get(prefix, 0))
            for row in rows:
                values = numbers(row, prefix)
                for name in values.keys() - known:
                    run.define_metric(name, step_metric=f"{prefix}step")
                known |= values.keys()
                run.log(values)
        if (now := json.dumps(read if online else sent)) != said:
            write_aside(kept, now)
            said = now
    run.finish()


def start(run_dir: Path, run_id: str) -> tuple[Any, bool]:
    """The W&B run, with the whole configuration, and whether it is online: not where there is no way to the server."""
    file = run_dir / "config.yaml"
    config: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    section = config.get("trainer", {}).get(WANDB)
    if section is None:
        raise InputError(
            f"{file} has no section trainer.wandb, which names the project to file the run under."
        )
    set_default("WANDB_INIT_TIMEOUT", INIT_S)
    wandb: Any = importlib.import_module(WANDB)

    def init(mode: str) -> Any:
        return wandb.init(
            project=section["project"],
            entity=section.get("entity"),
            name=run_dir.resolve().name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            dir=run_dir,
            config=config,
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )

    try:
        mode = section.get("mode", "online")
        return init(mode), mode == "online"
    except wandb.Error as error:
        _say(
            f"Weights & Biases cannot be had ({str(error).splitlines()[0]}): the numbers are kept in "
            f"{run_dir / WANDB}, for `wandb sync`, and sent at the next attempt"
        )
        wandb.teardown()  # or its service would still hold the run
        return init("offline"), False


def new_rows(file: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole rows behind `offset`, and where the next will begin."""
    if not file.is_file():
        return [], offset
    with file.open("rb") as opened:
        opened.seek(offset)
        content = opened.read()
    whole = content[: content.rfind(b"\n") + 1]
    return list(_rows(whole)), offset + len(whole)


def numbers(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """What of a row has a curve."""
    return {
        prefix + name: value
        for name, value in plain(row).items()
        if isinstance(value, int | float) and name not in NO_NUMBERS
    }


def _rows(lines: bytes) -> Iterator[dict[str, Any]]:
    for line in lines.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            yield row


def _watch(ended: threading.Event, parent: int, finish_s: float) -> None:
    """Notice the end of the run, and see to it that this process does not outlive it for long."""
    while sys.stdin.buffer.read(1):
        pass
    ended.set()
    since = time.monotonic()
    while time.monotonic() - since < (finish_s if os.getppid() == parent else ORPHANED_S):
        time.sleep(0.1)
    os._exit(1)


def _say(line: str) -> None:
    """To the run, which makes it a warning; to a person where there is none."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
