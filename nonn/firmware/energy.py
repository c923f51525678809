"""The energy of an inference on a microcontroller, projected from measurements of MLPerf Tiny.

The benchmark measured a ResNet-8 of 12.5 million multiply-accumulates (MACs) in int8, whose energy over its MACs is
taken for that of a student's: https://github.com/mlcommons/tiny_results_v1.1/blob/main/closed/Krai/results/README.md,
X-CUBE-AI 8.0.0. A student's convolutions, kernels and memory differ from that network's, and so may its board.
"""

from __future__ import annotations

from nonn.core.boards import find_board

#: The board of a Cortex-M7 that was measured, whose figures stand in the catalogue.
MEASURED_M7 = "cortex_m7"
#: Nanojoules a MAC of a Cortex-M4: 17,315 µJ an inference on a NUCLEO-L4R5ZI.
MEASURED_M4 = 17315.114 / 12.5e3


def nanojoules_per_mac(core: str) -> float | None:
    """Of the measured microcontroller with this core; None where a project's catalogue states no power for it."""
    if core == "cortex-m4":
        return MEASURED_M4
    board = find_board(MEASURED_M7)
    speed = board.mmacs["int8"]
    return 1e3 * board.active_w.high / speed if board.active_w and speed else None
