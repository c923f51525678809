"""Stage `evaluate`: score everything on the test images, see `nonn.method.scoring`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nonn.core.files import write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.core.progress import log
from nonn.data.dataset import load_dataset
from nonn.method.calibration import measure_calibration
from nonn.method.scoring import missing_devices, missing_strategies, score_all, summarise


def run(params: Params, paths: Paths) -> None:
    torch.set_num_threads(params.evaluate.threads)
    data = load_dataset(paths)
    _, labels = data.subset("test")
    for line in missing_ensembles(params):
        log(line)
    scores = list(score_all(params, paths, data))
    write_json(
        paths.evaluation,
        {
            "n_test": len(labels),
            "rows": summarise(scores, params.evaluate),
            "missing": [
                {"method": s.method, "network": s.network, **row}
                for s in scores
                if s.answers
                for row in missing_devices(s.answers, s.n_students, labels, params.evaluate.seed)
            ],
            "calibration": [
                {"network": s.network, **row}
                for s in scores
                if s.temperatures
                for row in measure_calibration(s.answers, s.temperatures, s.n_students, labels, params.evaluate.seed)
            ],
            "missing_strategies": [row for s in scores for row in missing_strategies(s, labels, params.evaluate.seed)],
        },
    )


def missing_ensembles(params: Params) -> Iterator[str]:
    """A line for each network that has too few KD students for an ensemble; none where no network has any."""
    if not params.pool:
        return
    for name, network in params.networks.items():
        n_devices, pool = len(network.devices), params.pool_of(name)
        n_students = params.networks[pool[0]].baselines["kd"] if pool else 0
        if n_students < n_devices:
            yield (
                f"note: networks.{name}: {n_students} KD students for its devices are too few for an ensemble of "
                f"{n_devices}; set its baselines.kd to {n_devices} or more"
            )
