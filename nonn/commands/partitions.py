"""The command ``nonn partitions``: compare ways to link and to divide the teacher's filters, without any training."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nonn.core.artifacts import Sizes
from nonn.core.errors import UserError
from nonn.core.files import damaged, read_json, write_text
from nonn.core.install import how_to_install
from nonn.core.numerics import set_numerics
from nonn.core.options import (
    add_network,
    add_settings,
    at_least,
    load_settings,
    refuse_missing,
    refuse_unknown_networks,
)
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.core.progress import log, track
from nonn.core.system import describe_system

#: Default number of seeds.
N_SEEDS = 5
#: Packages whose versions are stated, and their import names.
PACKAGES = {"igraph": "igraph", "networkx": "networkx", "numpy": "numpy", "scikit-learn": "sklearn"}
#: The partitioner that is left out if its package is not installed.
LEIDEN = "Leiden"
HEADER = "| Graph | Partitioner | Sets | Filters | Modularity | Balance | Agreement | Time (ms) |"
ALIGNMENT = "| :-- | :-- | --: | --: | --: | --: | --: | --: |"
EXPLANATION = """\
*Sets* is how many there are, *Filters* how many filters they hold. *Modularity* is that of the sets on the graph of
the row, as mean ± standard deviation over seeds. *Balance* is the size of the smallest set in parts of the largest.
*Agreement* is the adjusted Rand index of the sets of two seeds, the mean over all pairs: 1 for equal sets, 0 for
chance. *Time* is the median of processor time.
"""


def measure(params: Params, paths: Paths, network: str, n_seeds: int) -> list[dict[str, Any]]:
    """Rows of the table: each rule with each partitioner, for the sizes of a network."""
    from nonn.data.tensors import read_tensors
    from nonn.method.filter_graph import load_graph, normalise_activity
    from nonn.studies.comparison import PARTITIONERS, Problem, compare, graphs

    graph, sizes = load_graph(paths), read_json(paths.filter_counts(network), Sizes)["sizes"]
    pooled = read_tensors(paths.signals).get("validation_pooled")
    if pooled is None or pooled.dim() != 2 or pooled.shape[1] != len(graph.live):
        raise damaged(paths.signals, "validation_pooled is not of the filters of the graph")
    activity, rows = normalise_activity(pooled).numpy(), []
    names = [name for name in PARTITIONERS if name != LEIDEN or find_spec("igraph")]
    if LEIDEN not in names:
        log(f"note: {LEIDEN} is left out; {how_to_install('igraph')}")
    jobs = [(rule, weights, name) for rule, weights in graphs(pooled, params.graph.top_k).items() for name in names]
    for rule, weights, name in track(jobs, "partitions"):
        problem = Problem(weights, graph.live, activity, graph.class_activity, sizes)
        rows.append({"graph": rule, "partitioner": name} | compare(problem, PARTITIONERS[name], n_seeds))
    return rows


def render(rows: Sequence[Mapping[str, Any]], conditions: str) -> str:
    """The table in Markdown, with what it was measured on."""
    lines = [HEADER, ALIGNMENT]
    for row in rows:
        spread = f" ± {row['modularity_sd']:.3f}" if round(row["modularity_sd"], 3) else ""
        cells = (
            row["graph"].replace("_", " "),
            row["partitioner"],
            f"{row['sets']:g}",
            f"{row['used']:g}",
            f"{row['modularity']:.3f}{spread}",
            f"{row['balance']:.2f}",
            f"{row['agreement']:.2f}",
            f"{row['seconds'] * 1e3:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"{conditions}\n\n{EXPLANATION}\n{table}\n"


def conditions_of(params: Params, network: str, n_seeds: int) -> str:
    system = describe_system()
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES if find_spec(PACKAGES[package]))
    devices = len(params.networks[network].devices)
    top_k = "all filters" if params.graph.top_k is None else f"the {params.graph.top_k} strongest filters"
    text = (
        f"Measured by `nonn partitions {network}` on the teacher of `{params.experiment}`, for {devices} students, "
        f"with the seeds 0 to {n_seeds - 1}. The first two graphs look at {top_k} of each validation image, "
        f"correlation at all. One process on {system['cpu']}, {system['cores']} cores; {versions}."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network(parser, help="whose sizes the sets are to have, such as 4s")
    parser.add_argument(
        "--seeds",
        type=at_least(2, 1000),
        default=N_SEEDS,
        metavar="N",
        help="of which pairs are compared (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="also write the table to this file")
    add_settings(parser)
    parser.epilog = "example: nonn partitions 4s --seeds 10 --output partitions.md"


def run(options: argparse.Namespace) -> None:
    params = load_settings(options)
    set_numerics(params.numerics)
    import sklearn  # noqa: F401  # before anything is measured: not every installation has it

    paths = Paths(params.experiment)
    refuse_unknown_networks(params, [options.network])
    refuse_missing([paths.signals, paths.graph, paths.filter_counts(options.network)], f"design@{options.network}")
    if options.output and options.output.is_dir():
        raise UserError(f"--output {options.output}: is a folder. Name a file.")
    rows = measure(params, paths, options.network, options.seeds)
    text = render(rows, conditions_of(params, options.network, options.seeds))
    print(text)
    if options.output:
        write_text(options.output, text)
