"""A made-up experiment for tables and figures: all that the stage `figures` reads."""

from functools import partial
from itertools import chain

import numpy as np
import pandas as pd
import torch
from experiments import REPOSITORY

from nonn.core.files import read_json, write_json
from nonn.core.params import SINGLE_METHODS, STRATEGIES, load_params
from nonn.core.paths import Paths
from nonn.core.system import describe_system
from nonn.data.tensors import write_tensors
from nonn.deploy.traced_cost import measure_cost
from nonn.method.scoring import Scores, missing_devices, missing_strategies, summarise
from nonn.stages import design as design_stage
from nonn.stages import graph as graph_stage
from nonn.stages import partition as partition_stage
from nonn.training.loop import LOG_COLUMNS, write_log
from nonn.training.networks import ConvNet

PARAMS = load_params(REPOSITORY / "params.yaml")
N_CLASSES = 10
TEACHER_MS = 9.6
#: Test accuracies that the made-up experiment scatters around.
ACCURACY = {
    "teacher": 0.993,
    "nonn": 0.986,
    "ensemble": 0.9845,
    "total": 0.9855,
    "at_kd": 0.980,
    "kd": 0.979,
    "labels": 0.974,
    "random": 0.983,
}
#: By the seeds of the made-up networks.
CHOSEN = ["fail_out", "subset_layers", "fail_out"]
FIGURES = (
    *("filter_graph", "adjacency", "top_k", "training", "accuracy_memory", "missing_devices"),
    *("student_selection", "architectures", "communication", "latency", "scaling", "ratios"),
)
TABLES = (
    "missing.csv",
    "distributed.csv",
    "ratios.json",
    "summary.csv",
    "summary.md",
    "summary.tex",
    "metrics.json",
    "claims.json",
)


def write_graph(params, paths, n_filters, generator):
    """Write a dataset and pooled activations in which each class has filters of its own."""
    labels = np.repeat(np.arange(N_CLASSES), 30)
    favourite = generator.integers(0, N_CLASSES, n_filters)
    active = np.where(favourite == labels[:, None], 1.2, 0.25) * generator.gamma(1.2, 1, (len(labels), n_filters))
    pooled = active * generator.gamma(2, 0.5, n_filters)
    pooled[:, :2] = 0  # two dead filters
    index = torch.arange(len(labels))
    tensors = {"images": torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), "labels": torch.from_numpy(labels)}
    tensors |= {"train": index[:0], "validation": index, "test": index[:0]}
    write_tensors(paths.dataset, tensors | {"mean": torch.zeros(1), "std": torch.ones(1)})
    classes = [str(label) for label in range(N_CLASSES)]
    write_json(paths.dataset_info, {"classes": classes, "channels": 1, "size": params.dataset.size})
    write_tensors(paths.signals, {"validation_pooled": torch.from_numpy(pooled)})
    graph_stage.run(params, paths)
    for network in params.networks:
        design_stage.run(params, paths, network)
        partition_stage.run(params, paths, network)


def make_log(epochs, final, generator, student=None):
    epoch = np.arange(1, epochs + 1)
    accuracy = final - 0.75 * np.exp(-0.45 * epoch) + generator.normal(0, 0.0015, epochs)
    log = pd.DataFrame({"epoch": epoch, "train_loss": 1 / epoch, "validation_loss": 1 / epoch})
    log = log.assign(validation_accuracy=accuracy)[LOG_COLUMNS]
    return (log if student is None else log.assign(student=student)).to_dict("records")


def write_logs(params, paths, generator):
    write_log(paths.log(paths.teacher), make_log(params.teacher.epochs, ACCURACY["teacher"], generator))
    epochs = params.distill.epochs
    for name, network in params.networks.items():
        for seed in range(network.seeds):
            for student in range(len(network.devices)):
                log = make_log(epochs, 0.98, generator)
                write_log(paths.log(paths.student(name, student, seed)), log)
    for network, method, seeds in params.baselines():
        n_students = 1 if method in SINGLE_METHODS else len(params.networks[network].devices)
        for seed in seeds:
            logs = [make_log(epochs, ACCURACY[method] - 0.002, generator, i) for i in range(n_students)]
            write_log(paths.log(paths.baseline(network, method, seed)), list(chain(*logs)))


