"""Boards: memory, speed, power and links of each kind.

The figures stand in ``boards.yaml``, each with its source. A project adds or replaces some in a file of its own,
`OWN_FILE`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from ruamel.yaml import YAML

from nonn.core.errors import UserError, printable
from nonn.core.links import check_link
from nonn.core.schema import VALUES, NotTiny, Section, check_values, did_you_mean
from nonn.core.yaml_text import read_yaml

#: What a project adds to the catalogue, beside its ``params.yaml``.
OWN_FILE = Path("devices.yaml")

Amount = Annotated[float, Field(gt=0, allow_inf_nan=False), NotTiny]


class Figure(Section):
    """One figure of the catalogue, and where it comes from."""

    value: Any
    kind: Literal["measured", "cited", "estimated"]
    source: str
    how: str | None = None

    @model_validator(mode="after")
    def _says_how_it_was_derived(self) -> Figure:
        if self.kind == "estimated" and not self.how:
            raise ValueError("an estimate says in `how` what it was derived from")
        return self


class Facts(Section):
    """The values of one board, as they stand in a file without their sources."""

    title: str = ""
    ram_kib: Amount
    flash_kib: Amount | None = None
    float32_mmacs: Amount | None = None
    int8_mmacs: Amount | None = None
    idle_w: Amount | None = None
    active_w: Amount | Annotated[list[Amount], Field(min_length=2, max_length=2)] | None = None
    cores: Annotated[int, Field(ge=1, le=1024)] = 1
    links: list[str] | None = None
    runs_onnx: bool = False

    @field_validator("links")
    @classmethod
    def _are_links(cls, links: list[str] | None) -> list[str] | None:
        for link in links or ():
            check_link(link)
        return links

    @model_validator(mode="after")
    def _agree(self) -> Facts:
        low, high = self.active_range or (None, None)
        if low is not None and high is not None and not (self.idle_w or 0) < low <= high:
            raise ValueError("active_w: is [low, high], and above idle_w")
        return self

    @property
    def active_range(self) -> tuple[float, float] | None:
        if self.active_w is None:
            return None
        low, high = self.active_w if isinstance(self.active_w, list) else (self.active_w, self.active_w)
        return low, high


@dataclass(frozen=True)
class Range:
    """Lower and upper bound of a modelled quantity."""

    low: float
    high: float


@dataclass(frozen=True)
class Board:
    """A kind of device.

    `idle_w` are watts with nothing to do, 0 where no source gives any, and then left out; `active_w` those with one
    core computing, None where unknown. `mmacs` are millions of multiply-accumulates a second by precision, None where
    unknown. If `seconds_per_mac` is set, the stage `distributed` multiplies it by the multiply-accumulates; otherwise
    it scales the time measured on this machine by ``distributed.slowdown``.
    """

    name: str
    idle_w: float
    active_w: Range | None
    seconds_per_mac: float | None = None
    title: str = ""
    ram_kib: float = 0.0
    flash_kib: float | None = None  # None: weights live in RAM, too
    mmacs: Mapping[str, float | None] = field(default_factory=dict)
    cores: int = 1
    links: tuple[str, ...] | None = None  # that it has by itself; None where unknown
    runs_onnx: bool = False
    figures: Mapping[str, Figure] = field(default_factory=dict)  # by the keys of the catalogue
    bare: Mapping[str, Any] = field(default_factory=dict)  # what the project states without a source

    @property
    def has_energy(self) -> bool:
        """Whether the stage `distributed` can say what an image takes there."""
        return self.active_w is not None and (self.runs_onnx or any(self.mmacs.values()))

    def with_catalogue_speed(self, precision: str) -> Board:
        """The board with the speed that the catalogue gives for a precision."""
        speed = self.mmacs.get(precision)
        return replace(self, seconds_per_mac=1e-6 / speed if speed else None)

    def for_composing(self, precision: str) -> Board:
        """The board as the stage `distributed` composes with it: with the speed of the catalogue.

        Boards that run the exported files go without, since the files are timed on this machine in their place.
        """
        return self if self.runs_onnx else self.with_catalogue_speed(precision)

    def on_all_cores(self) -> Board:
        """The board as it computes on all its cores at once: as many times faster, at the upper bound of its power."""
        assert self.active_w is not None, "all cores ask for power"
        assert self.seconds_per_mac is not None, "all cores ask for speed"
        power, speed = self.active_w.high, self.seconds_per_mac / self.cores
        return replace(self, active_w=Range(power, power), seconds_per_mac=speed)

    def holds(self, weight_bytes: float, activation_bytes: float) -> bool:
        """Whether a model fits: weights in flash and activations in RAM, or both in RAM where there is no flash."""
        flash, ram = self.flash_kib, self.ram_kib
        if flash is None:
            return weight_bytes + activation_bytes <= 1024 * ram
        return weight_bytes <= 1024 * flash and activation_bytes <= 1024 * ram


@cache
def _shipped() -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Sources and boards, each by name, of the file that comes with the package."""
    content = YAML(typ="safe").load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return content["sources"], content["boards"]


