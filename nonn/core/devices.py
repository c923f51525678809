"""Devices as ``params.yaml`` states them: a budget in full, or a board of the catalogue."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from nonn.core.boards import all_boards, check_board
from nonn.core.budgets import Budget
from nonn.core.schema import NotTiny, Section

#: Far more than any key needs, and still small enough for arithmetic in float32.
HUGE = 1e12
Positive = Annotated[float, Field(gt=0, le=HUGE, allow_inf_nan=False), NotTiny]
NonNegative = Annotated[float, Field(ge=0, le=HUGE, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Limit = Annotated[float, Field(gt=0), NotTiny]  # `.inf`: none


class DeviceParams(Section):
    """Budget of one device: stated in full, or taken from a board of the catalogue, with single figures replaced.

    It has one memory, `memory_kib`, or two, `flash_kib` and `ram_kib`.
    """

    memory_kib: Positive | None = None
    flash_kib: Positive | None = None
    ram_kib: Positive | None = None
    mmacs: Limit | None = None
    mmacs_per_s: Positive | None = None
    board: str | None = None
    share: Annotated[float, Field(gt=0, le=1), NotTiny] | None = None

    @field_validator("board")
    @classmethod
    def _is_known(cls, board: str | None) -> str | None:
        return board if board is None else check_board(board, all_boards())

    @model_validator(mode="after")
    def _is_a_budget(self) -> DeviceParams:
        parts = self.flash_kib, self.ram_kib
        if self.memory_kib is not None and parts != (None, None):
            raise ValueError("memory_kib is for weights and activations together; remove it, or flash_kib and ram_kib")
        if self.board is None:
            if self.memory_kib is None and None in parts:
                raise ValueError("has no memory; give memory_kib, or flash_kib and ram_kib, or a board")
            if self.mmacs is None:
                raise ValueError("mmacs: missing; add it (`.inf` sets no limit)")
            if self.share is not None:
                raise ValueError("share: is that of a board's RAM; name its `board`, or remove it")
        if self.share is not None and (self.memory_kib, self.ram_kib) != (None, None):
            raise ValueError("share: is that of a board's RAM, which this device states itself; remove one of the two")
        return self

    def budget(self, name: str, precision: str, latency_ms: float | None = None) -> Budget:
        """The budget of the device called `name`, for students that compute in `precision`."""
        memory, flash, ram, speed = self.memory_kib, self.flash_kib, self.ram_kib, self.mmacs_per_s
        if self.board is not None:
            board = all_boards()[self.board]
            speed = speed or board.mmacs[precision]
            if memory is None:
                ram = ram or board.ram_kib * (self.share or 1)
                flash = flash or board.flash_kib
                memory, flash, ram = (ram, None, None) if flash is None else (None, flash, ram)
        mmacs = float("inf") if self.mmacs is None else self.mmacs
        return Budget(memory, mmacs, flash, ram, latency_ms, speed, name, self.board)
