"""Names that users give to experiments, networks and devices, and the names of the hosts that ask devices."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

#: The host that asks the devices, on links and in clusters.
COORDINATOR = "coordinator"
#: An application that asks a coordinator, in its certificate.
APPLICATION = "application"
#: Words that some version of YAML takes for a truth value or for null.
_YAML_WORDS = {"y", "n", "yes", "no", "true", "false", "on", "off", "null"}


def _check_name(name: str) -> str:
    if name.startswith("-"):
        raise ValueError(f"{name!r} looks like an option to a shell; begin it with a letter or digit")
    number = name.replace("_", "")
    if name.lower() in _YAML_WORDS or re.fullmatch(r"\d+|0[xob][0-9a-fA-F]+|\d+[eE]-?\d+|\d+(-\d+)+", number):
        raise ValueError(f"{name!r} reads as something else than text in YAML; add a letter to it")
    return name


#: Name of a folder and of a key, which every shell and YAML reads as text.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=64), AfterValidator(_check_name)]
