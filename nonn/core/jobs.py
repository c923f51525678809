"""The lists of jobs that ``dvc.yaml`` loops over, derived from the parameters and never edited by hand.

DVC cannot say "each student of each network with each seed"; it takes a list of items. `write_jobs` writes the
lists, Snakemake and ``nonn use`` call it, and no stage runs while they do not agree with ``params.yaml``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nonn.core.boards import Board, all_boards, find_board
from nonn.core.chips import CHIPS, FAMILIES
from nonn.core.errors import UserError, printable
from nonn.core.files import regular, write_text
from nonn.core.image_source import named_source
from nonn.core.params import SOLO, Params
from nonn.core.teacher_source import WHOLE_FILES

JOBS_FILE = Path("workflow/jobs.yaml")
#: Entries of the file that are mappings, but no lists of jobs.
FACTS = ("budgets", "board")
HEADER = "# Derived from params.yaml by `nonn jobs`, and checked before a stage runs: edit params.yaml instead.\n"


def list_jobs(params: Params) -> dict[str, Any]:
    """Jobs by the list of ``dvc.yaml`` that they belong to; the key of a job is the path of what it writes.

    Beside lists of jobs there are facts that DVC watches as dependencies or parameters:

    - ``source``, ``weights``, ``teacher`` and ``teacher_data``, the files or folders that `dataset.source`,
      `teacher.weights` and `teacher.source` name, and the data beside an ONNX file. If a key names nothing on this
      machine, it is the module that would read the file, since DVC requires every dependency to exist.
    - ``baselines_folder`` and ``solo_folder``, the folders of all baselines and of those of seed 0. Without baselines
      they are the module that would train them.
    - ``sizes`` of the images, since DVC cannot watch keys that params.yaml leaves to their defaults.
    - ``budgets`` and ``board``, what the catalogue of boards says on the networks that need it and on the boards of the
      stage `distributed`, so that DVC notices changes of the catalogue.

    ``emulated`` has one job if firmware can be made of some students.
    """
    reader, trainer = "nonn/teachers/teacher.py", "nonn/stages/baseline.py"
    folder = f"results/{params.experiment}/baselines"
    baselines = {
        f"seed{seed}/{name}/{method}": {"network": name, "method": method, "seed": seed}
        for name, method, seeds in params.baselines()
        for seed in seeds
    }
    teacher = [str(path) for path in params.teacher.files]
    return {
        "source": named_source(params.dataset.source) or "nonn/data/packaged.py",
        "weights": params.teacher.weights or reader,
        "teacher": (teacher or [reader])[0],
        "teacher_data": (teacher[1:] or [reader])[0],
        "pool": "-".join(params.pool or ()),
        "budgets": looked_up_budgets(params),
        "board": _board_facts(params),
        "sizes": "×".join(map(str, params.image_sizes)),
        "networks": {name: {} for name in params.networks},
        "exported": {name: {} for name in [*params.networks, SOLO]},
        "students": {
            f"seed{seed}/{name}/{student}": {"network": name, "student": student, "seed": seed}
            for name, network in params.networks.items()
            for seed in range(network.seeds)
            for student in range(len(network.devices))
        },
        "emulated": {"firmware": {}} if any(chips_of(params, name) for name in params.networks) else {},
        "assembled": {
            f"seed{seed}/{name}": {"network": name, "seed": seed}
            for name, network in params.networks.items()
            for seed in range(network.seeds)
        },
        "baselines_folder": folder if baselines else trainer,
        "solo_folder": f"{folder}/seed0" if baselines else trainer,
        "baselines": baselines,
    }


def chips_of(params: Params, network: str) -> dict[int, str]:
    """The microcontroller of each student of a network that can run as firmware, by the student's position."""
    if params.design.precision != "int8" or params.design.family not in FAMILIES:
        return {}
    boards = [budget.board for budget in params.budgets_of(network)]
    return {position: board for position, board in enumerate(boards) if board in CHIPS}


