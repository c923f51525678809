"""Tables and claims, by numbers computed by hand and from a small made-up experiment."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from reports import DESIGNS, LATENCIES, N_CLASSES, PARAMS, ROWS, cost, row

from nonn.core.errors import UserError
from nonn.core.files import read_json, write_json
from nonn.core.params import STRATEGIES
from nonn.core.system import describe_system
from nonn.report import inputs, method_table, missing_table, summary
from nonn.stages import design as design_stage
from nonn.stages import figures as figures_stage


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
        fitted = inputs.load_designs(params, paths)[network, "ensemble_fitted"]
        assert [student["n_filters"] for student in fitted] == [member["architecture"]["widths"][-1]] * n_devices


def write_report(methods, comparison):
    return summary.format_report(
        methods,
        params=PARAMS,
        comparisons=[comparison],
        ratios=pd.DataFrame({"NoNN": ["2.0×"]}),
        splits=pd.DataFrame({"Assumed": ["that it fits"], "Ratio": ["9.0×"]}),
        energies=pd.DataFrame({"Assumed": ["that it fits"], "Ratio": ["3.0×"]}),
        latencies=pd.DataFrame({"Link": ["wifi20"]}),
        missing=missing_table.format_missing(STRATEGY_ROWS),
        n_test=500,
        system=describe_system(),
    )


def test_summary_csv_by_hand(methods):
    assert summary.format_csv(methods, method_table.COLUMNS) == (
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
        "n_seeds": 2,
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
        "best_fitting_baseline": "ensemble",
        "best_fitting_baseline_accuracy": 0.95,
        "best_fitting_baseline_beaten": False,
        "p_value_fitting": 0.5,
    }


def test_a_baseline_that_fits_on_no_device_is_not_the_best_fitting_one(methods):
    larger = methods[methods["method"] == "ensemble"].assign(method="total", accuracy_mean=0.97, p_value_vs_nonn=0.01)
    comparison = method_table.compare_network(pd.concat([methods, larger], ignore_index=True), "2s")
    assert (comparison["best_baseline"], comparison["best_fitting_baseline"]) == ("total", "ensemble")
    assert (comparison["p_value"], comparison["p_value_fitting"]) == (0.01, 0.5)


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
        (0.96, 1.0, False, "NoNN is as accurate as the ensemble."),
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


def ensemble_row(missing, mean, worst):
    about = {"method": "ensemble", "network": "2s", "missing": missing, "n_subsets": missing + 1}
    return about | {"mean": mean, "mean_sd": None, "worst": worst, "worst_sd": None}


STRATEGY_ROWS = missing_table.join_rows(
    {
        "rows": [{"network": "2s", "method": "ensemble", "n_seeds": 2}],
        "missing_strategies": [
            strategy_row("rescale", 0, 0, 0.95, 0.95),
            strategy_row("rescale", 0, 1, 0.8, 0.7),
            strategy_row("fail_out", 3, 0, 0.95, 0.95),
            strategy_row("fail_out", 3, 1, 0.85, 0.75),
        ],
        "missing": [ensemble_row(0, 0.94, 0.94), ensemble_row(1, 0.82, 0.81)],
    },
    ["2s"],
)


def test_missing_csv_by_hand():
    assert summary.format_csv(STRATEGY_ROWS, missing_table.COLUMNS) == (
        "network,method,strategy,chosen,missing,n_subsets,n_seeds,mean,mean_sd,worst\n"
        "2s,nonn,rescale,0,0,1,3,0.950000,,0.950000\n"
        "2s,nonn,rescale,0,1,2,3,0.800000,0.010000,0.700000\n"
        "2s,nonn,fail_out,3,0,1,3,0.950000,,0.950000\n"
        "2s,nonn,fail_out,3,1,2,3,0.850000,0.010000,0.750000\n"
        "2s,ensemble,,,0,1,2,0.940000,,0.940000\n"
        "2s,ensemble,,,1,2,2,0.820000,,0.810000\n"
    )


def test_the_report_tells_of_missing_devices(methods):
    report = write_report(methods, method_table.compare_network(methods, "2s"))
    section = report.partition("## When devices are missing\n")[2].partition("\n## ")[0]
    assert section.splitlines()[-6:] == [
        "",
        "| 2s | Chosen by | 1 missing |",
        "| :-- | --: | --: |",
        "| Rescaled | 0 of 3 | 80.00 % (70.00 %) |",
        "| Fail-out | 3 of 3 | 85.00 % (75.00 %) |",
        "| Ensemble of KD | – | 82.00 % (81.00 %) |",
    ]


def test_chosen_strategies_in_words():
    assert missing_table.chosen_strategies(STRATEGY_ROWS) == {"2s": "fail-out"}
    divided = pd.concat([STRATEGY_ROWS.iloc[:4].assign(chosen=[2, 2, 1, 1]), STRATEGY_ROWS.assign(network="4s")])
    assert missing_table.chosen_strategies(divided) == {"2s": "rescaled (2), fail-out (1)", "4s": "fail-out"}


def test_every_line_of_a_table_has_the_cells_of_its_heading(inside):
    params, paths = inside
    blocks = (paths / "summary.md").read_text().split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) == 5 + len(params.networks), (
        "methods, ratios, splits, energies, latencies, and devices missing from each"
    )
    for heading, rule, *lines in tables:
        assert set(rule) == set("| :-")
        assert lines
        assert {line.count("|") for line in (rule, *lines)} == {heading.count("|")}


def test_missing_csv_has_every_strategy_of_every_network(inside):
    params, paths = inside
    table = pd.read_csv(paths / "missing.csv")
    assert list(table.columns) == list(missing_table.COLUMNS)
    expected = sum(len(network.devices) for network in params.networks.values()) * len(STRATEGIES)
    strategies = table.dropna(subset=["strategy"])
    assert len(strategies) == expected
    assert len(strategies[["network", "strategy", "missing"]].drop_duplicates()) == expected
    assert set(strategies["method"]) == {"nonn"}
    assert {"nonn", "ensemble"} <= set(table.loc[table["strategy"].isna(), "method"])
    assert "## When devices are missing" in (paths / "summary.md").read_text()


def test_claims_are_of_the_network_that_is_most_accurate_on_validation_images():
    worse = {"network": "2s", "accuracy": 0.95, "validation_accuracy": 0.9}
    better = {"network": "4s", "accuracy": 0.9, "validation_accuracy": 0.95}
    assert method_table.collect_claims([worse, better]) is better


def test_claims_and_metrics_agree_with_the_table(inside):
    params, paths = inside
    table = pd.read_csv(paths / "summary.csv").set_index(["network", "method"])
    claims, metrics = (json.loads((paths / f"{name}.json").read_text()) for name in ("claims", "metrics"))
    network = claims["network"]
    assert claims["accuracy"] == table.loc[network, "nonn"]["accuracy_mean"]
    assert claims["validation_accuracy"] == max(metrics[f"{n}_validation_accuracy"] for n in params.networks)
    others = table.loc[network].drop("nonn")
    assert claims["best_baseline"] == others["accuracy_mean"].idxmax()
    assert claims["n_seeds"] == table.loc[network, "nonn"]["n_seeds"]
    # As `write_distributed` made them: a split by channels takes twice as long as NoNN, by rows three times, and each
    # of n devices n times the energy of the teacher.
    assert (claims["total_latency_ratio"], claims["total_latency_rows_ratio"]) == (2.0, 3.0)
    assert claims["total_latency_link"] in params.distributed.links
    n_devices = len(params.networks[network].devices)
    assert claims["energy_ratio"] == claims["energy_ratios"]["holds"] == pytest.approx(1 / n_devices)
    assert json.loads((paths / "ratios.json").read_text())["energy_per_node"]["ratio"] >= claims["energy_ratio"]
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
        inputs.read_log(inside[1].log(inside[1].teacher))
