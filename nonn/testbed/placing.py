"""Where models run for the comparison of energies: the students' own board, or one that holds the teacher.

A teacher is larger than any of its students, so it may not fit the board that they run on. Then it runs on the board of
the catalogue on which it takes least energy, of those that hold it. Teacher and students are charged alike: each at the
speed of its precision on its board, by multiply-accumulates. Other assumptions are composed beside this one, as methods
of their own:

teacher_own_board
    The teacher on the students' board, as if that had the memory: what less and cheaper work alone is worth.
teacher_all_cores
    The teacher on all cores of the board that holds it, as many times faster as there are, at its full power.
teacher_int8, teacher_int8_own_board
    The same for the teacher in int8, where it was exported.
nonn_teacher_board
    The students on the board of the teacher, as the paper has both on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nonn.core.artifacts import CostInfo, SoloManifest
from nonn.core.boards import Board, find_board
from nonn.core.energy import most_frugal
from nonn.core.files import read_json
from nonn.core.params import SOLO, Params, Precision
from nonn.core.progress import log
from nonn.testbed.deployments import Deployment


def own_board(params: Params, precision: Precision) -> Board:
    """The board of the students in a precision: the quickest where networks state several."""
    (board,) = params.boards_of(SOLO, precision) or [find_board(params.distributed.board).for_composing(precision)]
    return board


def home_of(cost: CostInfo, precision: Precision, params: Params) -> Board | None:
    """The board that a model of some cost runs on: the students' own, or else the most frugal that holds it.

    None, and a line that says so, where no board of known power and speed holds it.
    """
    own, needs = own_board(params, precision), (cost["weight_bytes"], cost["peak_activation_bytes"])
    if own.holds(*needs):
        return own
    if found := most_frugal(*needs, precision):
        return found
    log(f"note: no board of known power and {precision} speed holds the teacher, so its energy is not composed")
    return None


def teacher_homes(params: Params, solo: Path) -> dict[str, Board | None]:
    """The board of each exported teacher, ``teacher`` and ``teacher_int8``."""
    manifest = read_json(solo / "manifest.json", SoloManifest)
    precisions: dict[str, Precision] = {"teacher": "float32", "teacher_int8": "int8"}
    return {
        name: home_of(manifest[name]["students"][0]["cost"], precision, params)
        for name, precision in precisions.items()
        if name in manifest
    }


def place(deployment: Deployment, board: Board, method: str | None = None) -> Deployment:
    """A deployment with all its devices on a board, by another name if one is given."""
    workload = replace(deployment.workload, boards=[board] * deployment.workload.n_devices)
    like = deployment.like or deployment.method
    return replace(deployment, method=method or deployment.method, like=like, workload=workload)


def placed_teachers(teachers: dict[str, Deployment], params: Params, solo: Path) -> Iterator[Deployment]:
    """The teachers on boards that hold them, and on the students' own where that is another one."""
    for name, home in teacher_homes(params, solo).items():
        own = own_board(params, teachers[name].workload.precision)
        if home:
            yield place(teachers[name], home)
            if home.cores > 1 and home.seconds_per_mac and home.active_w:
                yield place(teachers[name], home.on_all_cores(), f"{name}_all_cores")
        if home != own and (own.seconds_per_mac or own.runs_onnx):
            yield place(teachers[name], own, f"{name}_own_board")


def with_the_teacher(network: Deployment, params: Params, solo: Path) -> Iterator[Deployment]:
    """A network's students on the board of the float32 teacher, where they are not there anyway."""
    precision = network.workload.precision
    home = teacher_homes(params, solo).get("teacher")
    if home is None or home.name == own_board(params, precision).name:
        return
    board = find_board(home.name).with_catalogue_speed(precision)
    if board.seconds_per_mac:
        yield place(network, board, f"{network.method}_teacher_board")
