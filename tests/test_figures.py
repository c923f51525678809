"""Tables by hand-computed numbers, and all outputs from a small made-up experiment."""

import json
import shutil
from functools import partial
from itertools import chain
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from experiments import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from nonn.core.errors import UserError
from nonn.core.files import read_json, write_json
from nonn.core.params import SINGLE_METHODS, STRATEGIES, Architecture, load_params
from nonn.core.paths import Paths
from nonn.core.system import describe_system
from nonn.data.tensors import write_tensors
from nonn.deploy.cost import measure_cost
from nonn.method.scoring import Scores, missing_devices, missing_strategies, summarise
from nonn.report import accuracy_plots, design_plots, graph_plots, method_table, missing_table, plots, summary
from nonn.stages import design as design_stage
from nonn.stages import figures as figures_stage
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
    write_json(paths.teacher_info, {"architecture": params.teacher.own.model_dump()})
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
                    f"energy_{what}{idle}_mj": [ms, 2 * ms] for what in ("node", "total") for idle in ("", "_with_idle")
                }
                composed.append(row(method, link, n, wire_bytes=100 * ms, memory_bytes=1000, **parts, **energies))
        write_json(paths.distributed(name), {"system": describe_system(), "live": live, "composed": composed})


def write_experiment(params, n_filters, n_test):
    """Write all inputs of the stage, into the current folder."""
    paths, generator = Paths(params.experiment), np.random.default_rng(0)
    write_graph(params, paths, n_filters, generator)
    write_logs(params, paths, generator)
    write_evaluation(params, paths, n_test, generator)
    write_benchmarks(params, paths)
    write_distributed(params, paths)
    return paths


