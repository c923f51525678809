"""Devices at once: live rows, composed ones, and the stage on a tiny network."""

import asyncio
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from clusters import CLASSES
from loads import CORE, WORKLOAD, on_a_pi, student_row
from splits import COST, in_int8, write_tiny

from nonn.core.architecture import Architecture
from nonn.core.files import read_json, write_json
from nonn.core.links import PRESETS, Link
from nonn.core.names import COORDINATOR
from nonn.core.paths import Paths
from nonn.core.system import describe_system
from nonn.runtime.cluster import local_cluster
from nonn.runtime.coordinator import Coordinator
from nonn.runtime.exported import read_manifest
from nonn.runtime.node import ServedStudent
from nonn.runtime.serving import serving
from nonn.runtime.session import run_onnx
from nonn.stages import distributed as distributed_stage
from nonn.stages.distributed import network_deployments, solo_deployments
from nonn.testbed import composed, distributed
from nonn.testbed.composed import Workload, compose, payload_bytes
from nonn.testbed.deployments import Deployment, as_network, sent_once
from nonn.testbed.distributed import LOOPBACK, compose_all, echo_sizes, framing_of, measure_live, overhead
from nonn.testbed.emulation import Counters, EmulatedNetwork, missing_privileges
from nonn.testbed.trial import Measured

#: A byte takes a microsecond; and the same as one medium for all.
MEGABYTE, SHARED = Link(8e6), Link(8e6, shared=True)
DELAYED = Link(8e6, 0.001)


@pytest.fixture(scope="module")
def section(params):
    return on_a_pi(params.distributed)


# A model that runs alone, as a network


def test_a_model_alone_gives_the_same_logits_as_a_network_of_one(solo_folder, tmp_path):
    folder = as_network(solo_folder, "teacher", tmp_path / "network")
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 28, 28), dtype=np.uint8)
    expected = run_onnx(solo_folder / "model.onnx", images)
    assert (expected < 0).any()  # features of a student never are
    assert read_manifest(folder).students[0].feature_limit is None

    async def scenario():
        async with serving(ServedStudent(folder / "0.onnx"), "127.0.0.1:0") as (port, _):
            cluster = local_cluster(folder, None, port, 20_000)
            async with Coordinator(cluster) as coordinator:
                for image, logits in zip(images, expected, strict=True):
                    answer = await coordinator.classify(image)
                    np.testing.assert_array_equal(answer.features["node-0"], logits)
                    exponentials = np.exp(logits.astype(float) - logits.max())
                    np.testing.assert_allclose(answer.prediction.probabilities, exponentials / exponentials.sum())
                    assert answer.prediction.label == f"class {logits.argmax()}"

    asyncio.run(scenario())


# Live rows, without devices


def counted(latencies_ms: list[float], absent: int, scale: int = 1) -> Measured:
    """Two images: 2000 bytes of the coordinator, 600 and 1000 of its devices, or so many times as much."""
    counts = {COORDINATOR: (2000, 20, 1600, 16), "host-0": (600, 6, 1000, 10), "host-1": (1000, 10, 1000, 10)}
    traffic = {host: Counters(*(scale * count for count in own)) for host, own in counts.items()}
    return Measured(np.array(latencies_ms), absent, traffic)


class PaperBed:
    """A test bed on which nothing runs."""

    def __init__(self, params):
        self.params, self.asked = params, []

    def measure(self, deployment, _, exchanges, is_echo=False):
        self.asked.append((deployment.method, list(exchanges)))
        if is_echo:
            return [Measured(np.array([1.0, 2.0]), 0, {}) for _ in exchanges]
        return [counted([3.0, 5.0], absent=1, scale=2000 if deployment.is_split else 1) for _ in exchanges]


def deployment(method: str, workload: Workload) -> Deployment:
    return Deployment(method, None, method != "nonn", workload, 0.001)


HEAVY = replace(WORKLOAD, payload=[{("0", "1"): 1e6, ("1", "0"): 1e6}])


