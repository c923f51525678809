"""Stage `design`: how many filters and which architecture each device gets, see `nonn.method.sizing`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nonn.core.artifacts import DatasetInfo, GraphInfo, ImageSpec
from nonn.core.errors import UserError
from nonn.core.files import read_json, replacing, write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.core.progress import log
from nonn.method.sizing import design_network, imbalance_warning, sample_candidates


def run(params: Params, paths: Paths, network: str) -> None:
    """Write the numbers of filters of a network's students, all architectures, and candidates."""
    files = design_files(params, paths, network)
    if warning := imbalance_warning(files[paths.filter_counts(network)]["sizes"], params.budgets_of(network)):
        log(f"networks.{network}: {warning}")
    with replacing(paths.filter_counts(network).parent) as folder:
        for path, content in files.items():
            write_json(folder / path.relative_to(paths.filter_counts(network).parent), content)


def design_files(params: Params, paths: Paths, network: str) -> dict[Path, Any]:
    """What `run` writes, by path, ready for JSON; Snakemake asks for it beforehand, to see which jobs it changes."""
    graph, images = read_json(paths.graph_info, GraphInfo), ImageSpec.of(read_json(paths.dataset_info, DatasetInfo))
    budgets = params.budgets_of(network)
    try:
        sizes, designs = design_network(params.design, budgets, images, graph["n_live"])
    except UserError as error:
        raise UserError(f"params.yaml: networks.{network}: {error}") from None
    architectures = {paths.design(network, name): students for name, students in designs.items()}
    candidates = sample_candidates(params.design, budgets, images, max(sizes))
    return {paths.filter_counts(network): {"sizes": sizes}, paths.candidates(network): candidates, **architectures}
