"""The command ``nonn rivals``: train SplitNet and the pruned teacher for a network's devices, and score them.

Not among the baselines of `networks`: no stage has to run again for them. Trainings are kept under ``.nonn/rivals``.
"""

from __future__ import annotations

import argparse

from nonn.commands.tables import write_rows
from nonn.core.errors import UserError
from nonn.core.numerics import set_numerics
from nonn.core.options import (
    add_network,
    add_settings,
    at_least,
    load_settings,
    refuse_missing,
    refuse_unknown_networks,
)
from nonn.core.paths import Paths, remove_unfinished

COLUMNS = (
    *("experiment", "network", "method", "n_seeds", "accuracy_mean", "accuracy_sd", "p_vs_nonn", "one_missing"),
    *("memory_kib", "params", "mmacs", "bytes_sent", "note"),
)
METHODS = ("splitnet", "pruned")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network(parser, "networks", nargs="*", help="whose devices they run on (default: all networks)")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="NAME,…", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=at_least(1), default=1, metavar="N", help="(default: %(default)s)")
    add_settings(parser)
    parser.epilog = "example: nonn rivals 4s --methods splitnet --seeds 3"


def run(options: argparse.Namespace) -> None:
    params = load_settings(options)
    set_numerics(params.numerics)
    networks, methods = options.networks or list(params.networks), options.methods.split(",")
    refuse_unknown_networks(params, networks)
    if unknown := [name for name in methods if name not in METHODS]:
        raise UserError(f"--methods {unknown[0]}: no such rival; choose of {', '.join(METHODS)}")
    if "pruned" in methods:
        import torch_pruning  # noqa: F401  # before anything is trained: not every installation has it
    paths = Paths(params.experiment)
    refuse_missing([paths.dataset, paths.signals, paths.teacher], "signals")
    remove_unfinished(paths)
    import torch

    from nonn.studies.rivals import rows_of
    from nonn.training.hardware import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for network in networks:
        for row in rows_of(params, network, methods, options.seeds):
            rows.append({"experiment": params.experiment, **row})
            p = row.get("p_vs_nonn")
            comparison = "" if p is None else f", p {'< 0.001' if p < 0.001 else f'= {p:.3f}'} against NoNN"
            print(f"{network} {row['method']:<9} {row['accuracy_mean']:.2%}{comparison}")
    write_rows(paths / "rivals.csv", COLUMNS, rows)
    print(f"{paths / 'rivals.csv'}: {len(rows)} rows")