def test_live_rows_by_hand_and_cases_that_take_too_long(section, monkeypatch):
    monkeypatch.setattr(distributed, "missing_privileges", lambda: None)
    monkeypatch.setattr(
        distributed, "emulated_network", lambda hosts, link: nullcontext(EmulatedNetwork(tuple(hosts), link))
    )
    links = section.model_copy(update={"links": ["ieee802154", "ethernet100"], "longest": 10.0})
    bed = PaperBed(links)
    live = measure_live([deployment("nonn", WORKLOAD), deployment("rows", HEAVY)], bed, links)
    where = [(row["link"], row["method"], row["scenario"], row["images"]) for row in live]
    assert where == [  # no link and then the fastest first
        (LOOPBACK, "nonn", "sensor", 2),
        (LOOPBACK, "nonn", "broadcast", 2),
        ("ethernet100", "nonn", "sensor", 2),
        ("ethernet100", "nonn", "broadcast", 2),
        ("ethernet100", "rows", "sensor", 2),
        ("ieee802154", "nonn", "sensor", 2),
        ("ieee802154", "nonn", "broadcast", 2),
        ("ieee802154", "rows", "sensor", 0),
    ]
    # Echoes are as large as what the first device gets and sends.
    both = [("nonn", ["sensor", "broadcast"]), ("nonn", [(240, 144), (240, 144)])]
    assert bed.asked == [*both, *both, ("rows", ["sensor"]), *both]
    first, third, last = live[2], live[4], live[-1]
    assert (first["p50_ms"], first["p95_ms"], first["absent"]) == (4.0, pytest.approx(4.9), 1)
    assert (first["wire_bytes"], first["wire_packets"], first["device_bytes"]) == (1800, 18, 1000)
    # For 2 · (8 + 1000 + 500) bytes of payload, and for 2 · (8 + 1,000,000 + 500).
    assert first["framing"] == pytest.approx(1800 / 3016)
    assert third["framing"] == pytest.approx(3.6e6 / 2_001_016)
    assert "overhead_ms" in first
    assert "overhead_ms" not in third
    # 3.6 MB at 250 kbit/s, as it was counted on the fast link.
    assert last["expected_ms"] == pytest.approx(1e3 * 3.6e6 * 8 / 250e3)


def test_without_emulation_everything_runs_on_loopback(section, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "missing_privileges", lambda: "no namespaces here")
    live = measure_live([deployment("nonn", WORKLOAD), deployment("rows", HEAVY)], PaperBed(section), section)
    assert [(row["link"], row["method"]) for row in live] == [(LOOPBACK, m) for m in ("nonn", "nonn", "rows")]
    assert "no namespaces here" in capsys.readouterr().err


def test_echoes_are_of_the_sizes_that_were_counted_or_are_expected():
    nonn, uncounted = deployment("nonn", WORKLOAD), Measured(np.array([50.0, 70.0]), 0, {})
    # Of an image, host-0 got 5 packets in 500 bytes and sent 3 in 300, with headers of 52 bytes each.
    assert echo_sizes(nonn, "broadcast", counted([50.0, 70.0], absent=0), "host-0") == (240, 144)
    assert [echo_sizes(nonn, scenario, uncounted, "host-0") for scenario in ("sensor", "broadcast")] == [
        (208, 700),
        (2200, 700),
    ]


def test_overhead_is_what_neither_the_slowest_device_nor_the_link_takes():
    echo = Measured(np.array([1.0, 2.0]), 0, {})
    row = overhead(deployment("nonn", WORKLOAD), Measured(np.array([50.0, 70.0]), 0, {}), echo)
    # The slowest device's 40 ms of computing, and an echo of 1.5 ms.
    assert row == {"ideal_ms": 41.5, "overhead_ms": 18.5, "ideal_over_total": pytest.approx(41.5 / 60)}


def test_framing_is_that_of_the_deployment_in_the_scenario_or_the_nearest_to_it():
    live = [
        {"method": "nonn", "scenario": "sensor", "framing": 9.0},
        {"method": "nonn", "scenario": "broadcast", "framing": 2.0},
        {"method": "rows", "scenario": "sensor", "framing": 3.0},
        {"method": "nonn", "scenario": "broadcast", "framing": 2.5},  # on a slower link
        {"method": "channels", "scenario": "sensor", "images": 0},
    ]
    cases = {("nonn", "sensor"): 9.0, ("nonn", "broadcast"): 2.0, ("rows", "broadcast"): 3.0, ("channels", "sensor"): 1}
    cases |= {("reference_rows", "sensor"): 3.0, ("kd", "sensor"): 1}
    for (method, scenario), framing in cases.items():
        assert framing_of(deployment(method, WORKLOAD), scenario, live) == framing


def test_only_on_a_shared_medium_is_a_map_sent_once(section):
    links = section.model_copy(update={"links": ["ieee802154", "ethernet100"]})
    rows = list(compose_all([sent_once(deployment("channels", WORKLOAD))], [], links))
    assert {(row["method"], row["link"]) for row in rows} == {("channels_multicast", "ieee802154")}


