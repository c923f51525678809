"""The machine that a number was measured on: its description, and one core of it."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from nonn.core.errors import UserError


@contextlib.contextmanager
def pinned_to(core: int) -> Iterator[None]:
    """Keep this process on one core while the block runs, if the system supports it."""
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


def usable_cores() -> int:
    """How many cores this process may use, in a container or a job of a cluster perhaps a few of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    from importlib.metadata import PackageNotFoundError, version  # not for help, which is instant

    try:
        return version(package)
    except PackageNotFoundError:  # torch, on a device
        return None
