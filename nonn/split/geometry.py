"""Intervals along the axis of a split: shares of devices, and what a window reads."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from nonn.split.graph import attributes_of

#: Half-open, along the axis of the split; empty where both ends are the same.
Interval = tuple[int, int]
EMPTY = (0, 0)


def share(size: int, position: int, n_devices: int) -> Interval:
    """A device's even share; where there are fewer items than devices, those that get one are spread out.

    So the shares of maps of different sizes stay close to each other, and halos small.
    """
    start, stop = position * size // n_devices, (position + 1) * size // n_devices
    return (start, stop) if start < stop else EMPTY


def hull(first: Interval, second: Interval) -> Interval:
    if EMPTY in (first, second):
        return second if first == EMPTY else first
    return min(first[0], second[0]), max(first[1], second[1])


def common(first: Interval, second: Interval) -> Interval:
    start, stop = max(first[0], second[0]), min(first[1], second[1])
    return (start, stop) if start < stop else EMPTY


@dataclass(frozen=True)
class Window:
    """Kernel, stride and padding of an operation along the rows."""

    kernel: int
    stride: int
    before: int

    @classmethod
    def of(cls, node: NodeProto) -> Window:
        settings = attributes_of(node)
        return cls(settings["kernel_shape"][0], settings.get("strides", [1])[0], settings.get("pads", [0])[0])

    @property
    def overlaps(self) -> bool:
        """Whether neighbouring outputs look at the same inputs."""
        return self.kernel > self.stride

    def inputs(self, outputs: Interval) -> Interval:
        """Rows that some rows of the output are made from; beyond the ends of the map, there is padding."""
        start, stop = outputs
        return start * self.stride - self.before, (stop - 1) * self.stride - self.before + self.kernel
