"""Flash and RAM of a student's firmware, from its architecture alone, before it is trained.

The steps are those that `nonn.firmware.graph` reads from the exported file, and the arena is planned by the same
function, so RAM is what the linker will report. Weights are not known yet, but their number is; flash differs from the
linker's figure by the size of the compiled code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import DTypeLike

from nonn.core.architecture import Architecture
from nonn.core.chips import FAMILIES
from nonn.core.families import WHITENED
from nonn.firmware.arena import plan_arena
from nonn.firmware.source import buffers_of
from nonn.firmware.steps import Combine, Conv, FirmwareProgram, KernelCall, Mean, Prepare, Shape
from nonn.firmware.targets import STACK_BYTES

#: Bytes of ``nonn_conv_t`` of ``kernels.h`` on a processor of 32 bits.
CONV_BYTES = 40
#: Bytes of code: kernels, start-up and main program; and of each step, a call with its arguments. From firmware that
#: arm-none-eabi-gcc 12.2 linked, rounded up so that what fits here fits for the linker; a test compares them.
CODE_BYTES, STEP_BYTES = 4240, 28
#: Bytes of variables of ``main.c``: a time for each step, and single ones.
STEP_TIME_BYTES, VARIABLE_BYTES = 8, 24
#: Constants that each of the two passes, over an image and its mirror image, has for itself.
APART = ("bias", "scale", "table")


@dataclass(frozen=True)
class Footprint:
    """Bytes that a firmware takes of a microcontroller; RAM with all of the stack."""

    flash_bytes: int
    ram_bytes: int


def has_kernels(architecture: Architecture) -> bool:
    """Whether there are kernels for a student: none for shortcuts or depthwise convolutions."""
    return architecture.family in FAMILIES and (architecture.family != "airbench" or architecture.depth < 3)


@cache
def predict_footprint(kind: str, channels: int, size: int, n_filters: int | None) -> Footprint:
    """Flash and RAM of a student for images of shape (channels, size, size).

    `kind` is its architecture as JSON, of those that `has_kernels`; `n_filters` are the outputs of its bridge, None for
    none.
    """
    student = blank_program(Architecture.model_validate_json(kind), channels, size, n_filters)
    steps = len(student.steps)
    arrays = {id(array): nbytes for step in student.steps for array, nbytes in _constants(step)}
    descriptors = CONV_BYTES * sum(isinstance(step, Conv) for step in student.steps)
    arena = plan_arena(buffers_of(student))[1]
    return Footprint(
        flash_bytes=CODE_BYTES + STEP_BYTES * steps + descriptors + sum(arrays.values()),
        ram_bytes=arena + STEP_TIME_BYTES * steps + VARIABLE_BYTES + STACK_BYTES,
    )


def blank_program(architecture: Architecture, channels: int, size: int, n_filters: int | None) -> FirmwareProgram:
    """A student without values: its weights and tables have shapes only."""
    image = Shape(size, size, channels)
    once = list(_pass(architecture, image, n_filters))
    n_features = n_filters or architecture.n_features
    if not architecture.mirror:
        return FirmwareProgram("image", image, once[-1].writes, n_features, once)
    mirrored = [_again(step) for step in once]
    joined = Combine((once[-1].writes, mirrored[-1].writes), "sum", n_features, "+")
    halved = Combine(("sum",), "features", n_features, "/", 2.0)
    return FirmwareProgram("image", image, "features", n_features, [*mirrored, *once, joined, halved])


def _again(step: KernelCall) -> KernelCall:
    """The same step of a second pass: it shares the weights, and has scales, biases and tables of its own."""
    own = {
        name: _blank(array.dtype, *array.shape) for name in APART if (array := getattr(step, name, None)) is not None
    }
    reads = tuple(name if name == "image" else f"{name} again" for name in step.reads)
    return replace(step, reads=reads, writes=f"{step.writes} again", **own)


def _pass(architecture: Architecture, image: Shape, n_filters: int | None) -> Iterator[KernelCall]:
    yield Prepare(("image",), "map", image, _blank(np.uint8, image.channels, 256), False)
    shape, last = image, "map"
    layers = list(_layers(architecture, image.channels, n_filters))
    for number, (filters, kernel, stride, pool) in enumerate(layers):
        margin = kernel // 2 if kernel % 2 else 0
        filters += filters % 2  # as `in_pairs` fills up
        step = Conv(
            reads=(last,),
            writes=f"map {number}",
            shape=shape,
            out=Shape(-(-shape.rows // stride), -(-shape.columns // stride), filters),
            weights=_blank(np.int8, filters, kernel, kernel, shape.channels),
            bias=_blank(np.int32, filters),
            scale=_blank(np.float32, filters),
            stride=stride,
            padding=(margin, margin),
            zeros=(0, 0),
            pool=pool,
            # What follows the last convolution is part of the mean's table.
            table=_blank(np.uint8, 1, 256) if number < len(layers) - 1 else None,
        )
        shape, last = step.pooled, step.writes
        yield step
    yield Mean((last,), "mean", shape, _blank(np.float32, 256))


def _layers(architecture: Architecture, channels: int, n_filters: int | None) -> Iterator[tuple[int, int, int, int]]:
    """Filters, side of the kernel, stride and side of the pooling of each convolution, as `nonn.training.networks`."""
    is_fast = architecture.family == "fast"
    yield (max(4, architecture.widths[0] // 2), 3, 1, 1) if is_fast else (2 * channels * WHITENED**2, WHITENED, 1, 1)
    for stage, filters in enumerate(architecture.widths):
        yield (filters, 3, 2, 1) if architecture.strided and stage == 0 else (filters, 3, 1, 2)
        for _ in range(architecture.depth - 1):
            yield filters, 3, 1, 1
    if n_filters:
        yield n_filters, 1, 1, 1


def _constants(step: KernelCall) -> Iterator[tuple[np.ndarray, int]]:
    """Arrays in flash, and the bytes of each there: those of filters are filled up to whole words."""
    match step:
        case Prepare(tables=tables):
            yield tables, tables.nbytes
        case Conv():
            yield step.weights, len(step.weights) * step.column_bytes
            for array in (step.bias, step.scale, step.table):
                if array is not None:
                    yield array, array.nbytes
        case Mean(table=table):
            yield table, table.nbytes


def _blank(kind: DTypeLike, *shape: int) -> np.ndarray:
    """A zero array that takes no memory and has its own `id()`."""
    return np.ndarray(shape, kind, bytes(8), strides=(0,) * len(shape))
