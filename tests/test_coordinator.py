"""Whatever nodes do, an image is answered by its deadline, from the students that are left."""

import asyncio
import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from clusters import (
    CLASSES,
    FEATURE_LIMIT,
    N_FEATURES,
    PATIENCE,
    assert_answer,
    cluster_of,
    empty_node,
    expected_logits,
    free_ports,
    hang,
    make_image,
    plain_node,
    rogue_node,
    two_and,
    with_features,
)
from grpc import StatusCode, aio
from PIL import Image
from safetensors.numpy import load_file

from nonn.cli import main
from nonn.core.errors import UserError
from nonn.live.health import wait_for
from nonn.runtime.cluster import write_cluster
from nonn.runtime.coordinator import Coordinator, NobodyAnsweredError
from nonn.runtime.node import ServedStudent
from nonn.runtime.predict import classify
from nonn.runtime.protocol import MIN_MESSAGE_LIMIT
from nonn.runtime.serving import serving
from nonn.runtime.tls import Identity

#: Milliseconds that a test waits for in vain.
FEW = 500.0


# All present


def test_all_nodes_say_what_the_network_says_alone(network_folder):
    async def scenario():
        async with plain_node(network_folder, 2) as (third, _), two_and(network_folder, third) as coordinator:
            for seed in range(10):
                answer = await coordinator.classify(make_image(seed))
                alone = classify(network_folder, make_image(seed))
                assert answer.prediction.label == alone.label
                assert answer.prediction.probabilities == pytest.approx(alone.probabilities, rel=1e-4)
                assert answer.prediction.shares == pytest.approx(alone.shares, rel=1e-4)
                assert_answer(answer, network_folder, make_image(seed), [0, 1, 2])

    asyncio.run(scenario())


def test_all_under_mutual_tls(network_folder, certificates):
    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            addresses = []
            for i in range(3):
                node = serving(
                    ServedStudent(network_folder / f"{i}.onnx"),
                    "127.0.0.1:0",
                    # Node 2 has the certificate of node 1: right authority, wrong name.
                    Identity.of(f"node-{min(i, 1)}", certificates),
                    ["coordinator"],
                )
                port, _ = await stack.enter_async_context(node)
                addresses.append(f"127.0.0.1:{port}")
            cluster = cluster_of(network_folder, addresses, certificates)
            async with Coordinator(cluster) as coordinator:
                assert_answer(await coordinator.classify(make_image()), network_folder, make_image(), [0, 1])

    asyncio.run(scenario())


# Missing, late, hanging


async def refuse(request, context):
    await context.abort(StatusCode.RESOURCE_EXHAUSTED, "busy")


def test_a_missing_node_is_done_without(network_folder, free_port):
    async def scenario():
        async with two_and(network_folder, f"127.0.0.1:{free_port}") as coordinator:
            answer = await coordinator.classify(make_image())
            assert_answer(answer, network_folder, make_image(), [0, 1])
            assert answer.absent["node-2"].startswith("unavailable: ")

    asyncio.run(scenario())


def test_a_hanging_node_is_waited_for_until_the_deadline(network_folder):
    cancelled = asyncio.Event()

    async def wait(request, context):
        try:
            await hang()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def scenario():
        async with rogue_node(wait) as (third, _), two_and(network_folder, third, FEW) as coordinator:
            answer = await coordinator.classify(make_image())
            assert_answer(answer, network_folder, make_image(), [0, 1])
            assert answer.absent == {"node-2": "no answer by the deadline"}
            await asyncio.wait_for(cancelled.wait(), PATIENCE)  # the late call was called off at the node too

    asyncio.run(scenario())


