"""`python -m a3po_vllm.registered RECIPE FOLDER NAME [-- ARGUMENT ...]`: a server that says where it is.

RECIPE says how servers of the run are started (`megatron_a3po/rollout/vllm/recipe.py` writes it); ARGUMENTs are added.
Once the server answers, FOLDER/NAME.url has its URL; before it ends the file is taken away, so that what is there is
alive or was killed. TERM, USR1, USR2 and ctrl-C end it well: it finishes what it was asked. It is started anew where it
dies, fails its health check, or is reported by NAME.failed. One server has a NAME: a later attempt under the same name
fences this one off. Nothing here imports vLLM or megatron_a3po: any Python of the server's environment will do.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DONE, NEEDS_PERSON = 0, 3
POLL_S, HEALTH_EVERY_S, ANSWER_S = 0.5, 10.0, 10.0
MAX_UNHEALTHY = 3  # checks in a row
MAX_BARREN = 3  # starts in a row that never answered
End = Literal["asked", "done", "fenced", "failed"]


@dataclass(frozen=True)
class Registration:
    """What this server says in FOLDER, and what is said to it there."""

    folder: Path
    name: str
    attempt: int

    def claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.is_fenced():
            self._write(".attempt", str(self.attempt))

    def is_fenced(self) -> bool:
        """Whether a later attempt has this name."""
        try:
            return int(self._file(".attempt").read_text()) > self.attempt
        except (OSError, ValueError):
            return False

    def enter(self, url: str) -> None:
        self._file(".failed").unlink(missing_ok=True)
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._write(".url", f"{url}\nattempt {self.attempt}, node {node}, pid {os.getpid()}\n")

    def is_entered(self, url: str) -> bool:
        """Not where somebody took the file away, or an attempt before left its own."""
        try:
            return self._file(".url").read_text().startswith(f"{url}\n")
        except OSError:
            return False

    def leave(self) -> None:
        if not self.is_fenced():
            self._file(".url").unlink(missing_ok=True)

    def is_reported(self) -> bool:
        return self._file(".failed").exists()

    def _file(self, suffix: str) -> Path:
        return self.folder / f"{self.name}{suffix}"

    def _write(self, suffix: str, text: str) -> None:
        aside = self._file(f"{suffix}.tmp-{self.attempt}")
        aside.write_text(text)
        aside.rename(self._file(suffix))


class Served:
    """One start of the server, and its process, which hears of its end from here alone."""

    def __init__(self, recipe: dict[str, Any], extra: Sequence[str], address: str, grace_s: float) -> None:
        self.address, self.port, self._grace_s = address, _free_port(address), grace_s
        self.url = f"http://{address}:{self.port}"
        # A variable that the task was given outlasts the recipe's: it is this machine's.
        environment = recipe["environment"] | dict(os.environ)
        token = Path(environment["A3PO_VLLM_TOKEN_FILE"]).read_text(encoding="ascii").strip()
        self._headers = {"Authorization": f"Bearer {token}"}
        place = ["--host", address, "--port", str(self.port), "--shutdown-timeout", str(round(grace_s))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "a3po_vllm", *recipe["arguments"], *place, *extra],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_leave_wishes_to_this_one,
        )

    def died(self) -> int | None:
        return self._process.poll()

    def answers(self) -> bool:
        connection = http.client.HTTPConnection(self.address, self.port, timeout=ANSWER_S)
        try:
            connection.request("GET", "/health", headers=self._headers)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def end(self) -> None:
        """The whole session: vLLM's engine is a process of its own."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.terminate()
            self._process.wait(self._grace_s + ANSWER_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def tend(own: Registration, served: Served, asked: threading.Event, until: Path | None) -> tuple[End, bool]:
    """Watch one start to its end; how it ended, and whether it ever answered."""
    answered, unhealthy, next_check = False, 0, 0.0
    while True:
        if asked.is_set():
            return "asked", answered
        if until is not None and until.exists():
            return "done", answered
        if own.is_fenced():
            return "fenced", answered
        if (code := served.died()) is not None:
            say(f"the server ended with code {code}")
            return "failed", answered
        if answered and own.is_reported():
            say("the run has no use for it any more as it is")
            return "failed", answered
        if time.monotonic() >= next_check:
            if served.answers():
                unhealthy = 0
                answered = True
                if not own.is_entered(served.url):
                    own.enter(served.url)
                    say(f"serves at {served.url}")
            elif answered and (unhealthy := unhealthy + 1) >= MAX_UNHEALTHY:
                say(f"the server failed {unhealthy} health checks in a row")
                return "failed", answered
            next_check = time.monotonic() + (HEALTH_EVERY_S if answered and not unhealthy else POLL_S)
        asked.wait(POLL_S)


def serve(own: Registration, arguments: argparse.Namespace, asked: threading.Event) -> int:
    """Start after start, until it is asked to end or is of no use."""
    own.claim()
    barren = 0
    while barren < MAX_BARREN:
        while not arguments.recipe.is_file() and not asked.is_set():
            asked.wait(POLL_S)  # the run has not begun yet
        if asked.is_set() or own.is_fenced():
            break
        served = Served(
            json.loads(arguments.recipe.read_text()), arguments.extra, arguments.address, arguments.grace
        )
        try:
            end, answered = tend(own, served, asked, arguments.until)
        finally:
            own.leave()
            served.end()
        barren = 0 if answered else barren + 1
        if end in ("asked", "done"):
            say("ended, as it was asked to" if end == "asked" else "ended: the run is done")
            return DONE
        if end == "failed" and barren < MAX_BARREN:
            say("starts anew")
    if own.is_fenced():
        say(f"attempt {own.attempt} of {own.name} is fenced off: a later one serves under this name")
        return NEEDS_PERSON
    if asked.is_set():
        say("ended before it served")
        return DONE
    say(f"{MAX_BARREN} starts in a row never answered: needs a person; why is above")
    return NEEDS_PERSON


def main(argv: Sequence[str] | None = None) -> int:
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: asked.set())
    parser = argparse.ArgumentParser(prog="python -m a3po_vllm.registered")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--address", default="127.0.0.1", help="where others reach this machine, and listen")
    parser.add_argument("--attempt", type=int, default=1)
    parser.add_argument("--until", type=Path, help="end once this file is there")
    parser.add_argument("--grace", type=float, default=15.0, metavar="SECONDS", help="for requests under way")
    parser.epilog = "What comes after -- are arguments of vLLM's server."
    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:split])
    arguments.extra = given[split + 1 :]
    return serve(Registration(arguments.folder, arguments.name, arguments.attempt), arguments, asked)


def say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%FT%T')} {line}\n")
    sys.stdout.flush()


def _leave_wishes_to_this_one() -> None:
    """Slurm signals all processes of a task."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
