"""Trains the tiny experiment in the current folder, and prints the hash of what it wrote: see `test_numerics`.

A program of its own, since numerics have to be chosen before torch is loaded.
"""

import importlib
import sys

from nonn.core.numerics import set_numerics

set_numerics(sys.argv[1])

from experiments import make_dataset, tiny_params, write_dataset  # noqa: E402
from ruamel.yaml import YAML  # noqa: E402

from nonn.core.files import sha256_of  # noqa: E402
from nonn.core.params import PARAMS_FILE, load_params  # noqa: E402
from nonn.core.paths import Paths  # noqa: E402

if __name__ == "__main__":
    with PARAMS_FILE.open("w") as file:
        YAML().dump(tiny_params({"teacher": {"epochs": 2, "threads": 2}, "distill": {"epochs": 2}}), file)
    params = load_params()
    paths = Paths(params.experiment)
    write_dataset(make_dataset(), paths)
    arguments = {
        "design": {"network": "2s"},
        "partition": {"network": "2s"},
        "distill": {"network": "2s", "seed": 0},
        "assemble": {"network": "2s", "seed": 0},
    }
    for stage in ("teacher", "signals", "graph", "design", "partition", "distill", "assemble"):
        run = importlib.import_module(f"nonn.stages.{stage}").run
        for student in range(2) if stage == "distill" else (None,):
            run(params, paths, **arguments.get(stage, {}), **({} if student is None else {"student": student}))
    for path in (paths.teacher, paths.signals, paths.graph, paths.network("2s", 0)):
        print(path.name, sha256_of(path)[:16])
