"""The machine that a number was measured on: its description, and one core of it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from nonn.core.errors import UserError

#: Instruction sets of x86 that networks compute with, and Linux's names of them: processors of one name differ in them.
EXTENSIONS = {"AVX2": "avx2", "AVX-512": "avx512f", "VNNI": "avx512_vnni", "bfloat16": "avx512_bf16"}


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
        cpu = describe_cpu(info.read_text(encoding="utf-8", errors="replace")) or cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "onnxruntime": _version("onnxruntime"),
        "torch": _version("torch"),
    }


def describe_cpu(cpuinfo: str) -> str | None:
    """The model of the first processor in Linux's /proc/cpuinfo, and its instruction sets that decide speed."""
    fields = dict(re.findall(r"^(model name|flags)\s*:\s*(.*?)\s*$", cpuinfo.split("\n\n", 1)[0], flags=re.MULTILINE))
    flags = fields.get("flags", "").split()
    extensions = ", ".join(name for name, flag in EXTENSIONS.items() if flag in flags)
    model = fields.get("model name")
    return f"{model} with {extensions}" if model and extensions else model


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # not for help, which is instant

    try:
        return version(package)
    except PackageNotFoundError:  # torch, on a device
        return None
