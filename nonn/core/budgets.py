"""What a device offers a student: memory for weights and activations, compute, and the time that it may take.

A budget follows from `devices` of ``params.yaml``, after the board is looked up in the catalogue and the latency target
of the network is turned into multiply-accumulates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nonn.core.cost import Cost


class Allowance(NamedTuple):
    """One of the limits that a student has to keep."""

    key: str  # of params.yaml
    offered: float
    needed: float
    unit: str
    step: float  # an offer is rounded up to multiples of this

    @property
    def is_kept(self) -> bool:
        return self.needed <= self.offered

    @property
    def enough(self) -> float:
        """The smallest sufficient offer, in whole steps."""
        steps = math.ceil(self.needed / self.step)
        rounded = round(steps * self.step, 6)
        return rounded if rounded >= self.needed else round((steps + 1) * self.step, 6)

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        missing = _shown(self.enough - self.offered)
        return f"{self.key} is {_shown(self.offered)}{unit}, {missing}{unit} less than the {_shown(self.enough)} needed"


@dataclass(frozen=True)
class Budget:
    """Of one device: `memory_kib` for weights and activations together, or `flash_kib` for weights and `ram_kib` for
    activations. `mmacs` are millions of multiply-accumulates for one image.

    With a target of `latency_ms` for the computing of an image, `mmacs_per_s` is the speed of the device. Two devices
    of one budget are equal, whatever their names.
    """

    memory_kib: float | None = None
    mmacs: float = math.inf
    flash_kib: float | None = None
    ram_kib: float | None = None
    latency_ms: float | None = None
    mmacs_per_s: float | None = None
    name: str = field(default="", compare=False)
    board: str | None = field(default=None, compare=False)

    @property
    def total_kib(self) -> float:
        """Memory of all kinds together."""
        return self.memory_kib if self.memory_kib is not None else (self.flash_kib or 0) + (self.ram_kib or 0)

    @property
    def most_mmacs(self) -> float:
        """Millions of multiply-accumulates that keep both limits, on their number and on their time."""
        if self.latency_ms is None or self.mmacs_per_s is None:
            return self.mmacs
        return min(self.mmacs, self.latency_ms * self.mmacs_per_s / 1e3)

    def limits(self, cost: Cost) -> list[Allowance]:
        """Each limit with what a student needs of it."""
        weights, activations = cost.weight_bytes / 1024, cost.peak_activation_bytes / 1024
        if self.memory_kib is not None:
            allowances = [Allowance("memory_kib", self.memory_kib, weights + activations, "KiB", 1)]
        else:
            allowances = [Allowance("flash_kib", self.flash_kib or 0, weights, "KiB", 1)]
            allowances.append(Allowance("ram_kib", self.ram_kib or 0, activations, "KiB", 1))
        allowances.append(Allowance("mmacs", self.mmacs, cost.macs / 1e6, "million", 0.01))
        if self.latency_ms is not None and self.mmacs_per_s is not None:
            allowances.append(Allowance("latency_ms", self.latency_ms, cost.macs / self.mmacs_per_s / 1e3, "ms", 0.01))
        return allowances

    def fits(self, cost: Cost) -> bool:
        return all(limit.is_kept for limit in self.limits(cost))

    def compute_ms(self, cost: Cost) -> float | None:
        """Modelled time of one image; None if the speed of the device is unknown."""
        return cost.macs / self.mmacs_per_s / 1e3 if self.mmacs_per_s else None

    def as_dict(self) -> dict[str, Any]:
        """The values that are set, for JSON."""
        values = {key: value for key, value in vars(self).items() if value not in (None, "", math.inf)}
        return {key: value for key, value in values.items() if key not in ("name", "board")}


def combined_budget(budgets: Sequence[Budget]) -> Budget:
    """One device with the memory and the compute of all.

    If some have one memory and some have two, the result has one.
    """
    mmacs = sum(budget.most_mmacs for budget in budgets)
    if all(budget.memory_kib is None for budget in budgets):
        return Budget(
            mmacs=mmacs,
            flash_kib=sum(budget.flash_kib or 0 for budget in budgets),
            ram_kib=sum(budget.ram_kib or 0 for budget in budgets),
        )
    return Budget(memory_kib=sum(budget.total_kib for budget in budgets), mmacs=mmacs)


def _shown(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    places = 2 if abs(value) >= 0.1 or not value else 1 - math.floor(math.log10(abs(value)))  # two digits of small ones
    return f"{value:,.{places}f}".rstrip("0").rstrip(".")
