"""Processes of commands that tests start, watch and end."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator, Sequence

from clusters import PATIENCE


@contextlib.contextmanager
def running(command: Sequence[str], **options) -> Iterator[subprocess.Popen]:
    """A process, with the options of `Popen`; it ends with the block, or where a test waits for it too long."""
    with subprocess.Popen(command, **options) as process:
        timer = threading.Timer(3 * PATIENCE, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()
