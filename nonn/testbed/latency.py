"""What each exported model costs on one pinned core in ONNX Runtime.

Every model runs alone in a fresh process: latency of one image and memory of the session are
measured, parameters, weight bytes, peak activations and multiply-accumulates are counted. Times
differ from run to run: only the bytes of this stage, of `distributed`, and of `figures`, which shows both, do.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from nonn.core.params import Benchmark
from nonn.core.progress import track
from nonn.core.system import pinned_to


def measure_models(models: dict[str, Path], params: Benchmark) -> dict[str, dict]:
    """Measure ONNX models, each alone in a fresh process pinned to one core.

    Every model is measured in several windows, and the models take turns. What counts is its least
    disturbed window, the one with the smallest median: other work on the machine, or on the host of
    a virtual one, only ever adds to a latency.

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


def _measure_window(path: Path, params: dict) -> dict[str, float]:
    import numpy as np

    from nonn.runtime.session import open_session

    with pinned_to(params["core"]):
        reset_peak_memory()
        before = memory_kib("VmHWM")
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
        memory = memory_kib("VmHWM") - before
    measured = times[params["warmup"] :]
    return {
        "latency_p50_ms": float(np.percentile(measured, 50)),
        "latency_p99_ms": float(np.percentile(measured, 99)),
        "session_memory_kib": memory,
    }


def reset_peak_memory() -> None:
    """Let a new peak start at what is resident now; Linux only."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def memory_kib(kind: str) -> int:
    """Memory of this process, resident (VmRSS) or at its peak (VmHWM), where the system tells it as Linux does."""
    if not (status := Path("/proc/self/status")).exists():
        return 0
    return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(kind)))
