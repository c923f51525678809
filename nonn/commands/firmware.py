"""The command ``nonn firmware``: int8 students as firmware for a microcontroller, run on an emulated one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nonn.core.errors import UserError
from nonn.core.options import complete_from, natural


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "student", nargs="+", type=Path, metavar="STUDENT", help="its ONNX file, or the folder of a whole export"
    )
    device = parser.add_argument("--device", required=True, metavar="NAME", help="of `nonn devices`, such as stm32h743")
    complete_from(device, _devices)
    parser.add_argument("--flash-kib", type=natural, metavar="N", help="leave it only so much of the device's flash")
    parser.add_argument("--ram-kib", type=natural, metavar="N", help="leave it only so much of the device's RAM")
    parser.add_argument("--out", type=Path, default=Path("firmware"), metavar="FOLDER", help="(default: firmware)")
    parser.add_argument(
        "--run",
        type=natural,
        default=1,
        metavar="N",
        help="compare N images with ONNX Runtime (default: 1; 0: only build)",
    )
    parser.add_argument(
        "--images", type=Path, metavar="FILE.npy", help="uint8 (N, channels, H, W) for --run (default: noise)"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE.npy",
        help="quantise float32 students first, on these training images, uint8 (N, channels, H, W)",
    )
    parser.add_argument("--layers", action="store_true", help="show the instructions of each layer")
    parser.epilog = "example: nonn firmware results/cifar10_int8/shipped/4s --device stm32h743 --run 10"


def run(options: argparse.Namespace) -> None:
    from nonn.core.files import write_json
    from nonn.firmware.build import EMULATOR, require
    from nonn.firmware.build_and_run import build, firmware_entry, read_images, run_and_compare, students_of
    from nonn.firmware.targets import find_target

    target = find_target(options.device, options.flash_kib, options.ram_kib)
    if options.run:
        require(EMULATOR, "--run (0 for none)")
    entries, paths = [], students_of(options.student)
    if len({path.stem for path in paths}) < len(paths):
        raise UserError("two students have the same file name, and so the same folder. Build them one after the other.")
    for path in paths:
        student = in_int8(path, options.calibrate, options.out / "int8") if options.calibrate else path
        firmware = build(student, target, options.out / path.stem)
        images = read_images(options.images, firmware.student, options.run)
        first, identical = run_and_compare(firmware, images)
        entries.append(firmware_entry(firmware, first, len(images), identical))
        print("\n".join(describe(entries[-1], options.layers)))
        write_json(options.out / "firmware.json", entries)
    if wrong := [entry for entry in entries if entry["images_identical"] < entry["images_checked"]]:
        names = ", ".join(f"{entry['network']}/{entry['student']}" for entry in wrong)
        raise UserError(f"{names}: features differ from those of ONNX Runtime; see {options.out / 'firmware.json'}")


def in_int8(path: Path, images: Path, folder: Path) -> Path:
    """Quantise a float32 student on training images, into a folder named after its network, as figures name it."""
    from nonn.deploy.calibrated import write_int8
    from nonn.runtime.sensor import open_images

    target = folder / path.resolve().parent.name / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    write_int8(path, lambda planes: open_images(images, planes), target)
    return target


def describe(entry: dict[str, Any], layers: bool) -> list[str]:
    """The figures of one student in a few lines."""
    lines = [f"{entry['network']}/{entry['student']} on {entry['device']} ({entry['core']})"]
    lines.append(f"  flash  {entry['flash_bytes']:>11,} of {entry['flash_limit_bytes']:,} bytes")
    lines.append(f"  RAM    {entry['ram_bytes']:>11,} of {entry['ram_limit_bytes']:,} bytes")
    lines[-1] += f", {entry['arena_bytes']:,} for activations, {entry['stack_bytes']:,} for the stack"
    if entry["instructions"] is None:
        return lines
    lines[-1] += f" ({entry['stack_used_bytes']} used)"
    lines.append(
        f"  {entry['instructions']:,} instructions for {entry['macs']:,} multiply-accumulates, "
        f"{entry['instructions_per_mac']:.2f} each"
    )
    lines.append(f"  {entry['images_identical']} of {entry['images_checked']} images as by ONNX Runtime, bit for bit")
    for layer in entry["layers"] if layers else ():
        ratio = f"{layer['instructions_per_mac']:8.2f}" if layer["macs"] else " " * 8
        lines.append(f"    {layer['layer']:<34}{layer['macs']:>12,}{layer['instructions']:>13,}{ratio}")
    return lines


def _devices() -> list[str]:
    from nonn.core.chips import CHIPS

    return list(CHIPS)
