"""The energy that an inference takes on a board, modelled from the figures of the catalogue, not measured:

    E = (P_active - P_idle) · t_compute + P_idle · t_idle + bits · E_bit

The first term is what computing adds. The second is what the device draws anyway, for as long as that is counted. The
third is what its radio spends on the bytes it sends and receives. Where a constant is only known as a range, so is the
energy.

A multiply-accumulate has its price in each precision, the power of the board over its speed in that precision. Power is
known of one precision at most, so a board is taken to draw the same in both.
"""

from __future__ import annotations

from nonn.core.boards import Board, Range, all_boards

#: Joules a bit of a Bluetooth Low Energy class radio, from the best to the worst published.
RADIO_J_PER_BIT = (10e-9, 50e-9)


def most_frugal(weight_bytes: float, activation_bytes: float, precision: str) -> Board | None:
    """Of the boards that hold a model, the one on which it takes least energy, at the catalogue's speed in a precision.

    Energy is taken at the upper bound of the power, idle draw included. None if no board of known power and speed holds
    the model.
    """
    boards = (board.with_catalogue_speed(precision) for board in all_boards().values() if board.active_w)
    candidates = [board for board in boards if board.seconds_per_mac and board.holds(weight_bytes, activation_bytes)]
    return min(candidates, key=lambda board: board.active_w.high * board.seconds_per_mac) if candidates else None  # type: ignore[union-attr,operator]


def compute_seconds(board: Board, macs: float, measured_s: float, slowdown: float) -> float:
    """Seconds of computing on a board: from its multiply-accumulates, or the measured time times `slowdown`."""
    return macs * board.seconds_per_mac if board.seconds_per_mac else measured_s * slowdown


def inference_energy(board: Board, compute_s: float, idle_s: float, wire_bytes: float) -> Range:
    """Joules of one device for one image, on a board whose `active_w` is known.

    It computes for `compute_s` seconds, and sends and receives `wire_bytes`. What it would draw anyway is counted for
    `idle_s` seconds: 0 for what the image adds alone, `compute_s` for all that it draws while it computes, or the time
    from the image to its answer.
    """
    assert board.active_w is not None, "energy asks for power"
    base = board.idle_w * idle_s
    bounds = zip((board.active_w.low, board.active_w.high), RADIO_J_PER_BIT, strict=True)
    return Range(*((watts - board.idle_w) * compute_s + base + 8 * wire_bytes * bit_j for watts, bit_j in bounds))
