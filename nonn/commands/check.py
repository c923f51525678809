"""The command ``nonn check``: read ``params.yaml``, which refuses every mistake, look at budgets, and stop."""

from __future__ import annotations

import argparse

from nonn.core.jobs import check_named_files
from nonn.core.options import add_settings, load_settings
from nonn.core.paths import Paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.epilog = "example: nonn check --set distill.epochs=6"


def run(options: argparse.Namespace) -> None:
    from nonn.method.feasibility import check_budgets

    params = load_settings(options)
    check_named_files(params)
    for line in check_budgets(params, Paths(params.experiment)):
        print(f"params.yaml: {line}")
    n_students = sum(len(network.devices) for network in params.networks.values())
    print(f"params.yaml is sound: experiment {params.experiment}, {n_students} students.")