@cache
def shipped_boards() -> dict[str, Board]:
    """Boards of the package, by the names that ``params.yaml`` gives them."""
    sources, entries = _shipped()
    return {name: make_board(name, entry, sources) for name, entry in entries.items()}


def all_boards() -> dict[str, Board]:
    """Boards of the package and of the project, whose figures take precedence."""
    if not os.path.lexists(OWN_FILE):
        return dict(shipped_boards())
    content = read_yaml(OWN_FILE, "Remove it, or write one.")
    project_boards = content.get("boards") if isinstance(content, dict) else None
    if not isinstance(project_boards, dict) or set(content) - {"boards", "sources"}:
        raise UserError(
            f"{OWN_FILE}: has one key, `boards`, a mapping of names to their figures; see docs/catalogue.md"
        )
    sources, entries = _shipped()
    own_sources = content.get("sources") or {}
    if not isinstance(own_sources, dict) or not all(isinstance(s, str) for pair in own_sources.items() for s in pair):
        raise UserError(f"{OWN_FILE}: sources: is no mapping of short names to texts; see docs/catalogue.md")
    sources = sources | own_sources
    boards = dict(shipped_boards())
    for name, entry in project_boards.items():
        if not isinstance(name, str) or not name.isprintable():
            raise UserError(f"{OWN_FILE}: boards: {VALUES.repr(name)} is no name of a board; write a text in quotes")
        if not isinstance(entry, dict):
            raise UserError(f"{OWN_FILE}: boards.{name}: is no mapping of figures; write for example ram_kib: 512")
        board = make_board(name, entries.get(name, {}) | entry, sources, f"{OWN_FILE}: ")
        bare = {key: value for key, value in entry.items() if key not in board.figures and key != "title"}
        boards[name] = replace(board, bare=bare)
    return boards


def make_board(name: str, entry: Mapping[str, Any], sources: Mapping[str, str], where: str = "") -> Board:
    """A board from its entry in a catalogue, where a figure is a number, or a mapping with its source."""
    where = f"{where}boards.{name}"
    figures = {
        key: check_values(value, Figure, f"{where}.{printable(str(key))}")
        for key, value in entry.items()
        if isinstance(value, dict)
    }
    values = {key: figures[key].value if key in figures else value for key, value in entry.items()}
    facts = check_values(values, Facts, where)
    sourced = {
        key: figure.model_copy(update={"source": sources.get(figure.source, figure.source)})
        for key, figure in figures.items()
    }
    return Board(
        name=str(name),
        idle_w=facts.idle_w or 0.0,
        active_w=Range(*facts.active_range) if facts.active_range else None,
        title=facts.title or str(name),
        ram_kib=facts.ram_kib,
        flash_kib=facts.flash_kib,
        mmacs={"float32": facts.float32_mmacs, "int8": facts.int8_mmacs},
        cores=facts.cores,
        links=None if facts.links is None else tuple(facts.links),
        runs_onnx=facts.runs_onnx,
        figures=sourced,
    )


def check_board(name: str, known: Collection[str]) -> str:
    """The name of a board, or a `ValueError` if it is not among the known ones."""
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"no board {name!r}{hint}; choose one of {', '.join(known)}, or add it to {OWN_FILE}")
    return name


def find_board(name: str) -> Board:
    """A board by its name in the catalogue, or a `UserError`."""
    boards = all_boards()
    try:
        return boards[check_board(name, boards)]
    except ValueError as error:
        raise UserError(str(error)) from None


def board_of_device(board: Board, mmacs_per_s: float | None, reference: Board) -> Board:
    """A board as a device of ``params.yaml`` has it, which computes at `mmacs_per_s` in the precision of the students.

    A missing speed is taken from `reference`, at the same precision. A missing power stays missing.
    """
    return replace(board, seconds_per_mac=1e-6 / mmacs_per_s if mmacs_per_s else reference.seconds_per_mac)
