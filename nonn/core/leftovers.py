"""Remove artifacts of students, seeds and networks that the parameters no longer name.

DVC forgets a stage that has gone from ``params.yaml`` but leaves its outputs, and a stage that
reads a whole folder (all students of a network, all baselines) would take them for inputs.
"""

from __future__ import annotations

from pathlib import Path

from nonn.core.files import remove
from nonn.core.params import Params
from nonn.core.paths import Paths


def expected_artifacts(params: Params, paths: Paths) -> set[Path]:
    """Every per-network, per-student and per-seed artifact that the parameters name."""
    expected = set()
    for network, devices in params.networks.items():
        expected |= {paths.sizes(network), paths.design(network), paths.partition(network)}
        expected |= {paths.export(network), paths.cluster(network)}
        expected |= {paths.benchmark(network), paths.distributed(network)}
        for seed in params.seeds_of(network):
            weights = [paths.student(network, student, seed) for student in range(len(devices))]
            assembled = paths.network(network, seed)
            expected |= {*weights, *map(paths.log, weights), assembled, assembled.with_suffix(".json")}
    for network, method, seeds in params.baseline_jobs():
        for seed in seeds:
            weights = paths.baseline(network, method, seed)
            expected |= {weights, paths.log(weights), weights.with_suffix(".json")}
    return expected | {paths.export("solo"), paths.benchmark("solo"), paths.distributed("solo")}


def remove_leftovers(params: Params, paths: Paths) -> list[Path]:
    """Delete what `expected_artifacts` does not name; return what was deleted."""
    expected = expected_artifacts(params, paths)
    found: set[Path] = set()
    single = ("sizes/*", "design/*", "partition/*", "export/*", "cluster/*", "benchmark/*", "distributed/*")
    for pattern in (*single, "networks/*/*", "students/*/*/*", "baselines/*/*/*"):
        found |= set(paths.root.glob(pattern))
    leftovers = sorted(found - expected)
    for path in leftovers:
        remove(path)
    return leftovers
