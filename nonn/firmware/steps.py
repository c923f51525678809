"""The steps that a firmware takes, one after another. Each is one call of a kernel in ``kernels.c``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class Shape:
    """Of a map of unsigned 8-bit integers."""

    rows: int
    columns: int
    channels: int

    @property
    def size(self) -> int:
        return self.rows * self.columns * self.channels


@dataclass
class KernelCall:
    """What is read and written, by the names of tensors in the ONNX graph."""

    reads: tuple[str, ...]
    writes: str


@dataclass
class Prepare(KernelCall):
    """The image in planes becomes a map. `tables` uint8 (channels, 256); `mirror`: left and right are swapped."""

    shape: Shape
    tables: np.ndarray
    mirror: bool


@dataclass
class Conv(KernelCall):
    """A convolution of integers, maximum pooling after it, and what then follows value by value.

    `weights` int8 (filters, kernel rows, kernel columns, channels), `bias` int32 (filters,) with the zero point of the
    input folded in, `scale` float32 (filters,), `table` uint8 (1 or filters, 256). `padding` is top and left.
    """

    shape: Shape  # of the input
    out: Shape  # before pooling
    weights: np.ndarray
    bias: np.ndarray
    scale: np.ndarray
    stride: int
    padding: tuple[int, int]
    zeros: tuple[int, int]  # zero points of input and output
    pool: int = 1
    table: np.ndarray | None = None

    @property
    def pooled(self) -> Shape:
        return Shape(self.out.rows // self.pool, self.out.columns // self.pool, self.out.channels)

    @property
    def macs(self) -> int:
        """Multiply-accumulates, those with padding included."""
        return self.out.rows * self.out.columns * self.weights.size

    @property
    def column_bytes(self) -> int:
        """Bytes under the kernel at one pixel, filled up to whole words."""
        return -(-self.weights[0].size // 4) * 4

    @property
    def scratch_bytes(self) -> int:
        """What ``nonn_conv`` needs beside its maps: two columns, and rows to pool."""
        pointwise = self.weights.shape[1:3] == (1, 1) and self.stride == 1 and self.padding == (0, 0)
        columns = 0 if pointwise and self.shape.channels % 4 == 0 else 2 * self.column_bytes
        return columns + (self.pool * self.out.columns * self.out.channels if self.pool > 1 else 0)


@dataclass
class Mean(KernelCall):
    """The mean over all pixels of float32 `table` (256,) at the values of a map: a vector of its channels."""

    shape: Shape
    table: np.ndarray


@dataclass
class Combine(KernelCall):
    """One operation on float32 vectors: ``+`` of two, or ``/`` or ``*`` of one and `constant`."""

    size: int
    operation: str
    constant: float | None = None


@dataclass
class FirmwareProgram:
    """A student as a firmware runs it: from the image, uint8 (channels, rows, columns), to float32 features."""

    image: str
    image_shape: Shape
    features: str
    n_features: int
    steps: list[KernelCall] = field(default_factory=list)

    @property
    def macs(self) -> int:
        return sum(step.macs for step in self.steps if isinstance(step, Conv))


def in_pairs(steps: Iterable[KernelCall]) -> None:
    """Give each convolution an even number of filters, since ``nonn_conv`` takes two at once.

    One without any weights joins an odd number, and the next convolution has weights of zero for it.
    """
    widened: dict[str, int] = {}
    for step in steps:
        if isinstance(step, Conv | Mean) and step.reads[0] in widened:
            step.shape = replace(step.shape, channels=widened[step.reads[0]])
            if isinstance(step, Conv):
                step.weights = np.pad(step.weights, ((0, 0), (0, 0), (0, 0), (0, 1)))
        if isinstance(step, Conv) and len(step.weights) % 2:
            step.out = replace(step.out, channels=len(step.weights) + 1)
            step.weights = np.pad(step.weights, ((0, 1), (0, 0), (0, 0), (0, 0)))
            step.bias, step.scale = np.pad(step.bias, (0, 1)), np.pad(step.scale, (0, 1))
            if step.table is not None and len(step.table) > 1:
                step.table = np.pad(step.table, ((0, 1), (0, 0)))
            widened[step.writes] = step.out.channels
