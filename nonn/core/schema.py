"""Checking YAML files against a schema: whatever is wrong with one gets a line with its key and the remedy."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from nonn.core.errors import UserError, printable
from nonn.core.yaml_text import parse_yaml, read_yaml


class Section(BaseModel):
    """A mapping of known keys, which does not change once it is checked.

    Types are strict: 3.0, "3" and true are not accepted for 3, because DVC reads the file itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


#: Least divisor: a quotient by a smaller number may exceed the range of a float.
TINY = 1e-9


def _is_not_tiny(value: float) -> float:
    if value < TINY:
        raise ValueError(f"is {value:g}; give at least {TINY:g}")
    return value


NotTiny = AfterValidator(_is_not_tiny)

#: How values are shown in messages.
VALUES = reprlib.Repr()
VALUES.maxstring = VALUES.maxother = VALUES.maxlong = 100
VALUES.maxlevel = 3

Schema = TypeVar("Schema", bound=Section)


def load_yaml(path: Path, schema: type[Schema], remedy: str, changes: Mapping[str, Any] | None = None) -> Schema:
    """Read a YAML file, make changes, and check it all against a schema.

    `changes` hold new values by dotted key, such as ``distill.lr``; `remedy` says what to do if the file is
    missing. The UserError has a line for each problem: file, key, what is wrong, what to do.
    """
    raw = read_yaml(path, remedy)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds no keys. Restore it from version control.")
    for key, value in (changes or {}).items():
        set_key(raw, key, value)
    return check_values(raw, schema, str(path))


def check_values(raw: dict, schema: type[Schema], name: str) -> Schema:
    """Check values against a schema; `name` is what a UserError, as that of `load_yaml`, calls their file."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        problems = [line for e in error.errors() for line in explain(e, schema)]
        raise UserError("\n".join(f"{name}: {problem}" for problem in problems)) from None


def parse_changes(settings: Sequence[str]) -> dict[str, Any]:
    """Changes for `load_yaml` from settings in the form ``KEY=VALUE``, each value in YAML."""
    changes = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        try:
            changes[key] = parse_yaml(value, key)
        except UserError:
            equals = ""
        if not (key and equals):
            raise UserError(f"{setting}: is not KEY=VALUE with a value in YAML; write for example distill.lr=0.1")
    return changes


def set_key(raw: dict, key: str, value: Any) -> None:
    """Set a dotted key in nested mappings; missing sections are added, and the schema refuses unknown ones."""
    *sections, name = key.split(".")
    for section in sections:
        inner = raw.get(section)
        raw[section] = raw = inner.copy() if isinstance(inner, dict) else {}  # aliases share one; ruamel's has comments
    raw[name] = value


def get_key(raw: Any, key: str, default: Any = None) -> Any:
    """Value of a dotted key in nested mappings."""
    for name in key.split("."):
        raw = raw.get(name, default) if isinstance(raw, Mapping) else default
    return raw


def explain(error: Any, schema: type[Section]) -> list[str]:
    """Sentences with the key and the remedy for one of pydantic's errors, a line for each key."""
    return [printable(line) for line in _sentence(error, schema).splitlines()]


def _sentence(error: Any, schema: type[Section]) -> str:
    location = [str(part) for part in error["loc"] if part != "[key]"]
    key, message = ".".join(location), error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        fields = _fields_at(location[:-1], schema)
        return f"{key}: unknown key; remove it{did_you_mean(location[-1], fields)}"
    if error["type"] == "missing":
        return f"{key}: missing; add it"
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    is_number = error["type"] == "string_type" and isinstance(error["input"], int | float)
    remedy = "put it in quotes" if is_number else "change it"
    return f"{key}: {message[0].lower()}{message[1:]} (it is {_shown(error['input'])}); {remedy}"


def _shown(value: Any) -> str:
    """A value of any size, shortened to one line."""
    return "a number of too many digits" if isinstance(value, int) and value.bit_length() > 1000 else VALUES.repr(value)


def _fields_at(location: list[str], schema: type[Section]) -> list[str]:
    """Names of the keys that the schema knows in a section."""
    kind: Any = schema
    for part in location:
        if get_origin(kind) is dict:  # of names that users give
            annotation = get_args(kind)[1]
        else:
            field = kind.model_fields.get(part)
            annotation = field.annotation if field else None
        kinds = (annotation, *get_args(annotation))  # a section, or one that may be null
        kind = next((kind for kind in kinds if get_origin(kind) is dict or _is_section(kind)), None)
        if kind is None:
            return []
    return list(kind.model_fields) if _is_section(kind) else []


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The end of a sentence that suggests the known word closest to `word`; empty if none is close."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
