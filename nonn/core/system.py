"""The machine that a number was measured on, and what it may do to a process."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nonn.core.errors import UserError


@contextlib.contextmanager
def tidied_up() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the block as Ctrl-C does, so that what it has begun is ended and deleted."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    former = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def pinned_to(core: int) -> Iterator[None]:
    """Keep this process on one core while the block runs, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    if core not in cores:
        raise UserError(f"params.yaml: benchmark.core: this machine has the cores {sorted(cores)}; choose one.")
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def describe_system() -> dict:
    """The machine and the versions behind a measured number."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next(names, f":{cpu}").split(":", 1)[1].strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "onnxruntime": _version("onnxruntime"),
        "torch": _version("torch"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # torch, on a device
        return None
