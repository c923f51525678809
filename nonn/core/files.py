"""Reading and writing artifacts: deterministic bytes, and never a half-written file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nonn.core.errors import UserError

#: Ignored by git: checkpoints, half-written files and the journal of jobs.
STATE = Path(".nonn")

_HOST = platform.node().replace("-", "_") or "localhost"


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `target` in one rename, if the block succeeds.

    The temporary lives in `STATE`, named by machine and process: a killed stage leaves nothing beside its
    outputs, and an orphan that outlives its scheduler cannot write into the file of its successor.
    """
    scratch = STATE / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = scratch / f"{_HOST}-{os.getpid()}-{target.name}"
    remove(temporary)
    try:
        yield temporary
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if temporary.is_dir():
                remove(target)  # a directory cannot be renamed over a full one
            temporary.replace(target)
        except OSError as error:
            problem = f"cannot be written ({error.strerror}). Name another place."
            if error.errno == errno.EXDEV:
                problem = "is on another file system than this folder. Write here, then copy."
            raise UserError(f"{target}: {problem}") from None
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Delete a file or folder; nothing happens if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep() -> None:
    """Delete temporaries of processes of this machine that are gone: killed before they could tidy up."""
    for path in (STATE / "tmp").glob(f"{_HOST}-*"):
        if not _is_running(int(path.name.split("-")[1])):
            remove(path)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing, only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write JSON with sorted keys, so that equal data gives equal bytes."""
    write_text(path, json.dumps(data, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(existing(path).read_text(encoding="utf-8"))


def existing(path: Path) -> Path:
    """The path of an artifact that some stage has written."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. Run `dvc repro` or `snakemake --cores 2` first.")
    return path
