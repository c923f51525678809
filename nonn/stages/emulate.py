"""Stage `emulate`: students of microcontrollers as firmware, linked and run on emulated ones, see `nonn.firmware`.

It takes the toolchain and the emulator, which are no Python packages: Snakemake leaves the stage out where they are
missing, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from nonn.core.budgets import Budget
from nonn.core.chips import CHIPS, FAMILIES
from nonn.core.errors import UserError
from nonn.core.files import scratch_folder, write_json
from nonn.core.jobs import chips_of
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.core.progress import log
from nonn.data.dataset import load_dataset
from nonn.data.image_store import spaced
from nonn.firmware.build import missing_program
from nonn.firmware.build_and_run import build, firmware_entry, run_and_compare
from nonn.firmware.graph import NoKernelError
from nonn.firmware.targets import Target, find_target
from nonn.report.firmware_plots import draw_firmware
from nonn.report.plots import drawing_style, save_figure

#: Test images on which the features of each student are compared, evenly spaced.
IMAGES = 20


def run(params: Params, paths: Paths) -> None:
    """Write figures and instructions of all firmware of an experiment, if it answers bit for bit as ONNX Runtime."""
    if line := missing_program():
        raise UserError(f"no firmware can be built and run here: {line}")
    if not any(map(partial(chips_of, params), params.networks)):
        raise UserError(
            "params.yaml: no student runs as firmware. Set design.precision to int8 and design.family to "
            f"{' or '.join(FAMILIES)}, and give a device one of the boards {', '.join(CHIPS)}."
        )
    test, _ = load_dataset(paths).subset("test")
    images = test[spaced(len(test), IMAGES)].numpy()
    with scratch_folder() as folder:
        entries = list(_entries(params, paths, images, folder))
    wrong = [entry for entry in entries if entry["images_identical"] < entry["images_checked"]]
    if wrong:
        names = ", ".join(f"{entry['network']}/{entry['student']}" for entry in wrong)
        raise UserError(f"{names}: features of the firmware differ from those of ONNX Runtime. Please report it.")
    write_json(paths.firmware, entries)
    with drawing_style():
        save_figure(draw_firmware(entries), paths / "figures/firmware", params.figures)


def _entries(params: Params, paths: Paths, images: np.ndarray, folder: Path) -> Iterator[dict]:
    for network in params.networks:
        budgets = params.budgets_of(network)
        for position, chip in chips_of(params, network).items():
            student = paths.export(network) / f"{position}.onnx"
            try:
                firmware = build(student, _target(chip, budgets[position]), folder / network / str(position))
            except NoKernelError as error:
                log(f"note: {error}")
                continue
            first, identical = run_and_compare(firmware, images)
            yield firmware_entry(firmware, first, len(images), identical)


def _target(chip: str, budget: Budget) -> Target:
    """A microcontroller with its memory limited to that of the device of ``params.yaml``."""
    sizes = budget.flash_kib, CHIPS[chip].usable(budget.ram_kib)
    return find_target(chip, *(None if kib is None else int(kib) for kib in sizes))
