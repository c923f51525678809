"""Stage `benchmark`: what each exported model costs on one pinned core in ONNX Runtime.

Every model runs alone in a fresh process: latency of one image and memory of the session are
measured, parameters, weight bytes, peak activations and multiply-accumulates are counted. Times
differ from run to run: only the bytes of this stage, of `distributed`, and of `figures`, which shows both, do.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nonn.errors import UserError
from nonn.files import read_json, write_json
from nonn.params import Benchmark, Params
from nonn.paths import Paths
from nonn.progress import track


def measure_models(models: dict[str, Path], params: Benchmark) -> dict[str, dict]:
    """Measure ONNX models, each alone in a fresh process pinned to one core.

    Every model is measured in several windows, and the models take turns. What counts is its least
    disturbed window, the one with the smallest median: other work on the machine, or on the host of
    a virtual one, only ever adds to a latency.

    Parameters
    ----------
    models : dict
        Name to file.
    params : Benchmark

    Returns
    -------
    dict
        Name to ``latency_p50_ms`` and ``latency_p99_ms`` of the least disturbed window and the
        largest ``latency_p50_ms_worst`` of all; ``session_memory_kib``, the growth of the process's
        peak memory from opening the model to the last run; ``windows``, ``runs`` in each, and
        whether the process was ``pinned``.

    Raises
    ------
    UserError
        This machine has no such core.
    """
    turns = [name for _ in range(params.windows) for name in models]
    windows: dict[str, list[dict]] = {name: [] for name in models}
    for name in track(turns, "benchmark"):
        # `spawn`, because a forked process would inherit this one's memory and threads.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            windows[name].append(pool.submit(_measure_window, models[name], params.model_dump()).result())
    return {
        name: {
            **min(measured, key=lambda window: window["latency_p50_ms"]),
            "latency_p50_ms_worst": max(window["latency_p50_ms"] for window in measured),
            "windows": params.windows,
            "runs": params.runs,
            "pinned": hasattr(os, "sched_setaffinity"),
        }
        for name, measured in windows.items()
    }


@contextlib.contextmanager
def pinned_to(core: int) -> Iterator[None]:
    """Keep this process on one core while the block runs, where the system can.

    Raises
    ------
    UserError
        This machine has no such core.
    """
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


def _measure_window(path: Path, params: dict) -> dict[str, float]:
    with pinned_to(params["core"]):
        return _measure_here(path, params)


def _measure_here(path: Path, params: dict) -> dict[str, float]:
    import numpy as np

    from nonn.runtime.session import open_session

    before = _peak_memory_kib(reset=True)
    session = open_session(path)
    spec = session.get_inputs()[0]
    dtype = np.uint8 if spec.type == "tensor(uint8)" else np.float32
    # Random pixels: the time of a convolution does not depend on what it sees.
    image = np.random.default_rng(0).integers(0, 256, spec.shape).astype(dtype)
    times = []
    for _ in range(params["warmup"] + params["runs"]):
        start = time.perf_counter_ns()
        session.run(None, {spec.name: image})
        times.append((time.perf_counter_ns() - start) / 1e6)
    measured = times[params["warmup"] :]
    return {
        "latency_p50_ms": float(np.percentile(measured, 50)),
        "latency_p99_ms": float(np.percentile(measured, 99)),
        "session_memory_kib": _peak_memory_kib() - before,
    }


def _peak_memory_kib(reset: bool = False) -> int:
    """Peak resident memory of this process; `reset` starts a new peak at what is resident now."""
    if not Path("/proc/self/status").exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def describe_system() -> dict:
    """The machine and the versions behind a measured number."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
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


def run(params: Params, paths: Paths, name: str) -> None:
    folder = paths.export(name)
    manifest = read_json(folder / "manifest.json")
    # A network's manifest lists its students; the solo manifest has one for each model.
    models = (
        {key: m["students"][0] for key, m in manifest.items()}
        if name == "solo"
        else {str(position): student for position, student in enumerate(manifest["students"])}
    )
    measured = measure_models({key: folder / entry["file"] for key, entry in models.items()}, params.benchmark)
    write_json(
        paths.benchmark(name),
        {
            "system": describe_system(),
            "models": {key: entry["cost"] | measured[key] for key, entry in models.items()},
        },
    )
