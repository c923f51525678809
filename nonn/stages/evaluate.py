"""Stage `evaluate`: score everything on the test images, see `nonn.method.scoring`."""

from __future__ import annotations

import torch

from nonn.core.files import write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.core.progress import track
from nonn.data.dataset import load_dataset
from nonn.method.calibration import measure_calibration
from nonn.method.scoring import missing_devices, missing_strategies, score_all, summarise


def run(params: Params, paths: Paths) -> None:
    torch.set_num_threads(params.evaluate.threads)
    data = load_dataset(paths)
    _, labels = data.part("test")
    int8 = params.design.precision == "int8"
    of_network = (4 if params.evaluate.final_layer == "fitted" else 2) + int8  # NoNN, and its ensembles
    n_models = 1 + int8 + of_network * len(params.networks) + len(list(params.baselines()))
    scores = list(track(score_all(params, paths, data), "evaluate", total=n_models))
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