def test_a_node_that_accepts_and_never_speaks(network_folder):
    async def scenario():
        async def mute(reader, writer):
            await reader.read()
            writer.close()

        server = await asyncio.start_server(mute, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        async with server, two_and(network_folder, f"{host}:{port}", FEW) as coordinator:
            answer = await coordinator.classify(make_image())
            assert_answer(answer, network_folder, make_image(), [0, 1])

    asyncio.run(scenario())


def test_nobody_left(network_folder):
    async def scenario():
        cluster = cluster_of(network_folder, [f"127.0.0.1:{port}" for port in free_ports(3)])
        async with Coordinator(cluster) as coordinator:
            with pytest.raises(NobodyAnsweredError, match=r"no node answered \(node-0: unavailable.*node-2: "):
                await coordinator.classify(make_image())

    asyncio.run(scenario())


# Rogue nodes


def with_change(change):
    async def answer(request, context):
        response = await with_features([1, 2])(request, context)
        change(response)
        return response

    return answer


ROGUES = {
    "nan": (with_features([np.nan, 0]), "not finite"),
    "infinity": (with_features([0, np.inf]), "not finite"),
    "minus infinity": (with_features([-np.inf, 0]), "not finite"),
    "huge": (with_features([3e38, 0]), "features up to 3e+38, beyond the limit of 20"),
    "beyond the limit": (with_features([0, np.nextafter(np.float32(FEATURE_LIMIT), 99)]), "beyond the limit of 20"),
    "negative": (with_features([-1e-6, 0]), "features below 0"),
    "too many": (with_features([1, 2, 3]), "expected 8 bytes, not 12"),
    "too few": (with_features([1]), "expected 8 bytes, not 4"),
    "another shape": (with_change(lambda r: r.outputs[0].shape.append(1)), "the shape [1, 2], not [1, 2, 1]"),
    "another type": (with_change(lambda r: setattr(r.outputs[0], "datatype", "INT32")), "the type FP32, not 'INT32'"),
    "another output": (with_change(lambda r: setattr(r.outputs[0], "name", "x")), "the output 'features' alone"),
    "another model": (with_change(lambda r: setattr(r, "model_name", "0")), "of model '2', not of '0'"),
    "another export": (with_change(lambda r: setattr(r, "model_version", "1")), "serves model '2' of another export"),
    "no data": (with_change(lambda r: r.ClearField("raw_output_contents")), "one raw tensor, not 0"),
    "no output": (with_change(lambda r: r.ClearField("outputs")), "the output 'features' alone"),
    "too large": (with_change(lambda r: setattr(r, "id", "x" * MIN_MESSAGE_LIMIT)), "resource exhausted"),
    "refusal": (refuse, "resource exhausted: busy"),
}


@pytest.mark.parametrize(("behave", "reason"), ROGUES.values(), ids=ROGUES)
def test_what_a_rogue_node_sends_changes_nothing(network_folder, behave, reason):
    async def scenario():
        async with rogue_node(behave) as (third, rogue), two_and(network_folder, third) as coordinator:
            answer = await coordinator.classify(make_image())
            assert_answer(answer, network_folder, make_image(), [0, 1])
            assert reason in answer.absent["node-2"]
            assert rogue.asked == 1

    asyncio.run(scenario())


def test_a_rogue_nodes_sway_is_bounded(network_folder):
    """Of features f within [0, L], the lead of class a over b has a range of L Σ_k |W_ak − W_bk|, and no more."""
    block = load_file(network_folder / "final.safetensors")["weights.2"].astype(float)  # all present: its scale is 1
    pairs = block[:, None] - block  # (C, C, F)
    bound = FEATURE_LIMIT * np.abs(pairs).sum(2)
    corners = FEATURE_LIMIT * np.stack([pairs > 0, pairs < 0]).reshape(-1, N_FEATURES[2])
    within = np.random.default_rng(0).uniform(0, FEATURE_LIMIT, (50, N_FEATURES[2]))
    sent = iter([*corners, *within])

    async def behave(request, context):
        return await with_features(next(sent))(request, context)

    async def scenario():
        leads = []
        async with rogue_node(behave) as (third, _), two_and(network_folder, third) as coordinator:
            for _ in range(len(corners) + len(within)):
                answer = await coordinator.classify(make_image())
                assert "node-2" in answer.present
                logits = np.log(answer.prediction.probabilities)  # but for a constant, which leads do not have
                leads.append(logits[:, None] - logits)
        np.testing.assert_allclose(np.ptp(leads, axis=0), bound, rtol=1e-6)  # reached by the corners

    asyncio.run(scenario())


def test_an_answer_that_is_no_message(network_folder):
    async def rubbish(content, context):
        return b"\xff" * 20

    async def scenario():
        server = aio.server()
        import grpc

        handler = grpc.unary_unary_rpc_method_handler(rubbish)
        methods = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler})
        server.add_generic_rpc_handlers([methods])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with two_and(network_folder, f"127.0.0.1:{port}") as coordinator:
            answer = await coordinator.classify(make_image())
            assert_answer(answer, network_folder, make_image(), [0, 1])
            assert answer.absent["node-2"] == "the answer is no message of the protocol"
        await server.stop(None)

    asyncio.run(scenario())


def test_an_answer_without_a_message(network_folder):
    async def scenario():
        async with empty_node() as third, two_and(network_folder, third) as coordinator:
            answer = await coordinator.classify(make_image())
            assert_answer(answer, network_folder, make_image(), [0, 1])
            assert answer.absent["node-2"] == "the answer is no message of the protocol"
            node, _, contract = coordinator.placed[2]
            assert await wait_for(node, contract, None, 0) == "the answer is no message of the protocol"

    asyncio.run(scenario())


# What a user meets


def test_an_image_of_another_shape_is_refused(network_folder, free_port):
    async def scenario():
        async with Coordinator(cluster_of(network_folder, [f"127.0.0.1:{free_port + i}" for i in range(3)])) as c:
            for wrong in (make_image()[None], make_image().astype(np.float32), make_image()[:, :2]):
                with pytest.raises(ValueError, match=r"expected an image of uint8 \(1, 4, 4\)"):
                    await c.classify(wrong)

    asyncio.run(scenario())


def test_a_damaged_final_layer_is_refused(network_folder, tmp_path):
    export = shutil.copytree(network_folder, tmp_path / "export")
    path = export / "final.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\xff\xff\x7f\x7f")
    with pytest.raises(UserError, match=r"final\.safetensors: its SHA-256 is not that of the manifest"):
        Coordinator(cluster_of(export, ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]))


def test_the_command_says_who_was_present(network_folder, folder, free_port, capsys):
    Image.fromarray(make_image()[0]).save("image.png")

    async def scenario():
        async with plain_node(network_folder, 0) as (first, _), plain_node(network_folder, 1) as (second, _):
            cluster = cluster_of(network_folder, [first, second, f"127.0.0.1:{free_port}"])
            write_cluster(Path("cluster.yaml"), cluster)
            await asyncio.to_thread(main, ["predict", "image.png", "--cluster", "cluster.yaml"])

    asyncio.run(scenario())
    first, *others = capsys.readouterr().out.splitlines()
    logits = expected_logits(network_folder, make_image(), [0, 1])
    assert first.startswith(f"{CLASSES[logits.argmax()]}  ")
    assert [line.split(":")[0].strip() for line in others] == ["node-0", "node-1", "node-2"]
    assert "of the lead" in others[1]
    assert others[2].startswith("  node-2: absent, unavailable")
