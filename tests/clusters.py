"""A tiny exported network, built by hand in milliseconds, and helpers that serve it on loopback."""

import contextlib
import hashlib
import socket
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from nonn.core.files import write_json
from nonn.runtime.node import Student
from nonn.runtime.serving import serving

CHANNELS, SIZE, N_FEATURES, CLASSES = 1, 4, (3, 5, 2), ["ant", "bee", "cat", "dog"]
PIXELS = CHANNELS * SIZE * SIZE
#: More than the students can reach, as their weights are.
FEATURE_LIMIT = 20.0


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
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (CHANNELS, SIZE, SIZE), dtype=np.uint8)


@contextlib.asynccontextmanager
async def plain_node(folder: Path, position: int = 0, port: int = 0):
    """Address of a node on loopback that serves one student in plain text, and the node's meters."""
    async with serving(Student(folder / f"{position}.onnx"), f"127.0.0.1:{port}") as (bound, meters):
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


def nobody_listens(addresses: Iterable[str]) -> bool:
    for address in addresses:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(address.split(":")[1]))) == 0:
                return False
    return True
