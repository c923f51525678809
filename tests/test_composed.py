"""Latency and energy that are composed of counted bytes and operations, by hand, and what they are composed of."""

import os
from dataclasses import replace

import numpy as np
import pytest
from clusters import N_FEATURES
from loads import CORE, WORKLOAD, on_a_pi, student_row
from splits import write_tiny

from nonn.core.links import Link, link_seconds
from nonn.core.names import COORDINATOR
from nonn.split.planner import plan_split
from nonn.testbed import composed
from nonn.testbed.composed import Workload, compose, network_workload, payload_bytes, split_workload
from nonn.testbed.deployments import time_final

#: A byte takes a microsecond; and the same as one medium for all.
MEGABYTE, SHARED = Link(8e6), Link(8e6, shared=True)
DELAYED = Link(8e6, 0.001)


@pytest.fixture(scope="module")
def section(params):
    return on_a_pi(params.distributed)


# Times


def test_the_final_layer_is_timed_on_one_core_and_not_by_its_luckiest_moment(network_folder, monkeypatch):
    core, cores = min(os.sched_getaffinity(0)), []

    def repeat(work, number, **_):
        work()
        cores.append(os.sched_getaffinity(0))
        return [number * seconds for seconds in (1.0, 3.0, 50.0)]

    monkeypatch.setattr("timeit.repeat", repeat)
    assert time_final(network_folder, core) == 3
    assert cores == [{core}]


# The link, by hand


@pytest.mark.parametrize(
    ("transfers", "full_duplex", "shared"),
    [
        ({}, 0, 0),
        ({("a", "b"): 1000}, 1, 1),
        # Both ways and other pairs at once.
        ({("a", "b"): 1000, ("b", "a"): 700, ("c", "d"): 300}, 1, 2),
        # One sends to all, all send to one.
        ({("a", "b"): 1000, ("a", "c"): 500}, 1.5, 1.5),
        ({("b", "a"): 1000, ("c", "a"): 1000, ("d", "a"): 1000}, 3, 3),
        # Everybody sends everybody the same.
        ({(a, b): 100 for a in "abcd" for b in "abcd" if a != b}, 0.3, 1.2),
    ],
    ids=["nothing", "one", "pairs", "broadcast", "incast", "all-gather"],
)
def test_milliseconds_on_the_link_by_hand(transfers, full_duplex, shared):
    assert 1e3 * link_seconds(MEGABYTE, transfers) == pytest.approx(full_duplex)
    assert 1e3 * link_seconds(SHARED, transfers) == pytest.approx(shared)
    delay = 1 if transfers else 0  # once for all that is sent at once
    assert 1e3 * link_seconds(DELAYED, transfers) == pytest.approx(full_duplex + delay)


def test_an_image_is_asked_for_exchanged_and_answered():
    request, exchange, answer = WORKLOAD.transfers("broadcast")
    assert request == {(COORDINATOR, "0"): 2000, (COORDINATOR, "1"): 2000}
    assert exchange == WORKLOAD.payload[0]
    assert answer == {("0", COORDINATOR): 500, ("1", COORDINATOR): 500}
    assert payload_bytes(WORKLOAD.transfers("broadcast")) == 2 * (2000 + 1000 + 500)
    assert WORKLOAD.transfers("sensor")[0] == {(COORDINATOR, "0"): 8, (COORDINATOR, "1"): 8}
    assert payload_bytes(WORKLOAD.transfers("sensor")) == 2 * (8 + 1000 + 500)


def test_a_map_that_all_hear_is_transmitted_once(section):
    exchange = {(a, b): 1000 for a in "012" for b in "012" if a != b}
    workload = replace(WORKLOAD, seconds=np.zeros((1, 3)), macs=np.zeros((1, 3)), payload=[exchange])
    workload = replace(workload, answer_bytes=[100, 100, 100])
    apart, once = (replace(workload, sent_once=flag) for flag in (False, True))
    link = [1e-3 * compose(each, SHARED, "sensor", 1.0, 0.0, section)["link_ms"] for each in (apart, once)]
    assert link == pytest.approx([(3 * 8 + 6 * 1000 + 300) * 1e-6, (8 + 3 * 1000 + 300) * 1e-6])
    # A device sends its map once in place of twice, and its answer; it hears all that it heard before.
    energies = [compose(each, SHARED, "sensor", 1.0, 0.0, section)["energy_node_mj"][1] for each in (apart, once)]
    assert energies[0] / energies[1] == pytest.approx((8 + 4000 + 100) / (8 + 3000 + 100))


# Latency and energy, by hand


def test_latency_and_energy_by_hand(section):
    row = compose(WORKLOAD, DELAYED, "sensor", framing=2.0, final_s=0.005, params=section)
    compute = 3 * (0.020 + 0.040)
    # 16, 1000 and 1000 bytes at each host that has most to do, twice because of the framing, and three delays.
    link = 2 * (16 + 1000 + 1000) * 1e-6 + 0.003
    total = compute + link + 0.005
    assert row["compute_ms"] == pytest.approx(1e3 * compute)
    assert row["link_ms"] == pytest.approx(1e3 * link)
    assert row["final_ms"] == pytest.approx(5)
    assert row["total_ms"] == pytest.approx(1e3 * total)
    assert row["wire_bytes"] == 2 * 2 * (8 + 1000 + 500)
    # Each device gets 8 bytes, sends 1000, gets 1000, and sends 500; twice because of the framing.
    bits = 8 * 2 * (8 + 1000 + 1000 + 500)
    spent = [3 * (0.010 + 0.040), 3 * (0.020 + 0.035)]
    low = [1e3 * (0.575 * s + bits * 10e-9) for s in spent]
    high = [1e3 * (2.3 * s + bits * 50e-9) for s in spent]
    idle = 1e3 * 1.4 * total
    assert row["energy_node_mj"] == pytest.approx([low[1], high[1]])
    assert row["energy_total_mj"] == pytest.approx([sum(low), sum(high)])
    while_computing = 1e3 * 1.4 * spent[1]
    assert row["energy_node_computing_mj"] == pytest.approx([low[1] + while_computing, high[1] + while_computing])
    assert row["energy_node_with_idle_mj"] == pytest.approx([low[1] + idle, high[1] + idle])
    assert row["energy_total_with_idle_mj"] == pytest.approx([sum(low) + 2 * idle, sum(high) + 2 * idle])


