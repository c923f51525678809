"""The command ``nonn plan``: what a set of devices would run and how fast, before anything is trained."""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from typing import TYPE_CHECKING

from nonn.core.errors import UserError
from nonn.core.options import at_least, complete_from
from nonn.core.params import FEWEST_PIXELS, MOST_PIXELS
from nonn.core.text_table import align

if TYPE_CHECKING:  # help is instant
    from nonn.core.boards import Range
    from nonn.core.budgets import Budget
    from nonn.core.params import Params
    from nonn.method.planning import DeviceSetEstimate, Planner

#: Defaults without params.yaml: images like those of CIFAR-10, and a teacher of 256 filters.
CLASSES, SIZE, CHANNELS, FILTERS, PRECISION, LINK = 10, 32, 3, 256, "int8", "ieee802154"
STUDENTS = {"family": "fast", "depths": [2], "min_width": 4, "max_width": 128, "step": 1}
#: More than any published data set of pictures has.
MOST_CLASSES = 2**16
#: Most devices of a set in the catalogue's table: their number grows with its power.
MOST_IN_SETS = 4
UNKNOWN = "?"


def positive(text: str) -> float:
    """A number above 0, of milliseconds."""
    if not 0 < (number := float(text)) < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no time above 0 and below 1e9; give milliseconds, such as 100")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    own = "params.yaml's"
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--devices",
        metavar="LIST",
        help="such as '2×rp2350 + 1×pi_zero2w', also 2x and 2*: of `nonn devices`, or of `devices` in params.yaml",
    )
    what.add_argument("--catalogue", action="store_true", help="compare all sets of boards that meet --target-latency")
    parser.add_argument(
        "--latency-ms",
        "--target-latency",
        dest="latency_ms",
        type=positive,
        metavar="MS",
        help="time for one image, computing and link together",
    )
    parser.add_argument(
        "--max-devices",
        type=at_least(2),
        default=3,
        metavar="N",
        help=f"largest set of --catalogue, 2 to {MOST_IN_SETS} (default: %(default)s)",
    )
    parser.add_argument(
        "--classes", type=at_least(2, MOST_CLASSES), metavar="N", help=f"(default: those of the data set, or {CLASSES})"
    )
    parser.add_argument(
        "--size",
        type=at_least(FEWEST_PIXELS, MOST_PIXELS),
        metavar="PIXELS",
        help=f"side of an image (default: {own}, or {SIZE})",
    )
    parser.add_argument(
        "--channels", type=at_least(1), metavar="N", help=f"1 or 3 (default: those of the data set, or {CHANNELS})"
    )
    parser.add_argument(
        "--filters",
        type=at_least(2),
        metavar="N",
        help=f"live filters of the teacher (default: of {own}, or {FILTERS})",
    )
    parser.add_argument("--precision", choices=("float32", "int8"), help=f"(default: {own}, or {PRECISION})")
    link = parser.add_argument(
        "--link", metavar="NAME", help=f"of `nonn links` (default: the first of {own}, or {LINK})"
    )
    complete_from(link, _links)
    parser.epilog = "example: nonn plan --devices '2×rp2350 + 1×pi_zero2w' --latency-ms 500"


def run(options: argparse.Namespace) -> None:
    from nonn.core.boards import all_boards
    from nonn.method.planning import parse_devices

    params = _params()
    planner, facts = make_planner(options, params)
    print(facts)
    if options.catalogue:
        _show_catalogue(planner, options)
        return
    stated = params.devices if params else {}
    names = parse_devices(options.devices, [*stated, *(name for name in all_boards() if name not in stated)])
    budgets = [_budget(name, params, planner.grid.precision) for name in names]
    _show_plan(planner, budgets, options.latency_ms, params)


