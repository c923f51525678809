"""The circuit of a node that fails opens; the node is probed, and taken back."""

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import pytest
from clusters import (
    PATIENCE,
    assert_answer,
    fail,
    hang,
    make_image,
    plain_node,
    rogue_node,
    two_and,
    until,
    with_features,
)

from nonn.runtime import coordinator as coordination
from nonn.runtime.coordinator import NobodyAnsweredError

#: Milliseconds that a test waits for in vain.
FEW = 500.0


def test_a_failing_node_is_left_alone_and_rejoins(network_folder, monkeypatch):
    monkeypatch.setattr(coordination, "FIRST_PAUSE_S", 1000.0)  # no probe is among the first requests
    sound = with_features([1, 2])
    behaviour = {"now": fail}

    async def behave(request, context):
        return await behaviour["now"](request, context)

    async def scenario():
        async with rogue_node(behave) as (third, rogue), two_and(network_folder, third) as coordinator:
            connection = coordinator.connections[2]
            for attempt in range(1, coordination.TOLERATED_FAILURES + 1):
                await coordinator.classify(make_image())
                assert connection.breaker_is_open == (attempt == coordination.TOLERATED_FAILURES)
            asked = rogue.asked
            answer = await coordinator.classify(make_image())
            assert answer.absent["node-2"] == "circuit open after 3 failures in a row (internal: ill)"
            assert rogue.asked == asked
            monkeypatch.setattr(coordination, "FIRST_PAUSE_S", 0.05)
            connection.succeeded()
            for _ in range(coordination.TOLERATED_FAILURES):
                connection.failed("ill")
            await until(lambda: rogue.asked >= asked + 2)  # probed, and probed again
            assert connection.breaker_is_open
            behaviour["now"] = sound
            await until(lambda: not connection.breaker_is_open)
            # On probation: one failure is enough to open the circuit again.
            behaviour["now"] = fail
            await coordinator.classify(make_image())
            assert connection.breaker_is_open
            behaviour["now"] = sound
            await until(lambda: not connection.breaker_is_open)
            answer = await coordinator.classify(make_image())
            assert answer.present == ["node-0", "node-1", "node-2"]
            assert connection.failures == 0

    asyncio.run(scenario())


def test_probes_go_on_whatever_they_meet(network_folder, monkeypatch):
    monkeypatch.setattr(coordination, "FIRST_PAUSE_S", 0.05)

    async def unforeseen(*_):
        raise TypeError("unforeseen")

    async def scenario():
        async with rogue_node(fail) as (third, rogue), two_and(network_folder, third) as coordinator:
            connection = coordinator.connections[2]
            for _ in range(coordination.TOLERATED_FAILURES):
                await coordinator.classify(make_image())
            monkeypatch.setattr(connection, "infer", unforeseen)
            await until(lambda: connection.reason == "unforeseen")
            monkeypatch.undo()
            rogue.behave = with_features([1, 2])
            await until(lambda: not connection.breaker_is_open)

    asyncio.run(scenario())


def test_a_hanging_node_costs_no_time_once_its_circuit_is_open(network_folder):
    async def scenario():
        async with rogue_node(hang) as (third, _), two_and(network_folder, third, FEW) as coordinator:
            for _ in range(coordination.TOLERATED_FAILURES):
                with contextlib.suppress(NobodyAnsweredError):  # on a busy machine
                    await coordinator.classify(make_image())
            assert coordinator.connections[2].breaker_is_open
            coordinator.timeout = 2 * PATIENCE  # nobody waits for this deadline
            async with asyncio.timeout(PATIENCE):
                answers = await asyncio.gather(*(coordinator.classify(make_image(seed)) for seed in range(5)))
            for seed, answer in enumerate(answers):
                assert_answer(answer, network_folder, make_image(seed), [0, 1])
                assert answer.absent["node-2"].endswith("(no answer by the deadline)")

    asyncio.run(scenario())


