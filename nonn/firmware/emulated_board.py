"""A microcontroller among the nodes: an emulated board computes a student, and a gateway answers for it.

The gateway builds the student's firmware, starts it in QEMU, and exchanges data by the board's serial port: it sends an
image of 8-bit pixels and receives a byte a feature. To the coordinator the gateway is a node like any other; it turns
the bytes into float32 features by the student's scale (`nonn.firmware.scale`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import selectors
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nonn.core.chips import CHIPS
from nonn.core.errors import UserError
from nonn.core.files import scratch_folder
from nonn.core.options import complete_from
from nonn.core.progress import log
from nonn.firmware.build import EMULATOR, require
from nonn.firmware.build_and_run import build
from nonn.firmware.emulate import IMAGE_TIMEOUT_S
from nonn.firmware.scale import scale_of
from nonn.firmware.targets import CORES, EMULATED_PORT, Target, find_target
from nonn.runtime.attached import ending_with_parent
from nonn.runtime.logs import relayed_stderr
from nonn.runtime.node import ServedStudent
from nonn.runtime.serving import serve
from nonn.runtime.serving_options import add_device, callers_from, identity_from

#: The byte that the firmware sends as soon as it listens.
READY = b"R"
#: Seconds within which it sends that, even on a busy machine.
START_TIMEOUT_S = 30.0


class Emulator:
    """QEMU with one firmware, behind a serial port."""

    def __init__(self, elf: Path, core: str):
        command = [require(EMULATOR, "an emulated board"), "-M", CORES[core].machine, "-cpu", core]
        command += ["-display", "none", "-monitor", "none", "-serial", "stdio", "-kernel", str(elf.resolve())]
        command += ["-semihosting-config", "enable=on,target=native"]  # by which a failed firmware stops
        self.process = subprocess.Popen(
            ending_with_parent(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        try:
            if self.read(len(READY), START_TIMEOUT_S) != READY:
                raise RuntimeError("it does not say that it is ready")
        except BaseException as error:
            self.close()
            if not isinstance(error, RuntimeError):
                raise
            raise UserError(f"{elf}: the firmware does not start in {EMULATOR} ({error}). Build it again.") from None

    def run(self, image: np.ndarray, n_features: int) -> np.ndarray:
        """The bytes (n_features,) of an image, uint8 (channels, rows, columns)."""
        assert self.process.stdin is not None  # a pipe
        self.process.stdin.write(np.ascontiguousarray(image, np.uint8).tobytes())
        return np.frombuffer(self.read(n_features, IMAGE_TIMEOUT_S), np.uint8)

    def read(self, count: int, seconds: float) -> bytes:
        """`count` bytes from the port; a `RuntimeError` if they do not come within `seconds`."""
        assert self.process.stdout is not None  # a pipe
        end, found = time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while len(found) < count:
                if not selector.select(max(end - time.monotonic(), 0)):
                    raise RuntimeError(f"the emulated board is silent for {seconds:g} s")
                if not (part := os.read(self.process.stdout.fileno(), count - len(found))):
                    raise RuntimeError("the emulated board has stopped")
                found += part
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


class EmulatedBoard:
    """An emulated board that computes a student by its firmware, which is built in `folder`.

    Raises
    ------
    UserError
        The toolchain or the emulator is missing, or no firmware can be made of the student.
    """

    def __init__(self, path: Path, target: Target, folder: Path):
        firmware = build(path, target, folder, EMULATED_PORT)
        self.n_features, self.scale = firmware.student.n_features, scale_of(firmware.student)
        self.start = functools.partial(Emulator, firmware.emulated.elf, target.core)
        self.emulator: Emulator | None = self.start()

    def run(self, images: np.ndarray) -> np.ndarray:
        """Features (k, F_i), float32, of images; after a failure the board is started again for the next images."""
        try:
            if self.emulator is None:
                self.emulator = self.start()
            return np.stack([self.scale.decode(self.emulator.run(image, self.n_features)) for image in images])
        except (OSError, RuntimeError):
            self.stop()
            raise

    def stop(self) -> None:
        """Switch the board off, if it is on."""
        if self.emulator:
            self.emulator.close()
        self.emulator = None


@contextlib.contextmanager
def served_board(path: Path, target: Target, folder: Path, sensor: Path | None = None) -> Iterator[ServedStudent]:
    """A student as an emulated board serves it, which is switched off at the end of the block.

    Raises
    ------
    UserError
        As `ServedStudent` and `EmulatedBoard`, or the board fails on its first image.
    """
    board = EmulatedBoard(path, target, folder)
    try:
        try:
            student = ServedStudent(path, sensor, board.run)  # runs two images on the board
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: the emulated {target.name} fails on its first image ({error}).") from None
        student.platform = "nonn_firmware"
        yield student
    finally:
        board.stop()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL.onnx", help="an exported int8 student, with manifest.json next to it"
    )
    device = parser.add_argument("--device", required=True, metavar="NAME", help="of `nonn devices`, such as stm32h743")
    complete_from(device, lambda: list(CHIPS))
    parser.add_argument("--address", default="127.0.0.1:7100", help="host:port to listen on (default: %(default)s)")
    add_device(parser)
    parser.epilog = "example: nonn board results/cifar10_int8/export/4s/0.onnx --device stm32h743 --insecure"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn board``."""
    identity = identity_from(options)
    allowed = callers_from(options, identity)
    with (
        scratch_folder() as folder,
        served_board(options.model, find_target(options.device), folder, options.sensor) as student,
        relayed_stderr(),
    ):
        asyncio.run(serve(student, options.address, identity, allowed, None, options.attached))
    log(f"{options.device}: stopped")
