"""Measurements that the design rests on, for whoever wants to see them: ``nonn bench WHAT``."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor

from nonn.graph import activation_hub_graph, naive_activation_hub_graph

REPEATS = 3


def best_time(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Least seconds of several runs: what the work needs when nothing disturbs it."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def bench_graph() -> None:
    """Time the graph of 256 and of 2,048 filters over 5,000 images, and the double loop it replaces."""

    def activity(n_images: int, n_filters: int) -> Tensor:
        return torch.rand(n_images, n_filters, generator=torch.Generator().manual_seed(0))

    few = activity(20, 256)
    naive = best_time(lambda: naive_activation_hub_graph(few)) / len(few) * 5000
    print(f"double loop, 256 filters, 5,000 images: {naive:.1f} s (measured on {len(few)} images, scaled)")
    for n_filters in (256, 2048):
        dense = activity(5000, n_filters)
        seconds = best_time(lambda dense=dense: activation_hub_graph(dense))
        line = f"vectorised, {n_filters} filters, 5,000 images: {seconds:.2f} s, {torch.get_num_threads()} threads"
        print(line + (f", {naive / seconds:.0f} times faster" if n_filters == 256 else ""))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process: {peak:.0f} MiB")


BENCHES = {"graph": bench_graph}
