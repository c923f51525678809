"""Energy of an inference, by hand, and the boards that hold a model."""

from fractions import Fraction

import pytest

from nonn.core.boards import Board, Range, shipped_boards
from nonn.core.energy import RADIO_J_PER_BIT, compute_seconds, inference_energy, most_frugal

BOARDS = shipped_boards()
WITH_POWER = {name: board for name, board in BOARDS.items() if board.active_w}
#: 2 W idle and 4 to 6 W with one core busy.
BOARD = Board("any", 2.0, Range(4.0, 6.0))


def as_pair(energy: Range) -> tuple[float, float]:
    return energy.low, energy.high


@pytest.mark.parametrize(
    ("compute_s", "idle_s", "wire_bytes", "expected"),
    [
        # (4 - 2) and (6 - 2) W for half a second.
        (0.5, 0, 0, (1, 2)),
        # All of it: 4 and 6 W.
        (0.5, 0.5, 0, (2, 3)),
        # And 2 W for the two seconds until the answer.
        (0.5, 2, 0, (5, 6)),
        # A million bytes are 8 million bits, of 10 to 50 nJ.
        (0, 0, 1e6, (Fraction(8, 100), Fraction(4, 10))),
        (0.5, 2, 1e6, (5 + Fraction(8, 100), 6 + Fraction(4, 10))),
        (0, 0, 0, (0, 0)),
    ],
)
def test_energy_by_hand(compute_s, idle_s, wire_bytes, expected):
    energy = inference_energy(BOARD, compute_s, idle_s, wire_bytes)
    assert as_pair(energy) == pytest.approx(tuple(map(float, expected)))


def test_one_core_takes_from_a_quarter_of_the_difference_to_all_of_it():
    # 1.4 W idle, 3.7 W with four cores: 1.4 + 2.3 / 4.
    assert as_pair(BOARDS["pi3b"].active_w) == pytest.approx((float(Fraction(79, 40)), 3.7))
    energy = inference_energy(BOARDS["pi3b"], 0.1, 0, 0)
    assert as_pair(energy) == pytest.approx((0.0575, 0.23))


def test_a_microcontroller_by_its_source():
    # 12.5 million multiply-accumulates, 18.2 times a second, in 7,615 µJ.
    board = BOARDS["cortex_m7"].for_composing("int8")
    seconds = compute_seconds(board, 12.5e6, measured_s=123.0, slowdown=7.0)
    assert seconds == pytest.approx(float(1 / Fraction(182, 10)))
    energy = inference_energy(board, seconds, seconds, 0)  # idle draw is not known, so not counted
    assert as_pair(energy) == pytest.approx((7615e-6, 7615e-6), rel=0.005)


def test_without_seconds_per_mac_the_measured_time_counts():
    assert compute_seconds(BOARD, 1e9, measured_s=0.25, slowdown=3.0) == 0.75
    assert compute_seconds(Board("any", 0.0, Range(1, 1), seconds_per_mac=1e-9), 1e9, 0.25, 3.0) == pytest.approx(1.0)


@pytest.mark.parametrize("board", WITH_POWER.values(), ids=WITH_POWER)
def test_ranges_are_ordered(board):
    assert 0 <= board.idle_w < board.active_w.low <= board.active_w.high
    assert RADIO_J_PER_BIT[0] < RADIO_J_PER_BIT[1]
    alone, with_idle = (inference_energy(board, 0.2, idle_s, 500) for idle_s in (0, 1.0))
    for energy in (alone, with_idle):
        assert 0 < energy.low < energy.high
    assert as_pair(with_idle) == pytest.approx(tuple(value + board.idle_w for value in as_pair(alone)))


# A price for each precision, on a board that holds the model


def test_each_precision_has_its_own_price_on_a_microcontroller():
    board = BOARDS["cortex_m7"]
    assert board.seconds_per_mac is None  # of which precision, nobody said
    # 280 MHz: 6 cycles for each multiply-accumulate in float32; in int8 as ResNet-8 was measured.
    seconds = {precision: board.for_composing(precision).seconds_per_mac for precision in ("float32", "int8")}
    assert seconds["float32"] == pytest.approx(6 / 280e6, rel=1e-3)
    assert seconds["int8"] == pytest.approx(1 / (18.2 * 12.5e6))
    assert BOARDS["esp32s3"].for_composing("float32").seconds_per_mac is None


def test_a_board_that_can_be_timed_here_has_a_speed_only_on_demand():
    board = BOARDS["pi3b"]
    assert board.for_composing("int8").seconds_per_mac is None
    assert board.with_catalogue_speed("int8").seconds_per_mac == pytest.approx(1e-6 / board.mmacs["int8"])


@pytest.mark.parametrize(
    ("name", "weights_kib", "activations_kib", "fits"),
    [
        ("cortex_m7", 2048, 1184, True),
        ("cortex_m7", 2049, 1, False),  # more than its flash, though it has RAM
        ("cortex_m7", 1, 1185, False),
        ("pi3b", 1024 * 1024 - 1, 1, True),  # one memory for both
        ("pi3b", 1024 * 1024, 1, False),
    ],
)
def test_weights_are_held_in_flash_where_there_is_one(name, weights_kib, activations_kib, fits):
    assert BOARDS[name].holds(1024 * weights_kib, 1024 * activations_kib) is fits


def test_the_most_frugal_board_that_holds_a_model():
    # Nanojoules a multiply-accumulate at most: 0.34 on the nRF52840, 0.61 on the Cortex-M7, 0.85 on a Raspberry Pi 4B
    # and 1.3 on a 3B, 1.8 on the ESP32-S3.
    mebibyte, rest = 2**20, 100 * 2**10
    small, middle, large = (most_frugal(n * mebibyte, rest, "int8").name for n in (0.5, 1.5, 4.5))
    assert (small, middle, large) == ("nrf52840", "cortex_m7", "pi4b")
    # In float32 a Raspberry Pi 3B takes 1.01 and a 4B 1.06, and the ESP32-S3 has no speed that is known.
    found = most_frugal(18 * mebibyte, rest, "float32")
    assert (found.name, found.seconds_per_mac) == ("pi3b", pytest.approx(1e-6 / 3650))
    assert most_frugal(1e12, 0, "float32") is None
