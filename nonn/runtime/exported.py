"""Reads what the stage `export` wrote, on the device where it runs: checked against schema and checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nonn.core.errors import UserError
from nonn.core.files import regular
from nonn.core.params import MOST_PIXELS, Sha256

#: Input and output of a student, as ONNX and as a served model.
INPUT, OUTPUT = "image", "features"
#: Form of int8 students, as manifests name it: unsigned 8-bit activations, signed 7-bit weights (`nonn.deploy.int8`).
QUANTISATION_SCHEME = "u8s7"
#: Name of a file beside the manifest, never a path.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.(onnx|safetensors)$")]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Dimension = Annotated[int, Field(ge=1, le=2**16)]
GreyLevel = Annotated[float, Field(ge=0, le=255)]


class Record(BaseModel):
    """The keys of a JSON file that its reader needs; others are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)


Schema = TypeVar("Schema", bound=Record)


def read_record(path: Path, schema: type[Schema], what: str, remedy: str) -> Schema:
    """A JSON file, checked against its schema; `what` says what it should be.

    Raises
    ------
    UserError
        It is missing, or does not fit the schema.
    """
    try:
        return schema.model_validate_json(regular(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {str(error.strerror).lower()}. {remedy}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: not {what} ({where or problem['msg']}). {remedy}") from None


class ImageFormat(Record):
    channels: Dimension
    size: Annotated[int, Field(ge=1, le=MOST_PIXELS)]
    dtype: Literal["uint8"]
    #: Grey levels between which the mean of the border lies in nearly all training images (`nonn.runtime.inversion`);
    #: none in exports from before it was measured.
    border: tuple[GreyLevel, GreyLevel] | None = None
    #: Value that is white in pictures of more than 8 bits (`nonn.core.images.upright`).
    white: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, size, size)."""
        return self.channels, self.size, self.size


class StudentFile(Record):
    file: FileName
    sha256: Sha256
    n_features: Dimension
    #: Largest value that a feature may have, none being negative; null for any finite ones.
    feature_limit: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None

    @property
    def model(self) -> str:
        """Name of the student among models, as its node serves it."""
        return Path(self.file).stem


class FinalFiles(Record):
    file: FileName
    sha256: Sha256
    blocks: FileName
    blocks_sha256: Sha256


class Manifest(Record):
    """The keys of an exported network's ``manifest.json`` that nodes and coordinator need."""

    classes: Annotated[list[str], Field(min_length=2)]
    image: ImageFormat
    students: Annotated[list[StudentFile], Field(min_length=1)]
    final: FinalFiles
    #: Temperatures, by which logits are divided before the softmax, with 1 to N students present
    #: (`nonn.method.calibration`); none in exports from before they were fitted.
    temperatures: tuple[Temperature, ...] = ()
    #: Of int8 students (`QUANTISATION_SCHEME`); none of float32 ones and of older exports.
    quantisation: Annotated[str, Field(pattern=r"^[a-z0-9]+$")] | None = None

    @model_validator(mode="after")
    def _names_each_once(self) -> Manifest:
        for names in (self.classes, [student.file for student in self.students]):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{twice[0]!r} is listed twice")
        return self

    @model_validator(mode="after")
    def _has_all_temperatures(self) -> Manifest:
        if len(self.temperatures) not in (0, len(self.students)):
            raise ValueError(f"{len(self.temperatures)} temperatures for {len(self.students)} students")
        return self

    def temperature(self, present: int) -> float:
        """Temperature with so many students present; 1, which calibrates nothing, where none was fitted."""
        return self.temperatures[present - 1] if self.temperatures else 1.0


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported network; see `read_record`."""
    remedy = "Copy the whole folder that `nonn export` wrote, or run the pipeline."
    return read_record(folder / "manifest.json", Manifest, "the manifest of an exported network", remedy)


def read_student_file(folder: Path, manifest: Manifest, student: StudentFile) -> bytes:
    """Content of the file of a student; a `UserError` as by `read_verified`, also if it is quantised in another form.

    Weights of 8 bits, as in exports from before forms had names, give wrong answers on x86 processors without VNNI.
    """
    content = read_verified(folder / student.file, student.sha256)
    if b"QuantizeLinear" in content and manifest.quantisation != QUANTISATION_SCHEME:
        raise UserError(
            f"{folder / student.file}: was quantised in another form than {QUANTISATION_SCHEME}. Run the stage "
            "`export` again."
        )
    return content


def read_verified(path: Path, sha256: str) -> bytes:
    """Content of a file of this SHA-256, or a `UserError`; read once, so that the bytes checked are the bytes used."""
    try:
        content = regular(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Export the network again.") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path}: its SHA-256 is not that of the manifest beside it. Copy the whole folder again.")
    return content
