"""Devices with sensors of their own: a number stands for an image, and nothing else does."""

import asyncio
import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from clusters import CHANNELS, PLENTY_MS, SIZE, free_ports, make_image, plain_node, refusal
from grpc import StatusCode, aio
from splits import write_tiny
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from nonn.cli import main
from nonn.core.errors import UserError
from nonn.runtime.cluster import Cluster, load_cluster, local_cluster, write_cluster
from nonn.runtime.coordinator import Coordinator
from nonn.runtime.node import ServedStudent
from nonn.runtime.processes import node_commands, running
from nonn.runtime.protocol import SAMPLE, Contract, make_request, read_response
from nonn.runtime.sensor import load_sensor
from nonn.runtime.serving import serving
from nonn.split.coordinator import SplitCoordinator, SplitFailedError, device_commands
from nonn.split.node import SplitDevice
from nonn.split.planner import plan_split

SHAPE, N_IMAGES = (CHANNELS, SIZE, SIZE), 3
IMAGES = np.stack([make_image(seed) for seed in range(N_IMAGES)])


@pytest.fixture(scope="module")
def sensor(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sensor") / "images.npy"
    np.save(path, IMAGES)
    return path


# The file


@pytest.mark.parametrize("order", ["C", "F"])
def test_images_come_as_they_were_saved(tmp_path, order):
    np.save(tmp_path / "images.npy", np.asarray(IMAGES, order=order))
    np.testing.assert_array_equal(load_sensor(tmp_path / "images.npy", SHAPE), IMAGES)
    assert load_sensor(None, SHAPE) is None


def write_damaged(path: Path, damage) -> None:
    np.save(path, IMAGES)
    path.write_bytes(damage(path.read_bytes()))


def write_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, IMAGES)