def test_images_that_fail_together_are_one_failure(network_folder):
    """Whether they were in one message or in several."""

    async def scenario():
        async with rogue_node(hang) as (third, _), two_and(network_folder, third, FEW) as coordinator:
            connection = coordinator.connections[2]
            for count in range(1, coordination.TOLERATED_FAILURES + 1):
                calls = (coordinator.classify(make_image(seed)) for seed in range(9))
                for done in await asyncio.gather(*calls, return_exceptions=True):
                    assert not isinstance(done, Exception) or isinstance(done, NobodyAnsweredError)  # a busy machine
                assert connection.failures == count
            assert connection.breaker_is_open

    asyncio.run(scenario())


def test_callers_with_short_deadlines_find_out_which_node_hangs(network_folder):
    """And one that is only slower than their deadlines keeps its circuit closed."""
    sound = with_features([1, 2])

    async def slowly(request, context):
        await asyncio.sleep(0.1)
        return await sound(request, context)

    async def scenario(behave, deadline_ms):
        async with rogue_node(behave) as (third, _), two_and(network_folder, third, deadline_ms) as coordinator:
            connection = coordinator.connections[2]

            async def classify_shortly() -> None:
                with contextlib.suppress(NobodyAnsweredError):  # on a busy machine
                    await coordinator.classify(make_image(), 0.02)

            async def is_probed_once() -> None:
                for _ in range(coordination.TOLERATED_FAILURES):
                    await classify_shortly()
                while connection.single_probe:
                    await classify_shortly()  # requests go on

            async with asyncio.timeout(PATIENCE):
                for count in range(1, coordination.TOLERATED_FAILURES + 1):
                    await is_probed_once()
                    assert connection.failures == (count if behave is hang else 0)
            assert connection.breaker_is_open == (behave is hang)

    asyncio.run(scenario(hang, FEW))
    asyncio.run(scenario(slowly, 1000 * PATIENCE))


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="TCP_USER_TIMEOUT is an option of Linux")
def test_connections_that_nobody_acknowledges_are_given_up(network_folder):
    def given_up_after(port: int) -> set[int]:
        """TCP_USER_TIMEOUT in milliseconds of this process's connections to a port."""
        found = set()
        for descriptor in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(descriptor.name))) as copy:
                if copy.family != socket.AF_UNIX and copy.getpeername()[1] == port:
                    found.add(copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        return found

    async def scenario():
        async with plain_node(network_folder, 2) as (third, _), two_and(network_folder, third) as coordinator:
            await coordinator.classify(make_image())
            assert given_up_after(int(third.rpartition(":")[2])) == {20_000}

    asyncio.run(scenario())


def test_when_all_are_left_alone_all_are_asked(network_folder):
    async def scenario():
        async with plain_node(network_folder, 2) as (third, _), two_and(network_folder, third) as coordinator:
            for connection in coordinator.connections:
                connection.pause = 1000  # no probe during this test
                for _ in range(coordination.TOLERATED_FAILURES):
                    connection.failed("imagined")
            assert all(connection.breaker_is_open for connection in coordinator.connections)
            assert_answer(await coordinator.classify(make_image()), network_folder, make_image(), [0, 1, 2])
            assert not any(connection.breaker_is_open for connection in coordinator.connections)

    asyncio.run(scenario())


def test_a_node_that_restarts_rejoins(network_folder, free_port):
    async def scenario():
        third = f"127.0.0.1:{free_port}"
        async with two_and(network_folder, third) as coordinator:
            for _ in range(2):
                await until_present(coordinator, [0, 1])
                async with plain_node(network_folder, 2, free_port):
                    await until_present(coordinator, [0, 1, 2])
            await until_present(coordinator, [0, 1])

    async def until_present(coordinator, present):
        async with asyncio.timeout(PATIENCE):
            while True:
                answer = await coordinator.classify(make_image())
                assert_answer(answer, network_folder, make_image(), [int(n[-1]) for n in answer.present])
                if answer.present == [f"node-{i}" for i in present]:
                    return
                await asyncio.sleep(0.02)

    asyncio.run(scenario())
