"""The campaigns in small: sound code passes them, and code with a fault does not."""

import asyncio
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from clusters import PATIENCE

from nonn.core.errors import UserError
from nonn.runtime import coordinator
from nonn.runtime.cluster import Node
from nonn.runtime.processes import Child
from nonn.testbed import fuzz
from nonn.testbed.bed import running_cluster
from nonn.testbed.soak import Soak, becomes_whole, disturb, soak_cluster


def wrong(outcomes) -> int:
    return sum(count for outcome, count in outcomes.items() if outcome.startswith("WRONG"))


def test_a_node_withstands_hostile_requests(network_folder, monkeypatch):
    monkeypatch.setattr(fuzz, "STRANGERS", 20)
    outcomes = asyncio.run(fuzz.fuzz_node(network_folder, 400, seed=1))
    assert outcomes.total() == 400
    assert wrong(outcomes) == 0
    assert outcomes["INVALID_ARGUMENT"] > 200
    assert outcomes["name not allowed: PERMISSION_DENIED"] > 0


def test_a_coordinator_withstands_hostile_responses(network_folder):
    outcomes = asyncio.run(fuzz.fuzz_coordinator(network_folder, 300, seed=1))
    assert outcomes.total() == 300
    assert wrong(outcomes) == 0
    assert outcomes["discarded"] > 200


def test_beside_a_hostile_node_there_has_to_be_a_sound_one(network_folder, monkeypatch):
    manifest, placed = fuzz.local_cluster(network_folder, None, 7100, 1000).placed()
    alone = SimpleNamespace(placed=lambda: (manifest, placed[:1]))
    monkeypatch.setattr(fuzz, "local_cluster", lambda *_: alone)
    with pytest.raises(UserError, match="has one student"):
        asyncio.run(fuzz.fuzz_coordinator(network_folder, 1, seed=1))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_coordinator_that_lets_nan_through_is_found_out(network_folder, monkeypatch):
    def careless(contract, response, **_):
        return np.resize(
            np.frombuffer(b"".join(response.raw_output_contents)[:8] or bytes(8), "<f4"), contract.n_features
        )

    monkeypatch.setattr(coordinator, "read_response", careless)
    assert wrong(asyncio.run(fuzz.fuzz_coordinator(network_folder, 100, seed=1))) > 0


def test_a_coordinator_that_lets_any_finite_number_through_is_found_out(network_folder, monkeypatch):
    def finite(_contract, features):
        return "" if np.isfinite(features).all() else "that are not finite"

    monkeypatch.setattr("nonn.runtime.protocol.check_features", finite)
    assert wrong(asyncio.run(fuzz.fuzz_coordinator(network_folder, 100, seed=1))) > 0


def test_every_request_is_answered_while_nodes_die(network_folder, monkeypatch):
    monkeypatch.setattr("nonn.testbed.soak.NAP", 1.0)
    monkeypatch.setattr("nonn.testbed.soak.RECOVERY_S", PATIENCE)
    soak = asyncio.run(soak_cluster(network_folder, 1600, deadline_ms=2000, every=1, seed=0))
    assert soak.kills >= 1
    assert soak.unanswered == 0
    assert soak.present.max() == 3
    assert soak.whole_again


def test_a_cluster_that_stays_broken_is_found_out(network_folder, monkeypatch):
    monkeypatch.setattr("nonn.testbed.soak.RECOVERY_S", PATIENCE)

    async def scenario():
        async with running_cluster(network_folder, 1000) as bed, coordinator.Coordinator(bed.cluster) as coordinating:
            image = np.zeros((1, 4, 4), np.uint8)
            assert await becomes_whole(bed, coordinating, image)
            process = bed.children["node-1"].process
            process.kill()
            await process.wait()

            async def nothing(name):
                pass

            monkeypatch.setattr(bed, "restart", nothing)
            monkeypatch.setattr("nonn.testbed.soak.RECOVERY_S", 0.5)
            assert not await becomes_whole(bed, coordinating, image)

    asyncio.run(scenario())


@pytest.mark.parametrize("is_known", [False, True])
def test_a_node_that_ends_by_itself_is_found_out(is_known):
    """Whether or not it is known to have ended when it is sent a signal."""

    def send_signal(_):
        if is_known:
            raise ProcessLookupError

    async def wait():
        return 3

    process = SimpleNamespace(send_signal=send_signal, wait=wait, returncode=3)
    child = Child(Node(name="node-0", address="127.0.0.1:1", model="0"), process, last_line="out of memory")
    bed = SimpleNamespace(children={"node-0": child})
    with pytest.raises(UserError, match=r"node-0 ended by itself, with exit status 3 \(out of memory\)"):
        asyncio.run(disturb(bed, Soak(np.zeros(1), np.zeros(1)), Random(0), every=0))


def test_what_a_soak_must_not_show():
    calm = Soak(np.full(1000, -50.0), np.full(1000, 4), [(i, 10**8) for i in range(100)], whole_again=True)
    assert calm.problems() == []
    faults = {
        "not answered": Soak(calm.late_ms, np.r_[0, calm.present[1:]], calm.memory, whole_again=True),
        "late by 6.0 ms at p99": Soak(np.full(1000, 6.0), calm.present, calm.memory, whole_again=True),
        "memory grew by 100.0 bytes": Soak(
            calm.late_ms, calm.present, [(i, 10**8 + 100 * i) for i in range(100)], whole_again=True
        ),
        "not whole again": Soak(calm.late_ms, calm.present, calm.memory),
    }
    for message, soak in faults.items():
        (problem,) = soak.problems()
        assert message in problem
