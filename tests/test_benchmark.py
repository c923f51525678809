"""Rows of the benchmark. No time is asserted: only that everything is there and could be right."""

import os
import shutil

import pytest

from nonn.core.errors import UserError
from nonn.core.files import read_json, write_json
from nonn.core.system import describe_system
from nonn.stages import benchmark as benchmark_stage
from nonn.testbed.latency import measure_models

COUNTED = {"params", "macs", "weight_bytes", "peak_activation_bytes"}
MEASURED = {
    "latency_p50_ms",
    "latency_p50_ms_worst",
    "latency_p99_ms",
    "session_memory_kib",
    "runs",
    "windows",
    "pinned",
}


def section(params, **changes):
    """The benchmark section, on a core that this process may use."""
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return params.benchmark.model_copy(update={"core": core} | changes)


def test_the_stage_writes_a_row_for_each_student(params, exported, experiment):
    shutil.copytree(exported, experiment.export("2s"))
    benchmark_stage.run(params.model_copy(update={"benchmark": section(params)}), experiment, "2s")
    result = read_json(experiment.benchmark("2s"))
    assert result["system"] == describe_system()
    assert set(result["models"]) == {"0", "1"}
    manifest = read_json(exported / "manifest.json")
    for position, row in result["models"].items():
        assert set(row) == COUNTED | MEASURED
        assert {key: row[key] for key in COUNTED} == manifest["students"][int(position)]["cost"]
        assert (row["runs"], row["windows"]) == (params.benchmark.runs, params.benchmark.windows)
        assert 0 < row["latency_p50_ms"] <= row["latency_p99_ms"]
        assert row["latency_p50_ms"] <= row["latency_p50_ms_worst"]
        assert row["session_memory_kib"] > 0


def test_solo_models_have_a_row_by_name(params, exported, experiment, monkeypatch):
    monkeypatch.setattr(
        benchmark_stage,
        "measure_models",
        lambda models, _: {name: {"measured": str(path)} for name, path in models.items()},
    )
    student = read_json(exported / "manifest.json")["students"][0]
    folder = experiment.export("solo")
    write_json(folder / "manifest.json", {"teacher": {"students": [student]}, "2s-kd": {"students": [student]}})
    benchmark_stage.run(params, experiment, "solo")
    rows = read_json(experiment.benchmark("solo"))["models"]
    assert rows == dict.fromkeys(("teacher", "2s-kd"), student["cost"] | {"measured": str(folder / "0.onnx")})


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to a core")
def test_a_core_that_is_not_there_is_refused(params, exported):
    with pytest.raises(UserError, match=r"params\.yaml: benchmark\.core: this machine has the cores \[.*choose one"):
        measure_models({"0": exported / "0.onnx"}, section(params, core=4096))


def test_the_system_is_named():
    system = describe_system()
    assert set(system) == {"cpu", "cores", "system", "python", "onnxruntime", "torch"}
    assert all(system.values())
