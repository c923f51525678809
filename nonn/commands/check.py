"""The command ``nonn check``: read ``params.yaml``, which refuses every mistake, and stop."""

from __future__ import annotations

from nonn.core.jobs import check_named_files
from nonn.core.params import load_params


def add_arguments(parser) -> None:
    parser.epilog = "example: nonn check"


def run(_) -> None:
    params = load_params()
    check_named_files(params)
    n_students = sum(len(network.devices) for network in params.networks.values())
    print(f"params.yaml is sound: experiment {params.experiment}, {n_students} students.")