def looked_up_budgets(params: Params) -> dict[str, list[dict[str, Any]]]:
    """Budgets of the devices of each network that names a board or has a target, in order."""
    by_network = {name: params.budgets_of(name) for name in params.networks}
    return {
        name: [budget.as_dict() for budget in budgets]
        for name, budgets in by_network.items()
        if any(budget.board or budget.latency_ms for budget in budgets)
    }


def _board_facts(params: Params) -> dict[str, Any]:
    """Facts on `distributed.board`, on the boards that devices state, and on those that a teacher may run on."""
    stated = {name: boards for name in params.networks if (boards := params.boards_of(name))}
    devices = {name: [_facts_of(board) for board in boards] for name, boards in stated.items()}
    facts = _facts_of(find_board(params.distributed.board).for_composing(params.design.precision))
    used = {budget.board for name in params.networks for budget in params.budgets_of(name)}
    offers = {name: _offer_of(board) for name, board in all_boards().items() if board.active_w or name in used}
    return facts | {"known": offers} | ({"devices": devices} if devices else {})


def _offer_of(board: Board) -> list[float | None]:
    """Memory, speed and power, as far as known: they decide whether a model fits, and its latency and energy."""
    power = (board.idle_w, board.active_w.low, board.active_w.high) if board.active_w else ()
    return [board.ram_kib, board.flash_kib, board.mmacs["float32"], board.mmacs["int8"], *power]


def _facts_of(board: Board) -> dict[str, Any]:
    """Power and speed, rounded, since DVC does not read back numbers of many digits as it wrote them."""
    power, seconds = board.active_w, board.seconds_per_mac
    facts = {"idle_w": board.idle_w, "active_w": [power.low, power.high] if power else None}
    return facts | {"mmacs_per_s": round(1e-6 / seconds, 3) if seconds else None}


def check_named_files(params: Params) -> None:
    """Refuse missing pictures, weights or teachers before anything runs."""
    teacher = params.teacher
    without = "null for the library's own" if teacher.is_foreign else "null to train"
    source = named_source(params.dataset.source)
    for key, name, remedy in (
        ("dataset.source", source, "Name a folder or archive, mnist5k, torchvision:NAME or hf:NAME."),
        ("teacher.weights", teacher.weights, f"Name a file, or {without}."),
        ("teacher.source", teacher.target if teacher.kind in WHOLE_FILES else None, "Name a file."),
    ):
        try:
            if key == "dataset.source" and name is not None and Path(name).is_dir():
                _refuse_own_folder(name)
            elif name:
                regular(Path(name))
        except (OSError, ValueError) as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise UserError(f"params.yaml: {key}: {printable(name or '')} {reason}. {remedy}") from None
        except UserError as error:
            raise UserError(f"params.yaml: {key}: {error}") from None


def _refuse_own_folder(name: str) -> None:
    """Refuse the project's folder, or one around it, as pictures: or the results count as pictures."""
    if Path.cwd().is_relative_to(Path(name).resolve()):
        raise UserError(f"{name!r} holds the whole project. Put the pictures into a folder of their own.")


def write_jobs(params: Params) -> bool:
    """Write the lists if they have changed; return whether they had."""
    content = _render(params)
    if JOBS_FILE.is_file() and JOBS_FILE.read_bytes() == content.encode():
        return False
    write_text(JOBS_FILE, content)
    return True


def check_jobs(params: Params) -> None:
    """Refuse lists of jobs that are not those of the parameters."""
    if JOBS_FILE.is_file() and JOBS_FILE.read_bytes() != _render(params).encode():
        raise UserError(f"{JOBS_FILE}: lists other jobs than params.yaml asks for. Run `nonn jobs`, then this again.")


def _render(params: Params) -> str:
    """YAML with one job per line; a JSON string is a quoted string in YAML."""
    lines = [HEADER, "jobs:\n"]
    for name, value in list_jobs(params).items():
        if isinstance(value, dict):
            lines.append(f"  {name}:\n" if value else f"  {name}: {{}}\n")
            lines += [f"    {json.dumps(key)}: {json.dumps(item)}\n" for key, item in value.items()]
        else:
            lines.append(f"  {name}: {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines)
