"""Progress of long work: a bar on a terminal, a few log lines with the time left otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

#: Without a terminal, a line is logged after this share of the work, but not before so many seconds.
LOG_EVERY, LOG_SECONDS = 0.1, 5.0


def track(items: Iterable[Item], label: str, total: int | None = None, done: int = 0) -> Iterator[Item]:
    """Iterate over `items` and report progress with an estimate of the time left.

    `total` is their number, needed where they have no length; `done` is how many further items were finished earlier (a
    resumed training).
    """
    remaining = len(items) if isinstance(items, Sized) else total
    assert remaining is not None, "say how many items there are"
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=remaining + done, initial=done, leave=False)
        return
    start = time.monotonic()
    if done:
        log(f"{label}: resumed at {done} of {remaining + done}")
    logged, logged_at = 0.0, start
    for count, item in enumerate(items, start=1):
        yield item
        share = count / remaining
        now = time.monotonic()
        if (share >= logged + LOG_EVERY and now >= logged_at + LOG_SECONDS) or count == remaining:
            logged, logged_at = share, now
            elapsed = now - start
            log(f"{label}: {done + count} of {remaining + done}, about {elapsed / share - elapsed:.0f} s left")


def log(message: str) -> None:
    """Write one line to standard error.

    Text and line feed are written at once: on an unbuffered stream `print` writes them separately, and gRPC may write a
    line between the two, which `nonn.runtime.logs` would see as one with this and might drop.
    """
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