def test_a_composed_row_for_every_deployment_link_and_scenario(section):
    links = section.model_copy(update={"links": ["wifi20", "ethernet941"]})
    live = [{"method": "rows", "scenario": "sensor", "framing": 3.0}]
    rows = list(compose_all([deployment("nonn", WORKLOAD), deployment("reference_rows", HEAVY)], live, links))
    assert len({(row["method"], row["link"], row["scenario"]) for row in rows}) == len(rows) == 8
    for row in rows:
        workload = WORKLOAD if row["method"] == "nonn" else HEAVY
        framing = 1.0 if row["method"] == "nonn" else 3.0
        expected = compose(workload, PRESETS[row["link"]], row["scenario"], framing, 0.001, links)
        assert {key: row[key] for key in expected} == expected
        assert (row["n_devices"], row["rounds"], row["memory_bytes"], row["macs"]) == (2, 1, 1000, 60e6)


# The stage


@pytest.fixture
def stage(params, section, network_folder, folder, monkeypatch):
    """Parameters and paths of a hand-made experiment: three students, and the same budget as one network."""
    paths = Paths("tiny")
    write_json(paths.dataset_info, {"classes": CLASSES, "channels": 1, "size": 4})
    (folder / paths.export("3s")).parent.mkdir(parents=True)
    paths.export("3s").symlink_to(network_folder)
    write_json(
        paths.benchmark("3s"), {"system": describe_system(), "models": {str(i): student_row(i) for i in range(3)}}
    )
    paths.export("solo").mkdir()
    write_tiny(paths.export("solo") / "3s-total.onnx")
    alone = {"students": [{"file": "3s-total.onnx", "cost": COST}]}
    write_json(paths.export("solo") / "manifest.json", {"3s-total": alone})
    monkeypatch.setattr(composed, "COMPUTE_RUNS", 3)
    changes = {"benchmark": params.benchmark.model_copy(update={"core": CORE}), "distributed": section}
    networks = params.networks | {
        "3s": params.networks["2s"].model_copy(update={"devices": ["small"] * 3, "baselines": {}})
    }
    return params.model_copy(update=changes | {"networks": networks}), paths


def all_numbers(content) -> list[float]:
    if isinstance(content, dict | list):
        parts = content.values() if isinstance(content, dict) else content
        return [number for part in parts for number in all_numbers(part)]
    return [content] if isinstance(content, int | float) else []


LIVE = {"method", "scenario", "link", "emulated", "absent", "images", "p50_ms", "p95_ms", "p99_ms"}
LIVE |= {"wire_bytes", "wire_packets", "device_bytes"}
OVERHEAD = {"ideal_ms", "overhead_ms", "ideal_over_total"}
ENERGIES = {f"energy_{which}{idle}_mj" for which in ("node", "total") for idle in ("", "_computing", "_with_idle")}
COMPOSED = {"method", "n_devices", "rounds", "memory_bytes", "macs", "link", "scenario", "framing", "wire_bytes"}
COMPOSED |= {"compute_ms", "link_ms", "final_ms", "total_ms", "precision", "boards"} | ENERGIES


def test_the_stage_writes_all_rows(stage, monkeypatch):
    params, paths = stage
    monkeypatch.setattr(distributed_stage, "SPLITS", ("rows",))  # saves seconds
    monkeypatch.setattr("nonn.deploy.reference.export_onnx", export_tiny)
    reference = Architecture(family="fast", widths=[4, 4, 4], depth=1)
    section = params.distributed.model_copy(update={"reference": reference})
    distributed_stage.run(params.model_copy(update={"distributed": section}), paths, "3s")
    result = read_json(paths.distributed("3s"))
    assert result["system"] == describe_system()
    assert all(map(math.isfinite, all_numbers(result)))
    live, calculated = result["live"], result["composed"]
    nonn = [("nonn", "sensor"), ("nonn", "broadcast")]
    emulated = missing_privileges() is None
    links = ["loopback", "ethernet100"] if emulated else ["loopback"]
    measured = [*nonn, *nonn, ("rows", "sensor")] if emulated else [*nonn, ("rows", "sensor")]
    assert [(row["method"], row["scenario"]) for row in live] == measured
    assert list(dict.fromkeys(row["link"] for row in live)) == links
    for row in live:
        on_link = row["link"] != LOOPBACK
        assert set(row) == LIVE | (OVERHEAD if row["method"] == "nonn" else set()) | ({"framing"} if on_link else set())
        assert (row["emulated"], row["absent"], row["images"]) == (on_link, 0, 2)
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert not on_link or row["framing"] > 1
    methods = ["nonn", "rows", "reference_rows"]
    expected = [(method, scenario) for method in methods for scenario in ("sensor", "broadcast")]
    assert [(row["method"], row["scenario"]) for row in calculated] == expected
    for row in calculated:
        assert set(row) == COMPOSED
        assert (row["n_devices"], row["rounds"]) == (3, 0 if row["method"] == "nonn" else 1)
        assert row["total_ms"] == pytest.approx(row["compute_ms"] + row["link_ms"] + row["final_ms"])
        assert all(0 < low <= high for low, high in (row[key] for key in ENERGIES))
    assert calculated[0]["compute_ms"] == pytest.approx(3 * 3)  # the slowest student's, on a board a third as fast
    if emulated:
        assert calculated[0]["wire_bytes"] == pytest.approx(live[2]["wire_bytes"])


