"""A cluster of emulated microcontrollers: it answers as ONNX Runtime does, and leaves nothing behind."""

import asyncio
import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from clusters import PATIENCE, cluster_of, free_ports, make_image, until
from firmwares import needs_toolchain, write_int8_export
from hypothesis import given, settings
from hypothesis import strategies as st

from nonn import cli
from nonn.core.errors import UserError
from nonn.firmware.build import EMULATOR
from nonn.firmware.emulated_board import EmulatedBoard
from nonn.firmware.graph import read_student
from nonn.firmware.scale import FeatureScale, scale_of
from nonn.firmware.targets import find_target
from nonn.live.up import run_cluster
from nonn.runtime.coordinator import Coordinator, NobodyAnsweredError
from nonn.runtime.final import FinalLayer, predict
from nonn.runtime.session import run_onnx


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write_int8_export(tmp_path_factory.mktemp("network") / "2s")


@pytest.fixture
def board(export, tmp_path):
    board = EmulatedBoard(export / "1.onnx", find_target("stm32h743"), tmp_path)
    yield board
    board.stop()


def emulators():
    """Process ids of the emulated boards that this test has started, itself or by way of others."""
    test, found = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0], set()  # without its phase
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_emulator = (process / "comm").read_text().startswith(EMULATOR[:15])
            if is_emulator and f"PYTEST_CURRENT_TEST={test} ".encode() in (process / "environ").read_bytes():
                found.add(process.name)
    return found


@needs_toolchain
def test_a_cluster_of_boards_answers_as_onnx_runtime(export):
    cluster = cluster_of(export, [f"127.0.0.1:{port}" for port in free_ports(3)])
    images = [make_image(seed) for seed in range(3)]

    async def scenario():
        stopped = asyncio.Event()
        running = asyncio.create_task(run_cluster(cluster, boards="stm32h743", stopped=stopped))
        async with asyncio.timeout(PATIENCE), Coordinator(cluster) as coordinator:
            answers = None
            while answers is None or answers[0].absent:
                assert not running.done(), running.exception()
                with contextlib.suppress(NobodyAnsweredError):
                    answers = [await coordinator.classify(image) for image in images]
                await asyncio.sleep(0.1)
        assert len(emulators()) == 3
        stopped.set()
        await running
        return coordinator, answers

    coordinator, answers = asyncio.run(scenario())
    manifest, final = coordinator.manifest, FinalLayer.load(export, coordinator.manifest)
    for image, answer in zip(images, answers, strict=True):
        expected = {}
        for position, entry in enumerate(manifest.students):
            scale = scale_of(read_student(export / entry.file))
            integers = scale.encode(run_onnx(export / entry.file, [image])[0])
            assert integers.dtype == np.uint8
            assert len(np.unique(integers)) > 1
            expected[position] = scale.decode(integers)
            np.testing.assert_array_equal(answer.features[f"node-{position}"], expected[position])
        prediction = predict(manifest, final, expected)
        assert answer.prediction.label == prediction.label
        np.testing.assert_array_equal(answer.prediction.probabilities, prediction.probabilities)
    asyncio.run(until(lambda: not emulators()))


@needs_toolchain
def test_a_board_that_stops_is_started_again(board):
    image = make_image()[None]
    features = board.run(image)
    board.emulator.process.kill()
    with pytest.raises((OSError, RuntimeError)):
        board.run(image)
    assert board.run(image).tobytes() == features.tobytes()


@needs_toolchain
def test_a_board_that_does_not_start_again_is_tried_with_the_next_image(board, monkeypatch):
    image = make_image()[None]
    features = board.run(image)
    board.stop()
    with monkeypatch.context() as patch:
        patch.setattr("nonn.firmware.emulated_board.START_TIMEOUT_S", 0.0)
        for _ in range(2):
            with pytest.raises(UserError, match=r"the firmware does not start in qemu-system-arm \(the emulated board"):
                board.run(image)
    assert board.run(image).tobytes() == features.tobytes()


@needs_toolchain
def test_bytes_of_the_board_are_those_of_the_scale(board, export):
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
    expected = run_onnx(export / "1.onnx", images)
    scale = board.scale
    found = np.stack([board.emulator.run(image, board.n_features) for image in images])
    np.testing.assert_array_equal(found, scale.encode(expected))
    assert np.abs(scale.decode(found) - expected).max() <= scale.step / 2 * 1.001


@settings(max_examples=50)
@given(st.floats(-8, 8, width=32), st.floats(0.03125, 4, width=32), st.integers(0, 255))
def test_a_byte_stands_for_itself(low, step, byte):
    scale = FeatureScale(np.float32(low), np.float32(step))
    assert scale.encode(scale.decode(np.array([byte], np.uint8))) == [byte]


def test_without_the_emulator_one_line_says_what_is_missing(export, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"nonn board: .* is not installed: .* make system-deps"):
        cli.main(["board", str(export / "0.onnx"), "--device", "stm32h743", "--insecure"])
    with pytest.raises(SystemExit, match="nonn board: pi5: firmware is written for cortex_m7"):
        cli.main(["board", str(export / "0.onnx"), "--device", "pi5", "--insecure"])
