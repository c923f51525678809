"""Tables that commands write: CSV, with fractions of six digits."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nonn.core.errors import UserError
from nonn.core.files import replacing


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows below a header; missing columns of a row stay empty."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({name: round(float(v), 6) if isinstance(v, float) else v for name, v in row.items()})


def refuse_other_table(option: str, path: Path, columns: Sequence[str]) -> None:
    """Raise UserError if no row could be added to a table, before there is a row."""
    if path.is_dir() or any(folder.is_file() for folder in path.parents):
        raise UserError(f"{option}: {path} cannot be written; give the path of a file")
    header = path.read_text(encoding="utf-8", errors="replace").splitlines()[:1] if path.is_file() else []
    if header and header != [",".join(columns)]:
        raise UserError(f"{option}: {path} has other columns than this table. Name another file.")
