"""Energy of an inference, by hand."""

from fractions import Fraction

import pytest

from nonn.core.boards import RADIO_J_PER_BIT, Board, Range, compute_seconds, inference_energy, shipped_boards

BOARDS = shipped_boards()
WITH_POWER = {name: board for name, board in BOARDS.items() if board.active_w}
#: 2 W idle and 4 to 6 W with one core busy.
BOARD = Board(2.0, Range(4.0, 6.0))


def as_pair(energy: Range) -> tuple[float, float]:
    return energy.low, energy.high


@pytest.mark.parametrize(
    ("compute_s", "window_s", "wire_bytes", "idle", "expected"),
    [
        # (4 - 2) and (6 - 2) W for half a second.
        (0.5, 2, 0, False, (1, 2)),
        # And 2 W for the two seconds until the answer.
        (0.5, 2, 0, True, (5, 6)),
        # A million bytes are 8 million bits, of 10 to 50 nJ.
        (0, 2, 1e6, False, (Fraction(8, 100), Fraction(4, 10))),
        (0.5, 2, 1e6, True, (5 + Fraction(8, 100), 6 + Fraction(4, 10))),
        (0, 0, 0, True, (0, 0)),
    ],
)
def test_energy_by_hand(compute_s, window_s, wire_bytes, idle, expected):
    energy = inference_energy(BOARD, compute_s, window_s, wire_bytes, idle)
    assert as_pair(energy) == pytest.approx(tuple(map(float, expected)))


def test_one_core_takes_from_a_quarter_of_the_difference_to_all_of_it():
    # 1.4 W idle, 3.7 W with four cores: 1.4 + 2.3 / 4.
    assert as_pair(BOARDS["pi3b"].active_w) == pytest.approx((float(Fraction(79, 40)), 3.7))
    energy = inference_energy(BOARDS["pi3b"], 0.1, 1.0, 0, idle=False)
    assert as_pair(energy) == pytest.approx((0.0575, 0.23))


def test_a_microcontroller_by_its_source():
    # 12.5 million multiply-accumulates, 18.2 times a second, in 7,615 µJ.
    board = BOARDS["cortex_m7"]
    seconds = compute_seconds(board, 12.5e6, measured_s=123.0, slowdown=7.0)
    assert seconds == pytest.approx(float(1 / Fraction(182, 10)))
    energy = inference_energy(board, seconds, seconds, 0, idle=True)  # idle draw is not known, so not counted
    assert as_pair(energy) == pytest.approx((7615e-6, 7615e-6), rel=0.005)


def test_without_seconds_per_mac_the_measured_time_counts():
    assert compute_seconds(BOARD, 1e9, measured_s=0.25, slowdown=3.0) == 0.75
    assert compute_seconds(Board(0.0, Range(1, 1), seconds_per_mac=1e-9), 1e9, 0.25, 3.0) == pytest.approx(1.0)


@pytest.mark.parametrize("board", WITH_POWER.values(), ids=WITH_POWER)
def test_ranges_are_ordered(board):
    assert 0 <= board.idle_w < board.active_w.low <= board.active_w.high
    assert RADIO_J_PER_BIT[0] < RADIO_J_PER_BIT[1]
    for idle in (False, True):
        energy = inference_energy(board, 0.2, 1.0, 500, idle)
        assert 0 < energy.low < energy.high
    alone, with_idle = (inference_energy(board, 0.2, 1.0, 500, idle) for idle in (False, True))
    assert as_pair(with_idle) == pytest.approx(tuple(value + board.idle_w for value in as_pair(alone)))
