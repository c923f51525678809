"""Files as git has them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from nonn.core.errors import UserError


def content_at(revision: str, path: Path | str) -> str | None:
    """Content of a file in a revision; None if it is not there."""
    command = ["git", "show", f"{revision}:./{Path(path).as_posix()}"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("git: not found. Install it: results of other commits are read from there.") from None
    return None if shown.returncode else shown.stdout
