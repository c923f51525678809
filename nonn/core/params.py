"""The schema of ``params.yaml``: every section, its types and bounds, and how sections agree.

One class a section, of the same name as the stage that reads it. Anything unknown or impossible
is refused with the key and the remedy before a stage runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from nonn.core.boards import BOARDS
from nonn.core.links import PRESETS
from nonn.core.schema import Section, did_you_mean, load_yaml

PARAMS_FILE = Path("params.yaml")

#: Baselines of one student on one device of the network, and of the network on another partition.
SINGLE_METHODS = ("labels", "kd", "at_kd", "total")
PARTITION_METHODS = ("random", "contiguous", "classwise", "full")
BASELINE_METHODS = (*SINGLE_METHODS, *PARTITION_METHODS)

#: In place of a network: the models that run alone, on one device, in ``export``, ``benchmark`` and ``distributed``.
SOLO = "solo"

#: What the final layer does when students are missing, the simplest first: see `nonn.method.missing`. Of the two
#: simplest, rescaling keeps the size of the logits, and so the probabilities.
Strategy = Literal["rescale", "zero_fill", "mean_fill", "fail_out", "subset_layers"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
#: Students up to which each subset of them can have a layer of its own, 2^N − 1 of them.
MAX_SUBSET_STUDENTS = 8

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Limit = Annotated[float, Field(gt=0)]  # `.inf`: none
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Device(Section):
    """Budget of one device."""

    memory_kib: Positive
    mmacs: Limit


class Ensemble(Section):
    pool: str
    seeds: list[Seed]


class DatasetParams(Section):
    source: str
    sha256: Sha256 | None = None
    size: Annotated[int, Field(ge=28, le=512)]
    validation: Annotated[float, Field(gt=0, lt=1)]
    test: Annotated[float, Field(gt=0, lt=1)]
    seed: Seed

    @model_validator(mode="after")
    def _leaves_training_images(self) -> DatasetParams:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave no training images; lower one of them")
        return self


class Augment(Section):
    pad: Annotated[int, Field(ge=0, le=16)]
    flip: bool
    cutout: Annotated[int, Field(ge=0, le=64)] = 0


#: Left out of files where it is false, its value before there was such a key.
Flag = Annotated[bool, Field(exclude_if=lambda on: not on)]


class Architecture(Section):
    """A convolutional network of one family: see `nonn.training.networks`."""

    family: Literal["fast", "airbench", "wrn", "resnet"]
    widths: list[Count] = Field(default=[])
    depth: Count
    width: Count = 1
    mirror: Flag = False
    strided: Flag = False

    @property
    def name(self) -> str:
        """As the literature writes it, such as WRN-16-2."""
        if self.widths:
            return f"{self.family} {'-'.join(map(str, self.widths))}"
        if self.family == "wrn":
            return f"WRN-{self.depth}-{self.width}"
        return f"ResNet-{self.depth}" if self.width == 1 else f"ResNet-{self.depth} (width ×{self.width})"

    @property
    def n_features(self) -> int:
        """Length of the feature vector, without a bridge."""
        return self.widths[-1] if self.widths else 64 * self.width

    @model_validator(mode="after")
    def _is_complete(self) -> Architecture:
        has_widths = self.family in ("fast", "airbench")
        if has_widths and len(self.widths) != 3:
            raise ValueError(f"family {self.family} needs `widths`, three numbers, such as [64, 256, 256]")
        if not has_widths and self.widths:
            raise ValueError(
                f"`widths` belongs to families fast and airbench; family {self.family} takes `depth` and `width`"
            )
        if has_widths and self.width != 1:
            raise ValueError(f"`width` belongs to families wrn and resnet; family {self.family} takes `widths`")
        if self.strided and self.family != "airbench":
            raise ValueError(f"`strided` belongs to family airbench, not to {self.family}; remove it")
        step = {"wrn": (6, 4), "resnet": (6, 2)}.get(self.family)
        if step and (self.depth < sum(step) or self.depth % step[0] != step[1]):
            raise ValueError(f"family {self.family} needs depth = {step[0]}n + {step[1]}, not {self.depth}")
        return self


class MuonParams(Section):
    """Of the filters of convolutions: see `nonn.training.optim`."""

    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]


class Schedule(Section):
    """Stochastic gradient descent with a triangular learning rate; with `muon`, of all but the filters."""

    epochs: Count
    batch_size: Count
    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NonNegative
    warmup: Fraction
    muon: MuonParams | None = None


class Normalization(Section):
    """Mean and standard deviation of each channel, pixels scaled to 0..1."""

    mean: Annotated[list[float], Field(min_length=1, max_length=3)]
    std: Annotated[list[Positive], Field(min_length=1, max_length=3)]


class Selection(Section):
    """Of the hardest images of each batch, by a small network: see `nonn.training.selection`."""

    keep: Annotated[float, Field(gt=0, le=1)]
    proxy: Architecture


class Teacher(Schedule):
    architecture: Architecture
    weights: str | None
    weights_sha256: Sha256 | None = None
    normalization: Normalization | None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    augment: Augment
    selection: Selection | None = None
    threads: Count
    seed: Seed

    @model_validator(mode="after")
    def _normalization_has_an_effect(self) -> Teacher:
        if self.normalization and not self.weights:
            raise ValueError("normalization: is that of imported `weights`, and they are null; set it to null too")
        return self


class Signals(Section):
    views: Count
    augment: Augment
    attention: bool
    threads: Count
    seed: Seed


class GraphParams(Section):
    rule: Literal["activation_hubs", "coactivation"]
    top_k: Annotated[int, Field(ge=2)] | None


class PartitionParams(Section):
    method: Literal["communities", "contiguous", "classwise", "random"]
    seed: Seed


class Design(Section):
    family: Literal["fast", "airbench", "wrn"]
    depths: Annotated[list[Count], Field(min_length=1)]
    min_width: Count
    max_width: Count
    step: Count
    widths: Annotated[list[Annotated[float, Field(ge=1)]], Field(min_length=3, max_length=3)] = Field(default=[1, 2, 4])
    mirror: Flag = False
    strided: Flag = False
    bytes_per_value: Literal[1, 4]

    @model_validator(mode="after")
    def _grid_is_not_empty(self) -> Design:
        if self.min_width > self.max_width:
            raise ValueError("min_width is above max_width")
        if self.strided and self.family != "airbench":
            raise ValueError(f"`strided` belongs to family airbench, not to {self.family}; remove it")
        if self.family == "wrn" and "widths" in self.model_fields_set:
            raise ValueError("`widths` belongs to families fast and airbench; remove it")
        if self.widths[0] != 1:
            raise ValueError(f"widths are in units of the first, so it is 1, not {self.widths[0]:g}")
        for depth in self.depths:
            if self.family == "wrn" and (depth < 10 or depth % 6 != 4):
                raise ValueError(f"family wrn needs depths of the form 6n + 4 (10, 16, 22, …), not {depth}")
        return self


class Distill(Schedule):
    kd_weight: Fraction
    temperature: Positive
    transfer_weight: NonNegative


class Baseline(Section):
    attention_weight: NonNegative


class Assemble(Section):
    epochs: Annotated[int, Field(ge=0)]
    lr: Positive
    missing: Literal["auto", Strategy] = "auto"


class Evaluate(Section):
    resamples: Annotated[int, Field(ge=100)]
    seed: Seed
    final_layer: Literal["averaged", "fitted"] = "averaged"
    threads: Count = 1


class Benchmark(Section):
    warmup: Annotated[int, Field(ge=0)]
    runs: Annotated[int, Field(ge=10)]
    windows: Count
    core: Annotated[int, Field(ge=0)]


class Distributed(Section):
    """Devices at once over emulated links, and what a split network takes there."""

    links: Annotated[list[str], Field(min_length=1)]
    board: str
    slowdown: Positive
    reference: Architecture | None
    images: Annotated[int, Field(ge=2)]
    seconds: Positive
    longest: Limit

    @field_validator("links")
    @classmethod
    def _are_known(cls, links: list[str]) -> list[str]:
        for link in links:
            if link not in PRESETS:
                raise ValueError(f"no link {link!r}; choose of {', '.join(PRESETS)}")
        if len(set(links)) < len(links):
            raise ValueError("a link is listed twice; remove one")
        return links

    @field_validator("board")
    @classmethod
    def _is_a_board(cls, board: str) -> str:
        if board not in BOARDS:
            raise ValueError(f"no board {board!r}; choose one of {', '.join(BOARDS)}")
        return board


class Figures(Section):
    dpi: Annotated[int, Field(ge=50, le=600)]
    format: Literal["png", "svg", "pdf"]


class Params(Section):
    """All of ``params.yaml``."""

    experiment: Name
    networks: Annotated[dict[Name, list[Name]], Field(min_length=1)]
    students: list[str]
    students_once: list[str]
    assembled: list[str]
    assembled_once: list[str]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    baselines: list[str]
    baselines_once: list[str]
    ensemble: Ensemble
    devices: dict[Name, Device]
    dataset: DatasetParams
    teacher: Teacher
    signals: Signals
    graph: GraphParams
    partition: PartitionParams
    design: Design
    distill: Distill
    baseline: Baseline
    assemble: Assemble
    evaluate: Evaluate
    benchmark: Benchmark
    distributed: Distributed
    figures: Figures

    def seeds_of(self, network: str) -> list[int]:
        """Seeds that the students of a network are trained with."""
        return self.seeds if network in self.assembled else self.seeds[:1]

    def baseline_jobs(self) -> Iterator[tuple[str, str, list[int]]]:
        """Yield ``(network, method, seeds)`` of every baseline; the pool also has the ensemble's seeds."""
        for name in [*self.baselines, *self.baselines_once]:
            network, method = name.split("/")
            seeds = self.seeds if name in self.baselines else self.seeds[:1]
            extra = self.ensemble.seeds if name == self.ensemble.pool else []
            yield network, method, [*seeds, *extra]

    @model_validator(mode="after")
    def _sections_agree(self) -> Params:
        if problems := list(self._disagreements()):
            raise ValueError("\n".join(problems))
        return self

    def _disagreements(self) -> Iterator[str]:
        if SOLO in self.networks:
            yield f"networks.{SOLO}: this is what models that run alone are called; choose another name"
        for network, devices in self.networks.items():
            if not 2 <= len(devices) <= 16:
                yield f"networks.{network}: has {len(devices)} devices; give it 2 to 16"
            for device in devices:
                if device not in self.devices:
                    hint = did_you_mean(device, self.devices)
                    yield f"networks.{network}: device {device!r} is not under `devices`; add it there{hint}"
            if self.assemble.missing == "subset_layers" and len(devices) > MAX_SUBSET_STUDENTS:
                yield (
                    f"assemble.missing: subset_layers is for up to {MAX_SUBSET_STUDENTS} devices, "
                    f"and networks.{network} has {len(devices)}; choose auto or another strategy"
                )
        yield from self._networks_disagree()
        baselines = {"baselines": self.baselines, "baselines_once": self.baselines_once}
        listed = {"seeds": self.seeds, "ensemble.seeds": self.ensemble.seeds, **baselines}
        for key, values in listed.items():
            if len(set(values)) < len(values):
                yield f"{key}: an entry is listed twice; remove one"
        if repeated := set(self.baselines) & set(self.baselines_once):
            yield f"baselines_once: {', '.join(sorted(repeated))} is in `baselines` already; remove one of the two"
        if repeated := set(self.seeds) & set(self.ensemble.seeds):
            yield f"ensemble.seeds: {sorted(repeated)} are already in `seeds`; list only further ones"
        for key, name in ((key, name) for key, names in baselines.items() for name in names):
            network, _, method = name.partition("/")
            if network not in self.networks or method not in BASELINE_METHODS:
                yield (
                    f"{key}: {name!r} is not network/method, with a network of `networks` and a method "
                    f"of {', '.join(BASELINE_METHODS)}"
                )
            if method == "at_kd" and not self.signals.attention:
                yield f"{key}: {name} needs attention maps; set signals.attention to true"
        if self.ensemble.pool not in self.baselines or not self.ensemble.pool.endswith("/kd"):
            yield f"ensemble.pool: {self.ensemble.pool!r} is not one of the kd baselines; add it to `baselines`"

    def _networks_disagree(self) -> Iterator[str]:
        """Each network is assembled either with every seed or once, and its students are trained likewise."""
        for network in self.networks:
            if (network in self.assembled) + (network in self.assembled_once) != 1:
                yield f"assembled: {network} of `networks` must stand either there or in `assembled_once`"
        for key, students in (("assembled", "students"), ("assembled_once", "students_once")):
            names, listed = getattr(self, key), getattr(self, students)
            if unknown := [name for name in names if name not in self.networks]:
                yield f"{key}: remove {', '.join(unknown)}: `networks` has no such entry"
            expected = [f"{n}/{i}" for n in names if n in self.networks for i in range(len(self.networks[n]))]
            if missing := [s for s in expected if s not in listed]:
                yield f"{students}: add {', '.join(missing)}: one entry for each device of the networks in `{key}`"
            if surplus := [s for s in listed if s not in expected]:
                yield f"{students}: remove {', '.join(surplus)}: no network in `{key}` has such a device"
            for repeated in (key, students):
                if len(set(getattr(self, repeated))) < len(getattr(self, repeated)):
                    yield f"{repeated}: an entry is listed twice; remove one"


def load_params(path: Path = PARAMS_FILE, changes: Mapping[str, Any] | None = None) -> Params:
    """Read and check a parameter file, with `changes` as `nonn.core.schema.load_yaml` takes them.

    Raises
    ------
    UserError
    """
    return load_yaml(path, Params, "Run nonn from the repository's top folder.", changes)
