"""Campaign `nonn fuzz`: hostile messages to a node and to a coordinator, on this machine only.

A node, in a process of its own and under mutual TLS, is sent damaged and hostile requests by a caller
with a good certificate, and requests by callers with none, with one of another authority, with a name
that it does not allow, in plain text, and as bytes that are not TLS. A coordinator asks one node that
answers with damaged and hostile responses, among sound ones. Whatever is not refused must be answered
exactly as a sound message is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message
from grpc import StatusCode, aio
from tritonclient.grpc.service_pb2 import InferParameter, ModelInferRequest, ModelInferResponse

from nonn.core.errors import UserError
from nonn.core.names import COORDINATOR
from nonn.core.options import seed_number
from nonn.core.progress import log, track
from nonn.runtime.addresses import split_address
from nonn.runtime.channel import MODEL_INFER, open_channel
from nonn.runtime.cluster import Cluster, Node, local_cluster
from nonn.runtime.coordinator import Coordinator
from nonn.runtime.final import predict
from nonn.runtime.node import ServedStudent
from nonn.runtime.protocol import Contract, ProtocolError, make_request, make_response, read_request, read_response
from nonn.runtime.serving import serving
from nonn.runtime.tls import CA, Identity
from nonn.testbed.bed import OTHER, STRANGER, running_cluster

#: One message in so many is sent by a stranger: each of those takes a connection of its own.
STRANGERS = 100
#: Seconds that an answer may take before it counts as none.
ANSWER_TIMEOUT_S = 10.0
#: Values of a number in a hostile feature vector.
HOSTILE_FLOATS = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 0.0)
#: Values of all numbers of a finite hostile vector: huge, below 0, or within any limit.
FINITE_FLOATS = (3e38, 1e9, 1e4, -1.0, -1e-3, 1e-45)
WORDS = ("", "0", "1", "image", "features", "FP32", "UINT8", "BYTES", "\x00", "é" * 50, "x" * 70_000)


def damage_bytes(content: bytes, random: Random) -> bytes:
    """Random bytes, or a message with bytes changed, cut off, appended or repeated."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    damaged = (
        random.randbytes(random.randrange(300)),
        bytes(changed),
        content[: random.randrange(len(content))],
        content + random.randbytes(random.randint(1, 40)),
        content * random.randint(2, 40),
    )
    return random.choice(damaged)


