"""The command ``nonn docs``: write the generated parts of the documentation.

- ``workflow/params.schema.json``, for editors, and ``docs/parameter-reference.md``: the schema of ``params.yaml``
  (`nonn.core.params`) with the meaning of each key (``workflow/params.meaning.yaml``).
- The tables of ``docs/results.md``, between comments that name the page and heading they come from.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML

from nonn.core.errors import UserError
from nonn.core.files import write_text
from nonn.core.params import Params
from nonn.core.schema import Section

MEANINGS = Path("workflow/params.meaning.yaml")
SCHEMA = Path("workflow/params.schema.json")
REFERENCE = Path("docs/parameter-reference.md")
RESULTS = Path("docs/results.md")

INTRODUCTION = f"""\
# Parameter reference

*`nonn docs` writes this page from the schema that every command checks `params.yaml` against. Edit
[{MEANINGS}](../{MEANINGS}) to change what it says of a key.*

A key without a default has to be given. Numbers are taken as they stand: where an integer is wanted, `3.0` is refused.
`nonn check` also checks how sections agree, which no table shows.

"""
TABLES = re.compile(r"(<!-- tables: (\S+), ([^\n]+?) -->\n).*?(<!-- end of tables -->)", re.DOTALL)


def make_schema(meanings: dict[str, dict[str, str]]) -> dict[str, Any]:
    """JSON schema of ``params.yaml``, with the meaning of every key; a key without one is refused."""
    schema = _without_titles(Params.model_json_schema())
    definitions = {"Params": schema, **schema["$defs"]}
    for name, definition in definitions.items():
        definition.pop("description", None)  # docstrings, which speak to developers
        for key, node in definition["properties"].items():
            node["description"] = _meaning(meanings, name, key)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "params.yaml of NoNN", **schema}


def format_reference(schema: dict[str, Any]) -> str:
    """The page of all keys: a table for each section, then one for each kind of mapping within sections."""
    sections = {name: _target(node) for name, node in schema["properties"].items()}
    headings = {target: name for name, target in sections.items() if target}
    nested = [name for name in schema["$defs"] if name not in headings]
    parts = [INTRODUCTION, "## Top level\n\n", _table(schema, headings), "\n"]
    for target, name in headings.items():
        parts += [
            f"## {name}\n\n{schema['properties'][name]['description']}\n\n",
            _table(schema["$defs"][target], headings),
        ]
        parts.append("\n")
    for target in nested:
        parts += [f"## {_heading(target)}\n\n", _table(schema["$defs"][target], headings), "\n"]
    return "".join(parts).rstrip("\n") + "\n"


def fill_tables(text: str) -> str:
    """Put the tables of summaries between the comments that ask for them."""

    def fill(match: re.Match) -> str:
        begin, page, heading, end = match.groups()
        tables = read_tables(Path(page))
        if heading not in tables:
            raise UserError(f"{RESULTS}: {page} has no tables below {heading!r}; choose of {', '.join(tables)}")
        return f"{begin}\n{tables[heading]}\n\n{end}"

    return TABLES.sub(fill, text)


def read_tables(page: Path) -> dict[str, str]:
    """Tables of a page by the heading they stand below, separated by empty lines."""
    tables: dict[str, list[str]] = {}
    heading = ""
    for is_table, block in groupby(page.read_text(encoding="utf-8").splitlines(), lambda line: line.startswith("|")):
        lines = list(block)
        if is_table:
            tables.setdefault(heading, []).append("\n".join(lines))
        else:
            heading = next((line.lstrip("# ") for line in reversed(lines) if line.startswith("#")), heading)
    return {heading: "\n\n".join(blocks) for heading, blocks in tables.items()}


def generated() -> dict[Path, str]:
    """Content of every generated file."""
    schema = make_schema(YAML(typ="safe").load(MEANINGS.read_text(encoding="utf-8")))
    return {
        SCHEMA: json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
        REFERENCE: format_reference(schema),
        RESULTS: fill_tables(RESULTS.read_text(encoding="utf-8")),
    }


def _meaning(meanings: dict[str, dict[str, str]], section: str, key: str) -> str:
    """Meaning of a key, given for its section or for one that this extends."""
    model = next(model for model in _models(Section) if model.__name__ == section)
    for ancestor in model.__mro__:
        if text := meanings.get(ancestor.__name__, {}).get(key):
            return text
    raise UserError(f"{MEANINGS}: {section}.{key}: missing; say what the key means")


def _models(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and all that extend it."""
    yield base
    for kind in base.__subclasses__():
        yield from _models(kind)


