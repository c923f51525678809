"""A cluster of child processes: it works, it is watched, and nothing of it is left behind."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from clusters import PATIENCE, cluster_of, empty_node, make_image, nobody_listens, until
from processes import running

from nonn.core.errors import UserError
from nonn.live.up import TOLD_AT, _missed, run_cluster, watch
from nonn.runtime.attached import told_to_stop
from nonn.runtime.cluster import Node, local_cluster
from nonn.runtime.coordinator import Coordinator
from nonn.runtime.processes import Child, stop


def running_up() -> contextlib.AbstractContextManager[subprocess.Popen]:
    command = [sys.executable, "-m", "nonn", "up"]
    return running(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines_until_up(process: subprocess.Popen) -> list[str]:
    """What ``nonn up`` says until all three nodes are up."""
    lines = []
    while sum(": up at" in line for line in lines) < 3:
        line = process.stdout.readline()
        assert line, f"ended early: {lines}"
        lines.append(line)
    return lines


def test_up_starts_all_and_control_c_leaves_nothing(cluster):
    async def classify():
        async with Coordinator(cluster) as coordinator:
            return await coordinator.classify(make_image())

    with running_up() as process:
        lines_until_up(process)
        assert asyncio.run(classify()).present == ["node-0", "node-1", "node-2"]
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE)
        assert output.splitlines()[-1] == "3 nodes stopped"
        assert process.returncode == 0
    assert nobody_listens(node.address for node in cluster.nodes)


def test_nodes_end_when_their_parent_is_killed(cluster):
    with running_up() as process:
        lines_until_up(process)
        process.kill()
    asyncio.run(until(lambda: nobody_listens(node.address for node in cluster.nodes)))


def test_a_node_that_exits_is_shown_and_the_others_go_on(cluster, capsys):
    first, second, third = cluster.nodes
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        blocked = f"127.0.0.1:{taken.getsockname()[1]}"
        nodes = [first, second, third.model_copy(update={"address": blocked})]

        async def scenario():
            stopped = asyncio.Event()
            running = asyncio.create_task(run_cluster(cluster.model_copy(update={"nodes": nodes}), stopped=stopped))
            output = ""
            async with asyncio.timeout(PATIENCE):
                while not ("node-0: up at" in output and "node-2: exited" in output):
                    await asyncio.sleep(0.1)
                    output += capsys.readouterr().out
            assert f"node-2: exited (1): nonn node: {blocked}: cannot listen there" in output
            stopped.set()
            await running

        asyncio.run(scenario())


def test_a_process_that_ends_with_its_grace_is_no_error(monkeypatch):
    async def just_too_late(ending, _):
        await ending
        raise TimeoutError

    async def scenario():
        child = Child(None, await asyncio.create_subprocess_exec("sleep", "60"))
        monkeypatch.setattr(asyncio, "wait_for", just_too_late)
        await stop(child)
        assert child.has_exited

    asyncio.run(scenario())


@pytest.mark.usefixtures("folder")
def test_missing_certificates_are_noticed_first(network_folder):
    cluster = local_cluster(network_folder, Path("nowhere"), 7100, 100)
    with pytest.raises(UserError, match=r"nowhere/.*: cannot be read .* Make certificates with `nonn certs`"):
        asyncio.run(run_cluster(cluster))


def test_counts_become_a_row(cluster):
    from tritonclient.grpc.service_pb2 import InferStatistics, StatisticDuration

    child = Child(cluster.nodes[0], None)
    assert child.row().split() == ["node-0", "0", cluster.nodes[0].address, "starting", "0", "0"]
    child.update(InferStatistics(success=StatisticDuration(count=2, ns=8_000_000)))
    child.update(
        InferStatistics(success=StatisticDuration(count=4, ns=10_000_000), fail=StatisticDuration(count=3, ns=1))
    )
    assert child.row().split()[3:] == ["up", "1.00", "ms", "7", "3"]


def test_a_node_that_listens_and_cannot_be_asked_says_why(capsys):
    child = Child(Node(name="a", address="127.0.0.1:1", model="0"), process=None)
    other = "unavailable: its certificate bears another name"
    for _ in range(3):
        _missed(child, other)
    assert child.state == "starting"  # it may only be about to listen
    child.is_ready = True
    for reason in ("unavailable: connection refused", other, "unavailable: something else"):
        _missed(child, reason)
    assert child.state == "no answer"
    assert capsys.readouterr().err == f"a: listens, and does not answer ({other})\n"


def test_a_node_that_answers_without_a_message_is_told(network_folder, monkeypatch, capsys):
    monkeypatch.setattr("nonn.live.up.POLL_S", 0.01)

    async def scenario():
        async with empty_node() as address:
            process = SimpleNamespace(returncode=None, wait=lambda: asyncio.sleep(PATIENCE))
            child = Child(Node(name="node-0", address=address, model="0"), process=process)
            child.is_ready = True
            cluster = cluster_of(network_folder, [address, "127.0.0.1:1", "127.0.0.1:2"])
            watching = asyncio.create_task(watch(child, cluster.placed()[1][0][2], cluster))
            await until(lambda: child.missed >= TOLD_AT or watching.done())
            watching.cancel()

    asyncio.run(scenario())
    said = "node-0: listens, and does not answer (the answer is no message of the protocol)\n"
    assert capsys.readouterr().err == said


def test_a_pipe_that_closes_is_looked_at_once(monkeypatch):
    end, other = os.pipe()

    async def scenario():
        stopped = told_to_stop(True)
        os.close(other)
        await asyncio.wait_for(stopped.wait(), PATIENCE)
        assert not asyncio.get_running_loop().remove_reader(sys.stdin)

    with os.fdopen(end) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        asyncio.run(scenario())


@pytest.mark.parametrize(("handler", "is_heard"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_signals_that_a_process_was_told_to_ignore_stay_ignored(handler, is_heard):
    """As `nohup nonn up &` has it when its terminal is closed."""
    before = signal.signal(signal.SIGHUP, handler)

    async def scenario():
        told_to_stop(False, signal.SIGHUP)
        assert asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP) == is_heard

    try:
        asyncio.run(scenario())
    finally:
        signal.signal(signal.SIGHUP, before)
