"""The schema of ``params.yaml``: every section, its types and bounds, and how sections agree.

Each section has a class. Anything unknown or impossible is refused, with the key and the remedy,
before a stage runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from nonn.core.architecture import FEWEST_STAGES, MOST_STAGES, Architecture, Depth, Flag, Width, depth_problem
from nonn.core.boards import Board, board_of_device, find_board
from nonn.core.budgets import Budget
from nonn.core.devices import Count, DeviceParams, NonNegative, Positive
from nonn.core.errors import UserError
from nonn.core.image_source import ImageSource
from nonn.core.measuring import BenchmarkParams, DistributedParams
from nonn.core.names import Name
from nonn.core.numerics import Numerics
from nonn.core.schema import Section, did_you_mean, load_yaml
from nonn.core.teacher_source import TeacherSource
from nonn.core.training_params import AugmentParams, Fraction, ScheduleParams, SelectionParams

PARAMS_FILE = Path("params.yaml")

#: Baselines of one student on one device of the network, and of the network on another partition.
BaselineMethod = Literal["labels", "kd", "at_kd", "total", "random", "contiguous", "classwise", "full"]
BASELINE_METHODS: tuple[str, ...] = get_args(BaselineMethod)
SINGLE_METHODS, PARTITION_METHODS = BASELINE_METHODS[:4], BASELINE_METHODS[4:]

#: Stands in place of a network for the models that run on one device, in ``export``, ``benchmark`` and ``distributed``.
SOLO = "solo"

#: What the final layer does when students are missing, the simplest first: see `nonn.method.missing`. Rescaling, unlike
#: zero-filling, keeps the size of the logits, and so the probabilities.
Strategy = Literal["rescale", "zero_fill", "mean_fill", "fail_out", "subset_layers"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
#: Most students for which each of the 2^N − 1 subsets can have a layer of its own.
MAX_SUBSET_STUDENTS = 8

#: Devices of a network.
FEWEST_DEVICES, MOST_DEVICES = 2, 16
#: Number format in which a device computes.
Precision = Literal["float32", "int8"]

Threads = Annotated[int, Field(ge=1, le=1_024)]
Seeds = Annotated[int, Field(ge=1, le=1_000)]  # each a training
Seed = Annotated[int, Field(ge=0, lt=2**31)]
#: Pixels a side of an image. Networks halve it three times, and a view is moved by up to 16 pixels.
FEWEST_PIXELS, MOST_PIXELS = 28, 1024
Size = Annotated[int, Field(ge=FEWEST_PIXELS, le=MOST_PIXELS)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class NetworkParams(Section):
    """A NoNN: the device of each student, in order, and how often it and its baselines are trained.

    Trainings of a student, or of a baseline, have the seeds 0, 1, 2 and so on.
    """

    devices: Annotated[list[Name], Field(min_length=FEWEST_DEVICES, max_length=MOST_DEVICES)]
    seeds: Seeds
    baselines: dict[BaselineMethod, Seeds] = Field(default={})
    latency_ms: Positive | None = None


class DatasetParams(Section):
    source: ImageSource
    sha256: Sha256 | None = None
    size: Size
    broken: Literal["refuse", "skip"] = "refuse"
    white: Positive | None = None
    image_column: str | None = None
    label_column: str | None = None
    validation: Annotated[float, Field(gt=0, lt=1)]
    test: Annotated[float, Field(gt=0, lt=1)]
    seed: Seed

    @model_validator(mode="after")
    def _leaves_training_images(self) -> DatasetParams:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave no training images; lower one of them")
        return self


class TeacherParams(ScheduleParams, TeacherSource):
    """Keys used only in training have defaults; an imported teacher ignores them."""

    architecture: Architecture | None = None
    size: Size | None = None
    weights_sha256: Sha256 | None = None
    epochs: Count = 12
    batch_size: Count = 250
    lr: Positive = 0.4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 0.0005
    warmup: Fraction = 0.2
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    augment: AugmentParams = AugmentParams(pad=2, flip=False)
    selection: SelectionParams | None = None
    threads: Threads
    seed: Seed = 0

    @property
    def own_architecture(self) -> Architecture:
        """The architecture of a teacher of our own families."""
        assert self.architecture is not None  # as validated
        return self.architecture

    @model_validator(mode="after")
    def _is_complete(self) -> TeacherParams:
        if not (self.is_foreign or self.architecture):
            raise ValueError("architecture: source train needs one; add it, or name another source")
        return self


class SignalsParams(Section):
    views: Annotated[int, Field(ge=1, le=1_000)]  # each as large as the teacher's answers to all training images
    augment: AugmentParams
    attention: bool
    threads: Threads
    seed: Seed


class GraphParams(Section):
    rule: Literal["activation_hubs", "coactivation"]
    top_k: Annotated[int, Field(ge=2, le=16_384)] | None


class PartitionParams(Section):
    method: Literal["communities", "contiguous", "classwise", "random"]
    seed: Seed


#: Widths of stages, in units of the first.
Proportions = Annotated[
    list[Annotated[float, Field(ge=1, le=64)]], Field(min_length=FEWEST_STAGES, max_length=MOST_STAGES)
]


class DesignParams(Section):
    input: Size | None = None
    family: Literal["fast", "airbench", "wrn", "mobilenet"]
    depths: Annotated[list[Depth], Field(min_length=1, max_length=16)]
    min_width: Width
    max_width: Width
    step: Width
    widths: Proportions | None = None
    mirror: Flag = False
    strided: Flag = False
    precision: Precision

    @model_validator(mode="after")
    def _grid_is_not_empty(self) -> DesignParams:
        if self.min_width > self.max_width:
            raise ValueError("min_width is above max_width")
        if self.strided and self.family != "airbench":
            raise ValueError(f"`strided` belongs to family airbench, not to {self.family}; remove it")
        if self.family == "wrn" and self.widths:
            raise ValueError("`widths` belongs to families fast, airbench and mobilenet; remove it")
        if self.family == "airbench" and len(self.widths or ()) > FEWEST_STAGES:
            raise ValueError("family airbench has three stages; give three `widths`, or take family fast or mobilenet")
        if self.widths and self.widths[0] != 1:
            raise ValueError(f"widths are in units of the first, so it is 1, not {self.widths[0]:g}")
        for depth in self.depths:
            if self.family == "wrn" and (depth < 10 or depth % 6 != 4):
                raise ValueError(f"family wrn needs depths of the form 6n + 4 (10, 16, 22, …), not {depth}")
        return self


class DistillParams(ScheduleParams):
    kd_weight: Fraction
    temperature: Positive
    transfer_weight: NonNegative


class BaselineParams(Section):
    attention_weight: NonNegative


class AssembleParams(Section):
    epochs: Annotated[int, Field(ge=0, le=1_000_000)]
    lr: Positive
    missing: Literal["auto", Strategy] = "auto"


class EvaluateParams(Section):
    resamples: Annotated[int, Field(ge=100, le=1_000_000)]
    seed: Seed
    final_layer: Literal["averaged", "fitted"] = "averaged"
    threads: Threads = 1


class FiguresParams(Section):
    dpi: Annotated[int, Field(ge=50, le=600)]


class ImageSizes(NamedTuple):
    """Pixels a side of the images that students and teacher see."""

    students: int
    teacher: int


class Params(Section):
    """All of ``params.yaml``."""

    experiment: Name
    numerics: Numerics
    devices: dict[Name, DeviceParams]
    networks: Annotated[dict[Name, NetworkParams], Field(min_length=1)]
    dataset: DatasetParams
    teacher: TeacherParams
    signals: SignalsParams
    graph: GraphParams
    partition: PartitionParams
    design: DesignParams
    distill: DistillParams
    baseline: BaselineParams
    assemble: AssembleParams
    evaluate: EvaluateParams
    benchmark: BenchmarkParams
    distributed: DistributedParams
    figures: FiguresParams

    def budgets_of(self, network: str) -> list[Budget]:
        """Budget of each device of a network."""
        target, precision = self.networks[network].latency_ms, self.design.precision
        return [self.devices[name].budget(name, precision, target) for name in self.networks[network].devices]

    def boards_of(self, name: str, precision: Precision | None = None) -> list[Board] | None:
        """Boards of the devices of a network, in order, for which the stage `distributed` composes latency and energy.

        They compute in `precision`, by default that of the students. A device that states neither a board nor a speed
        counts as ``distributed.board``; None if all do. For `SOLO` it is one board, the quickest of all networks, which
        favours the models that NoNN is compared with.
        """
        precision = precision or self.design.precision
        if name == SOLO:
            stated = [board for network in self.networks for board in self.boards_of(network, precision) or ()]
            return [min(stated, key=lambda board: board.seconds_per_mac or math.inf)] if stated else None
        budgets = self.budgets_of(name)
        reference = find_board(self.distributed.board).for_composing(precision)
        if not any(budget.board or budget.mmacs_per_s for budget in budgets):
            return None
        boards = [find_board(budget.board) if budget.board else reference for budget in budgets]
        speeds = [budget.mmacs_per_s for budget in budgets]
        if precision != self.design.precision:  # a speed that a device states is that of the students
            speeds = [board.mmacs[precision] for board in boards]
        return [board_of_device(board, speed, reference) for board, speed in zip(boards, speeds, strict=True)]

    @property
    def image_sizes(self) -> ImageSizes:
        default = self.dataset.size
        return ImageSizes(students=self.design.input or default, teacher=self.teacher.size or default)

    def baselines(self) -> Iterator[tuple[str, str, range]]:
        """Yield ``(network, method, seeds)`` of every baseline."""
        for name, network in self.networks.items():
            for method, count in network.baselines.items():
                yield name, method, range(count)

    @property
    def pool(self) -> tuple[str, str] | None:
        """The baseline ``kd`` with the most seeds, the first of equals; None without any."""
        return self._largest_pool(self.networks)

    def pool_of(self, network: str) -> tuple[str, str] | None:
        """The baseline that supplies the students of a network's ensembles: the ``kd`` with the most seeds.

        Searches all networks with the same devices, because a pool's students are designed for the smallest device of
        their own network. A network of N devices meets as many disjoint ensembles of N as the pool holds. None without
        any.
        """
        section = self.networks[network]
        alike = (set(section.devices), section.latency_ms)
        return self._largest_pool(name for name, n in self.networks.items() if (set(n.devices), n.latency_ms) == alike)

    def _largest_pool(self, names: Iterable[str]) -> tuple[str, str] | None:
        counts = {name: self.networks[name].baselines.get("kd", 0) for name in names}
        largest = max(counts, key=counts.__getitem__)
        return (largest, "kd") if counts[largest] else None

    @model_validator(mode="after")
    def _sections_agree(self) -> Params:
        if problems := list(self._disagreements()):
            raise ValueError("\n".join(problems))
        return self

    def _stages_and_sizes(self) -> Iterator[tuple[str, str, int, int]]:
        """Yield ``(key, family, n_stages, pixels)`` of each architecture: its stages, and the images that it sees."""
        sizes, teacher = self.image_sizes, self.teacher
        yield "design.widths", self.design.family, len(self.design.widths or ()), sizes.students
        for key, architecture, size in (
            ("distributed.reference", self.distributed.reference, sizes.students),
            ("teacher.architecture", None if teacher.is_foreign else teacher.architecture, sizes.teacher),
            ("teacher.selection.proxy", teacher.selection and teacher.selection.proxy, sizes.teacher),
        ):
            if architecture:
                yield key, architecture.family, len(architecture.widths or ()), size

    def _depth_problems(self) -> Iterator[str]:
        for key, family, n_stages, size in self._stages_and_sizes():
            if problem := depth_problem(family, n_stages, size):
                yield f"{key}: {problem}"

    def _batch_norm_problems(self) -> Iterator[str]:
        trained = {"design": "distill"} | ({"teacher": "teacher"} if self.teacher.is_trained else {})
        for key, family, n_stages, size in self._stages_and_sizes():
            section, is_too_deep = trained.get(key.partition(".")[0]), depth_problem(family, n_stages, size)
            if section and not is_too_deep and getattr(self, section).batch_size == 1 and size >> n_stages <= 1:
                yield (
                    f"{section}.batch_size: is 1, and {n_stages} stages leave one pixel of an image of {size}, of "
                    "which batch norm learns nothing; give at least 2"
                )

    def _cutout_problems(self) -> Iterator[str]:
        augmented = [("signals", self.signals.augment, self.image_sizes.students)]
        if self.teacher.is_trained:
            augmented.append(("teacher", self.teacher.augment, self.image_sizes.teacher))
        for section, augment, size in augmented:
            if augment.cutout >= size:
                yield f"{section}.augment.cutout: hides all of an image of {size} pixels; give less than that"

    def check_filters(self, n_filters: int) -> None:
        """Raise UserError if the parameters ask for more filters than the `n_filters` of the teacher."""
        if problems := list(self._missing_filters(n_filters)):
            raise UserError("\n".join(f"{PARAMS_FILE}: {problem}." for problem in problems))

    def _missing_filters(self, n_filters: int) -> Iterator[str]:
        top_k = self.graph.top_k
        if top_k is not None and top_k > n_filters:
            yield (
                f"graph.top_k: is {top_k}, but the teacher has only {n_filters} filters; lower it, or set it to null "
                "for all filters"
            )
        for name, network in self.networks.items():
            if len(network.devices) > n_filters:
                yield (
                    f"networks.{name}.devices: {len(network.devices)} devices share {n_filters} filters of the "
                    "teacher; take fewer devices or a wider teacher"
                )

    def _disagreements(self) -> Iterator[str]:
        yield from self._depth_problems()
        yield from self._batch_norm_problems()
        yield from self._cutout_problems()
        if not self.teacher.is_foreign:
            yield from self._missing_filters(self.teacher.own_architecture.n_features)
        board, precision = find_board(self.distributed.board), self.design.precision
        if not board.runs_onnx and not board.mmacs[precision]:
            yield f"distributed.board: the speed of {board.name} in {precision} is not known; choose another board"
        if SOLO in self.networks:
            yield f"networks.{SOLO}: this is what models that run alone are called; choose another name"
        for name, network in self.networks.items():
            for device in dict.fromkeys(network.devices):
                if device not in self.devices:
                    hint = did_you_mean(device, self.devices)
                    yield f"networks.{name}.devices: {device!r} is not under `devices`; add it there{hint}"
            if network.latency_ms is not None and all(device in self.devices for device in network.devices):
                for device in dict.fromkeys(budget.name for budget in self.budgets_of(name) if not budget.mmacs_per_s):
                    yield (
                        f"networks.{name}.latency_ms: the speed of device {device!r} in {self.design.precision} is not "
                        f"known; give devices.{device} a board that has one, or mmacs_per_s"
                    )
            if self.assemble.missing == "subset_layers" and len(network.devices) > MAX_SUBSET_STUDENTS:
                yield (
                    f"assemble.missing: subset_layers is for up to {MAX_SUBSET_STUDENTS} devices, "
                    f"and networks.{name} has {len(network.devices)}; choose auto or another strategy"
                )
            if "at_kd" in network.baselines and not self.signals.attention:
                yield f"networks.{name}.baselines.at_kd: needs attention maps; set signals.attention to true"
        if self.signals.attention and self.teacher.is_foreign:
            yield (
                "signals.attention: only teachers of source train have attention maps; set it to false, and remove "
                "baselines at_kd"
            )


def load_params(path: Path = PARAMS_FILE, changes: Mapping[str, Any] | None = None) -> Params:
    """Read and check a parameter file, with `changes` as `nonn.core.schema.load_yaml` takes them."""
    return load_yaml(path, Params, "Run nonn from the repository's top folder.", changes)