BAD_FILES = {
    "missing": (lambda _: None, "cannot be read .*No such file"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "pipe": (os.mkfifo, "is a named pipe"),
    "empty": (lambda path: path.touch(), "cannot be read"),
    "text": (lambda path: path.write_text("no array"), "cannot be read"),
    "archive": (write_archive, "cannot be read"),
    "pickle": (lambda path: np.save(path, np.array([None]), allow_pickle=True), "cannot be read"),
    "cut off": (lambda path: write_damaged(path, lambda content: content[:-1]), "cannot be read"),
    "cut header": (lambda path: write_damaged(path, lambda content: content[:20]), "cannot be read"),
    "broken header": (lambda path: write_damaged(path, lambda c: c.replace(b": (3,", b": ((3")), "cannot be read"),
    "endless": (
        lambda path: write_damaged(path, lambda c: c.replace(b"(3, 1,", b"(3%s, 1," % (b"0" * 30))),
        "cannot be",
    ),
    "floats": (lambda path: np.save(path, IMAGES.astype(np.float32)), r"holds float32 \(3, 1, 4, 4\)"),
    "one image": (
        lambda path: np.save(path, IMAGES[0]),
        r"holds uint8 \(1, 4, 4\); give images of uint8 of shape \(n, 1, 4, 4\), n from 1 on",
    ),
    "larger": (lambda path: np.save(path, np.zeros((3, 1, 5, 5), np.uint8)), r"holds uint8 \(3, 1, 5, 5\)"),
    "a number": (lambda path: np.save(path, np.uint8(3)), r"holds uint8 \(\)"),
    "none": (lambda path: np.save(path, IMAGES[:0]), r"holds uint8 \(0, 1, 4, 4\)"),
}


@pytest.mark.parametrize(("write", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_clear_error(tmp_path, write, message):
    path = tmp_path / "images.npy"
    write(path)
    with pytest.raises(UserError, match=f"^{path}: {message}"):
        load_sensor(path, SHAPE)


def test_commands_refuse_a_bad_file_before_they_serve(network_folder, folder):
    write_tiny(folder / "model.onnx")
    plan_split(folder / "model.onnx", 2, "rows").save(folder / "plan")
    split_node = ["split-node", "plan/0", "--devices", "127.0.0.1:7100", "127.0.0.1:7101"]
    for command in (["node", str(network_folder / "0.onnx")], split_node):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--insecure", "--sensor", "nowhere.npy"])
        assert stopped.value.code.startswith(f"nonn {command[0]}: nowhere.npy: cannot be read")


# Nodes


def sample_request(contract: Contract, number: int = 0) -> oip.ModelInferRequest:
    return make_request(contract, np.int64(number))


def set_number(request: oip.ModelInferRequest, content: bytes) -> None:
    request.raw_input_contents[0] = content


def little(number: int) -> bytes:
    return number.to_bytes(8, "little", signed=True)


DAMAGES = {
    "negative": (lambda r: set_number(r, little(-1)), "the sensor has images 0 to 2, none of number -1"),
    "beyond": (lambda r: set_number(r, little(3)), "the sensor has images 0 to 2, none of number 3"),
    "largest": (lambda r: set_number(r, little(2**63 - 1)), "none of number 9223372036854775807"),
    "too short": (lambda r: set_number(r, bytes(4)), "expected 8 bytes, not 4"),
    "too long": (lambda r: set_number(r, bytes(16)), "expected 8 bytes, not 16"),
    "type": (lambda r: setattr(r.inputs[0], "datatype", "INT32"), "expected the type INT64, not 'INT32'"),
    "shape": (lambda r: r.inputs[0].shape.pop(), "expected the shape [1, 1], not [1]"),
    "batch": (lambda r: r.inputs[0].shape.__setitem__(0, 2), "expected the shape [1, 1], not [2, 1]"),
    "typed data": (lambda r: r.inputs[0].contents.int64_contents.append(0), "as raw_input_contents"),
    "no data": (lambda r: r.ClearField("raw_input_contents"), "one raw tensor, not 0"),
    "two inputs": (lambda r: r.inputs.append(r.inputs[0]), "expected 1 input, not 2"),
    "unknown": (lambda r: setattr(r.inputs[0], "name", "number"), "expected the input 'image', not 'number'"),
}


@contextlib.asynccontextmanager
async def calling(student: ServedStudent):
    async with serving(student, "127.0.0.1:0") as (port, _), aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield oip_grpc.GRPCInferenceServiceStub(channel)


def test_a_node_answers_a_number_exactly_as_its_image(network_folder, sensor):
    student = ServedStudent(network_folder / "0.onnx", sensor)

    async def scenario():
        async with calling(student) as stub:
            for number, image in enumerate(IMAGES):
                by_number = await stub.ModelInfer(sample_request(student.contract, number))
                by_image = await stub.ModelInfer(make_request(student.contract, image))
                assert by_number == by_image
                features = read_response(student.contract, by_number)
                np.testing.assert_array_equal(features, student.run(image[None])[0])

    asyncio.run(scenario())


def test_a_node_refuses_numbers_that_are_not_agreed(network_folder, sensor):
    student = ServedStudent(network_folder / "0.onnx", sensor)

    async def scenario():
        async with calling(student) as stub:
            for damage, message in DAMAGES.values():
                request = sample_request(student.contract)
                damage(request)
                code, details = await refusal(stub.ModelInfer(request))
                assert code == StatusCode.INVALID_ARGUMENT
                assert message in details
            await stub.ModelInfer(sample_request(student.contract, 2))  # the node is unharmed

    asyncio.run(scenario())


def test_a_node_without_a_sensor_refuses_numbers(network_folder):
    contract = ServedStudent(network_folder / "0.onnx").contract

    async def scenario():
        async with plain_node(network_folder) as (address, _), aio.insecure_channel(address) as channel:
            call = oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(sample_request(contract))
            code, details = await refusal(call)
            assert code == StatusCode.INVALID_ARGUMENT
            assert details == f"expected the input 'image', not {SAMPLE!r}"

    asyncio.run(scenario())


def test_cluster_yaml_names_the_sensor_relative_to_itself(network_folder, sensor, folder):
    plain = local_cluster(network_folder, None, 7100, 5000)
    write_cluster(folder / "cluster.yaml", plain)
    assert load_cluster(folder / "cluster.yaml").sensor is None
    write_cluster(folder / "cluster.yaml", plain.model_copy(update={"sensor": sensor}))
    assert str(sensor.parent) not in (folder / "cluster.yaml").read_text()
    assert load_cluster(folder / "cluster.yaml").sensor.resolve() == sensor


@contextlib.asynccontextmanager
async def coordinating(cluster: Cluster):
    """A coordinator of node processes that `cluster` describes, each on a port of its own choice."""
    async with running(node_commands(cluster)) as children:
        nodes = [child.node for child in children.values()]
        async with Coordinator(cluster.model_copy(update={"nodes": nodes})) as coordinator:
            yield coordinator


def test_a_coordinator_classifies_by_number(network_folder, certificates, sensor):
    cluster = local_cluster(network_folder, certificates, 0, PLENTY_MS).model_copy(update={"sensor": sensor})

    async def scenario():
        async with coordinating(cluster) as coordinator:
            for number, image in enumerate(IMAGES):
                by_number, by_image = await coordinator.classify(np.int64(number)), await coordinator.classify(image)
                assert by_number.prediction == by_image.prediction
                assert by_number.present == by_image.present == ["node-0", "node-1", "node-2"]
            with pytest.raises(UserError, match="node-0: invalid argument: the sensor has images 0 to 2"):
                await coordinator.classify(np.int64(N_IMAGES))
            with pytest.raises(ValueError, match="expected an image of uint8"):
                await coordinator.classify(np.array(0))

    asyncio.run(scenario())


# Devices of a split network


def test_devices_of_a_split_network_answer_numbers_too(sensor, folder):
    write_tiny(folder / "model.onnx")
    plan = plan_split(folder / "model.onnx", 2, "channels")
    plan.save(folder / "plan")
    np.testing.assert_array_equal(SplitDevice(folder / "plan/0", sensor).contract.sensor, IMAGES)
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]

    async def scenario():
        async with (
            running(device_commands(folder / "plan", addresses, sensor=sensor)),
            SplitCoordinator(plan, addresses, PLENTY_MS) as coordinator,
        ):
            for number, image in enumerate(IMAGES):
                logits = await coordinator.classify(np.int64(number))
                np.testing.assert_array_equal(logits, await coordinator.classify(image))
            with pytest.raises(SplitFailedError, match=r"invalid argument: the sensor has images 0 to 2, none .* -1"):
                await coordinator.classify(np.int64(-1))
            with pytest.raises(ValueError, match="expected an image of uint8"):
                await coordinator.classify(np.array(0))

    asyncio.run(scenario())
