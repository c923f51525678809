"""From the devices' budgets, how many filters and which architecture each student gets.

Sizes come first: a device gets filters in proportion to the capacity of the largest student that it can hold, so the
bridge of its student is known before the stage `partition` decides which filters these are. The sizes are written apart
from the architectures, so a budget that changes an architecture but no size leaves the partition alone.

Capacity is the number of features before the bridge, of a student with a bridge to one filter. The bridge mixes these
features, so they are as many filters as it can imitate independently of each other. Memory itself would not do: a
device may have more of it than any student of the grid can use, or too little compute to use it.

On a microcontroller that firmware is made for, students of 8 bits are measured as firmware: flash with the code, RAM
with the stack (`nonn.firmware.footprint`). Elsewhere weights and activations count by themselves.

*Deviation.* The outline of the method partitions first and designs afterwards. Then every edit of a
budget would rerun the partition, on which all students depend, though it rarely changes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from nonn.core.architecture import FEWEST_STAGES, MOST_CHANNELS, MOST_STAGES, MOST_WIDTH, Architecture
from nonn.core.artifacts import ImageSpec
from nonn.core.budgets import Allowance, Budget, combined_budget
from nonn.core.chips import CHIPS
from nonn.core.cost import Cost
from nonn.core.errors import UserError
from nonn.core.params import DesignParams, Precision
from nonn.deploy.analytic_cost import COUNTED_FAMILIES, count_cost
from nonn.firmware.footprint import Footprint, has_kernels, predict_footprint

#: Candidates of one depth that are kept to be drawn, and up to which part of the largest budget.
N_SHOWN, SHOWN_UP_TO = 14, 4.0
#: From how many times the filters of the smallest student on those of the largest are called lopsided.
LOPSIDED = 4
#: Widths of the stages of family mobilenet, the last ones where it has fewer; those of the paper for 224 pixels.
MOBILENET_WIDTHS = (16, 16, 24, 32, 64, 160)
#: To whose multiples they are rounded, as in the authors' code.
MOBILENET_STEP = 8
#: The last map of family mobilenet has at most so many pixels a side, as far as it has stages enough.
MOBILENET_LAST_SIDE = 8


def apportion(total: int, shares: Sequence[float], least: int = 1) -> list[int]:
    """Split `total` into whole numbers in proportion to `shares`, by largest remainders, each at least `least`.

    >>> apportion(10, [1, 1, 2])
    [3, 2, 5]
    """
    exact = [total * share / sum(shares) for share in shares]
    sizes = [max(least, int(value)) for value in exact]
    by_need = sorted(range(len(shares)), key=lambda i: (sizes[i] - exact[i], i))
    while sum(sizes) != total:
        step = 1 if sum(sizes) < total else -1
        order = by_need if step > 0 else [i for i in reversed(by_need) if sizes[i] > least]
        for i in order[: abs(total - sum(sizes))]:
            sizes[i] += step
    return sizes


def proportions(grid: DesignParams, size: int) -> list[float]:
    """Widths of the stages in units of the first one's, of students for images of `size` pixels a side."""
    if grid.widths:
        return grid.widths
    if grid.family != "mobilenet":
        return [1, 2, 4]
    halvings = (size - 1).bit_length() - (MOBILENET_LAST_SIDE - 1).bit_length()
    widths = MOBILENET_WIDTHS[-min(max(halvings, FEWEST_STAGES), MOST_STAGES) :]
    return [width / widths[0] for width in widths]


def candidates_of_depth(grid: DesignParams, depth: int, size: int) -> list[Architecture]:
    """The students of one depth for images of `size` pixels, from narrow to wide, the widths of their stages in a fixed
    proportion, and no two the same."""
    widths = range(grid.min_width, grid.max_width + 1, grid.step)
    common: dict[str, Any] = {"family": grid.family, "depth": depth, "mirror": grid.mirror, "strided": grid.strided}
    if grid.family == "wrn":
        return [Architecture(width=width, **common) for width in widths if width <= MOST_WIDTH]
    step = MOBILENET_STEP if grid.family == "mobilenet" else 1
    rows = [tuple(max(step, step * round(w * factor / step)) for factor in proportions(grid, size)) for w in widths]
    return [Architecture(widths=list(row), **common) for row in dict.fromkeys(rows) if max(row) <= MOST_CHANNELS]


class Shape(NamedTuple):
    """What a student's cost depends on, beside its architecture."""

    channels: int
    size: int
    n_classes: int
    n_filters: int | None  # outputs of its bridge, None for a student without one (a baseline)


def _key(grid: DesignParams) -> str:
    """The grid as JSON, which can be a key: candidates and costs are asked for again and again."""
    return grid.model_dump_json(exclude_unset=True)


@cache
def _candidates(grid: str, depth: int, size: int) -> list[Architecture]:
    return candidates_of_depth(DesignParams.model_validate_json(grid), depth, size)


