"""Compile and link a firmware with Debian's toolchain for Arm, under the limits of a device's memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from nonn.core.errors import UserError, printable
from nonn.core.files import write_text
from nonn.firmware.targets import CORES, STACK_BYTES, Target, linker_script

COMPILER = "arm-none-eabi-gcc"
EMULATOR = "qemu-system-arm"
INSTALL = "On Debian or Ubuntu run: make system-deps"
#: Instructions of the loop by which ``main.c`` measures how many a tick of SysTick lasts.
CALIBRATION = 2_000_000
#: No fused operations on float32, which round differently from ONNX Runtime.
FLAGS = (
    *("-mthumb", "-mfloat-abi=hard", "-std=c11", "-O2", "-ffp-contract=off", "-ffunction-sections"),
    *("-fdata-sections", "-Wall", "-Wextra", "-Werror", f"-DCALIBRATION={CALIBRATION}u"),
)
#: Sources of the package, beside the student's own ``student.c``.
OWN_SOURCES = ("kernels.h", "kernels.c", "main.c")


class ToolError(UserError):
    """A program of the toolchain failed; `stderr` is what it wrote on standard error."""

    def __init__(self, program: str, stderr: str):
        lines = stderr.strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else "it says nothing")
        super().__init__(f"{Path(program).name}: {printable(reason)}. {INSTALL}, or make room on the disk.")
        self.stderr = stderr


@dataclass(frozen=True)
class LinkedFirmware:
    """A linked firmware. `ram_bytes` has the arena, the program's variables, and all of the stack."""

    elf: Path
    flash_bytes: int
    ram_bytes: int


def missing_program() -> str | None:
    """A line about the first program of toolchain and emulator that is not installed; None if there is none."""
    for program in (COMPILER, EMULATOR):
        if shutil.which(program) is None:
            return f"{program} is not installed. {INSTALL}"
    return None


def require(program: str, what_for: str) -> str:
    """The path of a program of the toolchain.

    Raises
    ------
    UserError
        It is not installed.
    """
    if (path := shutil.which(program)) is None:
        raise UserError(f"{program} is not installed: {what_for} needs it. {INSTALL}")
    return path


def copy_sources(folder: Path) -> None:
    """Put kernels and main program beside the student's own source."""
    for name in OWN_SOURCES:
        write_text(folder / name, (files("nonn.firmware") / name).read_text(encoding="utf-8"))


def compile_sources(folder: Path, target: Target, uart: int | None = None) -> list[Path]:
    """Objects of all sources in a folder; with `uart`, the address of a serial port, images come from that port.

    Raises
    ------
    UserError
        The toolchain is missing.
    """
    compiler = require(COMPILER, "building a firmware")
    flags = [*CORES[target.core].flags, *FLAGS, *([f"-DNONN_UART={uart:#x}"] if uart is not None else [])]
    objects = []
    for source in (folder / name for name in ("kernels.c", "main.c", "student.c")):
        objects.append(source.with_suffix(".o"))
        _run([compiler, *flags, "-c", source.name, "-o", objects[-1].name], folder)
    return objects


def link(objects: Sequence[Path], target: Target, elf: Path) -> LinkedFirmware:
    """Link for a device; writes a linker script and a map beside `elf`.

    Raises
    ------
    UserError
        It does not fit into the device's flash or RAM.
    """
    script, listing = elf.with_suffix(".ld"), elf.with_suffix(".map")
    write_text(script, linker_script(target, STACK_BYTES))
    command = [require(COMPILER, "building a firmware"), *CORES[target.core].flags, *FLAGS, "-nostartfiles"]
    command += ["-Wl,--gc-sections", f"-Wl,-Map={listing.name}", "-T", script.name]
    command += [*(path.name for path in objects), "-o", elf.name]
    try:
        _run(command, elf.parent)
    except ToolError as error:
        if not (over := re.findall(r"region `(\w+)' overflowed by (\d+) bytes?", error.stderr)):
            raise
        limits = {"FLASH": ("flash", target.flash_bytes), "RAM": ("RAM", target.ram_bytes)}
        lines = [f"{limits[region][0]} by {int(n):,} of {limits[region][1]:,} bytes" for region, n in over]
        raise UserError(
            f"{elf.stem}: does not fit {target.name}: it exceeds {' and '.join(lines)}. "
            "Choose a smaller student or a device with more memory (`nonn devices`)."
        ) from None
    return LinkedFirmware(elf, *_sizes(elf))


def _sizes(elf: Path) -> tuple[int, int]:
    """Bytes in flash and in RAM."""
    text = _run([require("arm-none-eabi-size", "building a firmware"), "-A", elf.name], elf.parent)
    sizes = {name: int(size) for name, size in re.findall(r"^(\.\w+)\s+(\d+)\s+\d+$", text, re.MULTILINE)}
    data = sizes.get(".data", 0)
    return sizes[".text"] + data, data + sizes[".bss"] + sizes[".stack"]


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ToolError(command[0], done.stderr)
    return done.stdout
