"""Parts of the sections of ``params.yaml`` that train: schedule, augmentation, and selection of images."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nonn.core.architecture import Architecture
from nonn.core.devices import Count, NonNegative, Positive
from nonn.core.schema import Section

Fraction = Annotated[float, Field(ge=0, le=1)]


class AugmentParams(Section):
    pad: Annotated[int, Field(ge=0, le=16)]
    flip: bool
    cutout: Annotated[int, Field(ge=0, le=64)] = 0


class MuonParams(Section):
    """The optimiser of convolutional filters: see `nonn.training.optim`."""

    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]


class ScheduleParams(Section):
    """Stochastic gradient descent with a triangular learning rate. With `muon`, it excludes the filters."""

    epochs: Count
    batch_size: Count
    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NonNegative
    warmup: Fraction
    muon: MuonParams | None = None


class SelectionParams(Section):
    """Selection of the hardest images of each batch by a small network: see `nonn.teachers.selection`."""

    keep: Annotated[float, Field(gt=0, le=1)]
    proxy: Architecture
