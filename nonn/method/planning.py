"""Estimates what a set of devices would run and how fast, from the catalogue of boards, before anything is trained.

Each device gets the student that the stage `design` would give it. Its computing time is its multiply-accumulates
divided by the effective speed of the board. Every device has the image from its own sensor, is asked by one UDP message
of 8 bytes, and answers with one of 4 bytes a feature; `nonn.core.links` gives the time on the link. The final layer,
some thousand multiply-accumulates, is left out. Accuracy cannot be estimated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

from nonn.core.architecture import Architecture
from nonn.core.artifacts import ImageSpec
from nonn.core.boards import OWN_FILE, Board, Range, all_boards
from nonn.core.budgets import Budget
from nonn.core.chips import FAMILIES, runs_as
from nonn.core.cost import Cost
from nonn.core.energy import inference_energy
from nonn.core.errors import UserError
from nonn.core.links import datagram_bytes, find_link, link_seconds
from nonn.core.names import COORDINATOR
from nonn.core.params import FEWEST_DEVICES, MOST_DEVICES, DesignParams, DeviceParams
from nonn.core.schema import did_you_mean
from nonn.method.sizing import apportion_filters, design_student

#: Bytes of the message that asks a device for its features, and of one feature.
REQUEST_BYTES, FEATURE_BYTES = 8, 4
#: Relative difference below which two sets of devices count as alike: the catalogue's figures are no more precise.
ALIKE = 0.05
#: Milliseconds to whose multiples a target that works is rounded up.
TARGET_STEP = 0.1


@dataclass(frozen=True)
class DeviceEstimate:
    """What one device would run; times and energy are None where the catalogue has no speed or power."""

    budget: Budget
    architecture: Architecture
    n_filters: int
    cost: Cost
    compute_ms: float | None
    energy_mj: Range | None


@dataclass(frozen=True)
class DeviceSetEstimate:
    """What a set of devices on a link would run."""

    devices: Sequence[DeviceEstimate]
    answer_wire_bytes: int  # of all devices, on the wire
    link_ms: float
    target_ms: float | None  # of computing: what the link leaves of the target

    @property
    def filter_counts(self) -> list[int]:
        return [device.n_filters for device in self.devices]

    @property
    def params(self) -> int:
        return sum(device.cost.params for device in self.devices)

    @property
    def total_ms(self) -> float | None:
        times = [device.compute_ms for device in self.devices if device.compute_ms is not None]
        return max(times) + self.link_ms if len(times) == len(self.devices) else None

    @property
    def known_energies(self) -> list[Range]:
        """Of the devices whose speed and power are known."""
        return [device.energy_mj for device in self.devices if device.energy_mj]

    @property
    def energy_mj(self) -> Range | None:
        """Of all devices together; None if that of one is not known."""
        return total(self.known_energies) if len(self.known_energies) == len(self.devices) else None


class Planner:
    """Estimates for one experiment: what students there are, what images, and how many filters they share.

    `link` is the name of one.
    """

    def __init__(self, grid: DesignParams, images: ImageSpec, n_filters: int, link: str, boards: Mapping[str, Board]):
        self.grid, self.images, self.n_filters, self.boards = grid, images, n_filters, boards
        self.link_name, self.link = link, find_link(link)

    def estimate(self, budgets: Sequence[Budget], latency_ms: float | None = None) -> DeviceSetEstimate:
        """Design the students of a set of devices, so that they answer within a target if there is one.

        What the link leaves of the target is for computing. The time on the link depends on how filters are shared
        out, and that on the time for computing, so the two are found in turns.
        """
        sizes, target = [math.ceil(self.n_filters / len(budgets))] * len(budgets), None
        for _ in range(4):
            if latency_ms is not None:
                target = latency_ms - self.link_ms(sizes)
                if target <= 0:
                    raise UserError(f"the link alone takes {self.link_ms(sizes):.1f} ms.")
                budgets = [replace(budget, latency_ms=target) for budget in budgets]
            before, sizes = sizes, apportion_filters(self.grid, budgets, self.images, self.n_filters)
            if sizes == before:
                break
        link_ms = self.link_ms(sizes)
        students = [design_student(self.grid, b, self.images, n) for b, n in zip(budgets, sizes, strict=True)]
        times = [budget.compute_ms(cost) for budget, (_, cost) in zip(budgets, students, strict=True)]
        devices = [
            DeviceEstimate(budget, architecture, n, cost, time, self._energy(budget, n, time))
            for budget, n, (architecture, cost), time in zip(budgets, sizes, students, times, strict=True)
        ]
        return DeviceSetEstimate(devices, sum(map(answer_wire_bytes, sizes)), link_ms, target)

    def link_ms(self, sizes: Sequence[int]) -> float:
        """Milliseconds on the link for one image: all requests, then all answers."""
        requests = {(COORDINATOR, str(i)): datagram_bytes(REQUEST_BYTES) for i in range(len(sizes))}
        answers = {(str(i), COORDINATOR): answer_wire_bytes(size) for i, size in enumerate(sizes)}
        return 1e3 * (link_seconds(self.link, requests) + link_seconds(self.link, answers))

    def nearest_target(self, budgets: Sequence[Budget]) -> float | None:
        """The lowest target that works, in whole steps; None if none does, as where memory fails."""

        def works(steps: int) -> bool:
            try:
                self.estimate(budgets, steps * TARGET_STEP)
            except UserError:
                return False
            return True

        highest = 1
        while not works(highest):
            highest *= 2
            if highest * TARGET_STEP > 1e8:
                return None
        lowest = highest // 2
        while highest - lowest > 1:
            middle = (lowest + highest) // 2
            lowest, highest = (lowest, middle) if works(middle) else (middle, highest)
        return round(highest * TARGET_STEP, 1)

    def without_link(self, budgets: Sequence[Budget]) -> list[str]:
        """Boards that do not have the link by themselves, as far as it is known."""
        without = []
        for name in dict.fromkeys(budget.board for budget in budgets if budget.board in self.boards):
            links = self.boards[name or ""].links
            if links is not None and self.link_name not in links:
                without.append(str(name))
        return without

    def _energy(self, budget: Budget, n_filters: int, compute_ms: float | None) -> Range | None:
        """Millijoules that an image adds on one device."""
        board = self.boards.get(budget.board or "")
        if board is None or board.active_w is None or compute_ms is None:
            return None
        wire = datagram_bytes(REQUEST_BYTES) + answer_wire_bytes(n_filters)
        energy = inference_energy(board, compute_ms / 1e3, 0.0, wire)
        return Range(1e3 * energy.low, 1e3 * energy.high)


def total(energies: Sequence[Range]) -> Range:
    return Range(sum(energy.low for energy in energies), sum(energy.high for energy in energies))


def answer_wire_bytes(n_filters: int) -> int:
    return datagram_bytes(FEATURE_BYTES * n_filters)


def deployment_warnings(boards: Iterable[str | None], family: str) -> Iterator[str]:
    """A line for boards on which students of this family run neither as nodes nor as firmware of this package."""
    known = all_boards()
    kinds = {name: runs_as(name, known[name].runs_onnx) for name in dict.fromkeys(boards) if name}
    if by_hand := ", ".join(name for name, kind in kinds.items() if kind == "by hand"):
        yield f"On {by_hand} neither a node nor firmware of nonn runs; `nonn litert` writes files for LiteRT."
    firmware = ", ".join(name for name, kind in kinds.items() if kind == "firmware")
    if firmware and family not in FAMILIES:
        yield (
            f"Firmware, for {firmware}, has no kernels for family {family}; set design.family to "
            f"{' or '.join(FAMILIES)}, or use `nonn litert`."
        )


def parse_devices(text: str, known: Sequence[str]) -> list[str]:
    """Names of devices from a text such as ``2×rp2350 + pi_zero2w``; also ``2x``, ``2*`` and commas.

    >>> parse_devices("2xrp2350 + pi4b", ["rp2350", "pi4b"])
    ['rp2350', 'rp2350', 'pi4b']
    """
    names: list[str] = []
    for part in re.split(r"[+,]", text):
        match = re.fullmatch(r"\s*(?:(\d{1,4})\s*[×x*]?\s*)?([A-Za-z_][\w-]*)\s*", part)
        if not match:
            raise UserError(f"--devices: {part.strip()!r} is not NUMBERxNAME; write for example 2xrp2350 + 1xpi4b")
        count, name = int(match[1] or 1), match[2]
        if count == 0:
            raise UserError(f"--devices: {part.strip()!r} asks for none; give 1 or more, or leave it out")
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(
                f"--devices: no device {name!r}{hint}; choose of {', '.join(known)}, or add it to {OWN_FILE}"
            )
        names += [name] * min(count, MOST_DEVICES + 1)
    if not FEWEST_DEVICES <= len(names) <= MOST_DEVICES:
        more = "more than " if len(names) > MOST_DEVICES else ""
        number = min(len(names), MOST_DEVICES)
        raise UserError(
            f"--devices: a network has {FEWEST_DEVICES} to {MOST_DEVICES} devices, and these are {more}{number}"
        )
    return names


def pareto(
    planner: Planner, budgets: Mapping[str, Budget], latency_ms: float, most_devices: int
) -> list[tuple[list[str], DeviceSetEstimate]]:
    """Sets of devices that answer within a target, without those that another set beats.

    One beats another if its students have as many parameters in all, and it takes as little time and energy, and less
    of something, where a difference below `ALIKE` is none. An energy that is not known counts as the worst. The sets
    come from fast to slow.
    """
    feasible = []
    for names in _sets(list(budgets), most_devices):
        try:
            estimate = planner.estimate([budgets[name] for name in names], latency_ms)
        except UserError:
            continue
        feasible.append((names, estimate, _objectives(estimate)))
    best = [
        (names, estimate)
        for names, estimate, objectives in feasible
        if not any(
            other != objectives and all(o <= v for o, v in zip(other, objectives, strict=True))
            for _, _, other in feasible
        )
    ]
    return sorted(best, key=lambda entry: (entry[1].total_ms, -entry[1].params))


def _sets(names: Sequence[str], most: int) -> Iterator[list[str]]:
    for count in range(FEWEST_DEVICES, most + 1):
        yield from map(list, combinations_with_replacement(names, count))


def _objectives(estimate: DeviceSetEstimate) -> tuple[int, float, float]:
    """What to minimise, in steps of `ALIKE`."""
    energy = estimate.energy_mj
    amounts = estimate.total_ms, energy.high if energy else None
    time, energy_step = (round(math.log(amount) / math.log1p(ALIKE)) if amount else math.inf for amount in amounts)
    return -round(math.log(estimate.params) / math.log1p(ALIKE)), time, energy_step


def board_budget(name: str, precision: str) -> Budget:
    """The budget of a board of the catalogue, all of whose memory is for the student."""
    return DeviceParams(board=name).budget(name, precision)
