"""What the stage `export` wrote, read where it runs: checked against its schema and its checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nonn.core.errors import UserError
from nonn.core.files import read_json

#: Names beside the manifest, never paths that lead elsewhere.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.(onnx|safetensors)$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, le=2**16)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True)


class Image(Section):
    channels: Count
    size: Count
    dtype: Literal["uint8"]


class StudentFile(Section):
    file: FileName
    sha256: Sha256
    n_features: Count
    #: Largest value that a feature may have, none being negative; null for any finite ones.
    feature_limit: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None

    @property
    def model(self) -> str:
        """Name of the student among models, as its node serves it."""
        return Path(self.file).stem


class FinalFiles(Section):
    file: FileName
    blocks: FileName
    blocks_sha256: Sha256


class Manifest(Section):
    """The keys of an exported network's ``manifest.json`` that nodes and coordinator need."""

    classes: Annotated[list[str], Field(min_length=2)]
    image: Image
    students: Annotated[list[StudentFile], Field(min_length=1)]
    final: FinalFiles
    #: Form of int8 students (`nonn.quantize.FORM`); none of float32 ones, and of exports from before it was named.
    quantisation: Annotated[str, Field(pattern=r"^[a-z0-9]+$")] | None = None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported network.

    Raises
    ------
    UserError
        It is missing or damaged, or not that of a network.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file. Copy the whole folder that `nonn export` wrote, or run the pipeline.")
    try:
        return Manifest.model_validate(read_json(path))
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        what = error.errors()[0]["loc"] if isinstance(error, ValidationError) else error
        raise UserError(f"{path}: not the manifest of an exported network ({what}). Export it again.") from None


def read_verified(path: Path, sha256: str) -> bytes:
    """Content of a file whose SHA-256 the manifest knows; read once, so what was checked is what is used.

    Raises
    ------
    UserError
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Export the network again.") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path}: its SHA-256 is not that of the manifest beside it. Copy the whole folder again.")
    return content
