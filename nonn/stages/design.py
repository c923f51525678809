"""Stage `design`: how many filters and which architecture each device gets, see `nonn.method.sizing`."""

from __future__ import annotations

from nonn.core.errors import UserError
from nonn.core.files import read_json, replacing, write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.method.sizing import design_network


def run(params: Params, paths: Paths, network: str) -> None:
    devices = [params.devices[name] for name in params.networks[network]]
    graph, info = read_json(paths.graph_info), read_json(paths.dataset_info)
    try:
        sizes, designs = design_network(params.design, devices, info, graph["n_live"])
    except UserError as error:
        raise UserError(f"params.yaml: networks.{network}: {error}") from None
    with replacing(paths.design(network)) as folder:
        for name, students in designs.items():
            write_json(folder / f"{name}.json", students)
    write_json(paths.sizes(network), {"sizes": sizes})
