"""Where a vLLM server may be: one launched on this machine, or one that somebody else runs at a URL.

A place opens to a Server that answers and is suitable, however often the one before has failed: a launched one is
started anew, another is waited for. What a server does in between is `fleet.py`'s business.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_a3po.environment import LOCALHOST, child_environment
from megatron_a3po.rollout.vllm.server import Server
from megatron_a3po.rollout.vllm.wire import BACKEND, STAGING, ServerError, Unreachable

logger = logging.getLogger(__name__)

PLUGIN = Path(__file__).parent / "plugin"
POLL_S = 0.5
STOP_S = 5.0
LAST_LINES = 15
UNLABELLED = "default"
# Of the GNU C library: memory that is free again is kept. Otherwise each update on a CPU fetches that of a model anew
# from the system, page by page, which takes longer than to fill it.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_ARENA_MAX": "1",  # for all threads
}


class Place(Protocol):
    """`trouble`: why it does not answer yet, while it is waited for."""

    trouble: str

    async def open(self) -> Server:
        """A server that answers. Unreachable where none does in time, ServerError where none ever will."""
        ...

    def check(self) -> None:
        """ServerError where it is known to be gone, whatever it answers."""
        ...

    async def close(self) -> None: ...


class GivenPlace:
    """A server that is not ours to start or stop."""

    def __init__(self, url: str, connect: Callable[[str], Server], timeout_s: float) -> None:
        self._url = url
        self._connect = connect
        self._timeout_s = timeout_s
        self._server: Server | None = None
        self.trouble = ""

    def __str__(self) -> str:
        return self._url

    async def open(self) -> Server:
        failed_in_an_update = self._server is not None and self._server.is_broken
        await self.close()
        self._server = self._connect(self._url)
        await _wait_until_healthy(self, self._server, self._timeout_s, is_given=True)
        if await self._server.is_open():
            logger.warning(
                "the control routes of the vLLM server %s answer without a token: whoever reaches it can change its "
                "weights; start it with --middleware a3po_vllm.access.BearerToken (docs/vllm.md)",
                self._url,
            )
        if failed_in_an_update and await self._server.label() != UNLABELLED:
            self._server.is_broken = True
            raise Unreachable("it failed while it took new weights, so that it has to be started again")
        return self._server

    def check(self) -> None:
        pass

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()


@dataclass(frozen=True)
class Launch:
    """What a server is started with: one launched here, or by its recipe elsewhere. gpu: of one launched here."""

    python: str
    model_dir: Path
    dtype: str
    max_tokens: int
    max_samples: int
    seed: int
    num_threads: int
    token_file: Path
    timeout_s: float
    on_cpu: bool
    gpu: str | None = None

    def command(self, port: int) -> list[str]:
        return [self.python, "-m", "a3po_vllm", "--host", LOCALHOST, "--port", str(port), *self.arguments()]

    def arguments(self) -> list[str]:
        """The weights come with the first update, so that none are read here: a run may start from random ones."""
        arguments = {
            "--model": str(self.model_dir.resolve()),
            "--load-format": "dummy",
            "--dtype": self.dtype,
            "--max-model-len": str(self.max_tokens),
            "--max-num-seqs": str(self.max_samples),
            "--seed": str(self.seed % 2**31),
            "--logprobs-mode": "processed_logprobs",
            "--generation-config": "vllm",
            "--weight-transfer-config": f'{{"backend": "{BACKEND}"}}',
            "--worker-extension-cls": STAGING,
            "--middleware": "a3po_vllm.access.BearerToken",
        }
        flags = ["--enable-scale-out", "--skip-tokenizer-init", "--enable-prefix-caching"]
        if self.on_cpu:
            flags.append("--enforce-eager")
        pairs = [part for pair in arguments.items() for part in pair]
        return [*pairs, *flags]

    def environment(self) -> dict[str, str]:
        return child_environment(**self.variables())

    def variables(self) -> dict[str, str]:
        """Its interpreter is another than ours, so it finds the plugin on the path and nothing else."""
        changes = {
            "PYTHONPATH": str(PLUGIN),
            "A3PO_VLLM_LAUNCHED": "1",
            "A3PO_VLLM_TOKEN_FILE": str(self.token_file.resolve()),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(self.num_threads),
        }
        if self.gpu is not None:
            changes["CUDA_VISIBLE_DEVICES"] = self.gpu
        if self.on_cpu:
            changes |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | KEEP_MEMORY
        return changes


class LaunchedPlace:
    """A server on this machine, ended by its process id and with us. Its processes are a session of their own, so
    that a ctrl-C is the trainer's alone. Open it from the thread that lives as long as the process."""

    def __init__(self, launch: Launch, log: Path, connect: Callable[[str], Server]) -> None:
        self._launch = launch
        self._log = log
        self._connect = connect
        self._process: subprocess.Popen[bytes] | None = None
        self._server: Server | None = None
        self.trouble = ""

    def __str__(self) -> str:
        return f"the server of {self._log}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def open(self) -> Server:
        await self.close()
        port = _free_port()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._launch.command(port),
                env=self._launch.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        logger.info("vLLM server: pid %d, port %d, log %s", self._process.pid, port, self._log)
        self._server = self._connect(f"http://{LOCALHOST}:{port}")
        await _wait_until_healthy(self, self._server, self._launch.timeout_s)
        return self._server

    def check(self) -> None:
        if self._process is not None and (code := self._process.poll()) is not None:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
            end = "\n".join(lines)
            raise ServerError(f"it ended with exit code {code}; the end of {self._log}:\n{end}")

    async def close(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(_end, self._process)
            self._process = None
        if self._server is not None:
            await self._server.close()
            self._server = None


def new_token_file(file: Path) -> str:
    """A token for this run, in a file that its owner alone can read."""
    token = secrets.token_urlsafe(32)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    with os.fdopen(
        os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii"
    ) as opened:
        opened.write(token)
    return token


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The whole session: vLLM's engine is a process of its own."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.terminate()
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


async def _wait_until_healthy(
    place: Place, server: Server, timeout_s: float, *, is_given: bool = False
) -> None:
    deadline = time.monotonic() + timeout_s
    place.trouble = ""
    while True:
        place.check()
        try:
            await server.check_health()
        except ServerError as error:
            if is_given and not place.trouble:  # one that we launch takes its time
                logger.warning("waiting for the vLLM server %s: %s", place, error)
            place.trouble = str(error)
            if time.monotonic() > deadline:
                raise Unreachable(
                    f"it did not answer within {timeout_s:g} s (rollout.server_timeout_s): {error}"
                ) from error
        else:
            place.trouble = ""
            return
        await asyncio.sleep(POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return probe.getsockname()[1]