@cache
def _cost(grid: str, depth: int, position: int, shape: Shape, precision: Precision) -> Cost:
    architecture = _candidates(grid, depth, shape.size)[position]
    if architecture.family in COUNTED_FAMILIES:
        return count_cost(architecture, *shape, precision)
    from nonn.deploy.traced_cost import measure_cost  # of PyTorch, which takes seconds to import
    from nonn.training.networks import ConvNet

    channels, size, n_classes, n_filters = shape
    return measure_cost(ConvNet(architecture, channels, n_classes, n_filters), channels, size, precision)


@cache
def _footprint(grid: str, depth: int, position: int, shape: Shape) -> Footprint | None:
    """Of a candidate as firmware; None where none can be made of it."""
    architecture = _candidates(grid, depth, shape.size)[position]
    if not has_kernels(architecture):
        return None
    found = predict_footprint(architecture.model_dump_json(), shape.channels, shape.size, shape.n_filters)
    # Only a baseline has a head: firmware for it would hold that in float32.
    head = 0 if shape.n_filters else 4 * (architecture.n_features + 1) * shape.n_classes
    return replace(found, flash_bytes=found.flash_bytes + head)


def _needs(grid: str, depth: int, position: int, shape: Shape, precision: Precision, is_firmware: bool) -> Cost:
    """What a budget is compared with: `_cost`, with flash and RAM in place of weights and activations for firmware."""
    cost = _cost(grid, depth, position, shape, precision)
    if not is_firmware or (footprint := _footprint(grid, depth, position, shape)) is None:
        return cost
    return replace(cost, weight_bytes=footprint.flash_bytes, peak_activation_bytes=footprint.ram_bytes)


def runs_firmware(grid: DesignParams, budget: Budget) -> bool:
    """Whether a device runs its student as firmware."""
    return grid.precision == "int8" and budget.board in CHIPS


def design_student(
    grid: DesignParams, budget: Budget, images: ImageSpec, n_filters: int | None
) -> tuple[Architecture, Cost]:
    """Find the largest student that fits a device: of most parameters, among equals of most multiply-accumulates.

    `n_filters` are the outputs of the bridge, None for a student without one (a baseline). If not even the smallest
    candidate fits, a UserError says which limit fails, by how much, and what works.
    """
    shape, is_firmware = Shape(*images, n_filters), runs_firmware(grid, budget)
    if is_firmware:
        budget = replace(budget, ram_kib=CHIPS[budget.board or ""].usable(budget.ram_kib))
    found = _design(_key(grid), tuple(grid.depths), budget, shape, grid.precision, is_firmware)
    if found is None:
        raise UserError(explain_misfit(grid, budget, images, n_filters))
    return found


@cache
def _design(
    grid: str, depths: tuple[int, ...], budget: Budget, shape: Shape, precision: Precision, is_firmware: bool
) -> tuple[Architecture, Cost] | None:
    best = None
    for depth in depths:
        students = _candidates(grid, depth, shape.size)

        def is_too_large(position: int, depth: int = depth) -> bool:
            return not budget.fits(_needs(grid, depth, position, shape, precision, is_firmware))

        # A wider student costs more in every respect, so those that fit come first.
        n_fit = bisect_left(range(len(students)), True, key=is_too_large)
        if n_fit:
            cost = _cost(grid, depth, n_fit - 1, shape, precision)
            if best is None or (cost.params, cost.macs) > (best[1].params, best[1].macs):
                best = (students[n_fit - 1], cost)
    return best


def explain_misfit(grid: DesignParams, budget: Budget, images: ImageSpec, n_filters: int | None) -> str:
    """Why no student fits, and the nearest budget that holds one: that of the candidate which misses least."""

    is_firmware = runs_firmware(grid, budget)
    if not any(candidates_of_depth(grid, depth, images.size) for depth in grid.depths):
        return (
            f"design.min_width: {grid.min_width} makes stages wider than any student may have; the widest are of "
            f"{MOST_WIDTH if grid.family == 'wrn' else MOST_CHANNELS}. Lower it, or design.widths."
        )

    def broken(depth: int) -> list[Allowance]:
        smallest = _needs(_key(grid), depth, 0, Shape(*images, n_filters), grid.precision, is_firmware)
        return [limit for limit in budget.limits(smallest) if not limit.is_kept]

    def missing(depth: int) -> tuple[int, float]:
        return len(broken(depth)), max(limit.needed / limit.offered for limit in broken(depth))

    depth = min(grid.depths, key=missing)
    device = f"device {budget.name!r}" if budget.name else "the device"
    works = ", ".join(f"{limit.key}: {limit.enough:g}" for limit in broken(depth))
    remedy = "give as much, or lower design.min_width"
    block = CHIPS[budget.board or ""].block_kib if is_firmware else None
    if block and any(limit.key == "ram_kib" and limit.enough > block for limit in broken(depth)):
        remedy = f"the board has no block of RAM beyond {block:g} KiB: choose another, or lower design.min_width"
    return (
        f"no student of `design` fits {device}: {'; '.join(map(str, broken(depth)))}. The smallest, "
        f"{candidates_of_depth(grid, depth, images.size)[0].name}, needs {works}; {remedy}."
    )


