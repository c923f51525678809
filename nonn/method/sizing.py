"""From the devices' budgets, how many filters and which architecture each student gets.

Sizes come first: a device gets filters in proportion to the capacity of the largest student that it can hold, so the
bridge of its student is known before the stage `partition` decides which filters these are. The sizes are written apart
from the architectures, so a budget that changes an architecture but no size leaves the partition alone.

Capacity is the square root of the parameters, counted with a bridge to one filter: as filters do, it grows with the
width of a network, where parameters grow with its square. Memory itself would not do. A device has more of it than any
student of the grid can use, or too little compute to use it.

*Deviation.* The outline of the method partitions first and designs afterwards. Then every edit of a
budget would rerun the partition, on which all students depend, though it rarely changes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from nonn.core.budgets import Budget, combined_budget
from nonn.core.errors import UserError
from nonn.core.params import Architecture, Design
from nonn.deploy.counting import BODIES, Cost, count_cost

#: Candidates of one depth that are kept to be drawn, and up to which part of the largest budget.
N_SHOWN, SHOWN_UP_TO = 14, 4.0
#: From how many times the filters of the smallest student on those of the largest are called lopsided.
LOPSIDED = 4


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


def family(grid: Design, depth: int) -> list[Architecture]:
    """The students of one depth, from narrow to wide, the widths of their stages in a fixed proportion."""
    widths = range(grid.min_width, grid.max_width + 1, grid.step)
    common: dict[str, Any] = {"family": grid.family, "depth": depth, "mirror": grid.mirror, "strided": grid.strided}
    if grid.family in ("fast", "airbench"):
        return [Architecture(widths=[round(w * factor) for factor in grid.widths], **common) for w in widths]
    return [Architecture(width=width, **common) for width in widths]


@cache
def _counted(
    architecture: str, channels: int, size: int, n_classes: int, n_filters: int | None, precision: Any
) -> Cost:
    candidate = Architecture.model_validate_json(architecture)
    if candidate.family in BODIES:
        return count_cost(candidate, channels, size, n_classes, n_filters, precision)
    from nonn.deploy.cost import measure_cost  # of PyTorch, which takes seconds to import
    from nonn.training.networks import ConvNet

    return measure_cost(ConvNet(candidate, channels, n_classes, n_filters), channels, size, precision)


def student_cost(grid: Design, architecture: Architecture, info: dict, n_filters: int | None) -> Cost:
    """What a student costs at the precision of the grid, on the images that `info` describes.

    `n_filters` are the outputs of its bridge, None for a student without one (a baseline).
    """
    shape = info["channels"], info["size"], len(info["classes"]), n_filters, grid.precision
    return _counted(architecture.model_dump_json(), *shape)


def design_student(grid: Design, budget: Budget, info: dict, n_filters: int | None) -> tuple[Architecture, Cost]:
    """Find the largest student that fits a device: of most parameters, among equals of most multiply-accumulates.

    `info` is that of the dataset; `n_filters` are the outputs of the bridge, None for a student without one (a
    baseline). If not even the smallest candidate fits, a UserError says which limit fails, by how much, and what works.
    """
    best = None
    for depth in grid.depths:
        students = family(grid, depth)
        # A wider student costs more in every respect, so those that fit come first.
        n_fit = bisect_left(
            students, True, key=lambda student: not budget.fits(student_cost(grid, student, info, n_filters))
        )
        if n_fit:
            cost = student_cost(grid, students[n_fit - 1], info, n_filters)
            if best is None or (cost.params, cost.macs) > (best[1].params, best[1].macs):
                best = (students[n_fit - 1], cost)
    if best is None:
        raise UserError(refusal(grid, budget, info, n_filters))
    return best


def refusal(grid: Design, budget: Budget, info: dict, n_filters: int | None) -> str:
    """Why no student fits, and the nearest budget that holds one: that of the candidate which misses least."""

    def missing(student: Architecture) -> tuple[int, float]:
        broken = [limit for limit in budget.limits(student_cost(grid, student, info, n_filters)) if not limit.is_kept]
        return len(broken), max(limit.needed / limit.offered for limit in broken)

    smallest = min((family(grid, depth)[0] for depth in grid.depths), key=missing)
    broken = [limit for limit in budget.limits(student_cost(grid, smallest, info, n_filters)) if not limit.is_kept]
    device = f"device {budget.name!r}" if budget.name else "the device"
    problems = "; ".join(map(str, broken))
    works = ", ".join(f"{limit.key}: {limit.enough:g}" for limit in broken)
    return (
        f"no student of `design` fits {device}: {problems}. The smallest, {smallest.name}, needs {works}; give as much, "
        "or lower design.min_width."
    )


def sample_candidates(grid: Design, budgets: Sequence[Budget], info: dict, n_filters: int) -> list[dict]:
    """What some of the candidates cost, to be drawn: at most `N_SHOWN` of each depth, each ``{architecture, cost}``.

    From the narrowest to the first whose memory is beyond `SHOWN_UP_TO` times the largest budget. All have a bridge to
    `n_filters`; `info` is that of the dataset.
    """
    largest = SHOWN_UP_TO * max(budget.total_kib for budget in budgets) * 1024
    shown = []
    for depth in grid.depths:
        students = family(grid, depth)
        for i in np.unique(np.geomspace(1, len(students), N_SHOWN).round().astype(int) - 1):
            cost = student_cost(grid, students[i], info, n_filters)
            shown.append({"architecture": students[i].model_dump(), "cost": vars(cost)})
            if cost.memory_bytes > largest:
                break
    return shown


def apportion_filters(grid: Design, budgets: Sequence[Budget], info: dict, n_live: int) -> list[int]:
    """How many of the teacher's `n_live` filters each student gets, in proportion to its capacity.

    No student gets a single one where there are two for each: its share of the loss would hardly ever change.
    """
    if len(budgets) > n_live:
        raise UserError(f"{len(budgets)} devices share {n_live} live filters; take fewer devices or a wider teacher.")
    capacities = [math.sqrt(_largest(grid, budget, info).params) for budget in budgets]
    return apportion(n_live, capacities, least=2 if n_live >= 2 * len(budgets) else 1)


def smallest_device(grid: Design, budgets: Sequence[Budget], info: dict) -> Budget:
    """The device that holds the smallest student, the first of equals."""

    def capacity(budget: Budget) -> tuple[int, int]:
        cost = _largest(grid, budget, info)
        return cost.params, cost.macs

    return min(budgets, key=capacity)


def _largest(grid: Design, budget: Budget, info: dict) -> Cost:
    return design_student(grid, budget, info, 1)[1]


def say_if_lopsided(sizes: Sequence[int], budgets: Sequence[Budget]) -> str | None:
    """One line where some student gets far more filters than another; None where the shares are alike."""
    few, many = min(range(len(sizes)), key=sizes.__getitem__), max(range(len(sizes)), key=sizes.__getitem__)
    if sizes[many] < LOPSIDED * sizes[few]:
        return None
    return (
        f"lopsided: student {many} ({budgets[many].name}) imitates {sizes[many]} of {sum(sizes)} filters, student {few} "
        f"({budgets[few].name}) only {sizes[few]}; without student {many} little is left. Devices that are more alike, "
        "or a lower design.max_width, share them more evenly."
    )


def design_network(
    grid: Design, budgets: Sequence[Budget], info: dict, n_live: int
) -> tuple[list[int], dict[str, list[dict]]]:
    """Design all students of a network, and those of every baseline within the same budgets.

    Returns how many of the teacher's `n_live` filters each student gets, and by name the students, each
    ``{architecture, n_filters, cost}``: one for "0", "1", …; and for each method of `nonn.stages.baseline` those that
    it trains. A bridge to all filters may not fit where one to a student's own does: then ``full`` has none. `info` is
    that of the dataset.
    """
    sizes = apportion_filters(grid, budgets, info, n_live)

    @cache
    def design(budget: Budget, n_filters: int | None) -> dict:
        architecture, cost = design_student(grid, budget, info, n_filters)
        return {"architecture": architecture.model_dump(), "n_filters": n_filters, "cost": vars(cost)}

    students = [design(budget, n_filters) for budget, n_filters in zip(budgets, sizes, strict=True)]
    designs = {str(position): [student] for position, student in enumerate(students)}
    designs |= dict.fromkeys(("random", "contiguous", "classwise"), students)
    alone = design(smallest_device(grid, budgets, info), None)
    designs |= {method: [alone] for method in ("labels", "kd", "at_kd")}
    designs["total"] = [design(combined_budget(budgets), None)]
    try:
        designs["full"] = [design(budget, n_live) for budget in budgets]
    except UserError:
        designs["full"] = []
    return sizes, designs