def add_terms(terms, present):
    return terms[list(present)].sum(0)


def write_evaluation(params, paths, n_test, generator):
    hard = generator.permutation(n_test)
    labels = torch.from_numpy(generator.integers(0, N_CLASSES, n_test))

    def score(method, network, n_students, n_seeds):
        rates = ACCURACY[method] + generator.normal(0, 0.0015, n_seeds)
        # Some images are hard for every model, as with real ones.
        correct = np.stack([(hard + generator.normal(0, n_test / 60, n_test)) < rate * n_test for rate in rates])
        terms = [
            torch.nn.functional.one_hot(labels, N_CLASSES)
            + torch.from_numpy(generator.normal(0, 0.42, (n_students, n_test, N_CLASSES)))
            for _ in range(n_seeds)
        ]
        answers = [partial(add_terms, t) for t in terms] if n_students > 1 else []
        if method != "nonn":
            return Scores(method, network, n_students, correct, answers)
        return Scores(method, network, n_students, correct, answers, dict.fromkeys(STRATEGIES, answers), CHOSEN)

    scores = [score("teacher", "", 1, 1)]
    pool_network, pool_method = params.pool
    n_pool = params.networks[pool_network].baselines[pool_method]
    for name, network in params.networks.items():
        n = len(network.devices)
        scores.append(score("nonn", name, n, network.seeds))
        if n_pool >= n:
            scores.append(score("ensemble", name, n, n_pool // n))
    for network, method, seeds in params.baselines():
        n = 1 if method in SINGLE_METHODS else len(params.networks[network].devices)
        scores.append(score(method, network, n, len(seeds)))
    missing = [
        {"method": s.method, "network": s.network, **row}
        for s in scores
        if s.answers
        for row in missing_devices(s.answers, s.n_students, labels, 0)
    ]
    section = params.evaluate.model_copy(update={"resamples": 1000})
    strategies = [row for s in scores for row in missing_strategies(s, labels, 0)]
    evaluation = {"n_test": n_test, "rows": summarise(scores, section)}
    calibration = [
        {"network": network, "missing": number, "n_subsets": 1, "calibrated": 0.01 * (1 + number), "uncalibrated": 0.07}
        for network in params.networks
        for number in range(2)
    ]
    evaluation |= {"missing": missing, "missing_strategies": strategies, "calibration": calibration}
    write_json(paths.evaluation, evaluation)


def timed(ms):
    ratio = TEACHER_MS / ms
    return {
        **{"latency_p50_ms": ms, "latency_ratio": ratio},
        **{"latency_ratio_low": 0.95 * ratio, "latency_ratio_high": 1.05 * ratio},
    }


def write_benchmarks(params, paths):
    teacher = measure_cost(ConvNet(params.teacher.architecture, 1, N_CLASSES), 1, params.dataset.size)
    for name, network in params.networks.items():
        models = {str(i): timed(0.9 + 0.1 * i) for i in range(len(network.devices))}
        write_json(paths.benchmark(name), {"system": describe_system(), "models": models})
    single = [f"{network}-{method}" for network, method, _ in params.baselines() if method in SINGLE_METHODS]
    models = {name: timed(1.1) for name in single}
    models["teacher"] = vars(teacher) | {"latency_p50_ms": TEACHER_MS}
    write_json(paths.teacher_info, {"architecture": params.teacher.own_architecture.model_dump()})
    write_json(paths.benchmark("solo"), {"system": describe_system(), "models": models})


def write_distributed(params, paths):
    def row(method, link, n, **values):
        return {"method": method, "link": link, "scenario": "sensor", "n_devices": n} | values

    for name, n in [*((name, len(network.devices)) for name, network in params.networks.items()), ("solo", 1)]:
        methods = ("teacher", "kd") if name == "solo" else ("nonn", "channels", "rows")
        live, composed = [], []
        for link in params.distributed.links:
            for slower, method in enumerate(methods, start=1):
                ms = 2.0 * slower * n
                times = {"p50_ms": ms, "p95_ms": 2 * ms, "p99_ms": 3 * ms, "images": 30, "absent": 0}
                live.append(row(method, link, n, emulated=True, **times))
                parts = {"compute_ms": ms, "link_ms": ms, "final_ms": 0.1, "total_ms": 2.1 * ms, "rounds": slower}
                energies = {
                    f"energy_{what}{idle}_mj": [ms, 2 * ms]
                    for what in ("node", "total")
                    for idle in ("", "_computing", "_with_idle")
                }
                parts |= {"precision": params.design.precision, "boards": [params.distributed.board] * n}
                composed.append(row(method, link, n, wire_bytes=100 * ms, memory_bytes=1000, **parts, **energies))
        write_json(paths.distributed(name), {"system": describe_system(), "live": live, "composed": composed})


def write_experiment(params, n_filters, n_test):
    """Write all inputs of the stage, into the current folder."""
    paths, generator = Paths(params.experiment), np.random.default_rng(0)
    write_graph(params, paths, n_filters, generator)
    write_logs(params, paths, generator)
    write_evaluation(params, paths, n_test, generator)
    write_networks(params, paths)
    write_benchmarks(params, paths)
    write_distributed(params, paths)
    return paths


def write_networks(params, paths):
    """Of each network what the report reads: the larger ones are the more accurate."""
    for name, network in params.networks.items():
        missing = {"chosen": STRATEGIES[0], "not_chosen": []}
        info = {"students": read_json(paths.design(name, 0)), "missing": missing, "temperatures": [1.0]}
        for seed in range(network.seeds):
            accuracy = 0.9 + 0.01 * len(network.devices) + 0.001 * seed
            write_json(paths.network(name, seed).with_suffix(".json"), info | {"validation_accuracy": accuracy})


def with_figures(params, **changes):
    return params.model_copy(update={"figures": params.figures.model_copy(update=changes)})


def cost(params, macs, weights, activations):
    return {"params": params, "macs": macs, "weight_bytes": weights, "peak_activation_bytes": activations}


def row(method, network, n_students, mean, deviation=None, p=None):
    return {
        **{"method": method, "network": network, "n_students": n_students, "n_seeds": 2 if deviation else 1},
        **{"accuracy_mean": mean, "accuracy_sd": deviation},
        **{"p_value_vs_nonn": p, "p_value_vs_nonn_seeds": p and p / 2},
    }


ROWS = [
    row("ensemble", "2s", 2, 0.95, 0.01, 0.5),
    row("full", "2s", 2, 0.93, 0.01, 0.001),
    row("nonn", "2s", 2, 0.96, 0.01),
    row("teacher", "", 1, 0.99),
]
DESIGNS = {
    ("", "teacher"): [{"n_filters": None, "cost": cost(100, 1000, 400, 200)}],
    ("2s", "nonn"): [
        {"n_filters": 3, "cost": cost(10, 90, 40, 20)},
        {"n_filters": 5, "cost": cost(12, 80, 48, 2)},
    ],
    ("2s", "ensemble"): [{"n_filters": None, "cost": cost(11, 85, 44, 10)}] * 2,
    ("2s", "full"): [{"n_filters": 8, "cost": cost(14, 90, 56, 20)}] * 2,
}
LATENCIES = {
    ("", "teacher"): {"latency_p50_ms": 6.0},
    ("2s", "nonn"): {
        **{"latency_p50_ms": 1.5, "latency_ratio": 4.0, "latency_ratio_low": 3.9, "latency_ratio_high": 4.1}
    },
    ("2s", "ensemble"): {"latency_p50_ms": 1.2, "latency_ratio": 5.0},
}
