"""What devices do for an image, by hand: for tests that compose latencies and energies of it."""

import os

import numpy as np

from nonn.core.params import DistributedParams
from nonn.testbed.composed import Workload

CORE = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0

#: Two devices, two rounds.
WORKLOAD = Workload(
    seconds=np.array([[0.010, 0.020], [0.040, 0.035]]),
    macs=np.array([[10e6, 30e6], [50e6, 20e6]]),
    memory_bytes=1000,
    payload=[{("0", "1"): 1000, ("1", "0"): 1000}],
    image_bytes=2000,
    answer_bytes=[500, 500],
)


def on_a_pi(params: DistributedParams) -> DistributedParams:
    """The parameters of the stage: Raspberry Pi at a third of this machine's speed."""
    changes = {"board": "pi3b", "slowdown": 3.0, "links": ["ethernet100"], "images": 2, "seconds": 0.001}
    return params.model_copy(update=changes | {"reference": None})


def student_row(position: int) -> dict:
    """What the stage `benchmark` writes of a student."""
    times = {"latency_p50_ms": 1.0 + position, "macs": 100 * (position + 1)}
    return times | {"weight_bytes": 1000 - 400 * position, "peak_activation_bytes": 500 * position}
