"""Energy of one inference on one device, from published constants: modelled, not measured.

    E = (P_active - P_idle) · t_compute + P_idle · t_window + bits · E_bit

The first term is what computing adds, the second what the device draws anyway until the image is answered, the third
what its radio spends on the bytes it sends and receives. Where a constant is only known as a range, so is the energy.

References
----------
.. [1] MLPerf Tiny v1.1, closed division, NUCLEO-H7A3ZI-Q: https://mlcommons.org/benchmarks/inference-tiny/
.. [2] Raspberry Pi 3B: 1.4 W idle, 3.7 W under full load: https://www.pidramble.com/wiki/benchmarks/power-consumption
.. [3] Raspberry Pi 3B+: https://github.com/geerlingguy/sbc-reviews/issues/16
.. [4] Raspberry Pi 4B: https://github.com/geerlingguy/sbc-reviews/issues/4
"""

from __future__ import annotations

from dataclasses import dataclass

#: Joules a bit of a Bluetooth Low Energy class radio, from the best to the worst published.
RADIO_J_PER_BIT = (10e-9, 50e-9)


@dataclass(frozen=True)
class Range:
    """Lower and upper bound of a modelled quantity."""

    low: float
    high: float


@dataclass(frozen=True)
class Board:
    """Power and speed of a kind of device.

    Published figures are for all four cores of a Raspberry Pi: one core takes from a quarter of the difference to idle
    up to the whole of it. Of a device on which no latency can be measured here, the compute time is `seconds_per_mac`
    times the multiply-accumulates; otherwise it is the measured one, times a stated slowdown.
    """

    idle_w: float  # watts with nothing to do; 0 where the source gives none, and then left out
    active_w: Range  # watts with one core computing
    seconds_per_mac: float | None = None


def _one_core_of_four(idle_w: float, full_w: float) -> Range:
    return Range(idle_w + (full_w - idle_w) / 4, full_w)


#: Boards by the name that ``params.yaml`` gives them.
BOARDS = {
    # ResNet-8 of 12.5 million multiply-accumulates: 18.2 a second at 280 MHz and 7,615 µJ each [1]_, so 0.139 W.
    "cortex_m7": Board(0.0, Range(0.139, 0.139), seconds_per_mac=1 / (18.2 * 12.5e6)),
    "pi3b": Board(1.4, _one_core_of_four(1.4, 3.7)),
    "pi3b_plus": Board(3.1, _one_core_of_four(3.1, 5.6)),
    "pi4b": Board(1.6, _one_core_of_four(1.6, 5.0)),
}


def compute_seconds(board: Board, macs: float, measured_s: float, slowdown: float) -> float:
    """Seconds of computing on a board: from its multiply-accumulates, or the measured time times `slowdown`."""
    return macs * board.seconds_per_mac if board.seconds_per_mac else measured_s * slowdown


def inference_energy(board: Board, compute_s: float, window_s: float, wire_bytes: float, idle: bool) -> Range:
    """Joules of one device for one image.

    It computes for `compute_s` of the `window_s` seconds from the start of the image to its answer, and sends and
    receives `wire_bytes`. What it would draw anyway is counted if `idle`; without, only what the image adds.
    """
    base = board.idle_w * window_s if idle else 0.0
    bounds = zip((board.active_w.low, board.active_w.high), RADIO_J_PER_BIT, strict=True)
    return Range(*((watts - board.idle_w) * compute_s + base + 8 * wire_bytes * bit_j for watts, bit_j in bounds))
