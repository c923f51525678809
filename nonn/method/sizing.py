"""From the devices' budgets, how many filters and which architecture each student gets.

Sizes come first and are exact: a device gets filters in proportion to its memory, so the bridge of its student is known
before the stage `partition` decides which filters these are. The sizes are written apart from the architectures, so a
budget that changes an architecture but no size leaves the partition alone.

*Deviation.* The outline of the method partitions first and designs afterwards. Then every edit of a
budget would rerun the partition, on which all students depend, though it rarely changes.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import cache
from typing import Any

import numpy as np

from nonn.core.architecture import FEWEST_STAGES, MOST_STAGES
from nonn.core.errors import UserError
from nonn.core.params import Architecture, Design, Device
from nonn.deploy.cost import Cost, measure_cost
from nonn.training.networks import ConvNet

#: Candidates of one depth that are kept to be drawn, and up to which part of the largest budget.
N_SHOWN, SHOWN_UP_TO = 14, 4.0
#: Widths of the stages of family mobilenet, the last ones where it has fewer; those of the paper for 224 pixels.
MOBILENET_WIDTHS = (16, 16, 24, 32, 64, 160)
#: To whose multiples they are rounded, as in the authors' code.
MOBILENET_STEP = 8
#: The last map of family mobilenet has at most so many pixels a side, as far as it has stages enough.
MOBILENET_LAST_SIDE = 8


def apportion(total: int, shares: list[float]) -> list[int]:
    """Split `total` into whole numbers in proportion to `shares`, by largest remainders, each at least 1.

    >>> apportion(10, [1, 1, 2])
    [3, 2, 5]
    """
    exact = [total * share / sum(shares) for share in shares]
    sizes = [max(1, int(value)) for value in exact]
    by_need = sorted(range(len(shares)), key=lambda i: (sizes[i] - exact[i], i))
    while sum(sizes) != total:
        step = 1 if sum(sizes) < total else -1
        order = by_need if step > 0 else [i for i in reversed(by_need) if sizes[i] > 1]
        for i in order[: abs(total - sum(sizes))]:
            sizes[i] += step
    return sizes


def proportions(grid: Design, size: int) -> list[float]:
    """Widths of the stages in units of the first one's, of students for images of `size` pixels a side."""
    if grid.widths:
        return grid.widths
    if grid.family != "mobilenet":
        return [1, 2, 4]
    halvings = (size - 1).bit_length() - (MOBILENET_LAST_SIDE - 1).bit_length()
    widths = MOBILENET_WIDTHS[-min(max(halvings, FEWEST_STAGES), MOST_STAGES) :]
    return [width / widths[0] for width in widths]


def family(grid: Design, depth: int, size: int) -> list[Architecture]:
    """The students of one depth for images of `size` pixels, from narrow to wide, the widths of their stages in a fixed
    proportion, and no two the same."""
    widths = range(grid.min_width, grid.max_width + 1, grid.step)
    common: dict[str, Any] = {"family": grid.family, "depth": depth, "mirror": grid.mirror, "strided": grid.strided}
    if grid.family == "wrn":
        return [Architecture(width=width, **common) for width in widths]
    step = MOBILENET_STEP if grid.family == "mobilenet" else 1
    rows = [tuple(max(step, step * round(w * factor / step)) for factor in proportions(grid, size)) for w in widths]
    return [Architecture(widths=list(row), **common) for row in dict.fromkeys(rows)]


