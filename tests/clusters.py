"""A tiny exported network, built by hand in milliseconds, and helpers that serve it, ask it and wait for it."""

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from grpc import StatusCode, aio
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from nonn.core.files import write_json
from nonn.runtime.cluster import Cluster, Node, Tls
from nonn.runtime.coordinator import Coordinator
from nonn.runtime.node import ServedStudent
from nonn.runtime.protocol import Contract, make_response, version_of
from nonn.runtime.serving import serving
from nonn.runtime.session import run_onnx

CHANNELS, SIZE, N_FEATURES, CLASSES = 1, 4, (3, 5, 2), ["ant", "bee", "cat", "dog"]
PIXELS = CHANNELS * SIZE * SIZE
#: More than the students can reach, as their weights are.
FEATURE_LIMIT = 20.0
#: Of the students that `write_export` has written: the same each time.
VERSIONS: list[str] = []
#: Seconds after which what a test waits for has failed: more than it takes on a slow and busy machine.
PATIENCE = 60
#: Deadline that every image meets.
PLENTY_MS = 1000.0 * PATIENCE


def _save(path: Path, nodes: list, inputs: tuple, outputs: tuple, constants: dict) -> None:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*inputs)],
        [helper.make_tensor_value_info(*outputs)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def write_student(path: Path, weight: np.ndarray) -> None:
    """ReLU(W x) of the pixels x."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["sums"]),
        helper.make_node("Relu", ["sums"], ["features"]),
    ]
    shape = [1, CHANNELS, SIZE, SIZE]
    outputs = ("features", TensorProto.FLOAT, [1, weight.shape[1]])
    _save(path, nodes, ("image", TensorProto.UINT8, shape), outputs, {"weight": weight})


def write_export(folder: Path) -> Path:
    """An export of three students with random weights, as the stage `export` would write it."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    blocks, students = {}, []
    for position, n_features in enumerate(N_FEATURES):
        weight = generator.normal(size=(PIXELS, n_features)).astype(np.float32) / 500
        write_student(folder / f"{position}.onnx", weight)
        blocks[f"weights.{position}"] = generator.normal(size=(len(CLASSES), n_features)).astype(np.float32)
        blocks[f"biases.{position}"] = generator.normal(size=len(CLASSES)).astype(np.float32)
        students.append({"file": f"{position}.onnx", "n_features": n_features, "feature_limit": FEATURE_LIMIT})
    n = len(students)
    blocks |= {"scales": n / np.arange(1, n + 1), "fills": np.zeros((n, len(CLASSES)), np.float32)}
    save_file(blocks, folder / "final.safetensors")
    joined = np.concatenate([blocks[f"weights.{i}"] for i in range(n)], axis=1)
    constants = {"weight": joined, "bias": sum(blocks[f"biases.{i}"] for i in range(n))}
    gemm = helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"], transB=1)
    shapes = ([1, sum(N_FEATURES)], [1, len(CLASSES)])
    ends = [(name, TensorProto.FLOAT, shape) for name, shape in zip(("features", "logits"), shapes, strict=True)]
    _save(folder / "final.onnx", [gemm], *ends, constants)
    final = {"file": "final.onnx", "blocks": "final.safetensors"}
    final |= {"sha256": sha256(folder / "final.onnx"), "blocks_sha256": sha256(folder / "final.safetensors")}
    manifest = {
        "classes": CLASSES,
        "image": {"channels": CHANNELS, "size": SIZE, "dtype": "uint8"},
        "students": [student | {"sha256": sha256(folder / student["file"])} for student in students],
        "final": final,
    }
    write_json(folder / "manifest.json", manifest)
    VERSIONS[:] = [version_of(student["sha256"]) for student in manifest["students"]]
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (CHANNELS, SIZE, SIZE), dtype=np.uint8)


@contextlib.asynccontextmanager
async def plain_node(folder: Path, position: int = 0, port: int = 0):
    """Address of a node on loopback that serves one student in plain text, and the node's meters."""
    async with serving(ServedStudent(folder / f"{position}.onnx"), f"127.0.0.1:{port}") as (bound, meters):
        yield f"127.0.0.1:{bound}", meters


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens, for what cannot be asked to choose one itself."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def cluster_of(export: Path, addresses: list[str], tls: Path | None = None, deadline_ms: float = PLENTY_MS) -> Cluster:
    nodes = [Node(name=f"node-{i}", address=address, model=str(i)) for i, address in enumerate(addresses)]
    return Cluster(
        export=export,
        deadline_ms=deadline_ms,
        tls=Tls(folder=tls) if tls else None,
        insecure=tls is None,
        nodes=nodes,
    )


class Rogue(oip_grpc.GRPCInferenceServiceServicer):
    """Plays a node: does whatever the function `behave` does with a request."""

    def __init__(self, behave):
        self.behave, self.asked = behave, 0

    async def ModelInfer(self, request, context):
        self.asked += 1
        return await self.behave(request, context)


