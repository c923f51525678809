"""Where each buffer lies in the one static arena of a firmware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Buffers begin at multiples of it, so that words and float32 can be read in place.
ALIGNMENT = 8


@dataclass(frozen=True)
class Buffer:
    """Bytes that are in use from step `first` to step `last`, both included."""

    size: int
    first: int
    last: int


def plan_arena(buffers: Mapping[str, Buffer]) -> tuple[dict[str, int], int]:
    """Offset of each buffer, and the size of all.

    Buffers that are in use in one step do not overlap. The largest is placed first, each at the lowest offset that is
    free: https://arxiv.org/abs/2001.03288, there called greedy by size.
    """
    offsets: dict[str, int] = {}
    for name in sorted(buffers, key=lambda name: (-buffers[name].size, name)):
        buffer = buffers[name]
        taken = sorted(
            (offset, offset + _aligned(buffers[other].size))
            for other, offset in offsets.items()
            if buffers[other].first <= buffer.last and buffer.first <= buffers[other].last
        )
        offset = 0
        for start, end in taken:
            if offset + _aligned(buffer.size) <= start:
                break
            offset = max(offset, end)
        offsets[name] = offset
    return offsets, max((offsets[name] + _aligned(buffers[name].size) for name in buffers), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
