"""What earlier stages wrote, in the form in which tables and figures take it."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

from nonn.core.architecture import Architecture
from nonn.core.artifacts import (
    BenchmarkInfo,
    Designs,
    DistributedInfo,
    Filters,
    NetworkInfo,
    PartitionInfo,
    TeacherInfo,
)
from nonn.core.files import existing, intact, read_json
from nonn.core.params import PARTITION_METHODS, SINGLE_METHODS, SOLO, Params
from nonn.core.paths import Paths
from nonn.report import deployment_table, method_table, plots


def load_designs(params: Params, paths: Paths) -> dict[method_table.Key, list[dict]]:
    """Students of every method on every network, as `summarise_methods` takes them."""
    int8 = params.design.precision == "int8"
    alone = read_json(paths.benchmark(SOLO), BenchmarkInfo)["models"]
    teachers = [name for name in ("teacher", "teacher_int8") if name in alone]
    designs = {("", name): [{"n_filters": None, "cost": alone[name]}] for name in teachers}
    for network, students in load_student_designs(params, paths).items():
        designs |= dict.fromkeys(((network, "nonn"), (network, "nonn_averaged")), students)
        if int8:
            designs[network, "nonn_float32"] = [s | {"cost": _in_float32(s["cost"])} for s in students]
        if not (pool := params.pool_of(network)):
            continue
        ensemble = read_json(paths.design(*pool), Designs) * len(students)
        designs[network, "ensemble"] = ensemble
        # Their final layer reads features, as NoNN's does, so features are sent in place of logits.
        features = [{"n_filters": Architecture(**member["architecture"]).n_features} for member in ensemble]
        designs[network, "ensemble_fitted"] = [m | f for m, f in zip(ensemble, features, strict=True)]
    for network, method, _ in params.baselines():
        designs[network, method] = read_json(paths.design(network, method), Designs)
    return designs


def _in_float32(cost: Mapping[str, int]) -> dict[str, int]:
    """Cost of the same student before it was quantised."""
    in_float32 = {"weight_bytes": 4 * cost["params"], "peak_activation_bytes": 4 * cost["peak_activation_bytes"]}
    return {**cost, **in_float32}


def load_latencies(params: Params, paths: Paths) -> dict[method_table.Key, dict]:
    """Measurements of the slowest student of every method that was benchmarked."""
    solo = read_json(paths.benchmark(SOLO), BenchmarkInfo)["models"]
    latencies = {("", name): solo[name] for name in ("teacher", "teacher_int8") if name in solo}
    for network in params.networks:
        students = read_json(paths.benchmark(network), BenchmarkInfo)["models"].values()
        slowest = max(students, key=itemgetter("latency_p50_ms"))
        latencies |= dict.fromkeys(((network, "nonn"), (network, "nonn_averaged")), slowest)
        if pool := params.pool_of(network):
            member = solo["-".join(pool)]
            latencies |= dict.fromkeys(((network, "ensemble"), (network, "ensemble_fitted")), member)
    for network, method, _ in params.baselines():
        if method in SINGLE_METHODS:
            latencies[network, method] = solo[f"{network}-{method}"]
        elif method in PARTITION_METHODS and method != "full":
            latencies[network, method] = latencies[network, "nonn"]
    return latencies


def load_student_designs(params: Params, paths: Paths) -> dict[str, list[dict]]:
    """Students of each network, as the stage `design` wrote them."""
    return {
        network: [read_json(paths.design(network, i), Designs)[0] for i in range(len(section.devices))]
        for network, section in params.networks.items()
    }


def load_architectures(params: Params, paths: Paths, students: Mapping[str, list[dict]]) -> list[dict]:
    """Teacher, students and baselines of one model, as `draw_architectures` takes them: those built alike as one.

    Of students that differ in their bridge alone, the one of the widest.
    """
    cost = read_json(paths.benchmark(SOLO), BenchmarkInfo)["models"]["teacher"]
    info = read_json(paths.teacher_info, TeacherInfo)
    own = {"architecture": info["architecture"] or info["source"], "cost": cost, "size": params.image_sizes.teacher}
    listed = [("teacher", "", own)]
    listed += [("nonn", f" {network}", student) for network, own in students.items() for student in own]
    singles = dict.fromkeys((n, m) for n, m, _ in params.baselines() if m in SINGLE_METHODS)
    listed += [(m, f" {n}", read_json(paths.design(n, m), Designs)[0]) for n, m in singles]
    distinct: dict[str, dict] = {}
    for method, where, design in listed:
        # Baselines of one device are built alike, whatever they learn from.
        kind = method if method in ("teacher", "nonn", "total") else "kd"
        title = {"nonn": "NoNN student", "kd": "single student"}.get(kind, plots.METHODS[kind].label) + where
        entry = {"title": title, "method": kind, "n_filters": design.get("n_filters"), "cost": design["cost"]}
        entry |= {"size": design["size"]} if "size" in design else {}
        architecture = design["architecture"]
        entry["architecture"] = architecture if isinstance(architecture, str) else Architecture(**architecture)
        key = str((kind, where, entry["architecture"]))
        if key not in distinct or (entry["n_filters"] or 0) > (distinct[key]["n_filters"] or 0):
            distinct[key] = entry
    return list(distinct.values())


def load_partition(params: Params, paths: Paths, network: str) -> dict[str, Any]:
    """Sets of a network's students, with the summary of its partition."""
    students = range(len(params.networks[network].devices))
    sets = [read_json(paths.partition(network, student), Filters)["filters"] for student in students]
    return read_json(paths.partition_info(network), PartitionInfo) | {"sets": sets}


def load_logs(params: Params, paths: Paths) -> dict[str, dict[str, list[pd.DataFrame]]]:
    """Training logs of each network and method: one for each seed and student."""
    logs = {
        network: {
            "nonn": [
                read_log(paths.log(paths.student(network, student, seed)))
                for seed in range(section.seeds)
                for student in range(len(section.devices))
            ]
        }
        for network, section in params.networks.items()
    }
    for network, method, seeds in params.baselines():
        joint = [read_log(paths.log(paths.baseline(network, method, seed))) for seed in seeds]
        logs[network][method] = [log for one in joint for _, log in one.groupby("student")]
    return logs


def load_validation(params: Params, paths: Paths) -> dict[str, float]:
    """Share of the validation images on which each network is right, the mean over its seeds."""
    return {
        name: round(
            mean(
                read_json(paths.network(name, seed).with_suffix(".json"), NetworkInfo)["validation_accuracy"]
                for seed in range(section.seeds)
            ),
            6,
        )
        for name, section in params.networks.items()
    }


def load_deployment(params: Params, paths: Paths) -> pd.DataFrame:
    """Rows of the stage `distributed`, of all networks and of what runs on a single device."""
    results = {name: read_json(paths.distributed(name), DistributedInfo) for name in [*params.networks, SOLO]}
    return deployment_table.join_rows(
        results, {name: len(network.devices) for name, network in params.networks.items()}
    )


def read_log(path: Path) -> pd.DataFrame:
    with intact(path):
        log = pd.read_csv(existing(path))
        if missing := {"epoch", "validation_accuracy"} - set(log.columns):
            raise ValueError(f"no column {sorted(missing)[0]}")
    return log
