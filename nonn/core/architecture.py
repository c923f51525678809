"""The schema of a network's architecture: its family and sizes, as ``params.yaml`` and the artifacts hold it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nonn.core.families import LAST_EXPANSION
from nonn.core.schema import Section

#: Channels of a layer at most.
MOST_CHANNELS = 16_384
Width = Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
#: Widths of a ResNet in units of the plain one's, at most.
MOST_WIDTH = 256
Depth = Annotated[int, Field(ge=1, le=1_000)]
#: False is left out of files, so that files from before this key stay the same.
Flag = Annotated[bool, Field(exclude_if=lambda on: not on)]

#: Stages of a family that is described by the widths of its stages. Each stage halves its maps once.
FEWEST_STAGES, MOST_STAGES = 3, 6


class Architecture(Section):
    """A convolutional network of one family: see `nonn.training.networks`."""

    family: Literal["fast", "airbench", "wrn", "resnet", "mobilenet"]
    widths: Annotated[list[Width], Field(max_length=MOST_STAGES)] = Field(default=[])
    depth: Depth
    width: Annotated[int, Field(ge=1, le=MOST_WIDTH)] = 1
    mirror: Flag = False
    strided: Flag = False

    @property
    def name(self) -> str:
        """Name in the style of the literature, such as WRN-16-2."""
        if self.widths:
            return f"{self.family} {'-'.join(map(str, self.widths))}"
        if self.family == "wrn":
            return f"WRN-{self.depth}-{self.width}"
        return f"ResNet-{self.depth}" if self.width == 1 else f"ResNet-{self.depth} (width ×{self.width})"

    @property
    def n_features(self) -> int:
        """Length of the feature vector, without a bridge."""
        if self.family == "mobilenet":
            return LAST_EXPANSION * self.widths[-1]
        return self.widths[-1] if self.widths else 64 * self.width

    @model_validator(mode="after")
    def _is_complete(self) -> Architecture:
        has_widths = self.family in ("fast", "airbench", "mobilenet")
        most = FEWEST_STAGES if self.family == "airbench" else MOST_STAGES
        if has_widths and not FEWEST_STAGES <= len(self.widths) <= most:
            numbers = "three numbers" if most == FEWEST_STAGES else f"{FEWEST_STAGES} to {most} numbers"
            raise ValueError(f"family {self.family} needs `widths`, {numbers}, such as [64, 256, 256]")
        if not has_widths and self.widths:
            raise ValueError(
                f"`widths` belongs to families fast, airbench and mobilenet; family {self.family} takes `depth` and "
                "`width`"
            )
        if has_widths and self.width != 1:
            raise ValueError(f"`width` belongs to families wrn and resnet; family {self.family} takes `widths`")
        if self.strided and self.family != "airbench":
            raise ValueError(f"`strided` belongs to family airbench, not to {self.family}; remove it")
        step = {"wrn": (6, 4), "resnet": (6, 2)}.get(self.family)
        if step and (self.depth < sum(step) or self.depth % step[0] != step[1]):
            raise ValueError(f"family {self.family} needs depth = {step[0]}n + {step[1]}, not {self.depth}")
        return self


def depth_problem(family: str, n_stages: int, size: int) -> str | None:
    """Message if the poolings of all stages leave nothing of an image of `size` pixels, else None.

    Strides, as in family mobilenet, round up, so one pixel is always left.
    """
    if family == "mobilenet" or 2**n_stages <= size:
        return None
    return f"{n_stages} stages halve an image of {size} pixels to nothing; give at most {size.bit_length() - 1} widths"
