"""The rollout process: `python -m megatron_a3po.rollout.process FD PARENT`, started by `client.RolloutClient`.

An interpreter of its own, so that generation and the training loop never share a GIL. Here is the plumbing only: a
thread reads the connection, the event loop runs the service and one task for each request, and whatever fails ends
the process with a last message that carries the traceback. It ends with its parent, and leaves signals to it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from megatron_a3po.errors import A3POError, FencedError, RewardError, ServersGone
from megatron_a3po.logs import set_up_logs
from megatron_a3po.rollout.messages import Answer, Failure, Request, Start, Stop

if TYPE_CHECKING:
    from megatron_a3po.rollout.service import RolloutService

logger = logging.getLogger("megatron_a3po.rollout.process")  # under -m, __name__ is __main__

PARENT_POLL_S = 1.0


class Stopped(Exception):
    """The trainer asked for the end, or is gone."""


def main() -> int:
    # A Slurm step or ctrl-C signals every process. The trainer decides when generation ends, a checkpoint needs it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    threading.Thread(target=_die_with, args=(int(sys.argv[2]),), daemon=True).start()
    # Seconds go into these, in which the parent may end.
    import torch
    from transformers.utils.logging import disable_progress_bar

    from megatron_a3po.rollout.service import RolloutService

    try:
        start = connection.recv()
    except (EOFError, OSError):
        return 0
    set_up_logs(start.run_dir, "rollout", speaks=False)
    disable_progress_bar()  # of loading a model: the log is no terminal
    torch.set_num_threads(start.config.rollout.num_threads)
    try:
        asyncio.run(_serve(connection, start, RolloutService))
    except BaseException as error:  # the process boundary
        return _end(connection, error)
    raise AssertionError("serving ends by an exception")


async def _serve(connection: Connection, start: Start, make: "type[RolloutService]") -> None:
    inbox: asyncio.Queue[Request | Stop] = asyncio.Queue()
    sending = asyncio.Lock()
    service = make(start)
    logger.info("pid %d, version %d from %s", os.getpid(), start.first_version, start.weights_dir)

    async def answer(request: Request) -> None:
        try:
            value = await getattr(service, request.method)(*request.arguments)
        except ServersGone as error:  # an answer like others: a checkpoint still needs this process
            value = error
        async with (
            sending
        ):  # a batch may fill the socket; the event loop must not wait for the trainer to read it
            await asyncio.to_thread(connection.send, Answer(request.number, value))

    threading.Thread(target=_read, args=(connection, inbox, asyncio.get_running_loop()), daemon=True).start()
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(service.run(), name="run")
            tasks.create_task(service.engine_failed(), name="engine")
            while isinstance(request := await inbox.get(), Request):
                tasks.create_task(answer(request), name=request.method)
            raise Stopped
    finally:
        await service.close()


def _read(
    connection: Connection, inbox: "asyncio.Queue[Request | Stop]", loop: asyncio.AbstractEventLoop
) -> None:
    message = None
    while not isinstance(message, Stop):
        try:
            message = connection.recv()
        except (EOFError, OSError):
            message = Stop()
        try:
            loop.call_soon_threadsafe(inbox.put_nowait, message)
        except RuntimeError:  # the loop is closed already
            return


def _end(connection: Connection, error: BaseException) -> int:
    error = _cause(error)
    if isinstance(error, Stopped | BrokenPipeError | ConnectionResetError):
        logger.info("stopped")
        return 0
    trace = "".join(traceback.format_exception(error))
    logger.critical("ended by an error:\n%s", trace)
    # A reward's own traceback is in its error already, and what is a sentence needs none.
    known = isinstance(error, A3POError) and (
        isinstance(error, RewardError | FencedError) or error.exit_code == 2
    )
    with contextlib.suppress(OSError):
        connection.send(Failure(type(error).__name__, str(error) if known else trace))
    return 1


def _cause(error: BaseException) -> BaseException:
    """Out of nested groups the first error; tasks that were merely cancelled are in none of them."""
    while isinstance(error, BaseExceptionGroup):
        error = next((one for one in error.exceptions if not isinstance(one, Stopped)), error.exceptions[0])
    return error


def _die_with(parent: int) -> None:
    """The closed connection usually says it first; but a process that the trainer forked may still hold it open."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(1)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(
        code
    )  # nothing is left to clean up, and taking the interpreter down with torch in it costs seconds
