"""The command ``nonn devices``: the catalogue of boards, or one of them with the source of each figure."""

from __future__ import annotations

import argparse
from typing import Any

from nonn.core.errors import printable
from nonn.core.options import complete_from
from nonn.core.text_table import align


def add_arguments(parser: argparse.ArgumentParser) -> None:
    name = parser.add_argument("name", nargs="?", metavar="NAME", help="show one board, with the source of each figure")
    complete_from(name, _names)
    parser.epilog = "example: nonn devices rp2350"


def run(options: argparse.Namespace) -> None:
    from nonn.core.boards import OWN_FILE, all_boards, find_board

    if options.name:
        print("\n".join(describe(options.name, find_board(options.name))))
        return
    print("\n".join(overview(all_boards())))
    print(
        "\nMMAC/s: millions of multiply-accumulates a second that networks attain on one core. –: no figure was found."
    )
    print("node: `nonn node` and `nonn deploy`. firmware: `nonn firmware`. by hand: in LiteRT, see `nonn litert`.")
    print(f"`nonn devices NAME` has the source of each figure. {OWN_FILE} adds boards or replaces figures.")


def overview(boards) -> list[str]:
    """A table of all boards."""
    from nonn.core.chips import runs_as

    rows = [["board", "RAM KiB", "flash KiB", "float32 MMAC/s", "int8 MMAC/s", "idle W", "active W"]]
    rows[0] += ["runs as", "what it is"]
    for name, board in boards.items():
        active = "–" if board.active_w is None else f"{board.active_w.low:g}"
        if board.active_w and board.active_w.high > board.active_w.low:
            active += f"–{board.active_w.high:g}"
        numbers = [board.ram_kib, board.flash_kib, board.mmacs.get("float32"), board.mmacs.get("int8"), board.idle_w]
        way = runs_as(name, board.runs_onnx)
        rows.append([name, *(f"{number:,.10g}" if number else "–" for number in numbers), active, way])
        rows[-1].append(printable(board.title))
    *body, last = zip(*rows, strict=True)
    lines = align([list(row) for row in zip(*body, strict=True)]).splitlines()
    width = max(map(len, lines))
    return [f"{line.ljust(width)}  {title}" for line, title in zip(lines, last, strict=True)]


def describe(name: str, board) -> list[str]:
    """One board: each figure, how it is known, and its source."""
    lines = [f"{name}: {printable(board.title)}", ""]
    lines += [f"  {key:<14}  {_shown(value)}  (yours, without a source)" for key, value in board.bare.items()]
    for key, figure in board.figures.items():
        lines.append(f"  {key:<14}  {_shown(figure.value)}  ({figure.kind})")
        lines += [f"  {'':<14}  {printable(figure.how)}"] if figure.how else []
        lines.append(f"  {'':<14}  {printable(figure.source)}")
    unknown = [key for key in KEYS if key not in {*board.figures, *board.bare} and not getattr(board, key)]
    unknown += [f"{precision}_mmacs" for precision, speed in board.mmacs.items() if speed is None]
    if "flash_kib" in unknown:
        unknown.remove("flash_kib")
        lines.append("  flash_kib       none: weights and activations share the RAM")
    if unknown:
        lines.append(f"  not known: {', '.join(unknown)}")
    return [*lines, "", f"In params.yaml: devices: {{{name}: {{board: {name}}}}}"]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none by itself"
    is_amount = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:,.10g}" if is_amount else "none" if value is None else printable(str(value))


#: What may be unknown of a board, beside its speeds.
KEYS = ("flash_kib", "idle_w", "active_w", "links")


def _names() -> list[str]:
    from nonn.core.boards import all_boards

    return list(all_boards())