def _without_titles(node: Any) -> Any:
    """The schema without the titles that pydantic makes of names."""
    if isinstance(node, dict):
        return {k: _without_titles(v) for k, v in node.items() if not (k == "title" and isinstance(v, str))}
    return [_without_titles(item) for item in node] if isinstance(node, list) else node


def _table(definition: dict[str, Any], headings: dict[str, str]) -> str:
    lines = ["| Key | Value | Default | Meaning |", "| :-- | :-- | :-- | :-- |"]
    for key, node in definition["properties"].items():
        default = f"`{json.dumps(node['default'])}`" if "default" in node else ""
        lines.append(f"| `{key}` | {_kind(node, headings)} | {default} | {node['description']} |")
    return "\n".join(lines) + "\n"


def _target(node: dict[str, Any]) -> str | None:
    """Name of the definition that a key's value, or each value of its mapping, follows."""
    target = (_values(node) if node.get("type") == "object" else node).get("$ref")
    return target.rpartition("/")[2] if target else None


def _heading(target: str) -> str:
    return target.removesuffix("Params")


def _values(node: dict[str, Any]) -> dict[str, Any]:
    """Schema of the values of a mapping whose keys are names."""
    if "additionalProperties" in node:
        return node["additionalProperties"]
    return next(iter(node["patternProperties"].values()))


def _kind(node: dict[str, Any], headings: dict[str, str]) -> str:
    """What a value may be, in words."""
    if choices := node.get("anyOf"):
        return " or ".join(_kind(choice, headings) for choice in choices)
    if target := node.get("$ref"):
        name = target.rpartition("/")[2]
        heading = headings.get(name, _heading(name))
        return f"[{heading}](#{heading.lower()})"
    if words := node.get("enum"):
        return "one of " + ", ".join(f"`{word}`" for word in words)
    if "const" in node:
        return f"`{node['const']}`"
    kind = node["type"]
    if kind == "null":
        return "`null`"
    if kind == "array":
        return f"list of {_length(node)}{_kind(node['items'], headings)}"
    if kind == "object":
        names = ", ".join(f"`{name}`" for name in node.get("propertyNames", {}).get("enum", ())) or "names"
        return f"mapping of {names} to {_kind(_values(node), headings)}"
    return f"{kind}{_bounds(node)}"


def _length(node: dict[str, Any]) -> str:
    least, most = node.get("minItems"), node.get("maxItems")
    if least is None:
        return ""
    return f"{least}: " if least == most else f"{least} to {most}: " if most else f"{least} or more: "


def _bounds(node: dict[str, Any]) -> str:
    if "minimum" in node and "maximum" in node:
        return f", {node['minimum']:,} to {node['maximum']:,}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return "".join(f", {sign} {node[bound]:,}" for bound, sign in signs.items() if bound in node)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: nonn docs"


def run(_: argparse.Namespace) -> None:
    if not MEANINGS.is_file():
        raise UserError(f"{MEANINGS}: no such file. Run nonn from the repository's top folder.")
    for path, content in generated().items():
        is_news = not path.is_file() or path.read_text(encoding="utf-8") != content
        write_text(path, content)
        print(f"{path}: {'written' if is_news else 'as it was'}")
