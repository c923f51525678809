"""Stage `figures`: the tables, the report and the figures of an experiment.

Nothing is computed here but ratios of numbers that other stages measured or counted, and nothing is chosen but the
network that ``claims.json`` is of, on validation images. How it all is drawn is left to `nonn.report`.
"""

from __future__ import annotations

import pandas as pd

from nonn.core.artifacts import BenchmarkInfo, DatasetInfo, Evaluation, GraphInfo
from nonn.core.files import read_json, write_json, write_text
from nonn.core.params import SOLO, Params
from nonn.core.paths import Paths
from nonn.method.filter_graph import load_graph
from nonn.report import (
    accuracy_plots,
    deployment_plots,
    deployment_table,
    design_plots,
    graph_plots,
    inputs,
    method_table,
    missing_table,
    plots,
)
from nonn.report.summary import format_csv, format_report, format_tex


def run(params: Params, paths: Paths) -> None:
    evaluation, graph = read_json(paths.evaluation, Evaluation), load_graph(paths)
    info = read_json(paths.dataset_info, DatasetInfo)
    n_test, n_classes, students = evaluation["n_test"], len(info["classes"]), inputs.load_student_designs(params, paths)
    methods = method_table.summarise_methods(
        evaluation["rows"], inputs.load_designs(params, paths), inputs.load_latencies(params, paths), n_classes
    )
    validation = inputs.load_validation(params, paths)
    comparisons = [
        method_table.compare_network(methods, network) | {"validation_accuracy": validation[network]}
        for network in params.networks
    ]
    strategies = missing_table.join_rows(evaluation, params.networks)
    deployed = inputs.load_deployment(params, paths)
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
    metrics = method_table.collect_metrics(methods, comparisons) | method_table.calibration_metrics(evaluation)
    write_json(paths / "metrics.json", metrics)
    claims = method_table.collect_claims(comparisons)
    write_json(paths / "claims.json", claims | deployment_table.claim_ratios(deployed, claims["network"]))

    partitions = {network: inputs.load_partition(params, paths, network) for network in params.networks}
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
                inputs.load_architectures(params, paths, students), info["channels"], info["size"]
            ),
            "training": accuracy_plots.draw_training(
                inputs.read_log(paths.log(paths.teacher)), inputs.load_logs(params, paths)
            ),
            "accuracy_memory": accuracy_plots.draw_accuracy_memory(methods, budgets, n_test),
            "missing_devices": accuracy_plots.draw_missing_devices(missing, chosen, n_seeds, n_test),
            "communication": deployment_plots.draw_communication(deployed, params.distributed.reference),
            "latency": deployment_plots.draw_latency(deployed, board),
            "scaling": deployment_plots.draw_scaling(deployed, comparisons, board),
            "ratios": deployment_plots.draw_ratios(ratios, deployment_table.list_ratios(deployed, comparisons)),
        }
        for name, figure in figures.items():
            plots.save_figure(figure, paths / f"figures/{name}", params.figures)