def test_on_a_microcontroller_the_work_counts_and_not_the_time_measured(section):
    board = section.model_copy(update={"board": "cortex_m7"})
    row = compose(WORKLOAD, MEGABYTE, "sensor", 1.0, 0.0, board)
    assert row["compute_ms"] == pytest.approx(1e3 * (30e6 + 50e6) / 46.7e6)
    slower = replace(WORKLOAD, seconds=100 * WORKLOAD.seconds)
    assert compose(slower, MEGABYTE, "sensor", 1.0, 0.0, board) == row
    # The same work in int8 takes less time, and so less energy.
    cheap = compose(replace(WORKLOAD, precision="int8"), Link(1e15), "sensor", 1.0, 0.0, board)
    assert cheap["compute_ms"] == pytest.approx(1e3 * (30e6 + 50e6) / (18.2 * 12.5e6))
    bits = 8 * (8 + 1000 + 1000 + 500)
    needs = 1e3 * (0.139 * 60e6 / 227.5e6 + bits * 50e-9)
    assert cheap["energy_node_mj"][1] == cheap["energy_node_computing_mj"][1] == pytest.approx(needs)


def test_framing_scales_bytes_and_what_they_take(section):
    plain, framed = (compose(WORKLOAD, SHARED, "broadcast", framing, 0.0, section) for framing in (1.0, 2.5))
    assert framed["wire_bytes"] == 2.5 * plain["wire_bytes"] == 2.5 * 7000
    assert framed["link_ms"] == pytest.approx(2.5 * plain["link_ms"]) == pytest.approx(2.5 * 7)
    assert framed["compute_ms"] == plain["compute_ms"]


@pytest.mark.parametrize("n_devices", [1, 2, 8])
def test_equal_devices_in_parallel_take_the_time_of_one(section, n_devices):
    workload = Workload(np.full((1, n_devices), 0.02), np.full((1, n_devices), 1e6), 1000, [], 2000, [500] * n_devices)
    one = Workload(np.full((1, 1), 0.02), np.full((1, 1), 1e6), 1000, [], 2000, [500])
    row, alone = (compose(each, Link(1e15), "sensor", 1.0, 0.0, section) for each in (workload, one))
    assert row["total_ms"] == pytest.approx(alone["total_ms"]) == pytest.approx(60)
    assert row["energy_node_mj"] == pytest.approx(alone["energy_node_mj"])
    assert row["energy_total_mj"] == pytest.approx([n_devices * end for end in alone["energy_total_mj"]])
    # Their answers come over one line, one after another.
    assert compose(workload, MEGABYTE, "sensor", 1.0, 0.0, section)["link_ms"] == pytest.approx(n_devices * 0.508)


# Loads


@pytest.mark.parametrize("n_devices", [1, 2, 3])
@pytest.mark.parametrize("method", ["channels", "rows"])
def test_the_load_of_a_split_is_that_of_its_plan(folder, monkeypatch, method, n_devices):
    monkeypatch.setattr(composed, "COMPUTE_RUNS", 3)
    write_tiny(folder / "model.onnx")
    plan = plan_split(folder / "model.onnx", n_devices, method)
    workload = split_workload(plan, CORE)
    assert workload.n_devices == n_devices
    assert len(workload.payload) == plan.rounds
    assert payload_bytes(workload.payload) == plan.payload_bytes()
    for number, sent in enumerate(workload.payload):
        for (sender, receiver), n_bytes in sent.items():
            pair = int(sender), int(receiver)
            assert n_bytes == sum(
                m.n_bytes for m in plan.messages if (m.round, m.sender, m.receiver) == (number, *pair)
            )
    assert workload.macs.shape == workload.seconds.shape == (plan.rounds + 1, n_devices)
    assert workload.macs.sum(axis=0).tolist() == [part.macs for part in plan.parts]
    assert (workload.seconds >= 0).all()
    assert workload.seconds.sum() > 0
    assert workload.memory_bytes > 4 * max(part.params for part in plan.parts)
    assert workload.image_bytes == 16
    assert workload.answer_bytes == [4 * part.n_features for part in plan.parts]


def test_the_load_of_a_network_is_that_of_its_benchmark(network_folder):
    workload = network_workload(network_folder, {str(i): student_row(i) for i in range(3)}, "int8")
    assert workload.precision == "int8"
    np.testing.assert_allclose(workload.seconds, [[0.001, 0.002, 0.003]])
    np.testing.assert_array_equal(workload.macs, [[100, 200, 300]])
    assert workload.memory_bytes == 200 + 1000  # of 1000, 600 + 500, and 200 + 1000
    assert (workload.payload, workload.image_bytes, workload.answer_bytes) == ([], 16, [4 * n for n in N_FEATURES])
