"""Run a firmware on an emulated Cortex-M, and count its instructions."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nonn.core.errors import UserError
from nonn.core.files import scratch_folder
from nonn.firmware.build import CALIBRATION, EMULATOR, require
from nonn.firmware.targets import CORES
from nonn.runtime.attached import ending_with_parent

#: Seconds within which an image is answered, even on a busy machine.
IMAGE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Run:
    """`features` float32 (N, F); instructions are those of the first image, of each step and in all."""

    features: np.ndarray
    instructions: int
    step_instructions: list[int]
    stack_used_bytes: int


def run_firmware(elf: Path, core: str, images: np.ndarray, n_features: int) -> Run:
    """Features of images, uint8 (N, channels, H, W), as the firmware computes them.

    QEMU advances its clock by 1 ns for each instruction (``-icount shift=0``), so a timer counts instructions, exactly
    but for the length of a tick, 40 instructions. These are no cycles: QEMU knows no pipelines, caches or waits.

    Raises
    ------
    UserError
        The emulator is missing, or the firmware stopped, takes too long or cannot write its features.
    """
    emulator = require(EMULATOR, "running a firmware")
    with scratch_folder() as folder:
        (folder / "images.bin").write_bytes(np.ascontiguousarray(images, np.uint8).tobytes())
        command = [emulator, "-M", CORES[core].machine, "-cpu", core, "-nographic", "-monitor", "none"]
        command += ["-serial", "none", "-semihosting-config", "enable=on,target=native", "-icount", "shift=0"]
        command += ["-kernel", str(elf.resolve())]
        limit = IMAGE_TIMEOUT_S * max(len(images), 1)
        silent: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
        try:
            done = subprocess.run(ending_with_parent(command), cwd=folder, timeout=limit, check=False, **silent)
        except subprocess.TimeoutExpired:
            raise UserError(f"{elf}: the firmware has not ended in {limit:g} s. Build it again.") from None
        report = re.findall(r"^(\w+) (\d+)$", done.stdout + done.stderr, re.MULTILINE)
        values = {name: int(value) for name, value in report}
        if done.returncode or values.get("images") != len(images):
            last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no message"]
            raise UserError(f"{elf}: the firmware stopped in the emulator ({last[0]}). Build it again.")
        features = np.fromfile(folder / "features.bin", np.float32)
        if features.size != len(images) * n_features:
            raise UserError(f"{folder}: has too few features of {elf}. Free some space there, then run this again.")
    steps = [round(int(value) * CALIBRATION / values["calibration"]) for name, value in report if name == "step"]
    total = round(values["ticks"] * CALIBRATION / values["calibration"])
    return Run(features.reshape(len(images), n_features), total, steps, values["stack"])
