"""The microcontrollers that firmware is made for: processor, and where flash and RAM begin.

How much of each there is stands in the catalogue of boards. RAM in blocks at separate addresses counts as far as the
largest block goes, since the arena is one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """`block_kib` is the largest block of RAM, None if the RAM that the catalogue states is a single block."""

    core: str
    flash: int
    ram: int
    block_kib: int | None = None

    def usable(self, ram_kib: float | None) -> float | None:
        """The part of the RAM that firmware can use, since its activations lie in one block."""
        return ram_kib if ram_kib is None or self.block_kib is None else min(ram_kib, self.block_kib)


#: By the names of the catalogue. Addresses and blocks are those of the memory maps in the reference manuals of ST,
#: RM0090 (stm32f4), RM0385 (stm32f746), RM0433 (stm32h743) and RM0455 (cortex_m7, an STM32H7A3), and in the product
#: specification of the nRF52840.
CHIPS = {
    "cortex_m7": Chip("cortex-m7", 0x08000000, 0x24000000, 1024),
    "nrf52840": Chip("cortex-m4", 0x00000000, 0x20000000),
    "stm32f4": Chip("cortex-m4", 0x08000000, 0x20000000, 128),
    "stm32f746": Chip("cortex-m7", 0x08000000, 0x20000000),
    "stm32h743": Chip("cortex-m7", 0x08000000, 0x24000000, 512),
}

#: Families of students that have kernels; of airbench those without shortcuts, of depth 1 or 2.
FAMILIES = ("fast", "airbench")


def runs_as(board: str, runs_onnx: bool) -> str:
    """How a student gets onto a board: as a ``node``, as ``firmware``, or ``by hand``, such as a file of LiteRT."""
    return "node" if runs_onnx else "firmware" if board in CHIPS else "by hand"
