"""Stage `figures`: the tables, the report and the figures of an experiment.

Nothing is computed here but ratios of numbers that other stages measured or counted, and nothing is chosen but the
network that ``claims.json`` is of, on validation images. How it all is drawn is left to `nonn.report`.
"""

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
    DatasetInfo,
    Designs,
    DistributedInfo,
    Evaluation,
    Filters,
    GraphInfo,
    NetworkInfo,
    PartitionInfo,
    TeacherInfo,
)
from nonn.core.files import existing, intact, read_json, write_json, write_text
from nonn.core.params import PARTITION_METHODS, SINGLE_METHODS, SOLO, Params
from nonn.core.paths import Paths
from nonn.method.filter_graph import load_graph
from nonn.report import (
    accuracy_plots,
    deployment_plots,
    deployment_table,
    design_plots,
    graph_plots,
    method_table,
    missing_table,
    plots,
)
from nonn.report.summary import format_csv, format_report, format_tex


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
        # Their final layer is over features, as NoNN's is, so those travel in place of logits.
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
    """What was measured of the slowest student of every method that was benchmarked."""
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
    found: dict[str, dict] = {}
    for method, where, design in listed:
        # Baselines of one device are built alike, whatever they learn from.
        kind = method if method in ("teacher", "nonn", "total") else "kd"
        title = {"nonn": "NoNN student", "kd": "single student"}.get(kind, plots.METHODS[kind].label) + where
        entry = {"title": title, "method": kind, "n_filters": design.get("n_filters"), "cost": design["cost"]}
        entry |= {"size": design["size"]} if "size" in design else {}
        architecture = design["architecture"]
        entry["architecture"] = architecture if isinstance(architecture, str) else Architecture(**architecture)
        key = str((kind, where, entry["architecture"]))
        if key not in found or (entry["n_filters"] or 0) > (found[key]["n_filters"] or 0):
            found[key] = entry
    return list(found.values())


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


def calibration_metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Expected calibration error of each network with all devices present, before and after calibration."""
    whole = [row for row in evaluation["calibration"] if row["missing"] == 0]
    return {
        f"{row['network']}_calibration_error{ending}": round(row[key], 6)
        for row in whole
        for key, ending in (("calibrated", ""), ("uncalibrated", "_uncalibrated"))
    }


def read_log(path: Path) -> pd.DataFrame:
    with intact(path):
        log = pd.read_csv(existing(path))
        if missing := {"epoch", "validation_accuracy"} - set(log.columns):
            raise ValueError(f"no column {sorted(missing)[0]}")
    return log


def run(params: Params, paths: Paths) -> None:
    evaluation, graph = read_json(paths.evaluation, Evaluation), load_graph(paths)
    info = read_json(paths.dataset_info, DatasetInfo)
    n_test, n_classes, students = evaluation["n_test"], len(info["classes"]), load_student_designs(params, paths)
    methods = method_table.summarise_methods(
        evaluation["rows"], load_designs(params, paths), load_latencies(params, paths), n_classes
    )
    validation = load_validation(params, paths)
    comparisons = [
        method_table.compare_network(methods, network) | {"validation_accuracy": validation[network]}
        for network in params.networks
    ]
    strategies = missing_table.join_rows(evaluation, params.networks)
    deployed = load_deployment(params, paths)
    ratios = deployment_table.collect_ratios(deployed, comparisons)
    budgets = {name: sorted({b.total_kib for b in params.budgets_of(name)}) for name in params.networks}
    report = format_report(
        methods,
        params=params,
        comparisons=comparisons,
        ratios=deployment_table.format_ratios(ratios),
        splits=deployment_table.format_splits(ratios, budgets),
        energies=deployment_table.format_energies(ratios),
        latencies=deployment_table.format_latencies(deployed),
        missing=missing_table.format_missing(strategies),
        n_test=n_test,
        system=read_json(paths.benchmark(SOLO), BenchmarkInfo)["system"],
    )
    write_text(paths / "summary.md", report)
    write_text(paths / "summary.tex", format_tex(methods))
    write_text(paths / "summary.csv", format_csv(methods, method_table.COLUMNS))
    write_text(paths / "distributed.csv", format_csv(deployed, deployment_table.COLUMNS))
    write_text(paths / "missing.csv", format_csv(strategies, missing_table.COLUMNS))
    write_json(paths / "ratios.json", ratios)
    metrics = method_table.collect_metrics(methods, comparisons) | calibration_metrics(evaluation)
    write_json(paths / "metrics.json", metrics)
    claims = method_table.collect_claims(comparisons)
    write_json(paths / "claims.json", claims | deployment_table.claim_ratios(deployed, claims["network"]))

    partitions = {network: load_partition(params, paths, network) for network in params.networks}
    n_seeds = methods[methods["method"] == "nonn"].set_index("network")["n_seeds"]
    missing, chosen = pd.DataFrame(evaluation["missing"]), missing_table.chosen_strategies(strategies)
    board = "the boards of the devices" if params.boards_of(SOLO) else params.distributed.board
    with plots.drawing_style():
        figures = {
            "filter_graph": graph_plots.draw_filter_graph(graph.weights, partitions),
            "adjacency": graph_plots.draw_adjacency(graph.weights, partitions),
            "top_k": graph_plots.draw_top_k(read_json(paths.graph_info, GraphInfo)),
            "student_selection": design_plots.draw_student_selection(
                {network: read_json(paths.candidates(network)) for network in students},
                students,
                {network: params.budgets_of(network) for network in students},
            ),
            "architectures": design_plots.draw_architectures(
                load_architectures(params, paths, students), info["channels"], info["size"]
            ),
            "training": accuracy_plots.draw_training(read_log(paths.log(paths.teacher)), load_logs(params, paths)),
            "accuracy_memory": accuracy_plots.draw_accuracy_memory(methods, budgets, n_test),
            "missing_devices": accuracy_plots.draw_missing_devices(missing, chosen, n_seeds, n_test),
            "communication": deployment_plots.draw_communication(deployed, params.distributed.reference),
            "latency": deployment_plots.draw_latency(deployed, board),
            "scaling": deployment_plots.draw_scaling(deployed, comparisons, board),
            "ratios": deployment_plots.draw_ratios(ratios, deployment_table.list_ratios(deployed, comparisons)),
        }
        for name, figure in figures.items():
            plots.save_figure(figure, paths / f"figures/{name}", params.figures)