def make_planner(options: argparse.Namespace, params: Params | None) -> tuple[Planner, str]:
    """A planner from the options, else the parameters, else the defaults; and a line that states what was taken."""
    from nonn.core.artifacts import ImageSpec
    from nonn.core.boards import all_boards
    from nonn.core.params import DesignParams
    from nonn.core.paths import Paths
    from nonn.method.feasibility import known_dataset, known_filters
    from nonn.method.planning import Planner

    images = ImageSpec(CHANNELS, SIZE, CLASSES)
    filters, link, grid, source = (
        FILTERS,
        LINK,
        DesignParams.model_validate(STUDENTS | {"precision": PRECISION}),
        "defaults",
    )
    if params:
        paths, grid, link, source = Paths(params.experiment), params.design, params.distributed.links[0], "params.yaml"
        info = known_dataset(params, paths)
        images = ImageSpec.of(info) if info else images._replace(size=params.image_sizes.students)
        n_filters = FILTERS if params.teacher.is_foreign else params.teacher.own_architecture.n_features
        filters = known_filters(params, paths) or n_filters
    images = ImageSpec(
        options.channels or images.channels, options.size or images.size, options.classes or images.n_classes
    )
    filters, link = options.filters or filters, link if options.link is None else options.link
    if options.precision:
        grid = grid.model_copy(update={"precision": options.precision})
    if images.channels not in (1, 3):
        raise UserError(f"--channels: images have 1 or 3, not {images.channels}")
    facts = (
        f"Images of {images.channels}×{images.size}×{images.size}, {images.n_classes} classes, "
        f"{filters} filters to share; {grid.family} students in {grid.precision}; link {link}. "
        f"From {source} and options."
    )
    return Planner(grid, images, filters, link, all_boards()), facts


def _params() -> Params | None:
    from nonn.core.params import PARAMS_FILE, load_params

    return load_params() if os.path.lexists(PARAMS_FILE) else None


def _budget(name: str, params: Params | None, precision: str) -> Budget:
    from nonn.method.planning import board_budget

    if params and name in params.devices:
        return params.devices[name].budget(name, precision)
    return board_budget(name, precision)


def _show_plan(planner: Planner, budgets: list[Budget], latency_ms: float | None, params: Params | None) -> None:
    from nonn.commands.use import DEFAULT, EXPERIMENTS
    from nonn.core.boards import OWN_FILE
    from nonn.method.planning import deployment_warnings
    from nonn.method.sizing import imbalance_warning, teacher_size_warning

    if latency_ms and (silent := [budget for budget in budgets if not budget.mmacs_per_s]):
        where = f"to {OWN_FILE}" if silent[0].board else "as mmacs_per_s to this device in params.yaml"
        raise UserError(
            f"--latency-ms: the speed of {silent[0].name!r} in {planner.grid.precision} is not known; try another "
            f"--precision, or add it {where}"
        )
    try:
        estimate = planner.estimate(budgets, latency_ms)
    except UserError:
        if latency_ms is None or (nearest := planner.nearest_target(budgets)) is None:
            raise
        link_ms = planner.estimate(budgets, nearest).link_ms
        raise UserError(
            f"{latency_ms:g} ms is too short: the link takes {link_ms:,.1f} ms, and the smallest student of the "
            f"slowest device {nearest - link_ms:,.1f} ms. The nearest that works is --latency-ms {nearest:g}."
        ) from None
    print()
    print(align(_rows(estimate), n_texts=2))
    print()
    print("\n".join(_summary(estimate, planner.images.n_classes, latency_ms)))
    if without := planner.without_link(budgets):
        print(f"{planner.link_name} needs a module on {', '.join(without)}; see `nonn devices NAME`.")
    for warning in deployment_warnings((budget.board for budget in budgets), planner.grid.family):
        print(warning)
    if imbalance := imbalance_warning(estimate.filter_counts, budgets):
        print(imbalance)
    teacher = params.teacher.architecture if params and not params.teacher.is_foreign else None
    largest = max(device.cost.params for device in estimate.devices)
    if teacher and (problem := teacher_size_warning(largest, teacher, planner.images)):
        print(problem)
    where = "params.yaml" if params else "the experiment that `nonn new` writes"
    print(f"\nTo train it, put this into {where}, with design.precision: {planner.grid.precision}:\n")
    stated = params.devices if params else {}
    print(_as_params([budget for budget in budgets if budget.name not in stated], estimate))
    if not params:
        print("\nThen run `nonn use NAME`.")
        print("`nonn new` chooses image size and family of students itself: run `nonn plan` again in its folder.")
    elif params.experiment != DEFAULT and (file := EXPERIMENTS / f"{params.experiment}.yaml").is_file():
        print(f"\n`nonn use {params.experiment}` writes params.yaml again: to keep it then, put it into {file}, too.")


def _rows(estimate: DeviceSetEstimate) -> list[list[str]]:
    heading = ["device", "student", "filters", "weights KiB", "activations KiB", "MMACs", "compute ms", "energy mJ"]
    rows = [heading, ["", *["modelled"] * (len(heading) - 1)]]
    for device in estimate.devices:
        cost = device.cost
        rows.append(
            [
                device.budget.name,
                device.architecture.name,
                str(device.n_filters),
                f"{cost.weight_bytes / 1024:,.1f}",
                f"{cost.peak_activation_bytes / 1024:,.1f}",
                f"{cost.macs / 1e6:,.2f}",
                UNKNOWN if device.compute_ms is None else f"{device.compute_ms:,.2f}",
                _span(device.energy_mj),
            ]
        )
    return rows


