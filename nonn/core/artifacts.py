"""What the JSON files of the stages hold, as far as later stages read it: `read_json` checks a file against these.

A file may hold more keys. A stage that reads them only passes them on.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from nonn.core.architecture import Architecture

Count = Annotated[int, Field(ge=1, le=2**31)]
Index = Annotated[int, Field(ge=0, le=2**31)]


class DatasetInfo(TypedDict):
    """``dataset.json``."""

    classes: Annotated[list[str], Field(min_length=2)]
    channels: Annotated[int, Field(ge=1, le=3)]
    size: Count
    teacher_size: NotRequired[Count]
    white: NotRequired[float | None]
    source: NotRequired[str]
    counts: NotRequired[dict[str, Index]]  # images by split


class ImageSpec(NamedTuple):
    """Shape of the images and number of classes, which the design of a network depends on."""

    channels: int
    size: int  # pixels a side
    n_classes: int

    @classmethod
    def of(cls, info: DatasetInfo) -> ImageSpec:
        return cls(info["channels"], info["size"], len(info["classes"]))


class TeacherInfo(TypedDict):
    """``teacher.json``."""

    architecture: Architecture | None  # None for a foreign teacher, which has the keys below
    source: NotRequired[str]
    classifier: NotRequired[str | None]
    preprocessing: NotRequired[dict[str, Any]]
    n_outputs: NotRequired[Count]
    outputs: NotRequired[list[Index] | None]
    code_sha256: NotRequired[str]


class GraphInfo(TypedDict):
    """``graph.json``."""

    n_filters: Count
    n_live: Index
    top_k_curve: list[dict[str, Any]]


class Sizes(TypedDict):
    """``design/NETWORK/sizes.json``."""

    sizes: Annotated[list[Count], Field(min_length=1)]


class CostInfo(TypedDict):
    """A `nonn.core.cost.Cost` as JSON."""

    params: Index
    macs: Index
    weight_bytes: Index
    peak_activation_bytes: Index


class DesignInfo(TypedDict):
    """One of the students in a file below ``design/NETWORK``."""

    architecture: Architecture
    n_filters: Count | None
    cost: NotRequired[CostInfo]


Designs = list[DesignInfo]


class Filters(TypedDict):
    """``partition/NETWORK/students/N.json``."""

    filters: list[Index]


class BaselineSets(TypedDict):
    """``partition/NETWORK/baselines/METHOD.json``: sets, or the filters and sizes from which each seed draws sets."""

    sets: NotRequired[list[list[Index] | None]]
    live: NotRequired[list[Index]]
    sizes: NotRequired[list[Count]]


class Missing(TypedDict):
    """The strategies for missing students: the chosen one and the others."""

    chosen: str
    not_chosen: list[str]


class NetworkInfo(TypedDict):
    """``networks/seedN/NETWORK.json``."""

    students: Annotated[Designs, Field(min_length=1)]
    missing: Missing
    validation_accuracy: Annotated[float, Field(ge=0, le=1)]
    temperatures: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]


class Evaluation(TypedDict):
    """``evaluation.json``."""

    n_test: Count
    rows: list[dict[str, Any]]
    missing: list[dict[str, Any]]
    missing_strategies: list[dict[str, Any]]
    calibration: list[dict[str, Any]]


class ModelFile(TypedDict):
    """One model in a manifest of the stage `export`."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.onnx$")]
    cost: CostInfo


class ModelManifest(TypedDict):
    """``export/NETWORK/manifest.json``, and one entry of ``export/solo/manifest.json``."""

    students: Annotated[list[ModelFile], Field(min_length=1)]
    quantisation: NotRequired[str]


SoloManifest = dict[str, ModelManifest]


class Latency(TypedDict):
    """One model of the stage `benchmark`, without its cost."""

    latency_p50_ms: float


class BenchmarkInfo(TypedDict):
    """``benchmark/NAME.json``."""

    system: dict[str, Any]
    models: Annotated[dict[str, Latency], Field(min_length=1)]


class DistributedInfo(TypedDict):
    """``distributed/NAME.json``."""

    system: dict[str, Any]
    live: list[dict[str, Any]]
    composed: list[dict[str, Any]]


class PartitionInfo(TypedDict):
    """``partition/NETWORK/summary.json``."""

    modularity: float | None
