"""Splitting a network changes nothing in what it computes, and sends what can be counted by hand."""

import asyncio
import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from clusters import PATIENCE, hang, rogue_node
from grpc import aio
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import Build, export_untrained, random_image, write_tiny

from nonn.cli import main
from nonn.core.errors import UserError
from nonn.runtime.session import run_onnx
from nonn.split.graph import read_network
from nonn.split.node import Peer, SplitService
from nonn.split.plan import SplitPlan, load_part, run_in_process
from nonn.split.planner import describe, plan_split

METHODS = ("channels", "rows")
TOLERANCE = 1e-4
#: Exported classifiers: an even one, one with odd widths, one with GELU, and Wide ResNets with and without bridge.
EXPORTS = {
    "fast": {"channels": 1, "size": 28, "family": "fast", "widths": [16, 24, 32], "depth": 1},
    "fast-odd": {"channels": 1, "size": 28, "family": "fast", "widths": [7, 9, 11], "depth": 2},
    "airbench": {"channels": 3, "size": 32, "family": "airbench", "widths": [8, 12, 16], "depth": 2, "strided": True},
    "wrn-16-2": {"channels": 3, "size": 32, "family": "wrn", "depth": 16, "width": 2},
    "wrn-10-1": {"channels": 3, "size": 17, "n_filters": 5, "family": "wrn", "depth": 10, "width": 1},
}


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    for name, settings_ in EXPORTS.items():
        export_untrained(folder / f"{name}.onnx", **settings_)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.onnx")


def difference(path, plan: SplitPlan) -> float:
    """Largest difference from the unsplit network's logits, relative to the largest of these."""
    image = random_image(path)
    whole = run_onnx(path, image[None])[0]
    return np.abs(run_in_process(plan, image).logits - whole).max() / np.abs(whole).max()


# What is computed


