"""Features as bytes: a microcontroller sends |P_i| bytes an image, and the final layer gets float32 values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nonn.firmware.steps import Combine, FirmwareProgram, Mean

#: The largest byte.
MAX_BYTE = 255


@dataclass(frozen=True)
class FeatureScale:
    """A byte b stands for the feature `low` + b · `step`."""

    low: np.float32
    step: np.float32

    @property
    def per_unit(self) -> np.float32:
        return np.float32(1) / self.step

    def encode(self, features: np.ndarray) -> np.ndarray:
        """Bytes of float32 features, rounded half to even: as ``main.c`` does, in float32."""
        return np.clip(np.rint((features - self.low) * self.per_unit), 0, MAX_BYTE).astype(np.uint8)

    def decode(self, values: np.ndarray) -> np.ndarray:
        return self.low + values.astype(np.float32) * self.step


def scale_of(student: FirmwareProgram) -> FeatureScale:
    """The finest scale that holds all features that a student can have.

    A feature is a mean of values of the last map, which lie between the least and the greatest of its table. For
    students that answer with the mean of two passes, the bounds are those of both.
    """
    bounds: dict[str, np.ndarray] = {}
    for step in student.steps:
        if isinstance(step, Mean):
            bounds[step.writes] = np.array([step.table.min(), step.table.max()], np.float64)
        elif isinstance(step, Combine):
            bounds[step.writes] = _combined(step, [bounds[name] for name in step.reads])
    low, high = bounds[student.features]
    return FeatureScale(np.float32(low), np.float32((high - low) / MAX_BYTE or 1.0))


def _combined(step: Combine, bounds: list[np.ndarray]) -> np.ndarray:
    if step.constant is None:
        return bounds[0] + bounds[1]
    return np.sort(bounds[0] / step.constant if step.operation == "/" else bounds[0] * step.constant)
