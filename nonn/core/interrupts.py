"""What a process does on SIGINT, SIGTERM and SIGHUP while a block runs."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def tidied_up() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that it can stop its processes and delete its files.

    The block's `KeyboardInterrupt` holds the number of the signal. A second such signal changes nothing, since a
    terminal may send SIGHUP twice; Ctrl-C still interrupts. Outside of the main thread, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    got: list[int] = []

    def stop(number: int, _: object) -> None:
        got.append(number)
        if len(got) > 1:
            return
        if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL, signal.SIG_IGN, None):
            raise KeyboardInterrupt(number)
        signal.raise_signal(signal.SIGINT)  # asyncio's: an exception from here would end only whichever task runs

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    with _handled(numbers, stop):
        try:
            yield
        except KeyboardInterrupt as error:
            if got and not error.args:
                raise KeyboardInterrupt(got[0]) from None
            raise


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C, SIGTERM and SIGHUP while the block runs, also in what it starts."""
    with _handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled(numbers: Iterable[int], handler: Any) -> Iterator[None]:
    """Handle these signals by `handler` while the block runs."""
    former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let processes started in the block be stopped by SIGINT, even if this process ignores it because a shell started
    it in the background.

    Within `undisturbed`, nothing is changed.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: None)  # unlike what is ignored, a handler is not inherited
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
