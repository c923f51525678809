"""The costs of each exported model on one pinned core in ONNX Runtime.

Every model runs alone in a fresh process: latency of one image and memory of the session are
measured, parameters, weight bytes, peak activations and multiply-accumulates are counted. How many times
longer the teacher takes is measured with both in one process, in turns, so that a disturbance meets both, and in
processor time of the one thread that calculates: the teacher, which runs longer, is interrupted more often. Times
differ from run to run: only the bytes of this stage, of `distributed`, and of `figures`, which shows both, do.

References
----------
.. [1] A. Georges, D. Buytaert, L. Eeckhout, "Statistically rigorous Java performance evaluation", OOPSLA 2007,
   section 3.2: independent runs of a process are the sample, since times within one depend on each other.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nonn.core.params import BenchmarkParams
from nonn.core.progress import track
from nonn.core.system import pinned_to

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CONFIDENCE = 0.95
#: Pairs that run before any is timed.
WARMUP_PAIRS = 5


def measure_models(models: dict[str, Path], params: BenchmarkParams) -> dict[str, dict]:
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
    with _fresh_processes() as pool:
        for name in track(turns, "benchmark"):
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


def measure_ratios(teacher: Path, models: dict[str, Path], params: BenchmarkParams) -> dict[str, dict]:
    """Measure how many times longer the teacher takes than each model, in interleaved pairs on one core.

    Returns
    -------
    dict
        Name to what `summarise_ratios` says of it.

    Raises
    ------
    UserError
        This machine has no such core.
    """
    windows = []
    with _fresh_processes() as pool:
        for _ in track(range(params.windows), "teacher in turns"):
            windows.append(pool.submit(_measure_pairs, teacher, models, params.model_dump()).result())
    return {name: summarise_ratios([window[name] for window in windows]) for name in models}


def summarise_ratios(windows: list[list[float]]) -> dict[str, float | int | None]:
    """Sum up the ratios of the pairs of each window.

    A window counts by its median; ``latency_ratio`` is the geometric mean of the windows, and ``latency_ratio_low`` to
    ``latency_ratio_high`` its `CONFIDENCE` interval by Student's t over them, on a logarithmic scale [1]_. A single
    window tells no interval: both are None. ``latency_pairs`` counts all pairs.
    """
    from scipy import stats

    medians = np.log([np.median(ratios) for ratios in windows])
    low = high = None
    if len(windows) > 1:
        low, high = (float(np.exp(end)) for end in stats.ttest_1samp(medians, 0).confidence_interval(CONFIDENCE))
    return {
        "latency_ratio": float(np.exp(medians.mean())),
        "latency_ratio_low": low,
        "latency_ratio_high": high,
        "latency_pairs": sum(map(len, windows)),
    }


def _fresh_processes() -> ProcessPoolExecutor:
    """A pool that runs each call in a process of its own."""
    # `spawn`, because a forked process would inherit this one's memory and threads.
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)


def _measure_pairs(teacher: Path, models: dict[str, Path], params: dict) -> dict[str, list[float]]:
    from nonn.runtime.session import open_session

    with pinned_to(params["core"]):
        slow = _Turn(open_session(teacher))
        quick = {name: _Turn(open_session(path)) for name, path in models.items()}
        ratios: dict[str, list[float]] = {name: [] for name in models}
        for pair in range(WARMUP_PAIRS + params["pairs"]):
            for name, turn in quick.items():
                ratio = slow.processor_ms() / turn.processor_ms()
                if pair >= WARMUP_PAIRS:
                    ratios[name].append(ratio)
    return ratios


class _Turn:
    """A model that takes its turn with one random image.

    Random pixels: the time of a convolution does not depend on what it sees.
    """

    def __init__(self, session: InferenceSession):
        spec = session.get_inputs()[0]
        dtype = np.uint8 if spec.type == "tensor(uint8)" else np.float32
        self.session, self.name = session, spec.name
        self.image = np.random.default_rng(0).integers(0, 256, spec.shape).astype(dtype)

    def run_ms(self, clock: Callable[[], int] = time.perf_counter_ns) -> float:
        start = clock()
        self.session.run(None, {self.name: self.image})
        return (clock() - start) / 1e6

    def processor_ms(self) -> float:
        """Of the second of two runs: the first brings back the weights that the other model drove from cache."""
        self.run_ms()
        return self.run_ms(time.thread_time_ns)


def _measure_window(path: Path, params: dict) -> dict[str, float]:
    from nonn.runtime.session import open_session

    with pinned_to(params["core"]):
        reset_peak_memory()
        before = memory_kib("VmHWM")
        model = _Turn(open_session(path))
        times = [model.run_ms() for _ in range(params["warmup"] + params["runs"])]
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
