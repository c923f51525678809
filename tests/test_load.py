"""Many callers at once: what the campaign counts, and that it runs."""

import asyncio
import json

import pytest
from clusters import CHANNELS, PATIENCE, SIZE, rogue_node
from grpc import StatusCode, aio

from nonn.cli import main
from nonn.runtime.admission import RETRY_AFTER
from nonn.runtime.cluster import Node
from nonn.runtime.protocol import Contract
from nonn.testbed import load
from nonn.testbed.load import LoadTarget, Tally, measure, row


def test_the_command_counts_answers_of_a_node_and_of_a_coordinator(network_folder, folder, monkeypatch, capsys):
    monkeypatch.setattr(load, "WARM_UP_S", 0.5)
    arguments = [
        "--callers",
        "1,3",
        "--seconds",
        "0.5",
        "--deadline-ms",
        str(1000 * PATIENCE),
        "--idle",
        "2",
        "--json",
        "load.json",
    ]
    main(["load", str(network_folder), *arguments])
    loads = json.loads((folder / "load.json").read_text())["loads"]
    assert [(one["asked"], one["callers"]) for one in loads] == [
        ("node-0", 1),
        ("node-0", 3),
        ("coordinator", 1),
        ("coordinator", 3),
    ]
    assert all(one["answered_per_s"] > 0 and one["complete"] == 1 for one in loads)
    assert all(one["failed_per_s"] == 0 and one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"] for one in loads)
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_summary_has_rates_and_percentiles():
    seen = Tally("node-0", 7, 2.0, [float(i) for i in range(101)], complete=50, refused=4, late=2)
    summary = seen.summary()
    assert (summary["answered_per_s"], summary["refused_per_s"], summary["late_per_s"]) == (50.5, 2.0, 1.0)
    assert (summary["p50_ms"], summary["p95_ms"], summary["p99_ms"]) == (50.0, 95.0, 99.0)
    assert summary["complete"] == 50 / 101
    assert row(Tally("node-0", 1, 1.0).summary()).split()[-1] == "-"  # nothing was answered


@pytest.mark.parametrize(("impatient", "most"), [(False, 10), (True, None)])
def test_refused_callers_return_when_they_are_told_unless_impatient(monkeypatch, impatient, most):
    monkeypatch.setattr(load, "WARM_UP_S", 0.1)
    monkeypatch.setattr(load, "open_channel", lambda node, *_, **__: aio.insecure_channel(node.address))

    async def refuse(_, context):
        await context.abort(StatusCode.RESOURCE_EXHAUSTED, "busy", ((RETRY_AFTER, "5000"),))

    async def scenario():
        async with rogue_node(refuse) as (address, rogue):
            node = Node(name="node-0", address=address, model="0")
            target = LoadTarget(node, Contract("0", CHANNELS, SIZE, 1), None, None)
            await measure(target, 10, 0.5, PATIENCE, seed=0, impatient=impatient)
            return rogue.asked

    asked = asyncio.run(scenario())
    assert asked == most if most else asked > 10


@pytest.mark.parametrize("flags", [["--callers", "0"], ["--callers", "many"], ["--seconds", "0"]])
def test_impossible_loads_are_refused(network_folder, flags, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["load", str(network_folder), *flags])
    assert f"{flags[0]}: " in f"{refused.value}{capsys.readouterr().err}"  # as argparse says it, or the command
