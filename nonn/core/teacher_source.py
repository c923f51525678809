"""Keys of ``teacher`` in ``params.yaml`` that say where the teacher comes from and how it sees images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nonn.core.schema import Section, did_you_mean

#: Kinds of sources, and what each is called by.
FORMS = {
    "train": "train",
    "torchvision": "torchvision:NAME",
    "timm": "timm:NAME",
    "module": "module:PACKAGE.FILE:FACTORY",
    "onnx": "onnx:FILE.onnx",
    "export": "export:FILE.pt2",
}
#: Kinds whose weights are in the file that they name.
WHOLE_FILES = ("onnx", "export")
#: What to do about code that is not found.
CODE_PLACES = "Put it below the working directory, or install it in this environment."


#: The 1,000 classes of ImageNet (ILSVRC 2012) by their WordNet numbers, in the order of the outputs of torchvision's
#: and timm's networks, which is the alphabetical one: https://image-net.org/challenges/LSVRC/2012/browse-synsets.php
IMAGENET_CLASSES = Path(__file__).with_name("imagenet.txt")


def _spelled_out(classes: Any) -> Any:
    """The names behind the word ``imagenet``; lists stay as they are."""
    return IMAGENET_CLASSES.read_text(encoding="ascii").split() if classes == "imagenet" else classes


#: Names of classes, one an output.
Classes = Annotated[
    Annotated[list[str], Field(min_length=2)],
    BeforeValidator(
        _spelled_out, json_schema_input_type=Annotated[list[str], Field(min_length=2)] | Literal["imagenet"]
    ),
]


class Normalization(Section):
    """Mean and standard deviation of each channel, in units of the pixels that the network sees."""

    mean: Annotated[list[float], Field(min_length=1, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1, max_length=3)]


class TeacherSource(Section):
    """Where the teacher comes from: see `nonn.teachers`.

    Source ``train`` is a network of one of our own families, trained or imported; all others are foreign.
    """

    source: str = "train"
    weights: str | None = None
    ema: bool = True
    classifier: Annotated[str, Field(min_length=1)] | None = None
    classes: Classes | None = None
    normalization: Normalization | None = None
    colour_order: Literal["rgb", "bgr"] = "rgb"
    pixels: Literal["unit", "byte"] = "unit"
    expected_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def kind(self) -> str:
        return self.source.partition(":")[0]

    @property
    def target(self) -> str:
        """What the source names: a model, a factory or a file; empty for ``train``."""
        return self.source.partition(":")[2]

    @property
    def is_foreign(self) -> bool:
        return self.kind != "train"

    @property
    def is_trained(self) -> bool:
        """Whether the stage `teacher` trains; otherwise it imports."""
        return not (self.is_foreign or self.weights)

    @property
    def files(self) -> list[Path]:
        """What the source names on this machine, a file or a folder of code, and data that lie beside it."""
        if self.kind in WHOLE_FILES:
            path = Path(self.target)
            return [path, *(p for p in [path.with_name(f"{path.name}.data")] if p.is_file())]
        if self.kind == "module":
            parts = self.target.partition(":")[0].split(".")
            if len(parts) > 1 and Path(parts[0]).is_dir():
                return [Path(parts[0])]
            return [path for path in [Path(*parts).with_suffix(".py"), Path(*parts)] if path.exists()][:1]
        return []

    @field_validator("source")
    @classmethod
    def _is_a_source(cls, source: str) -> str:
        kind, colon, target = source.partition(":")
        if kind not in FORMS:
            hint = did_you_mean(kind, FORMS)
            raise ValueError(f"no source {source!r}; write one of {', '.join(FORMS.values())}{hint}")
        if (kind == "train") == bool(colon) or (colon and not target):
            raise ValueError(f"{source!r} is not of the form {FORMS[kind]}")
        if kind == "module" and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", target):
            raise ValueError(f"{source!r} is not of the form {FORMS[kind]}, such as module:models.small:make")
        return source

    @field_validator("weights")
    @classmethod
    def _is_a_file_s_name(cls, weights: str | None) -> str | None:
        if weights == "":
            raise ValueError("names no file; write null for none")
        if weights and "://" in weights:
            raise ValueError(f"{weights!r} is an address; download it and name the file")
        return weights

    @field_validator("classes")
    @classmethod
    def _are_distinct(cls, classes: list[str] | None) -> list[str] | None:
        if classes and len(set(classes)) < len(classes):
            twice = next(name for name in classes if classes.count(name) > 1)
            raise ValueError(f"{twice!r} is listed twice; the teacher has one output for each class")
        return classes

    @model_validator(mode="after")
    def _keys_suit_the_source(self) -> TeacherSource:
        if self.kind in WHOLE_FILES and self.weights:
            raise ValueError(f"weights: {self.source} holds its weights itself; set weights to null")
        if self.is_trained:
            if self.normalization:
                raise ValueError("normalization: is that of imported `weights`, and they are null; set it to null too")
            for key in ("classes", "classifier", "expected_accuracy"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: belongs to an imported teacher, and this one is trained; remove it")
        return self