def with_figures(params, **changes):
    return params.model_copy(update={"figures": params.figures.model_copy(update=changes)})


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Folder of an experiment whose stage has run; do not change it."""
    folder = tmp_path_factory.mktemp("experiment")
    params = with_figures(PARAMS, dpi=50)
    params = params.model_copy(update={"design": params.design.model_copy(update={"step": 16})})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        figures_stage.run(params, write_experiment(params, n_filters=40, n_test=400))
    return folder, params


@pytest.fixture
def inside(experiment, monkeypatch):
    folder, params = experiment
    monkeypatch.chdir(folder)
    return params, Paths(params.experiment)


def test_every_output_is_there(inside):
    _, paths = inside
    for name in FIGURES:
        assert (paths / f"figures/{name}.svg").read_text().startswith("<?xml")
        assert (paths / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in paths.root.glob("*") if path.name in TABLES} == set(TABLES)


def test_running_again_gives_the_same_bytes(inside):
    params, paths = inside
    drawn = [paths / f"figures/{name}.{suffix}" for name in FIGURES for suffix in plots.FORMATS]
    outputs = [*drawn, *(paths / name for name in TABLES)]
    before = [path.read_bytes() for path in outputs]
    figures_stage.run(params, paths)
    assert [path.read_bytes() for path in outputs] == before


TOP_K = {"top_k": None, "n_filters": 600, "modularity": 0.3, "n_communities": 5, "top_k_curve": []}


def draw(file_format):
    with plots.drawing_style():
        plots.save_figure(graph_plots.draw_top_k(TOP_K), Path("figure"), PARAMS.figures)
    return Path(f"figure.{file_format}").read_bytes()


@pytest.mark.parametrize("file_format", plots.FORMATS)
def test_no_format_tells_the_time(file_format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    before = draw(file_format)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert draw(file_format) == before


def test_style_is_ours_whatever_the_users_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = draw("png")
    with matplotlib.rc_context({"font.size": 20}):
        assert draw("png") == plain


def test_summary_has_one_row_a_method_and_network(inside):
    params, paths = inside
    table = pd.read_csv(paths / "summary.csv")
    assert list(table.columns) == list(method_table.COLUMNS)
    evaluated = {(row["network"], row["method"]) for row in read_json(paths.evaluation)["rows"]}
    listed = list(zip(table["network"].fillna(""), table["method"], strict=True))
    assert len(listed) == len(evaluated)
    assert set(listed) == evaluated
    assert listed[0] == ("", "teacher")
    assert listed[1] == (next(iter(params.networks)), "nonn")


def test_summary_counts_match_the_designs(inside):
    params, paths = inside
    table = pd.read_csv(paths / "summary.csv").set_index(["network", "method"])
    for network, section in params.networks.items():
        n_devices = len(section.devices)
        students = [read_json(paths.design(network, i))[0] for i in range(n_devices)]
        row = table.loc[network, "nonn"]
        assert row["params_total"] == sum(s["cost"]["params"] for s in students)
        assert row["feature_bytes"] == 4 * max(s["n_filters"] for s in students)
        # The slowest student's, as written by `write_benchmarks`.
        assert row["latency_p50_ms"] == pytest.approx(0.9 + 0.1 * (n_devices - 1))
        (member,) = read_json(paths.design(*params.pool))
        assert table.loc[network, "ensemble"]["params_total"] == n_devices * member["cost"]["params"]
        assert table.loc[network, "ensemble"]["feature_bytes"] == 4 * N_CLASSES
        fitted = figures_stage.load_designs(params, paths)[network, "ensemble_fitted"]
        assert [student["n_filters"] for student in fitted] == [member["architecture"]["widths"][-1]] * n_devices


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


@pytest.fixture
def methods():
    return method_table.summarise_methods(ROWS, DESIGNS, LATENCIES, n_classes=10)


def write_report(methods, comparison):
    return summary.write_summary_md(
        methods,
        params=PARAMS,
        comparisons=[comparison],
        ratios=pd.DataFrame({"NoNN": ["2.0×"]}),
        latencies=pd.DataFrame({"Link": ["wifi20"]}),
        missing=missing_table.format_missing(STRATEGY_ROWS),
        n_test=500,
        system=describe_system(),
    )


def test_summary_csv_by_hand(methods):
    assert summary.write_csv(methods, method_table.COLUMNS) == (
        "method,network,n_students,n_seeds,accuracy_mean,accuracy_sd,params_per_device,params_total,"
        "weight_bytes_per_device,macs_per_device,feature_bytes,latency_p50_ms,"
        "latency_ratio,latency_ratio_low,latency_ratio_high,p_value_vs_nonn,p_value_vs_nonn_seeds\n"
        "teacher,,1,1,0.990000,,100,100,400,1000,40,6.0000,,,,,\n"
        "nonn,2s,2,2,0.960000,0.010000,12,22,48,90,20,1.5000,4.0000,3.9000,4.1000,,\n"
        "ensemble,2s,2,2,0.950000,0.010000,11,22,44,85,40,1.2000,5.0000,,,0.500000,0.250000\n"
        "full,2s,2,2,0.930000,0.010000,14,28,56,90,32,,,,,0.001000,0.000500\n"
    )


def test_comparison_by_hand(methods):
    assert method_table.compare_network(methods, "2s") == {
        "network": "2s",
        "accuracy": 0.96,
        "teacher_accuracy": 0.99,
        "accuracy_gap_points": 3.0,
        "memory_ratio": 10.0,  # (400 + 200) / max(40 + 20, 48 + 2)
        "performance_ratio": 4.0,
        "performance_ratio_low": 3.9,
        "performance_ratio_high": 4.1,
        "best_baseline": "ensemble",
        "best_baseline_accuracy": 0.95,
        "best_baseline_beaten": False,  # ahead, but p = 0.5
        "p_value": 0.5,
    }


@pytest.mark.parametrize(
    ("accuracy", "p", "beaten", "verdict"),
    [
        (0.94, 0.01, True, "NoNN beats the ensemble significantly, by 2.00 points (p = 0.010)"),
        (
            0.94,
            0.05,
            False,
            "NoNN is ahead of the ensemble by 2.00 points (p = 0.050): the difference is not significant",
        ),
        (0.97, 0.3, False, "NoNN is behind the ensemble by 1.00 points (p = 0.300): the difference is not significant"),
        (0.97, 0.0001, False, "NoNN is beaten significantly by the ensemble, by 1.00 points (p < 0.001)"),
    ],
)
def test_report_says_whether_the_ensemble_is_beaten(accuracy, p, beaten, verdict):
    rows = [*ROWS[1:], row("ensemble", "2s", 2, accuracy, 0.01, p)]
    methods = method_table.summarise_methods(rows, DESIGNS, LATENCIES, n_classes=10)
    comparison = method_table.compare_network(methods, "2s")
    text = write_report(methods, comparison)
    assert comparison["best_baseline_beaten"] is beaten
    assert verdict in text
    assert "500 test images" in text
    assert "10.0×" in text


def test_fitted_ensembles_are_a_method_of_their_own():
    designs = DESIGNS | {("2s", "ensemble_fitted"): DESIGNS["2s", "ensemble"]}
    texts = []
    designs |= {("2s", "nonn_averaged"): DESIGNS["2s", "nonn"]}
    fitted = [row("nonn_averaged", "2s", 2, 0.9, 0.01, 0.3), row("ensemble_fitted", "2s", 2, 0.97, 0.01, 0.3)]
    for more in ([], fitted):
        methods = method_table.summarise_methods([*ROWS, *more], designs, LATENCIES, n_classes=10)
        comparison = method_table.compare_network(methods, "2s")
        texts.append(write_report(methods, comparison))
    assert "KD, fitted" not in texts[0]
    assert "is fitted further" not in texts[0]
    assert "| 2s | Ensemble of KD, fitted | 2 | 2 | 97.00 ± 1.00 % | 0.300 |" in texts[1]
    assert "The best baseline is *Ensemble of KD, fitted*" in texts[1]
    assert "is fitted further as NoNN's is" in texts[1]


@pytest.mark.parametrize(("method", "label"), [("nonn_averaged", "NoNN, averaged"), ("nonn_float32", "NoNN, float32")])
def test_nonns_own_variants_are_no_baselines(method, label):
    designs = DESIGNS | {("2s", method): DESIGNS["2s", "nonn"]}
    better = row(method, "2s", 2, 0.99, 0.01, 0.3)
    methods = method_table.summarise_methods([*ROWS, better], designs, LATENCIES, n_classes=10)
    assert label in list(summary.format_methods(methods)["Method"])
    assert method_table.compare_network(methods, "2s")["best_baseline"] == "ensemble"


def test_int8_networks_stand_beside_their_float32_selves_and_the_int8_teacher(inside, tmp_path, monkeypatch):
    params, paths = inside
    int8 = params.model_copy(update={"design": params.design.model_copy(update={"precision": "int8"})})
    solo = read_json(paths.benchmark("solo"))
    shutil.copytree(Path.cwd(), tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    for network in params.networks:
        design_stage.run(int8, paths, network)
    models = solo["models"] | {"teacher_int8": cost(1000, 5000, 1100, 300) | {"latency_p50_ms": 4.0}}
    write_json(paths.benchmark("solo"), solo | {"models": models})
    evaluation = read_json(paths.evaluation)
    of_nonn = [entry for entry in evaluation["rows"] if entry["method"] == "nonn"]
    more = [entry | {"method": "nonn_float32"} for entry in of_nonn]
    write_json(paths.evaluation, evaluation | {"rows": [*evaluation["rows"], *more, row("teacher_int8", "", 1, 0.99)]})
    figures_stage.run(int8, paths)
    table = pd.read_csv(paths / "summary.csv").set_index(["network", "method"])
    teacher = table.loc[(np.nan, "teacher_int8")]
    assert (teacher["weight_bytes_per_device"], teacher["latency_p50_ms"]) == (1100, 4.0)
    for network in params.networks:
        quantised, whole = (table.loc[network, method] for method in ("nonn", "nonn_float32"))
        assert whole["weight_bytes_per_device"] == 4 * whole["params_per_device"]
        assert quantised["weight_bytes_per_device"] < whole["weight_bytes_per_device"] / 2
        assert quantised["feature_bytes"] == whole["feature_bytes"], "vectors are sent in float32 either way"
        assert pd.isna(whole["latency_p50_ms"]), "only what is deployed is timed"
    text = (paths / "summary.md").read_text()
    assert "ratios to it include the change of precision" in text
    assert "at int8 precision" in text


def test_a_network_without_baselines_claims_nothing_about_them():
    alone = [entry for entry in ROWS if entry["method"] in ("teacher", "nonn")]
    methods = method_table.summarise_methods(alone, DESIGNS, LATENCIES, n_classes=10)
    comparison = method_table.compare_network(methods, "2s")
    assert comparison["best_baseline"] is comparison["p_value"] is None
    assert "no baseline" in write_report(methods, comparison)


def strategy_row(strategy, chosen, missing, mean, worst):
    return {
        **{"network": "2s", "strategy": strategy, "chosen": chosen, "missing": missing, "n_subsets": missing + 1},
        **{"n_seeds": 3, "mean": mean, "mean_sd": 0.01 if missing else None, "worst": worst, "worst_sd": None},
    }


STRATEGY_ROWS = pd.DataFrame(
    [
        strategy_row("rescale", 0, 0, 0.95, 0.95),
        strategy_row("rescale", 0, 1, 0.8, 0.7),
        strategy_row("fail_out", 3, 0, 0.95, 0.95),
        strategy_row("fail_out", 3, 1, 0.85, 0.75),
    ]
)


def test_missing_csv_by_hand():
    assert summary.write_csv(STRATEGY_ROWS, missing_table.COLUMNS) == (
        "network,strategy,chosen,missing,n_subsets,n_seeds,mean,mean_sd,worst\n"
        "2s,rescale,0,0,1,3,0.950000,,0.950000\n"
        "2s,rescale,0,1,2,3,0.800000,0.010000,0.700000\n"
        "2s,fail_out,3,0,1,3,0.950000,,0.950000\n"
        "2s,fail_out,3,1,2,3,0.850000,0.010000,0.750000\n"
    )


def test_the_report_tells_of_missing_devices(methods):
    report = write_report(methods, method_table.compare_network(methods, "2s"))
    section = report.partition("## When devices are missing\n")[2].partition("\n## ")[0]
    assert section.splitlines()[-5:] == [
        "",
        "| 2s | Chosen by | 1 missing |",
        "| :-- | --: | --: |",
        "| Rescaled | 0 of 3 | 80.00 % (70.00 %) |",
        "| Fail-out | 3 of 3 | 85.00 % (75.00 %) |",
    ]


def test_chosen_strategies_in_words():
    assert missing_table.chosen_strategies(STRATEGY_ROWS) == {"2s": "fail-out"}
    divided = pd.concat([STRATEGY_ROWS.assign(chosen=[2, 2, 1, 1]), STRATEGY_ROWS.assign(network="4s")])
    assert missing_table.chosen_strategies(divided) == {"2s": "rescaled (2), fail-out (1)", "4s": "fail-out"}


def test_every_line_of_a_table_has_the_cells_of_its_heading(inside):
    params, paths = inside
    blocks = (paths / "summary.md").read_text().split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) == 3 + len(params.networks), "methods, ratios, latencies, and devices missing from each network"
    for heading, rule, *lines in tables:
        assert set(rule) == set("| :-")
        assert lines
        assert {line.count("|") for line in (rule, *lines)} == {heading.count("|")}


def test_missing_csv_has_every_strategy_of_every_network(inside):
    params, paths = inside
    table = pd.read_csv(paths / "missing.csv")
    assert list(table.columns) == list(missing_table.COLUMNS)
    expected = sum(len(network.devices) for network in params.networks.values()) * len(STRATEGIES)
    assert len(table) == expected
    assert len(table[["network", "strategy", "missing"]].drop_duplicates()) == expected
    assert "## When devices are missing" in (paths / "summary.md").read_text()


def test_claims_are_of_the_most_accurate_network():
    worse, better = {"network": "2s", "accuracy": 0.9}, {"network": "4s", "accuracy": 0.95}
    assert method_table.collect_claims([worse, better]) is better


def test_claims_and_metrics_agree_with_the_table(inside):
    params, paths = inside
    table = pd.read_csv(paths / "summary.csv").set_index(["network", "method"])
    claims, metrics = (json.loads((paths / f"{name}.json").read_text()) for name in ("claims", "metrics"))
    network = claims["network"]
    assert claims["accuracy"] == max(table.loc[n, "nonn"]["accuracy_mean"] for n in params.networks)
    others = table.loc[network].drop("nonn")
    assert claims["best_baseline"] == others["accuracy_mean"].idxmax()
    for key in ("memory_ratio", "performance_ratio", "best_baseline"):
        assert metrics[f"{network}_{key}"] == claims[key]
    for network in params.networks:
        assert metrics[f"{network}_calibration_error"] == 0.01, "with all devices present"
        assert metrics[f"{network}_calibration_error_uncalibrated"] == 0.07


def test_tex_table_is_booktabs_and_escaped(inside):
    text = (inside[1] / "summary.tex").read_text()
    assert text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    assert r"\%" in text
    assert " %" not in text.replace(r"\%", "")


def test_a_missing_log_is_named(inside, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"teacher\.csv.*dvc repro"):
        figures_stage.read_log(inside[1].log(inside[1].teacher))


def test_strongest_links_by_hand():
    weights = np.array([[0, 3, 1, 0], [3, 0, 2, 0], [1, 2, 0, 0], [0, 0, 0, 0]])
    assert graph_plots.strongest_links(weights, 1).tolist() == [[0, 1], [1, 2]]
    assert graph_plots.strongest_links(weights, 3).tolist() == [[0, 1], [0, 2], [1, 2]]


def test_filters_are_ordered_by_student_then_community():
    split = {"sets": [[0, 2, 5], [1, 4]], "communities": [1, -1, 0, -1, 0, 1]}
    assert graph_plots.order_filters(split).tolist() == [2, 0, 5, 4, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.01, 0.2))
def test_spread_keeps_the_gap_the_order_and_the_bounds(values, gap):
    values = sorted(values)
    placed = accuracy_plots.spread(values, gap, 0, 1)
    fits = min(gap, 1 / max(len(values) - 1, 1))
    assert (np.diff(placed) >= fits - 1e-9).all()
    assert placed[0] >= -1e-9
    assert placed[-1] <= 1 + 1e-9
    if (np.diff(values) >= gap).all():
        assert placed == pytest.approx(values)


def test_spread_moves_as_little_as_needed():
    assert accuracy_plots.spread([], 0.1, 0, 1).tolist() == []
    assert accuracy_plots.spread([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
    assert accuracy_plots.spread([0.0, 0.02], 0.1, 0, 1) == pytest.approx([0.0, 0.1])


def test_top_k_is_drawn_without_a_curve():
    figure = graph_plots.draw_top_k(TOP_K)
    assert [axis.lines[1].get_xydata().tolist() for axis in figure.axes] == [[[600, 0.3]], [[600, 5]]]


def test_an_imported_teacher_is_a_level_line():
    teacher = pd.DataFrame({"epoch": [0], "validation_accuracy": [0.9]})
    log = pd.DataFrame(make_log(4, 0.95, np.random.default_rng(0)))
    (axis,) = accuracy_plots.draw_training(teacher, {"2s": {"nonn": [log, log]}}).axes
    assert set(axis.lines[0].get_ydata()) == {0.9}


def test_a_legend_is_no_wider_than_its_figure():
    """A single network makes narrow figures, and all baselines a long legend."""
    log = pd.DataFrame(make_log(4, 0.95, np.random.default_rng(0)))
    trained = ["nonn", "labels", "kd", "at_kd", "total", "random", "classwise", "full"]
    figure = accuracy_plots.draw_training(log, {"2s": {method: [log] for method in trained}})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 1 + len(trained)
    assert figure.bbox.x0 <= legend.get_window_extent().x0 < legend.get_window_extent().x1 <= figure.bbox.x1


def assert_in_view(axis, lines):
    left, right = axis.get_xlim()
    bottom, top = axis.get_ylim()
    assert lines
    for line in lines:
        x, y = np.asarray(line.get_xydata()).T
        assert ((left <= x) & (x <= right) & (bottom <= y) & (y <= top)).all()


def test_all_points_are_in_view(methods):
    missing = pd.DataFrame(
        [
            {
                "method": "nonn",
                "network": "2s",
                "missing": k,
                "mean": 0.9 - k / 9,
                "mean_sd": 0.01,
                "worst": 0.9 - k / 8,
            }
            for k in range(2)
        ]
    ).assign(worst_sd=None)
    (axis,) = accuracy_plots.draw_missing_devices(missing, {"2s": "rescaled"}, {"2s": 3}, 100).axes
    assert_in_view(axis, [line for line in axis.lines if len(line.get_xdata()) == 2])
    (axis,) = accuracy_plots.draw_accuracy_memory(methods, {"2s": [0.1]}, 100).axes
    assert_in_view(axis, [container.lines[0] for container in axis.containers])
    assert len(axis.containers) == len(methods)


def test_every_method_is_named_beside_its_point(methods):
    (axis,) = accuracy_plots.draw_accuracy_memory(methods, {"2s": [0.1]}, 100).axes
    named = [text.get_text() for text in axis.texts if not text.get_text().startswith("budget")]
    assert sorted(named) == sorted(plots.METHODS[m].label for m in methods["method"])


def test_every_method_is_drawn_at_its_memory_and_accuracy(methods):
    """However crowded: a point that is moved aside reads as another number."""
    (axis,) = accuracy_plots.draw_accuracy_memory(methods, {"2s": [0.1]}, 100).axes
    drawn = [container.lines[0] for container in axis.containers]
    assert all(line.get_transform() == axis.transData for line in drawn)
    places = sorted(tuple(line.get_xydata()[0]) for line in drawn)
    wanted = zip(methods["memory_bytes_per_device"] / 1024, methods["accuracy_mean"], strict=True)
    assert np.array(places) == pytest.approx(np.array(sorted(wanted)))
    (budget,) = [line for line in axis.lines if list(line.get_ydata()) == [0, 1]]
    assert list(budget.get_xdata()) == [0.1, 0.1]


def contrast_to_white(colour):
    """Of WCAG 2: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    channels = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)