@contextlib.asynccontextmanager
async def rogue_node(behave):
    server, rogue = aio.server(), Rogue(behave)
    oip_grpc.add_GRPCInferenceServiceServicer_to_server(rogue, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", rogue
    finally:
        await server.stop(None)


class Empty(grpc.GenericRpcHandler):
    """Ends every call well, and sends no message."""

    def service(self, _):
        async def nothing(*_):
            return
            yield

        return grpc.unary_stream_rpc_method_handler(nothing)


@contextlib.asynccontextmanager
async def empty_node():
    server = aio.server(handlers=[Empty()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def hang(*_) -> None:
    """What a node that never answers does with a request."""
    await asyncio.sleep(10 * PATIENCE)


@contextlib.asynccontextmanager
async def stub_of(address: str, credentials=None, name: str | None = None):
    options = [("grpc.ssl_target_name_override", name)] if name else []
    options.append(("grpc.max_send_message_length", -1))
    channel = (
        aio.secure_channel(address, credentials, options) if credentials else aio.insecure_channel(address, options)
    )
    async with channel:
        yield oip_grpc.GRPCInferenceServiceStub(channel)


async def refusal(call) -> tuple[StatusCode, str]:
    """Status and message that a call is refused with."""
    with pytest.raises(aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details()


#: How a sound request is damaged; the status that refuses it, if not INVALID_ARGUMENT, and what a node says.
BROKEN = {
    "another model": (lambda r: setattr(r, "model_name", "1"), StatusCode.NOT_FOUND, "serves model '0', not '1'"),
    "another version": (lambda r: setattr(r, "model_version", "2"), StatusCode.NOT_FOUND, "has only version"),
    "no input": (lambda r: r.ClearField("inputs"), None, "expected 1 input, not 0"),
    "two inputs": (lambda r: r.inputs.append(r.inputs[0]), None, "expected 1 input, not 2"),
    "input name": (lambda r: setattr(r.inputs[0], "name", "pixels"), None, "the input 'image', not 'pixels'"),
    "type": (lambda r: setattr(r.inputs[0], "datatype", "FP32"), None, "the type UINT8, not 'FP32'"),
    "batch": (lambda r: r.inputs[0].shape.__setitem__(0, 99), None, "the shape [1, 1, 4, 4], not [99, 1, 4, 4]"),
    "negative shape": (lambda r: r.inputs[0].shape.__setitem__(0, -1), None, "not [-1, 1, 4, 4]"),
    "no shape": (lambda r: r.inputs[0].ClearField("shape"), None, "the shape [1, 1, 4, 4], not []"),
    "too short": (lambda r: r.raw_input_contents.__setitem__(0, bytes(15)), None, "expected 16 bytes, not 15"),
    "too long": (lambda r: r.raw_input_contents.__setitem__(0, bytes(17)), None, "expected 16 bytes, not 17"),
    "no data": (lambda r: r.ClearField("raw_input_contents"), None, "one raw tensor, not 0"),
    "two tensors": (lambda r: r.raw_input_contents.append(b""), None, "one raw tensor, not 2"),
    "typed data": (lambda r: r.inputs[0].contents.uint_contents.extend([0] * 16), None, "raw_input_contents"),
    "shared memory": (
        lambda r: r.inputs[0].parameters["shared_memory_region"].MergeFrom(oip.InferParameter(string_param="x")),
        None,
        "parameters are not supported",
    ),
    "another output": (lambda r: r.outputs.add(name="logits"), None, "no output 'logits'; ask for features"),
}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


def nobody_listens(addresses: Iterable[str]) -> bool:
    for address in addresses:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(address.split(":")[1]))) == 0:
                return False
    return True


@contextlib.asynccontextmanager
async def two_and(export: Path, third: str, deadline_ms: float = PLENTY_MS):
    """A coordinator of two sound nodes and one that the test provides."""
    async with (
        plain_node(export, 0) as (first, _),
        plain_node(export, 1) as (second, _),
        Coordinator(cluster_of(export, [first, second, third], deadline_ms=deadline_ms)) as coordinator,
    ):
        yield coordinator


def expected_logits(export: Path, image: np.ndarray, present: list[int]) -> np.ndarray:
    """N/|present| · Σ_present (W_i f_i + b_i), term by term."""
    blocks = load_file(export / "final.safetensors")
    logits = np.zeros(len(CLASSES))
    for i in present:
        (feature,) = run_onnx(export / f"{i}.onnx", image[None])
        logits += blocks[f"weights.{i}"] @ feature + blocks[f"biases.{i}"]
    return logits * len(N_FEATURES) / len(present)


def assert_answer(answer, export: Path, image: np.ndarray, present: list[int]) -> None:
    assert answer.present == [f"node-{i}" for i in present]
    assert set(answer.absent) == {f"node-{i}" for i in range(len(N_FEATURES)) if i not in present}
    logits = expected_logits(export, image, present)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    assert answer.prediction.label == CLASSES[logits.argmax()]
    np.testing.assert_allclose(answer.prediction.probabilities, probabilities, rtol=1e-4)
    assert len(answer.prediction.shares) == len(present)


def with_features(values):
    async def answer(*_):
        contract = Contract("2", CHANNELS, SIZE, N_FEATURES[2], FEATURE_LIMIT, version=VERSIONS[2])
        return make_response(contract, "", np.array([values], np.float32))

    return answer


async def fail(_, context):
    await context.abort(StatusCode.INTERNAL, "ill")
