"""A student's firmware from its ONNX file to its figures: built, run, and compared with ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nonn.core.progress import track
from nonn.firmware.arena import plan_arena
from nonn.firmware.build import LinkedFirmware, compile_sources, copy_sources, link
from nonn.firmware.emulate import Run, run_firmware
from nonn.firmware.energy import nanojoules_per_mac
from nonn.firmware.graph import read_student
from nonn.firmware.scale import scale_of
from nonn.firmware.source import buffers_of, packed_weights, write_source
from nonn.firmware.steps import Combine, Conv, FirmwareProgram, KernelCall, Mean, Prepare
from nonn.firmware.targets import STACK_BYTES, Target
from nonn.runtime.exported import read_manifest
from nonn.runtime.sensor import open_images
from nonn.runtime.session import run_onnx

#: Images of one call of the emulator: after each, progress is shown.
BATCH = 25
#: Seed of the images that are run where none are given.
SEED = 0


@dataclass(frozen=True)
class Firmware:
    """What was built of one student: `linked` for the device, `emulated` the same for QEMU's memory map."""

    path: Path
    student: FirmwareProgram
    target: Target
    arena_bytes: int
    linked: LinkedFirmware
    emulated: LinkedFirmware


def students_of(paths: list[Path]) -> list[Path]:
    """ONNX files, those of a whole network for the folder of its export."""
    found: list[Path] = []
    for path in paths:
        found += [path / entry.file for entry in read_manifest(path).students] if path.is_dir() else [path]
    return found


def build(path: Path, target: Target, folder: Path, uart: int | None = None) -> Firmware:
    """Write, compile and link the firmware of a student in a folder of its own; for `uart` see `compile_sources`.

    Raises
    ------
    UserError
        The student has no kernels, the toolchain is missing, or the firmware does not fit the device.
    """
    student = read_student(path)
    folder.mkdir(parents=True, exist_ok=True)
    arena = write_source(student, folder)
    copy_sources(folder)
    objects = compile_sources(folder, target, uart)
    linked = link(objects, target, folder / f"{path.stem}.elf")
    return Firmware(path, student, target, arena, linked, link(objects, target.emulated, folder / "emulated.elf"))


def read_images(path: Path | None, student: FirmwareProgram, count: int) -> np.ndarray:
    """The first images of a file, see `nonn.runtime.sensor.open_images`; grey noise of a fixed seed without one."""
    shape = student.image_shape
    planes = (shape.channels, shape.rows, shape.columns)
    if path is None:
        return np.random.default_rng(SEED).integers(0, 256, (count, *planes), dtype=np.uint8)
    return np.ascontiguousarray(open_images(path, planes, count)[:count])


def run_and_compare(firmware: Firmware, images: np.ndarray) -> tuple[Run | None, int]:
    """The run of the first image, None without any, and how many have the features of ONNX Runtime bit for bit."""
    first, identical = None, 0
    student, core = firmware.student, firmware.target.core
    starts = range(0, len(images), BATCH)
    for start in track(starts, firmware.path.name) if len(starts) > 1 else starts:
        batch = images[start : start + BATCH]
        run = run_firmware(firmware.emulated.elf, core, batch, student.n_features)
        expected = run_onnx(firmware.path, batch)
        identical += sum(a.tobytes() == b.tobytes() for a, b in zip(run.features, expected, strict=True))
        first = first or run
    return first, identical


def firmware_entry(firmware: Firmware, run: Run | None, checked: int, identical: int) -> dict[str, Any]:
    """The entry of a student in ``firmware.json``; what only a run can tell is null without one."""
    student, scale = firmware.student, scale_of(firmware.student)
    weights, tables = _constant_bytes(student)
    counts: list[int] | list[None] = run.step_instructions if run else [None] * len(student.steps)
    layers = [_layer(step, count) for step, count in zip(student.steps, counts, strict=True)]
    return {
        "network": firmware.path.resolve().parent.name,
        "student": firmware.path.stem,
        "device": firmware.target.name,
        "core": firmware.target.core,
        "flash_bytes": firmware.linked.flash_bytes,
        "ram_bytes": firmware.linked.ram_bytes,
        "flash_limit_bytes": firmware.target.flash_bytes,
        "ram_limit_bytes": firmware.target.ram_bytes,
        "weight_bytes": weights,
        "table_bytes": tables,
        "arena_bytes": firmware.arena_bytes,
        "stack_bytes": STACK_BYTES,
        "stack_used_bytes": run.stack_used_bytes if run else None,
        "feature_bytes": student.n_features,
        "feature_low": float(scale.low),
        "feature_step": float(scale.step),
        "macs": student.macs,
        "instructions": run.instructions if run else None,
        "instructions_per_mac": _ratio(run.instructions if run else None, student.macs),
        "images_checked": checked,
        "images_identical": identical,
        **_energy(firmware),
        "layers": layers,
        "buffers": _buffers(student),
    }


def _energy(firmware: Firmware) -> dict[str, float | None]:
    """Projected, see `nonn.firmware.energy`: no board was measured."""
    price = nanojoules_per_mac(firmware.target.core)
    return {
        "projected_nj_per_mac": round(price, 3) if price else None,
        "projected_mj": float(f"{1e-6 * price * firmware.student.macs:.3g}") if price else None,
    }


def _buffers(student: FirmwareProgram) -> list[dict[str, Any]]:
    """Where each buffer lies in the arena, and from which step to which, both included."""
    buffers = buffers_of(student)
    offsets, _ = plan_arena(buffers)
    kinds = {step.writes: "map" if isinstance(step, Prepare | Conv) else "features" for step in student.steps}
    kinds[student.image] = "image"
    return [
        {"kind": kinds.get(name, "scratch"), "bytes": b.size, "offset": offsets[name], "first": b.first, "last": b.last}
        for name, b in buffers.items()
    ]


def _constant_bytes(student: FirmwareProgram) -> tuple[int, int]:
    """Bytes of flash for weights, and for scales, biases and tables; equal ones count once, as they are written."""
    weights, tables = set(), set()
    for step in student.steps:
        if isinstance(step, Conv):
            weights.add(packed_weights(step.weights).tobytes())
        others = [getattr(step, name, None) for name in ("tables", "bias", "scale", "table")]
        tables |= {array.tobytes() for array in others if array is not None}
    return sum(map(len, weights)), sum(map(len, tables))


def _layer(step: KernelCall, instructions: int | None) -> dict[str, Any]:
    macs = step.macs if isinstance(step, Conv) else 0
    weights = step.weights.size if isinstance(step, Conv) else 0
    return {
        "layer": describe(step),
        "weight_bytes": weights,
        "macs": macs,
        "instructions": instructions,
        "instructions_per_mac": _ratio(instructions, macs),
    }


def _ratio(instructions: int | None, macs: int) -> float | None:
    return round(instructions / macs, 3) if instructions and macs else None


def describe(step: KernelCall) -> str:
    """A step in a few words, such as ``conv 3×3 64→128 16×16 pool 2``: kernel, channels, pixels of its output."""
    match step:
        case Conv(weights=weights, out=out):
            kernel = f"{weights.shape[1]}×{weights.shape[2]} {weights.shape[3]}→{len(weights)}"
            stride = f" stride {step.stride}" if step.stride > 1 else ""
            pool = f" pool {step.pool}" if step.pool > 1 else ""
            return f"conv {kernel} {out.rows}×{out.columns}{stride}{pool}"
        case Prepare(mirror=mirror):
            return "image, mirrored" if mirror else "image"
        case Mean():
            return "mean"
        case Combine(operation=operation):
            return f"features {operation}"
    raise TypeError(type(step).__name__)