def test_every_colour_stands_out_from_white():
    """3 to 1 is what WCAG 2.2 asks of graphics (success criterion 1.4.11)."""
    assert contrast_to_white("black") == pytest.approx(21)
    colours = {look.colour for look in plots.METHODS.values()} | set(plots.STUDENT_COLOURS)
    assert len(colours) == len(plots.METHODS) + len(plots.STUDENT_COLOURS), "each means one thing"
    assert {colour for colour in colours if contrast_to_white(colour) < 3} == set()


@pytest.mark.parametrize(
    "architecture",
    [
        {"family": "fast", "widths": [6, 8, 10], "depth": 2},
        {"family": "airbench", "widths": [6, 8, 10], "depth": 2},
        {"family": "airbench", "widths": [6, 8, 10], "depth": 3, "strided": True},
        {"family": "wrn", "depth": 10, "width": 1},
        {"family": "resnet", "depth": 8, "width": 1},
        {"family": "fast", "widths": [6, 7, 8, 10], "depth": 1},
        {"family": "mobilenet", "widths": [4, 6, 8, 10], "depth": 2},
    ],
    ids=lambda architecture: architecture["family"],
)
@pytest.mark.parametrize("size", [28, 30, 32])
def test_blocks_are_those_of_the_network(architecture, size):
    architecture = Architecture(**architecture)
    blocks = design_plots.list_blocks(architecture, 3, size, 5)
    model = ConvNet(architecture, 3, 10, 5).eval()
    maps = model.stage_maps(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    stages = [(width, side) for name, width, side, _ in blocks if name.startswith("stage")]
    assert stages == [tuple(one.shape[1:3]) for one in maps]
    stem = model.stem(model.normalize(torch.zeros(1, 3, size, size)))
    assert ("stem", stem.shape[1]) in [block[:2] for block in blocks]
    assert blocks[-1] == ("bridge", 5, maps[-1].shape[-1], 1)


def test_chosen_students_stand_within_their_budgets(inside):
    params, paths = inside
    network = next(iter(params.networks))
    students, devices = figures_stage.load_students(params, paths)[network], params.budgets_of(network)
    candidates = read_json(paths.candidates(network))
    drawn = design_plots.draw_student_selection({network: candidates}, {network: students}, {network: devices})
    (axis,) = drawn.axes
    (chosen,) = [line for line in axis.lines if line.get_marker() == "o"]
    x, y = chosen.get_xydata().T
    assert (x <= devices[0].memory_kib).all()
    assert (y <= devices[0].mmacs).all()
    (curve,) = [line for line in axis.lines if line.get_marker() == "."]
    assert len(curve.get_xdata()) == len(candidates) > 1