def design_student(
    grid: Design, device: Device, channels: int, size: int, n_classes: int, n_filters: int | None
) -> tuple[Architecture, Cost]:
    """Find the largest student that fits a device: of most parameters, among equals of most multiply-accumulates.

    `size` is in pixels; `n_filters` are the outputs of the bridge, None for a student without one (a baseline). If not
    even the smallest candidate fits, a UserError tells what it needs.
    """
    families = [family(grid, depth, size) for depth in grid.depths]

    def cost_of(architecture: Architecture) -> Cost:
        model = ConvNet(architecture, channels, n_classes, n_filters)
        return measure_cost(model, channels, size, grid.precision)

    def is_too_large(architecture: Architecture) -> bool:
        return not cost_of(architecture).fits(device.memory_kib, device.mmacs)

    best = None
    for students in families:
        # A wider student costs more in every respect, so those that fit come first.
        n_fit = bisect_left(students, True, key=is_too_large)
        if n_fit:
            cost = cost_of(students[n_fit - 1])
            if best is None or (cost.params, cost.macs) > (best[1].params, best[1].macs):
                best = (students[n_fit - 1], cost)
    if best is None:
        smallest = min((cost_of(students[0]) for students in families), key=lambda cost: cost.memory_bytes)
        raise UserError(
            f"no student of `design` fits a device of {device.memory_kib:g} KiB and {device.mmacs:g} million "
            f"multiply-accumulates: the smallest needs {smallest.memory_bytes / 1024:.0f} KiB and "
            f"{smallest.macs / 1e6:.2f} million. Raise devices.*.memory_kib or mmacs, or lower design.min_width."
        )
    return best


def sample_candidates(grid: Design, devices: list[Device], info: dict, n_filters: int) -> list[dict]:
    """What some of the candidates cost, to be drawn: at most `N_SHOWN` of each depth, each ``{architecture, cost}``.

    From the narrowest to the first whose memory is beyond `SHOWN_UP_TO` times the largest budget. All have a bridge to
    `n_filters`; `info` is that of the dataset.
    """
    largest = SHOWN_UP_TO * max(device.memory_kib for device in devices) * 1024
    shown = []
    for depth in grid.depths:
        students = family(grid, depth, info["size"])
        for i in np.unique(np.geomspace(1, len(students), N_SHOWN).round().astype(int) - 1):
            model = ConvNet(students[i], info["channels"], len(info["classes"]), n_filters)
            cost = measure_cost(model, info["channels"], info["size"], grid.precision)
            shown.append({"architecture": students[i].model_dump(), "cost": vars(cost)})
            if cost.memory_bytes > largest:
                break
    return shown


def combined_budget(devices: list[Device]) -> Device:
    """One device with the memory and the compute of all."""
    return Device(memory_kib=sum(d.memory_kib for d in devices), mmacs=sum(d.mmacs for d in devices))


def design_network(
    grid: Design, devices: list[Device], info: dict, n_live: int
) -> tuple[list[int], dict[str, list[dict]]]:
    """Design all students of a network, and those of every baseline within the same budgets.

    Returns how many of the teacher's `n_live` filters each student gets, and by name the students, each
    ``{architecture, n_filters, cost}``: one for "0", "1", …; and for each method of `nonn.stages.baseline` those that
    it trains. A bridge to all filters may not fit where one to a student's own does: then ``full`` has none. `info` is
    that of the dataset.
    """
    if len(devices) > n_live:
        raise UserError(f"{len(devices)} devices share {n_live} live filters; take fewer devices or a wider teacher.")
    sizes = apportion(n_live, [device.memory_kib for device in devices])

    @cache
    def design(device: Device, n_filters: int | None) -> dict:
        shape = (info["channels"], info["size"], len(info["classes"]), n_filters)
        architecture, cost = design_student(grid, device, *shape)
        return {"architecture": architecture.model_dump(), "n_filters": n_filters, "cost": vars(cost)}

    students = [design(device, n_filters) for device, n_filters in zip(devices, sizes, strict=True)]
    smallest = min(devices, key=lambda device: (device.memory_kib, device.mmacs))
    designs = {str(position): [student] for position, student in enumerate(students)}
    designs |= dict.fromkeys(("random", "contiguous", "classwise"), students)
    designs |= {method: [design(smallest, None)] for method in ("labels", "kd", "at_kd")}
    designs["total"] = [design(combined_budget(devices), None)]
    try:
        designs["full"] = [design(device, n_live) for device in devices]
    except UserError:
        designs["full"] = []
    return sizes, designs