def sample_candidates(grid: DesignParams, budgets: Sequence[Budget], images: ImageSpec, n_filters: int) -> list[dict]:
    """What some of the candidates cost, to be drawn: at most `N_SHOWN` of each depth, each ``{architecture, cost}``.

    From the narrowest to the first whose memory is beyond `SHOWN_UP_TO` times the largest budget. All have a bridge to
    `n_filters`.
    """
    largest = SHOWN_UP_TO * max(budget.total_kib for budget in budgets) * 1024
    shown = []
    for depth in grid.depths:
        students = candidates_of_depth(grid, depth, images.size)
        for i in np.unique(np.geomspace(1, len(students), N_SHOWN).round().astype(int) - 1):
            cost = _cost(_key(grid), depth, int(i), Shape(*images, n_filters), grid.precision)
            shown.append({"architecture": students[i].model_dump(), "cost": vars(cost)})
            if cost.memory_bytes > largest:
                break
    return shown


def apportion_filters(grid: DesignParams, budgets: Sequence[Budget], images: ImageSpec, n_live: int) -> list[int]:
    """How many of the teacher's `n_live` filters each student gets, in proportion to its capacity.

    No student gets a single one where there are two for each: its share of the loss would hardly ever change.
    """
    if len(budgets) > n_live:
        raise UserError(f"{len(budgets)} devices share {n_live} live filters; take fewer devices or a wider teacher.")
    capacities = [_largest(grid, budget, images)[0].n_features for budget in budgets]
    return apportion(n_live, capacities, least=2 if n_live >= 2 * len(budgets) else 1)


def smallest_device(grid: DesignParams, budgets: Sequence[Budget], images: ImageSpec) -> Budget:
    """The device that holds the smallest student, the first of equals."""

    def capacity(budget: Budget) -> tuple[int, int]:
        _, cost = _largest(grid, budget, images)
        return cost.params, cost.macs

    return min(budgets, key=capacity)


def _largest(grid: DesignParams, budget: Budget, images: ImageSpec) -> tuple[Architecture, Cost]:
    return design_student(grid, budget, images, 1)


def imbalance_warning(sizes: Sequence[int], budgets: Sequence[Budget]) -> str | None:
    """One line where some student gets far more filters than another; None where the shares are alike."""
    few, many = min(range(len(sizes)), key=sizes.__getitem__), max(range(len(sizes)), key=sizes.__getitem__)
    if sizes[many] < LOPSIDED * sizes[few]:
        return None
    return (
        f"lopsided: student {many} ({budgets[many].name}) imitates {sizes[many]} of {sum(sizes)} filters, "
        f"student {few} ({budgets[few].name}) only {sizes[few]}. Devices that are more alike, or a lower "
        "design.max_width, share them more evenly."
    )


def teacher_size_warning(largest: int, teacher: Architecture, images: ImageSpec) -> str | None:
    """One line if the largest student has at least as many parameters as the teacher; None if it is smaller."""
    if teacher.family not in COUNTED_FAMILIES or largest < (own := count_cost(teacher, *images, n_filters=None).params):
        return None
    return (
        f"the largest student has {largest:,} parameters, the teacher {own:,}: a student should be smaller. "
        "Enlarge teacher.architecture, lower design.max_width, or put the teacher itself on a device."
    )


def design_network(
    grid: DesignParams, budgets: Sequence[Budget], images: ImageSpec, n_live: int
) -> tuple[list[int], dict[str, list[dict]]]:
    """Design all students of a network, and those of every baseline within the same budgets.

    Returns how many of the teacher's `n_live` filters each student gets, and by name the students, each
    ``{architecture, n_filters, cost}``, on a microcontroller also ``firmware``, its flash and RAM: one for "0", "1", …;
    and for each method of `nonn.stages.baseline` those that it trains. A bridge to all filters may not fit where one to
    a student's own does: then ``full`` has none.
    """
    sizes = apportion_filters(grid, budgets, images, n_live)

    @cache
    def design(budget: Budget, n_filters: int | None) -> dict:
        architecture, cost = design_student(grid, budget, images, n_filters)
        found = {"architecture": architecture.model_dump(), "n_filters": n_filters, "cost": vars(cost)}
        if n_filters and runs_firmware(grid, budget) and has_kernels(architecture):
            kind = architecture.model_dump_json()
            found["firmware"] = vars(predict_footprint(kind, images.channels, images.size, n_filters))
        return found

    students = [design(budget, n_filters) for budget, n_filters in zip(budgets, sizes, strict=True)]
    designs = {str(position): [student] for position, student in enumerate(students)}
    designs |= dict.fromkeys(("random", "contiguous", "classwise"), students)
    alone = design(smallest_device(grid, budgets, images), None)
    designs |= {method: [alone] for method in ("labels", "kd", "at_kd")}
    designs["total"] = [design(combined_budget(budgets), None)]
    try:
        designs["full"] = [design(budget, n_live) for budget in budgets]
    except UserError:
        designs["full"] = []
    return sizes, designs
