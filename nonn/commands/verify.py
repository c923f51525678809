"""The command ``nonn verify``: check that the objects of DVC's cache have the content that their names say.

DVC takes an object that is read-only for sound without reading it, so what a disk or a crash has damaged would come
back as a result. What does not match its name is deleted here, with the artifacts that were restored from it; DVC then
makes it again. Each run of the pipeline begins with `distrust`, which finds what has changed since it was last read.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ruamel.yaml import YAML, YAMLError
from voluptuous import Invalid

from nonn.core.errors import UserError, printable
from nonn.core.files import regular, remove
from nonn.core.paths import DVC_LOCK
from nonn.core.progress import log

_OBJECT = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?")


def cache_folder() -> Path:
    """The cache of the repository in the working directory, wherever it is configured to lie."""
    done = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True, check=False)
    if done.returncode or not Path("dvc.yaml").is_file():
        raise UserError("dvc cache dir: failed. Run nonn from the repository's top folder.")
    return Path(done.stdout.strip()) / "files" / "md5"


def md5_of(path: Path) -> str:
    """MD5, by which DVC names its objects; it gives no safety from forgery."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def damaged_objects(cache: Path) -> Iterator[Path]:
    """Objects whose content does not match their name."""
    for path in sorted(cache.glob("??/*")):
        name = path.relative_to(cache).as_posix()
        if _OBJECT.fullmatch(name) and md5_of(path) != name.replace("/", "").removesuffix(".dir"):
            yield path


def mend_cache(cache: Path, results: Path) -> list[Path]:
    """Delete damaged objects, and artifacts of the same content; return both."""
    gone = list(damaged_objects(cache))
    contents = {md5_of(path) for path in gone}
    if gone:
        gone += [path for path in sorted(results.rglob("*")) if path.is_file() and md5_of(path) in contents]
    for path in gone:
        remove(path)
    return gone


def distrust(cache: Path) -> None:
    """Make objects writable, so that DVC hashes those that it needs, unless it knows their modification times."""
    for path in cache.glob("??/*"):
        with contextlib.suppress(OSError):  # another user's, in a shared cache, or deleted meanwhile
            if not path.stat().st_mode & 0o200:
                path.chmod(0o644)


def mend_state(folder: Path = Path()) -> None:
    """Delete files that DVC writes in parts and was killed while writing, so that it cannot read them.

    That is the list of who reads and writes what, which is empty when nobody does, and ``dvc.lock``: what had run is
    found again in DVC's cache.
    """
    from dvc.config import Config
    from dvc.lock import LockError, make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    temporary = folder / ".dvc/tmp"
    users, stages = (temporary / RWLOCK_FILE, RWLOCK_LOCK, json.loads), (folder / DVC_LOCK, "lock", _check_lock_file)
    for path, lock, read in (users, stages):
        if not path.is_file() or _is_readable(path, read):
            continue
        temporary.mkdir(parents=True, exist_ok=True)
        is_linked = Config(str(folder / ".dvc"))["core"].get("hardlink_lock", False)
        # Whoever holds the lock may be writing right now.
        with (
            contextlib.suppress(LockError),
            make_lock(str(temporary / lock), tmp_dir=str(temporary), hardlink_lock=is_linked),
        ):
            if path.is_file() and not _is_readable(path, read):
                log(f"{path}: DVC was killed while it wrote this; deleted. What had run is found in DVC's cache.")
                remove(path)


def _check_lock_file(text: str) -> None:
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA

    COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(text))


def _is_readable(path: Path, read: Callable[[str], object]) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
        if re.search(r"^(<<<<<<<|>>>>>>>) ", text, re.MULTILINE):
            raise UserError(f"{path}: is in conflict after a merge. Resolve it, or run `git checkout HEAD {path}`.")
        read(text)
    except (ValueError, YAMLError, Invalid):
        return False
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: nonn verify"


def run(_: argparse.Namespace) -> None:
    gone = mend_cache(cache_folder(), Path("results"))
    for path in gone:
        print(f"{printable(path)}: damaged, deleted")
    if gone:
        raise UserError(f"{len(gone)} damaged files were deleted. Run `dvc repro` to make them again.")
    print("DVC's cache is sound.")
