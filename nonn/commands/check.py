"""The command ``nonn check``: read ``params.yaml``, which refuses every mistake, look at budgets, and stop."""

from __future__ import annotations

import argparse
from importlib.machinery import PathFinder
from pathlib import Path

from nonn.core.errors import UserError
from nonn.core.jobs import check_named_files
from nonn.core.options import add_settings, load_settings
from nonn.core.paths import Paths
from nonn.core.teacher_source import CODE_PLACES, TeacherSource


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.epilog = "example: nonn check --set distill.epochs=6"


def run(options: argparse.Namespace) -> None:
    from nonn.method.feasibility import check_budgets

    params = load_settings(options)
    check_named_files(params)
    _check_module(params.teacher)
    for line in check_budgets(params, Paths(params.experiment)):
        print(f"params.yaml: {line}")
    n_students = sum(len(network.devices) for network in params.networks.values())
    print(f"params.yaml is sound: experiment {params.experiment}, {n_students} students.")


def _check_module(teacher: TeacherSource) -> None:
    """Refuse code that is neither below the working directory nor installed; nothing of it is run."""
    if teacher.kind != "module":
        return
    name = teacher.target.partition(":")[0]
    path = Path(*name.split("."))
    if not (path.is_dir() or any(path.parent.glob(f"{path.name}.*")) or PathFinder.find_spec(name.partition(".")[0])):
        raise UserError(f"params.yaml: teacher.source: {teacher.source}: there is no module {name}. {CODE_PLACES}")