def damage_fields(message: Message, random: Random) -> bytes:
    """A message that is well formed, with one to three fields that are not as agreed."""
    request = isinstance(message, ModelInferRequest)
    tensors = message.inputs if request else message.outputs
    contents = message.raw_input_contents if request else message.raw_output_contents
    word = WORDS[random.randrange(len(WORDS))]
    number = random.choice([-1, 0, 1, 2, 2**31, 2**62, random.randrange(1000)])
    changes: list[Callable[[], object]] = [
        lambda: setattr(message, "model_name", word),
        lambda: setattr(message, "model_version", word),
        lambda: setattr(message, "id", word),
        lambda: tensors.append(tensors[0]),
        lambda: tensors[0].shape.append(number),
        lambda: tensors[0].shape.__setitem__(random.randrange(2), number),
        lambda: setattr(tensors[0], "name", word),
        lambda: setattr(tensors[0], "datatype", word),
        lambda: tensors[0].contents.fp32_contents.append(float("nan")),
        lambda: tensors[0].parameters["shared_memory_region"].CopyFrom(InferParameter(string_param=word)),
        lambda: message.parameters["sequence_id"].CopyFrom(InferParameter(int64_param=number)),
        lambda: contents.append(b""),
        lambda: contents.__setitem__(0, contents[0][: random.randrange(max(len(contents[0]), 1))]),
        lambda: contents.__setitem__(0, contents[0] * random.randint(2, 9)),
    ]
    if not request:
        floats = random.choice([HOSTILE_FLOATS, FINITE_FLOATS, [random.choice(FINITE_FLOATS)]])
        values = [random.choice(floats) for _ in range(len(contents[0]) // 4)]
        changes += 5 * [lambda: contents.__setitem__(0, np.array(values, "<f4").tobytes())]
    for change in random.choices(changes, k=random.randint(1, 3)):
        change()
    return message.SerializeToString()


def hostile(sound: Message, random: Random) -> bytes:
    """A damaged copy of a sound message."""
    if random.random() < 0.5:
        return damage_bytes(sound.SerializeToString(), random)
    copy = type(sound)()
    copy.CopyFrom(sound)
    return damage_fields(copy, random)


def is_sound(content: bytes, kind: type[Message], read: Callable, contract: Contract) -> np.ndarray | None:
    """The tensor of a message if, for all its damage, it is one that must be accepted."""
    if len(content) > contract.message_limit:
        return None
    try:
        return read(contract, kind.FromString(content))
    except (DecodeError, ProtocolError):
        return None


async def status_of(call) -> tuple[str, bytes]:
    try:
        return "OK", await asyncio.wait_for(call, ANSWER_TIMEOUT_S)
    except aio.AioRpcError as error:
        return error.code().name, b""
    except TimeoutError:
        return "no answer", b""


async def attack_as_stranger(cluster: Cluster, node: Node, sound: bytes, random: Random) -> str:
    """One attempt by someone whom the node must not answer; its kind and outcome."""
    assert cluster.tls is not None  # the bed makes certificates
    folder = cluster.tls.folder
    authority = (folder / CA).read_bytes()
    credentials = {
        "no certificate": grpc.ssl_channel_credentials(authority),
        "name not allowed": Identity.of(STRANGER, folder).for_client(),
        "other authority": grpc.ssl_channel_credentials(
            authority, *((folder / OTHER / f"{COORDINATOR}.{kind}").read_bytes() for kind in ("key", "pem"))
        ),
        "plain text": None,
        "not TLS": None,
    }
    kind = random.choice(list(credentials))
    if kind == "not TLS":
        _, writer = await asyncio.open_connection(*split_address(node.address))
        writer.write(random.randbytes(random.randrange(1, 2000)))
        writer.close()
        return f"{kind}: closed"
    options = [("grpc.use_local_subchannel_pool", 1)]
    secret = credentials[kind]
    channel = (
        aio.secure_channel(node.address, secret, options) if secret else aio.insecure_channel(node.address, options)
    )
    async with channel:
        status, _ = await status_of(channel.unary_unary(MODEL_INFER)(sound, timeout=ANSWER_TIMEOUT_S))
    return f"{kind}: {status}"


async def fuzz_node(export: Path, n_messages: int, seed: int) -> Counter:
    """Outcomes of hostile requests at a node, by name; wrong ones start with ``WRONG``."""
    random, outcomes = Random(seed), Counter[str]()
    async with running_cluster(export, deadline_ms=1000) as bed:
        cluster, (node, _, contract) = bed.cluster, bed.cluster.placed()[1][0]
        process = bed.children[node.name].process
        student = ServedStudent(export / f"{contract.model}.onnx")
        image = np.random.default_rng(seed).integers(0, 256, contract.image_shape[1:], dtype=np.uint8)
        sound = make_request(contract, image)
        async with open_channel(node, contract.message_limit, cluster.own_identity) as channel:
            call = channel.unary_unary(MODEL_INFER)
            for number in track(range(n_messages), "hostile requests"):
                if number % STRANGERS == 0:
                    outcome = await attack_as_stranger(cluster, node, sound.SerializeToString(), random)
                    outcomes[f"WRONG {outcome}" if outcome.endswith(": OK") else outcome] += 1
                    continue
                content = hostile(sound, random)
                status, reply = await status_of(call(content))
                expected = is_sound(content, ModelInferRequest, read_request, contract)
                if status == "OK" or expected is not None:
                    n_images = 1 if expected is None else len(expected)  # by chance, two may be a sound request as well
                    read = partial(read_response, n_images=n_images)
                    features = is_sound(reply, ModelInferResponse, read, contract)
                    right = False
                    if expected is not None and features is not None:
                        right = np.array_equal(np.atleast_2d(features), student.run(expected))
                    status = "harmless, answered rightly" if right else f"WRONG {status}"
                outcomes[status if status != "no answer" else f"WRONG {status}"] += 1
            status, _ = await status_of(call(sound.SerializeToString()))
        if status != "OK" or process.returncode is not None:
            outcomes[f"WRONG node afterwards: {status}, exit status {process.returncode}"] += 1
    return outcomes


async def fuzz_coordinator(export: Path, n_messages: int, seed: int) -> Counter:
    """Outcomes of hostile responses at a coordinator; wrong ones start with ``WRONG``."""
    random, outcomes, last = Random(seed), Counter[str](), dict[str, bytes]()
    manifest, placed = local_cluster(export, None, 7100, 1000).placed()
    *sound_nodes, (_, rogue, contract) = placed
    if not sound_nodes:
        raise UserError(f"{export}: has one student; beside a hostile one there has to be a sound one")
    limit = math.inf if contract.feature_limit is None else contract.feature_limit
    half = (contract.feature_limit or 1.0) / 2
    sound = make_response(contract, "", np.full((1, contract.n_features), half, np.float32))

    async def misbehave(_: bytes, context: aio.ServicerContext) -> bytes:
        last["content"] = b""
        if random.randrange(20) == 0:
            await context.abort(random.choice(list(StatusCode)[1:]), "x" * random.randrange(1000))
        last["content"] = hostile(sound, random)
        return last["content"]

    server = aio.server()
    handlers = {MODEL_INFER.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(misbehave)}
    service = MODEL_INFER.split("/")[1]
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, None)
        nodes = []
        for node, _, agreed in sound_nodes:
            serve = serving(ServedStudent(export / f"{agreed.model}.onnx"), "127.0.0.1:0")
            bound, _ = await stack.enter_async_context(serve)
            nodes.append(node.model_copy(update={"address": f"127.0.0.1:{bound}"}))
        nodes.append(Node(name="rogue", address=f"127.0.0.1:{port}", model=contract.model))
        cluster = Cluster(export=export, deadline_ms=ANSWER_TIMEOUT_S * 1000, insecure=True, nodes=nodes)
        coordinator = await stack.enter_async_context(Coordinator(cluster))
        image = np.random.default_rng(seed).integers(0, 256, contract.image_shape[1:], dtype=np.uint8)
        features = {i: ServedStudent(export / f"{c.model}.onnx").run(image[None])[0] for _, i, c in sound_nodes}
        for _ in track(range(n_messages), "hostile responses"):
            answer = await coordinator.classify(image)
            coordinator.connections[rogue].reset()  # or its breaker would block the rest of the campaign
            features_sent = is_sound(last["content"], ModelInferResponse, read_response, contract)
            present = features if features_sent is None else features | {rogue: features_sent}
            expected = predict(manifest, coordinator.final, present)
            right = np.allclose(answer.prediction.probabilities, expected.probabilities, rtol=1e-9)
            right = right and len(answer.present) == len(present)
            # Independent of `read_response`, which is under test here.
            right = right and (features_sent is None or 0 <= features_sent.min() <= features_sent.max() <= limit)
            kind = "discarded" if len(present) == len(features) else "harmless, used as a sound one"
            outcomes[kind if right else f"WRONG {kind}"] += 1
    return outcomes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", type=Path, metavar="FOLDER", help="folder of an exported network")
    parser.add_argument(
        "--messages", type=int, default=100_000, help="messages to each of the two (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    parser.epilog = "example: nonn fuzz results/mnist5k/export/2s --messages 1000"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn fuzz``."""
    if options.messages < 1:
        raise UserError("--messages: give at least 1")
    failed = 0
    for place, campaign in (("node", fuzz_node), ("coordinator", fuzz_coordinator)):
        outcomes = asyncio.run(campaign(options.export, options.messages, options.seed))
        print(f"{options.messages} hostile messages at the {place}:")
        for outcome, count in sorted(outcomes.items()):
            print(f"  {count:>8}  {outcome}")
        failed += sum(count for outcome, count in outcomes.items() if outcome.startswith("WRONG"))
    if failed:
        raise UserError(f"{failed} outcomes were wrong; see WRONG above")
    log("every hostile message was refused or harmless; nothing crashed")
