"""The life of a process that serves something: it says when it listens, and ends with the process that started it.

The counterpart is `nonn.runtime.processes`. Nothing large is imported, so that a child that only echoes starts fast.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from nonn.core.errors import UserError
from nonn.core.progress import log

#: Of Linux's prctl(2): the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1


def continue_after_parent() -> None:
    """Have the kernel wake this process when its parent dies, in case it is stopped then (SIGSTOP); Linux only."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)


def ending_with_parent(command: Sequence[str]) -> list[str]:
    """A command whose process the kernel kills when its parent dies; on other systems than Linux, as it is.

    The process asks for this itself before it becomes the command: a `preexec_fn` would fork, and what gRPC does after
    a fork may end the child.
    """
    if sys.platform != "linux":
        return list(command)
    code = (
        f"import ctypes, os, sys; ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, 9); "
        f"os.getppid() == {os.getpid()} or sys.exit(); "  # it may have died before
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-S", "-c", code, *command]


def told_to_stop(attached: bool, *more: signal.Signals) -> asyncio.Event:
    """An event that SIGINT, SIGTERM and `more` signals set, and, if `attached`, standard input when it closes.

    Signals of `more` that this process was started to ignore stay ignored.
    """
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, *more):
        if number not in more or signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
            loop.add_signal_handler(number, stopped.set)

    def closed() -> None:
        loop.remove_reader(sys.stdin)  # it stays readable, and would wake the loop for ever
        stopped.set()

    if attached:
        try:
            loop.add_reader(sys.stdin, closed)  # nothing is ever sent: readable means closed
        except (PermissionError, ValueError):  # a file, or none at all
            raise UserError("--attached: standard input is no pipe that could close; leave it out") from None
        continue_after_parent()
    return stopped


def announce(what: str, address: str, port: int, is_encrypted: bool = False) -> None:
    """Say what listens and where; `nonn.runtime.processes` waits for this line."""
    log(f"{what} at {address.rpartition(':')[0]}:{port}, {'mutual TLS' if is_encrypted else 'plain text'}")
