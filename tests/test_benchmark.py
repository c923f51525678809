"""Rows of the benchmark. No time is asserted: only that everything is there and could be right."""

import os
import shutil

import pytest

from nonn.core.errors import UserError
from nonn.core.files import read_json, write_json, write_text
from nonn.core.system import describe_cpu, describe_system
from nonn.stages import benchmark as benchmark_stage
from nonn.testbed.latency import measure_models, summarise_ratios

COUNTED = {"params", "macs", "weight_bytes", "peak_activation_bytes"}
MEASURED = {
    "latency_p50_ms",
    "latency_p50_ms_worst",
    "latency_p99_ms",
    "latency_ratio",
    "latency_ratio_low",
    "latency_ratio_high",
    "latency_pairs",
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
    experiment.export("solo").mkdir(parents=True)
    shutil.copy(exported / "1.onnx", experiment.export("solo") / "teacher.onnx")
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
        assert row["latency_pairs"] == params.benchmark.pairs * params.benchmark.windows
        assert 0 < row["latency_ratio_low"] <= row["latency_ratio"] <= row["latency_ratio_high"]


def test_the_interval_of_a_ratio_by_hand():
    """The medians of the three windows are 2, 4 and 8: logarithms 1, 2 and 3 to base 2, of standard error 1 / √3."""
    found = summarise_ratios([[2, 2, 90], [3, 4, 5], [8, 8, 8]])
    assert found["latency_ratio"] == pytest.approx(4)
    margin = 4.3027 / 3**0.5  # the 97.5 % point of Student's t with 2 degrees of freedom
    assert found["latency_ratio_low"] == pytest.approx(2 ** (2 - margin), rel=1e-4)
    assert found["latency_ratio_high"] == pytest.approx(2 ** (2 + margin), rel=1e-4)
    assert found["latency_pairs"] == 9


def test_a_single_window_tells_no_interval():
    found = summarise_ratios([[2.0, 3.0, 4.0]])
    assert found["latency_ratio"] == pytest.approx(3)
    assert found["latency_ratio_low"] is found["latency_ratio_high"] is None


def test_without_the_teachers_file_the_remedy_is_named(params, exported, experiment, monkeypatch):
    monkeypatch.setattr(benchmark_stage, "measure_models", lambda *_: {})
    shutil.copytree(exported, experiment.export("2s"))
    with pytest.raises(UserError, match=r"solo/teacher\.onnx: no such file"):
        benchmark_stage.run(params, experiment, "2s")


def test_solo_models_have_a_row_by_name(params, exported, experiment, monkeypatch):
    monkeypatch.setattr(
        benchmark_stage,
        "measure_models",
        lambda models, _: {name: {"measured": str(path)} for name, path in models.items()},
    )
    monkeypatch.setattr(
        benchmark_stage,
        "measure_ratios",
        lambda teacher, models, _: {name: {"beside": teacher.name} for name in models},
    )
    student = read_json(exported / "manifest.json")["students"][0]
    folder = experiment.export("solo")
    write_text(folder / "teacher.onnx", "")
    write_json(folder / "manifest.json", {"teacher": {"students": [student]}, "2s-kd": {"students": [student]}})
    benchmark_stage.run(params, experiment, "solo")
    rows = read_json(experiment.benchmark("solo"))["models"]
    alone = student["cost"] | {"measured": str(folder / "0.onnx")}
    assert rows == {"teacher": alone, "2s-kd": alone | {"beside": "teacher.onnx"}}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to a core")
def test_a_core_that_is_not_there_is_refused(params, exported):
    with pytest.raises(UserError, match=r"params\.yaml: benchmark\.core: this machine has the cores \[.*choose one"):
        measure_models({"0": exported / "0.onnx"}, section(params, core=4096))


def test_the_system_is_named():
    system = describe_system()
    assert set(system) == {"cpu", "cores", "system", "python", "onnxruntime", "torch"}
    assert all(system.values())


@pytest.mark.parametrize(
    ("cpuinfo", "described"),
    [
        (
            "model name\t: AMD EPYC\nflags\t\t: sse2 avx2 avx512f avx512_vnni\n\nmodel name\t: other\n",
            "AVX2, AVX-512, VNNI",
        ),
        ("model name\t: AMD EPYC\nflags\t\t: sse2\n", None),
    ],
)
def test_a_processor_is_described_with_the_instructions_that_decide_its_speed(cpuinfo, described):
    assert describe_cpu(cpuinfo) == " with ".join(filter(None, ("AMD EPYC", described)))


def test_a_processor_that_linux_does_not_name_is_described_by_its_type():
    assert describe_cpu("processor\t: 0\nBogoMIPS\t: 108.00\n") is None
    assert describe_system()["cpu"]