@pytest.mark.parametrize("n_devices", range(1, 9))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EXPORTS)
def test_a_split_network_computes_what_the_whole_does(exports, name, method, n_devices):
    path = exports / f"{name}.onnx"
    assert difference(path, plan_split(path, n_devices, method)) < TOLERANCE


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    size=st.integers(5, 17),
    channels=st.integers(1, 3),
    layers=st.lists(
        st.tuples(
            st.sampled_from(["conv", "conv", "residual", "pool"]),
            st.integers(1, 7),
            st.sampled_from([1, 3, 5]),
            st.sampled_from([1, 2]),
        ),
        min_size=1,
        max_size=5,
    ),
    n_devices=st.integers(2, 6),
    method=st.sampled_from(METHODS),
    recomputed=st.integers(0, 3),
)
def test_any_sizes_can_be_split(tmp_path_factory, size, channels, layers, n_devices, method, recomputed):
    build, rows = Build(channels, size), size
    build.convolve(4)
    for kind, outputs, kernel, stride in layers:
        if rows < 4:
            kind, stride = "conv", 1
        if kind == "pool":
            build.pool()
            rows //= 2
        elif kind == "conv":
            build.convolve(outputs, kernel, stride)
            build.normalize()
            build.add("Relu")
        else:
            inputs, before = build.channels, build.map
            build.add("Relu")
            shortcut = build.convolve(outputs, 1, stride)
            build.convolve(outputs, kernel, stride, read=before, inputs=inputs)
            build.normalize()
            build.add("Add", shortcut)
        rows = rows if kind == "pool" else -(-rows // stride)
    path = tmp_path_factory.mktemp("any") / "any.onnx"
    build.write(path)
    assert difference(path, plan_split(path, n_devices, method, recomputed)) < TOLERANCE


def test_seconds_are_told_by_device_and_segment(exports):
    path = exports / "fast.onnx"
    plan = plan_split(path, 8, "rows")  # the last maps have 3 rows: most devices have nothing to compute at the end
    seconds = run_in_process(plan, random_image(path)).seconds
    assert [len(own) for own in seconds] == [plan.rounds + 1] * 8
    for part, own in zip(plan.parts, seconds, strict=True):
        assert [value > 0 for value in own] == [segment is not None for segment in part.segments]
    assert sum(part.segments[-1] is None for part in plan.parts) == 5


# What is sent and what it costs


@pytest.mark.parametrize(
    ("method", "n_devices", "expected"),
    [
        # 4 channels of 4×4 values of 4 bytes; each device gets what the others have.
        ("channels", 2, {(0, 1): 128, (1, 0): 128}),
        # 4 channels over 3 devices: 1, 1 and 2.
        ("channels", 3, {(0, 1): 64, (0, 2): 64, (1, 0): 64, (1, 2): 64, (2, 0): 128, (2, 1): 128}),
        # One row of 4 columns and 4 channels each way between neighbours.
        ("rows", 2, {(0, 1): 64, (1, 0): 64}),
        ("rows", 3, {(0, 1): 64, (1, 0): 64, (1, 2): 64, (2, 1): 64}),
    ],
)
def test_bytes_by_hand(tiny, method, n_devices, expected):
    plan = plan_split(tiny, n_devices, method)
    assert plan.rounds == 1
    assert {(m.sender, m.receiver): m.n_bytes for m in plan.messages} == expected
    assert plan.payload_bytes() == sum(expected.values())
    assert plan.payload_bytes(sender=0) == sum(n for (sender, _), n in expected.items() if sender == 0)


def test_costs_by_hand(tiny):
    first, second = 4 * 9 + 4, 6 * 4 * 9 + 6
    macs = 16 * 4 * 9 + 16 * 6 * 4 * 9
    channels, rows = (plan_split(tiny, 2, method) for method in METHODS)
    # By channels the weights are shared out, by rows each device has all.
    assert [part.params for part in channels.parts] == [(first + second) / 2] * 2
    assert [part.params for part in rows.parts] == [first + second] * 2
    assert [part.macs for part in channels.parts] == [part.macs for part in rows.parts] == [macs / 2] * 2
    assert [part.columns for part in channels.parts] == [(0, 3), (3, 6)]
    assert [part.columns for part in rows.parts] == [(0, 6), (0, 6)]


def test_rounds_are_one_for_each_map_that_convolutions_read(exports):
    # Every convolution but the first reads a map of its own, shortcuts that of the convolution beside them;
    # the bridge of wrn-10-1, one pixel wide, needs no rows of its neighbours.
    assert [plan_split(exports / "fast-odd.onnx", 4, method).rounds for method in METHODS] == [6, 6]
    assert [plan_split(exports / "wrn-16-2.onnx", 4, method).rounds for method in METHODS] == [12, 12]
    assert [plan_split(exports / "wrn-10-1.onnx", 4, method).rounds for method in METHODS] == [7, 6]
    assert [plan_split(exports / "fast.onnx", 1, method).rounds for method in METHODS] == [0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_convolutions_cost_work_and_save_rounds(exports, method):
    path = exports / "wrn-16-2.onnx"
    plans = [plan_split(path, 3, method, recomputed) for recomputed in (0, 1, 4, 99)]
    # Of the first four convolutions one is a shortcut, which has no round of its own.
    assert [plan.rounds for plan in plans] == [12, 11, 9, 0]
    work = [sum(part.macs for part in plan.parts) for plan in plans]
    assert work == sorted(set(work))
    assert all(difference(path, plan) < TOLERANCE for plan in plans)


def test_only_neighbours_exchange_rows(exports):
    plan = plan_split(exports / "wrn-16-2.onnx", 4, "rows")
    assert {abs(message.sender - message.receiver) for message in plan.messages} == {1}


# Files


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_survives_its_folder(tiny, folder, method):
    plan = plan_split(tiny, 3, method)
    plan.save(folder / "plan")
    loaded = SplitPlan.load(folder / "plan")
    assert loaded.parts == plan.parts
    assert (loaded.models, loaded.method, loaded.scale) == (plan.models, plan.method, plan.scale)
    assert difference(tiny, loaded) < TOLERANCE
    assert load_part(folder / "plan" / "1") == (plan.parts[1], plan.models[1])


def test_the_same_plan_is_the_same_bytes(tiny):
    assert plan_split(tiny, 3, "rows").models == plan_split(tiny, 3, "rows").models


@pytest.mark.parametrize("file", ["0/1.onnx", "1/part.json", "final.safetensors"])
def test_a_damaged_plan_is_refused(tiny, folder, file):
    plan_split(tiny, 2, "rows").save(folder / "plan")
    with (folder / "plan" / file).open("ab") as damaged:
        damaged.write(b" ")
    with pytest.raises(UserError, match=f"{file}: its SHA-256 is not that of the manifest"):
        SplitPlan.load(folder / "plan")


def test_only_a_plan_is_replaced_by_a_plan(tiny, folder):
    plan = plan_split(tiny, 2, "rows")
    (folder / "results").mkdir()
    (folder / "results" / "kept").write_text("hours of work")
    with pytest.raises(UserError, match="results: is there, and is no plan of a split network"):
        plan.save(folder / "results")
    assert (folder / "results" / "kept").exists()
    for _ in range(2):
        plan.save(folder / "plan")
    (folder / "plan/notes.txt").touch()
    with pytest.raises(UserError, match=r"plan: holds more than a plan, such as notes\.txt\. Name a new folder"):
        plan.save(folder / "plan")
    (folder / "plan/notes.txt").unlink()
    for name in ("0/node-0.key", "2024/note.txt"):
        (folder / "plan" / name).parent.mkdir(exist_ok=True)
        (folder / "plan" / name).touch()
        with pytest.raises(UserError, match=rf"plan: holds more than a plan, such as {name}"):
            plan.save(folder / "plan")
        (folder / "plan" / name).unlink()
    (folder / "plan/2024").rmdir()
    before = sorted(folder.rglob("*"))
    for inside in (folder / "plan", folder / "plan/0"):
        with contextlib.chdir(inside), pytest.raises(UserError, match="is the working directory, or around it"):
            plan.save(Path("." if inside.name == "plan" else ".."))
    assert sorted(folder.rglob("*")) == before


DAMAGED_PARTS = {
    "receiver": lambda part: part["messages"][0].update(receiver=9),
    "sender": lambda part: part["messages"][0].update(sender=part["messages"][0]["receiver"]),
    "twice": lambda part: part["messages"].append(part["messages"][0]),
    "round": lambda part: part["messages"][0].update(round=9),
    "position": lambda part: part.update(position=7),
    "plan": lambda part: part.update(plan=None),
}


@pytest.mark.parametrize("damage", DAMAGED_PARTS.values(), ids=DAMAGED_PARTS)
def test_a_part_that_does_not_fit_together_is_refused(tiny, folder, damage):
    plan_split(tiny, 3, "rows").save(folder / "plan")
    path = folder / "plan/0/part.json"
    part = json.loads(path.read_text())
    damage(part)
    path.write_text(json.dumps(part))
    with pytest.raises(UserError, match=r"part\.json: .*Write the plan again with `nonn split`"):
        load_part(path.parent)


def test_networks_of_the_same_shape_are_different_plans(tmp_path):
    """So that their parts do not work together: answers and slices of another one are refused."""
    versions = set()
    for seed in (0, 1):
        path = write_tiny(tmp_path / f"{seed}.onnx", seed=seed)
        plans = [plan_split(path, 2, method) for method in METHODS]
        assert all(len({part.version for part in plan.parts}) == 1 for plan in plans)
        versions |= {plan.parts[0].version for plan in plans}
        assert plan_split(path, 2, "rows").parts[0].contract.version in versions
    assert len(versions) == 4


def test_a_damaged_graph_is_refused(tiny, monkeypatch):
    def damage(path):
        network = read_network(path)
        del network.shapes[network.last]
        return network

    monkeypatch.setattr("nonn.split.planner.read_network", damage)
    with pytest.raises(UserError, match=r"tiny\.onnx: cannot be split: its graph does not fit together \(.*Export it"):
        plan_split(tiny, 2, "rows")


def test_what_is_no_plan_is_refused(folder):
    (folder / "plan.json").write_text('{"method": "diagonally"}')
    with pytest.raises(UserError, match=r"plan.json: not a plan of a split network .*Write the plan again"):
        SplitPlan.load(folder)


# What cannot be split


def test_unsuitable_files_are_refused(network_folder, tmp_path, tiny):
    with pytest.raises(UserError, match=r"nowhere.onnx: no such file. Export the models first"):
        plan_split(tmp_path / "nowhere.onnx", 2, "rows")
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(UserError, match=r"text.onnx: not a sound ONNX file"):
        plan_split(tmp_path / "text.onnx", 2, "rows")
    with pytest.raises(UserError, match=r"0.onnx: cannot be split: it does not end in a spatial mean"):
        plan_split(network_folder / "0.onnx", 2, "rows")
    for n_devices in (0, 17):
        with pytest.raises(UserError, match=f"-n: {n_devices} devices are not possible; give 1 to 16"):
            plan_split(tiny, n_devices, "rows")
    with pytest.raises(UserError, match="--recomputed: -1 convolutions are not possible"):
        plan_split(tiny, 2, "rows", recomputed=-1)


def test_unknown_operations_are_refused(tmp_path):
    build = Build(channels=1, size=4)
    build.convolve(2)
    build.add("Sigmoid")
    build.write(tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"model.onnx: cannot be split: Sigmoid map4: an unknown operation"):
        plan_split(tmp_path / "model.onnx", 2, "rows")
    build = Build(channels=2, size=4)
    names = [build.constant(np.ones((2, 1, 3, 3)))]
    build.add("Conv", *names, kernel_shape=[3, 3], pads=[1] * 4, group=2)
    build.write(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="its group"):
        plan_split(tmp_path / "model.onnx", 2, "rows")


def test_the_command_writes_a_plan_and_says_what_it_costs(tiny, folder, capsys):
    main(["split", str(tiny), "-n", "2", "--method", "rows", "--output", "plan"])
    plan = SplitPlan.load(folder / "plan")
    said = capsys.readouterr().out
    assert said == describe(plan) + "\n"
    assert "rounds: 1, messages: 2, bytes between devices: 128\n" in said
    assert said.splitlines()[2].split() == ["device-0", "262", "2,016", "1", "64", "6"]


def test_a_peer_that_is_dead_is_noticed_beside_one_that_hangs(free_port):
    failures = []

    async def scenario():
        failed = asyncio.Event()
        exchange = SimpleNamespace(fail=lambda error: failures.append(str(error)) or failed.set())
        async with contextlib.AsyncExitStack() as stack:
            calls = []
            hanging, _ = await stack.enter_async_context(rogue_node(hang))
            for name, address in (("hanging", hanging), ("dead", f"127.0.0.1:{free_port}")):
                peer = Peer(name, await stack.enter_async_context(aio.insecure_channel(address)))
                calls.append((peer, peer.send(b"", timeout=10 * PATIENCE)))
            watching = asyncio.create_task(SplitService._watch(None, 1, calls, exchange))
            await asyncio.wait_for(failed.wait(), PATIENCE)
            watching.cancel()

    asyncio.run(scenario())
    (said,) = failures
    assert said.startswith("round 1: dead: unavailable")
