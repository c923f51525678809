"""Composed latency and energy of devices that are different boards."""

from dataclasses import replace
from pathlib import Path

import pytest
from experiments import tiny_params
from loads import WORKLOAD
from pydantic import ValidationError

from nonn.core.boards import Board, Range, board_of_device, find_board
from nonn.core.jobs import list_jobs
from nonn.core.links import Link
from nonn.core.params import SOLO, Params
from nonn.testbed.composed import compose
from nonn.testbed.deployments import Deployment, on_boards

#: A link that takes no time.
INSTANT = Link(1e15)
UNLIKE = {"a": {"board": "esp32s3", "ram_kib": 400}, "b": {"board": "rp2350"}, "c": {"memory_kib": 60, "mmacs": 5}}


def make_params(*devices: str, precision: str = "int8", board: str = "cortex_m7") -> Params:
    changes = {"networks": {"2s": {"devices": list(devices), "seeds": 1, "baselines": {}}}, "devices": UNLIKE}
    return Params.model_validate(
        tiny_params(changes | {"design": {"precision": precision}, "distributed": {"board": board}})
    )


def deployment(name: str = "nonn") -> Deployment:
    return Deployment(name, Path(), False, WORKLOAD, 0.001)


def test_each_device_computes_and_draws_as_its_own_board(params):
    slow = Board(idle_w=0.1, active_w=Range(0.2, 0.3), seconds_per_mac=1e-8, name="slow")
    quick = Board(idle_w=1.0, active_w=Range(3.0, 5.0), seconds_per_mac=1e-9, name="quick")
    row = compose(replace(WORKLOAD, boards=[slow, quick]), INSTANT, "sensor", 1.0, 0.0, params.distributed)
    # Of each round the slower device: 100 against 30 ms, then 500 against 20 ms.
    assert row["compute_ms"] == pytest.approx(600)
    bits = 8 * (8 + 1000 + 1000 + 500)
    low = [0.1 * 0.6 + bits * 10e-9, 2.0 * 0.05 + bits * 10e-9]
    high = [0.2 * 0.6 + bits * 50e-9, 4.0 * 0.05 + bits * 50e-9]
    assert row["energy_node_mj"] == pytest.approx([1e3 * low[1], 1e3 * high[1]])
    assert row["energy_total_mj"] == pytest.approx([1e3 * sum(low), 1e3 * sum(high)])
    idle = 1e3 * 0.6 * (0.1 + 1.0)
    assert row["energy_total_with_idle_mj"] == pytest.approx([1e3 * sum(low) + idle, 1e3 * sum(high) + idle])
    assert row["boards"] == ["slow", "quick"]


def test_boards_that_are_all_the_one_of_the_section_change_nothing(params):
    section = params.distributed.model_copy(update={"board": "pi3b", "slowdown": 3.0})
    plain = compose(WORKLOAD, INSTANT, "broadcast", 2.0, 0.005, section)
    stated = compose(replace(WORKLOAD, boards=[find_board("pi3b")] * 2), INSTANT, "broadcast", 2.0, 0.005, section)
    assert stated == plain
    assert plain["boards"] == ["pi3b", "pi3b"]


def test_devices_without_boards_are_all_that_of_the_section(params):
    assert params.boards_of("2s") is None
    assert params.boards_of(SOLO) is None
    (same,) = on_boards([deployment()], params, "2s")
    assert same.workload is WORKLOAD
    assert "devices" not in list_jobs(params)["board"]


def test_without_the_power_of_every_board_no_energy_is_composed(params):
    known = Board(idle_w=0.1, active_w=Range(0.2, 0.3), seconds_per_mac=1e-8, name="known")
    boards = [known, replace(known, active_w=None)]
    row = compose(replace(WORKLOAD, boards=boards), INSTANT, "sensor", 1.0, 0.0, params.distributed)
    assert row["compute_ms"] > 0
    assert not [key for key in row if key.startswith("energy")]