def _summary(estimate: DeviceSetEstimate, n_classes: int, latency_ms: float | None) -> list[str]:
    total = UNKNOWN if estimate.total_ms is None else f"{estimate.total_ms:,.1f}"
    target = f" (target {latency_ms:g})" if latency_ms else ""
    lines = [
        f"sent by all devices        {estimate.answer_wire_bytes:,} bytes for one image (modelled)",
        f"on the link                {estimate.link_ms:,.1f} ms (modelled)",
        f"slowest device + link      {total} ms{target} (modelled)",
        _energy(estimate),
        f"{estimate.params:,} parameters and {sum(estimate.filter_counts)} features for {n_classes} classes; "
        "accuracy is known after training.",
    ]
    if any(device.compute_ms is None or device.energy_mj is None for device in estimate.devices):
        lines.append(f"{UNKNOWN}: the catalogue has no speed or no power of the device; see `nonn devices NAME`.")
    return lines


def _energy(estimate: DeviceSetEstimate) -> str:
    from nonn.method.planning import total

    known, number = estimate.known_energies, len(estimate.devices)
    whose = "all" if len(known) == number else f"{len(known)} of {number}"
    amount = f"{_span(total(known))} mJ for one image, without what they draw anyway" if known else "not known"
    return f"{'energy of ' + whose + ' devices':<25}  {amount} (modelled)"


def _as_params(new: list[Budget], estimate: DeviceSetEstimate) -> str:
    """What to add to params.yaml for these devices; `new` are those that it does not describe yet."""
    names = [device.budget.name for device in estimate.devices]
    boards = {budget.name: budget.board for budget in new}
    lines = ["devices:", *(f"  {name}: {{board: {board}}}" for name, board in boards.items())] if boards else []
    lines += ["networks:", f"  {len(names)}s:", f"    devices: [{', '.join(names)}]", "    seeds: 1"]
    if estimate.target_ms is not None:
        lines.append(f"    latency_ms: {_floor(estimate.target_ms):g}  # of computing: what the link leaves")
    return "\n".join(lines)


def _floor(milliseconds: float) -> float:
    """A time rounded down to one decimal, or to three digits if it is short."""
    unit = min(0.1, 10.0 ** (math.floor(math.log10(milliseconds)) - 2))
    return math.floor(milliseconds / unit) * unit


def _show_catalogue(planner: Planner, options) -> None:
    from nonn.method.planning import board_budget, pareto

    if options.latency_ms is None:
        raise UserError("--catalogue: give the time for one image, for example --target-latency 100")
    if options.max_devices > MOST_IN_SETS:
        raise UserError(f"--max-devices: {options.max_devices} is above {MOST_IN_SETS}; give 2 to {MOST_IN_SETS}")
    precision = planner.grid.precision
    every = {name: board_budget(name, precision) for name in planner.boards}
    budgets = {name: budget for name, budget in every.items() if budget.mmacs_per_s}
    found = pareto(planner, budgets, options.latency_ms, options.max_devices)
    if not found:
        nearest = min(filter(None, (planner.nearest_target([budget] * 2) for budget in budgets.values())), default=None)
        remedy = f"the nearest that works is --target-latency {nearest:g}" if nearest else "take another --precision"
        raise UserError(f"no set of devices answers within {options.latency_ms:g} ms; {remedy}.")
    rows = [["devices", "parameters", "latency ms", "energy mJ"], ["", *["modelled"] * 3]]
    for names, estimate in found:
        kinds = " + ".join(f"{count}×{name}" for name, count in Counter(names).items())
        rows.append([kinds, f"{estimate.params:,}", f"{estimate.total_ms:,.1f}", _span(estimate.energy_mj)])
    print()
    print(align(rows))
    print(
        f"\n{len(found)} sets of up to {options.max_devices} devices, from fast to slow: no other has more parameters"
    )
    print(
        "in less time and with less energy, differences below 5 % aside. Energy that is not known counts as the worst."
    )
    print("Accuracy is known after training.")
    if left := [name for name in every if name not in budgets]:
        print(f"Left out, for want of a speed in {precision}: {', '.join(left)}.")


def _span(energy: Range | None) -> str:
    if energy is None:
        return UNKNOWN
    low, high = f"{energy.low:,.3g}", f"{energy.high:,.3g}"
    return low if low == high else f"{low}–{high}"


def _links() -> list[str]:
    from nonn.core.links import PRESETS

    return list(PRESETS)
