"""Reading YAML from anywhere: whatever the text holds, an error is clear and comes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from nonn.core.errors import UserError, one_line, refusal
from nonn.core.files import regular

#: Far more than a person writes. A parser's time grows with the square of the depth, its memory with what aliases
#: stand for ("billion laughs").
MAX_BYTES, MAX_DEPTH, MAX_VALUES = 1_000_000, 40, 100_000


def read_yaml(path: Path, remedy: str) -> Any:
    """Content of a YAML file; `remedy` says what to do if the file is missing.

    Raises
    ------
    UserError
        The file is missing, no regular file, no text, or no YAML that this program can need.
    """
    try:
        if regular(path).stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: has more than {MAX_BYTES} bytes. Restore it from version control.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. {remedy}") from None
    except OSError as error:
        raise refusal(error, path) or UserError(f"{path}: cannot be read ({error.strerror}). {remedy}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not text in UTF-8 ({error}). Save it as such.") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Values of a YAML text; `name` is what a UserError calls it."""
    try:
        if problem := _excess(text):
            raise UserError(f"{name}: {problem}. Write the values out, without nesting or aliases.")
        return YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        remedy = "Put values with a colon in quotes, or mend" if "':'" in str(error.problem) else "Mend"
        raise UserError(
            f"{name}:{line} is not valid YAML: {one_line(error.problem, 120)}. {remedy} that line."
        ) from None
    except YAMLError as error:
        raise UserError(f"{name}: is not text in UTF-8 ({one_line(error, 120)}). Save it as such.") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # A number, a date or another tagged value that cannot be; the error has no line number.
        raise UserError(f"{name}: holds a value that cannot be read ({one_line(error, 120)}). Correct it.") from None


def _excess(text: str) -> str | None:
    """Why a text is too large to be parsed, found before anything is built from it; None if it is not."""
    sizes: dict[str | None, int] = {}  # values that an anchor stands for
    open_nodes: list[tuple[str | None, int]] = []
    for event in YAML(typ="safe").parse(text):
        if isinstance(event, CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > MAX_DEPTH:
                return f"line {event.start_mark.line + 1} nests more than {MAX_DEPTH} levels"
            continue
        if isinstance(event, AliasEvent):
            if event.anchor in (anchor for anchor, _ in open_nodes):
                return f"line {event.start_mark.line + 1} holds itself (*{event.anchor})"
            size = sizes.get(event.anchor, 1)
        elif isinstance(event, ScalarEvent):
            size = 1
            sizes[event.anchor] = size
        elif isinstance(event, CollectionEndEvent):
            anchor, size = open_nodes.pop()
            sizes[anchor] = size
        else:
            continue
        if open_nodes:
            anchor, inner = open_nodes[-1]
            open_nodes[-1] = anchor, inner + size
            if inner + size > MAX_VALUES:
                return f"line {event.start_mark.line + 1} stands for more than {MAX_VALUES} values"
    return None