def test_speed_that_is_not_known_of_a_board_is_that_of_the_section():
    params = make_params("a", "b", "c")
    esp32s3, rp2350, plain = params.boards_of("2s")
    assert esp32s3.seconds_per_mac == pytest.approx(1e-6 / find_board("esp32s3").mmacs["int8"])
    assert esp32s3.active_w == find_board("esp32s3").active_w
    assert rp2350.seconds_per_mac == pytest.approx(1e-6 / find_board("rp2350").mmacs["int8"])
    reference = find_board("cortex_m7").for_composing("int8")
    assert rp2350.active_w is None
    assert plain == reference
    assert board_of_device(find_board("pi3b"), None, reference).seconds_per_mac == reference.seconds_per_mac


def test_a_speed_of_ones_own_counts_without_a_board(params):
    small = params.devices["small"].model_copy(update={"mmacs_per_s": 20.0})
    stated = params.model_copy(update={"devices": params.devices | {"small": small}})
    reference = find_board(params.distributed.board).for_composing(params.design.precision)
    assert stated.boards_of("2s") == [replace(reference, seconds_per_mac=1e-6 / 20), reference]


def test_the_precision_of_students_decides_the_speed():
    boards = {
        precision: make_params("a", "b", precision=precision).boards_of("2s") for precision in ("float32", "int8")
    }
    assert find_board("esp32s3").mmacs["int8"] != find_board("esp32s3").mmacs["float32"]
    assert boards["int8"][0].seconds_per_mac != boards["float32"][0].seconds_per_mac


def test_what_runs_alone_is_on_the_quickest_board(capsys):
    params = make_params("a", "b")
    kd = replace(deployment("kd"), workload=replace(WORKLOAD, precision="int8"))
    (placed,) = on_boards([kd], params, SOLO)
    (quickest,) = placed.workload.boards
    assert quickest.seconds_per_mac == min(board.seconds_per_mac for board in params.boards_of("2s"))
    assert not capsys.readouterr().err


def test_figures_that_are_not_known_are_named(capsys):
    (placed,) = on_boards([deployment()], make_params("a", "b"), "2s")
    assert [board.title for board in placed.workload.boards] == [find_board(n).title for n in ("esp32s3", "rp2350")]
    assert "note: 2s: power of rp2350: not known, so no energy is composed" in capsys.readouterr().err
    on_boards([deployment()], make_params("a", "c", precision="float32"), "2s")
    assert "note: 2s: float32 speed of esp32s3: not known" in capsys.readouterr().err


def test_what_calculates_in_another_precision_is_charged_in_that():
    """Such as the float32 reference beside students in int8."""
    params = make_params("a", "b")
    (placed,) = on_boards([deployment("reference_rows")], params, "2s")
    esp32s3, rp2350 = placed.workload.boards
    assert rp2350.seconds_per_mac == pytest.approx(1e-6 / find_board("rp2350").mmacs["float32"])
    # Of the first no speed in float32 is known, so it is that of the section's board.
    assert esp32s3.seconds_per_mac == pytest.approx(1e-6 / find_board("cortex_m7").mmacs["float32"])


def test_a_board_without_the_precision_of_the_students_is_refused():
    with pytest.raises(
        ValidationError, match=r"distributed\.board: the speed of esp32s3 in float32 is not known; choose"
    ):
        make_params("c", "c", precision="float32", board="esp32s3")
    assert make_params("c", "c", precision="int8", board="esp32s3").distributed.board == "esp32s3"


def test_dvc_sees_the_boards_of_devices():
    facts = list_jobs(make_params("a", "c"))["board"]["devices"]["2s"]
    assert [round(fact["mmacs_per_s"], 1) for fact in facts] == [find_board("esp32s3").mmacs["int8"], 227.5]
    assert facts[0]["active_w"] == [0.235, 0.235]
    # And those that a teacher may be on, with all that decides which one it is.
    known = list_jobs(make_params("c", "c"))["board"]["known"]
    assert known["esp32s3"] == [512, 8192, None, 133, 0.0, 0.235, 0.235]
    assert known["pi3b"] == [1048576, None, 3650, 2790, 1.4, 1.975, 3.7]
    assert "pi5" not in known  # whose power nobody measured
    # The students' own may hold the teacher, too, whatever is known of its power.
    assert list_jobs(make_params("b", "c"))["board"]["known"]["rp2350"][:2] == [520, 4096]
