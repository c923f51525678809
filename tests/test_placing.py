"""Where teachers and students run for the comparison of energies."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from experiments import tiny_params

from nonn.core.boards import OWN_FILE, find_board
from nonn.core.files import write_json
from nonn.core.params import Params
from nonn.testbed.composed import Workload
from nonn.testbed.deployments import Deployment
from nonn.testbed.placing import home_of, own_board, placed_teachers, with_the_teacher

WORKLOAD = Workload(np.array([[0.01]]), np.array([[700e6]]), 0, [], 3072, 40)
MEBIBYTE = 2**20


def make_params(board: str = "cortex_m7", devices: tuple[str, ...] = ("small", "small"), **design) -> Params:
    """Of students in int8, if not told otherwise."""
    network = {"devices": list(devices), "seeds": 1, "baselines": {}}
    kinds = {"small": {"memory_kib": 60, "mmacs": 5}, "camera": {"board": "esp32s3"}}
    changes = {"networks": {"2s": network}, "devices": kinds, "design": {"precision": "int8"} | design}
    return Params.model_validate(tiny_params(changes | {"distributed": {"board": board}}))


def cost(weight_bytes: float, activation_bytes: float = 100_000) -> dict:
    counted = {"weight_bytes": int(weight_bytes), "peak_activation_bytes": int(activation_bytes)}
    return {"params": 1, "macs": 1, **counted}


def write_manifest(folder: Path, **costs: dict) -> Path:
    """Of the models that run alone, as far as it is read here."""
    entries = {name: {"students": [{"file": "0.onnx", "cost": own}]} for name, own in costs.items()}
    write_json(folder / "manifest.json", entries)
    return folder


def teacher(precision: str = "float32") -> Deployment:
    return Deployment("teacher", Path(), False, replace(WORKLOAD, precision=precision), 0.001)


def test_a_teacher_that_fits_stays_on_the_students_board():
    home = home_of(cost(1.9 * MEBIBYTE), "float32", make_params())
    assert home == find_board("cortex_m7").for_composing("float32")
    assert home.seconds_per_mac == pytest.approx(1e-6 / 46.7)  # not at the price of int8


def test_a_larger_one_is_on_the_most_frugal_board_that_holds_it():
    params = make_params()
    assert home_of(cost(18 * MEBIBYTE), "float32", params).name == "pi3b"
    assert home_of(cost(4.5 * MEBIBYTE), "int8", params).name == "pi4b"
    assert home_of(cost(1.9 * MEBIBYTE, 1.3 * MEBIBYTE), "float32", params).name == "pi3b"  # for its activations


def test_where_all_are_on_a_board_that_holds_both_it_is_timed_alike():
    home = home_of(cost(18 * MEBIBYTE), "float32", make_params("pi3b"))
    assert (home.name, home.seconds_per_mac) == ("pi3b", None)


def test_a_teacher_that_no_board_holds_is_named(capsys):
    assert home_of(cost(1e12), "float32", make_params()) is None
    assert "note: no board of known power and float32 speed holds the teacher" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_a_board_of_ones_own_may_hold_the_teacher():
    # A better one than any of the catalogue: flash of 32 MiB, and 0.1 W at 500 million a second.
    Path(OWN_FILE).write_text(
        "boards: {mine: {ram_kib: 2048, flash_kib: 32768, float32_mmacs: 500, active_w: 0.1}}", encoding="utf-8"
    )
    home = home_of(cost(18 * MEBIBYTE), "float32", make_params())
    assert (home.name, home.seconds_per_mac) == ("mine", pytest.approx(2e-9))


@pytest.mark.usefixtures("folder")
def test_a_teacher_on_a_board_of_unknown_power_stays_there_alone(folder):
    solo = write_manifest(folder, teacher=cost(1 * MEBIBYTE))
    facts = "{ram_kib: 4096, float32_mmacs: 500, cores: 4}"
    Path(OWN_FILE).write_text(f"boards: {{mine: {facts}}}", encoding="utf-8")
    params = make_params(devices=("camera", "camera"))
    devices = {name: device.model_copy(update={"board": "mine"}) for name, device in params.devices.items()}
    params = params.model_copy(update={"devices": devices})
    (placed,) = placed_teachers({"teacher": teacher()}, params, solo)
    assert [board.name for board in placed.workload.boards] == ["mine"]


def test_the_students_own_board_is_the_quickest_that_they_state():
    assert own_board(make_params(devices=("camera", "small")), "int8").name == "cortex_m7"
    assert own_board(make_params(devices=("camera", "camera")), "int8").name == "esp32s3"
    assert own_board(make_params("pi3b"), "int8").seconds_per_mac is None


def test_all_cores_draw_the_upper_bound_of_the_power():
    board = find_board("pi3b").with_catalogue_speed("float32")
    every = board.on_all_cores()
    assert (every.active_w.low, every.active_w.high) == (board.active_w.high,) * 2
    assert every.seconds_per_mac == board.seconds_per_mac / board.cores


def test_teachers_are_placed_by_each_assumption(folder):
    solo = write_manifest(folder, teacher=cost(18 * MEBIBYTE), teacher_int8=cost(4.5 * MEBIBYTE))
    teachers = {"teacher": teacher(), "teacher_int8": replace(teacher("int8"), method="teacher_int8", like="teacher")}
    placed = {each.method: each for each in placed_teachers(teachers, make_params(), solo)}
    boards = {name: [(b.name, b.seconds_per_mac) for b in each.workload.boards] for name, each in placed.items()}
    assert boards == {
        "teacher": [("pi3b", pytest.approx(1e-6 / 3650))],
        "teacher_own_board": [("cortex_m7", pytest.approx(1e-6 / 46.7))],
        "teacher_all_cores": [("pi3b", pytest.approx(1e-6 / 3650 / 4))],
        "teacher_int8_all_cores": [("pi4b", pytest.approx(1e-6 / 5880 / 4))],
        "teacher_int8": [("pi4b", pytest.approx(1e-6 / 5880))],
        "teacher_int8_own_board": [("cortex_m7", pytest.approx(1e-6 / 227.5))],
    }
    # Whatever the name, what is sent is what the teacher sends.
    assert {each.like for each in placed.values()} == {"teacher"}


def test_a_teacher_that_fits_is_composed_once(folder):
    solo = write_manifest(folder, teacher=cost(MEBIBYTE))
    (only,) = placed_teachers({"teacher": teacher()}, make_params(), solo)
    assert (only.method, only.workload.boards[0].name) == ("teacher", "cortex_m7")


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_students_on_the_board_of_the_teacher(folder, precision):
    solo = write_manifest(folder, teacher=cost(18 * MEBIBYTE))
    workload = replace(WORKLOAD, seconds=np.full((1, 2), 0.01), macs=np.full((1, 2), 1e6), precision=precision)
    network = Deployment("nonn", Path(), False, workload, 0.001)
    (moved,) = with_the_teacher(network, make_params(precision=precision), solo)
    assert (moved.method, moved.like) == ("nonn_teacher_board", "nonn")
    speed = find_board("pi3b").mmacs[precision]
    assert [(b.name, b.seconds_per_mac) for b in moved.workload.boards] == [("pi3b", pytest.approx(1e-6 / speed))] * 2
    assert list(with_the_teacher(network, make_params("pi3b", precision=precision), solo)) == []  # they are there
    assert list(with_the_teacher(network, make_params(precision=precision), write_manifest(folder))) == []