def export_tiny(model, example, path, *_):
    """In place of an export that takes seconds: the hand-made model, after a look at the one that was meant."""
    assert model.eval()(example.repeat(1, 1, 8, 8)).shape == (1, len(CLASSES))
    write_tiny(path)


def test_without_a_network_of_the_total_budget_there_is_none_to_split(stage, tmp_path, capsys):
    params, paths = stage
    write_json(paths.export("solo") / "manifest.json", {})
    (only,) = network_deployments(params, paths, "3s", tmp_path / "scratch")
    assert (only.method, only.is_split, only.workload.n_devices) == ("nonn", False, 3)
    assert only.final_s > 0
    assert "note: there is no baseline 3s/total" in capsys.readouterr().err


def test_int8_networks_are_split_as_they_are(stage, tmp_path):
    """And charged as such, on a board that cannot be timed here."""
    params, paths = stage
    in_int8(paths.export("solo") / "3s-total.onnx")
    changes = {"design": params.design.model_copy(update={"precision": "int8"})}
    changes["distributed"] = params.distributed.model_copy(update={"board": "cortex_m7"})
    params = params.model_copy(update=changes)
    nonn, *splits = network_deployments(params, paths, "3s", tmp_path / "scratch")
    assert [each.method for each in splits] == ["channels", "rows"]
    assert {each.workload.precision for each in (nonn, *splits)} == {"int8"}
    by_channels = splits[0].workload
    # Each of 4 channels of 4×4 values goes to two other devices, a byte a value.
    assert payload_bytes(by_channels.payload) == 2 * 4 * 16
    row = next(compose_all(splits[:1], [], params.distributed))
    assert (row["precision"], row["boards"]) == ("int8", ["cortex_m7"] * 3)
    assert row["compute_ms"] == pytest.approx(1e3 * by_channels.macs.max(axis=1).sum() / 227.5e6)


def test_the_reference_is_in_the_precision_of_the_students(stage, tmp_path):
    params, paths = stage
    write_json(paths.dataset_info, {"classes": CLASSES, "channels": 1, "size": 28})
    reference = Architecture(family="fast", widths=[4, 4, 4], depth=1)
    changes = {"design": params.design.model_copy(update={"precision": "int8"})}
    changes["distributed"] = params.distributed.model_copy(update={"reference": reference})
    (tmp_path / "scratch").mkdir()
    found = list(
        distributed_stage.reference_deployments(params.model_copy(update=changes), paths, "3s", tmp_path / "scratch")
    )
    assert [(each.method, each.workload.precision) for each in found] == [
        ("reference_channels", "int8"),
        ("reference_rows", "int8"),
    ]


def test_a_network_that_also_sees_the_mirror_image_is_split_as_a_single_pass(stage, tmp_path):
    params, paths = stage
    entry = {"file": "missing.onnx", "single_pass": "3s-total.onnx", "cost": COST}
    write_json(paths.export("solo") / "manifest.json", {"3s-total": {"students": [entry]}})
    assert [deployment.is_split for deployment in network_deployments(params, paths, "3s", tmp_path / "scratch")] == [
        False,
        True,
        True,
    ]


def test_teacher_and_student_alone_are_networks_of_one_device(stage, solo_folder, tmp_path):
    params, paths = stage
    for path in solo_folder.iterdir():
        (paths.export("solo") / path.name).write_bytes(path.read_bytes())
    models = {"teacher": student_row(4), "2s-kd": student_row(0)}
    write_json(paths.benchmark("solo"), {"system": describe_system(), "models": models})
    teacher, student = solo_deployments(params, paths, tmp_path / "scratch")
    assert [teacher.method, student.method] == ["teacher", "kd"]
    assert [each.workload.n_devices for each in (teacher, student)] == [1, 1]
    assert (teacher.workload.seconds.item(), student.workload.seconds.item()) == (0.005, 0.001)
    assert (teacher.workload.image_bytes, teacher.workload.answer_bytes, teacher.workload.payload) == (784, [40], [])
    assert not teacher.is_split
    assert teacher.final_s > 0
