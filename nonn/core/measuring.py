"""The sections ``benchmark`` and ``distributed`` of ``params.yaml``: how devices are timed, alone and at once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from nonn.core.architecture import Architecture
from nonn.core.boards import all_boards, check_board, shipped_boards
from nonn.core.devices import Count, Positive
from nonn.core.links import PRESETS, check_link
from nonn.core.schema import NotTiny, Section


class BenchmarkParams(Section):
    warmup: Annotated[int, Field(ge=0, le=1_000_000)]
    runs: Annotated[int, Field(ge=10, le=1_000_000)]
    windows: Count
    pairs: Count
    core: Annotated[int, Field(ge=0, le=4_095)]


class DistributedParams(Section):
    """All devices at once over emulated links, and a network split over them."""

    links: Annotated[list[Annotated[str, Field(json_schema_extra={"enum": list(PRESETS)})]], Field(min_length=1)]
    board: Annotated[str, Field(json_schema_extra={"enum": [n for n, b in shipped_boards().items() if b.has_energy]})]
    slowdown: Positive
    reference: Architecture | None
    images: Annotated[int, Field(ge=2, le=1_000_000)]
    seconds: Positive
    longest: Annotated[float, Field(gt=0, le=30), NotTiny]  # half of what the coordinator waits for at most

    @field_validator("links")
    @classmethod
    def _are_known(cls, links: list[str]) -> list[str]:
        for link in links:
            check_link(link)
        if len(set(links)) < len(links):
            raise ValueError("a link is listed twice; remove one")
        return links

    @field_validator("board")
    @classmethod
    def _is_a_board(cls, board: str) -> str:
        return check_board(board, [name for name, facts in all_boards().items() if facts.has_energy])
