"""The exception whose message is meant for users, and refusals of the operating system as such messages."""

from __future__ import annotations

import errno
import os
from pathlib import Path


class UserError(Exception):
    """A problem that the user can solve; the message says what is wrong, where (file and key), and what to do."""


_OCCUPIED = "Move what is there away, or name another place."
_DENIED = "Change its owner or permissions, or name another place."

#: What to do if the operating system refuses a file. Errors that are not listed are faults of this program.
REMEDIES = {
    errno.ENOSPC: "Free some space there, then run this again.",
    errno.EDQUOT: "Free some of your quota, then run this again.",
    errno.EFBIG: "Raise the limit on the size of files (`ulimit -f`), or name another place.",
    errno.EROFS: "Make that file system writable, or name another place.",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.ENOENT: "Name a file or folder that is there.",
    errno.ENOTDIR: _OCCUPIED,
    errno.EISDIR: "Name a file, not a folder.",
    errno.EEXIST: _OCCUPIED,
    errno.ENOTEMPTY: _OCCUPIED,
    errno.EXDEV: "Keep what is renamed on one file system.",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`), then run this again.",
    errno.ENFILE: "Close other programs, then run this again.",
    errno.ENOMEM: "Close other programs, or use a machine with more memory.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Mend the symbolic link, which leads in a circle.",
    errno.EBUSY: "End the program that uses it, then run this again.",
    errno.ETXTBSY: "End the program that uses it, then run this again.",
    errno.EIO: "The disk may be failing: look into the system's log, and name another place.",
    errno.ENXIO: "Name a regular file.",
    errno.ENODEV: "Name a regular file.",
    errno.ESTALE: "Mount that file system again.",
}


def refusal(error: OSError, path: Path | None = None) -> UserError | None:
    """One line for a refusal of the operating system: the file, the reason, the remedy.

    `path` is named if the error names no file, as when a disk is full. None if the error is a fault of the program.
    """
    if error.errno not in REMEDIES:
        return None
    if error.filename is None and str(error.strerror).startswith("No usable temporary directory"):  # of `tempfile`
        return UserError("no folder for temporary files can be written. Free some space, or set TMPDIR to a folder.")
    name = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else path
    where = f"{printable(name)}: " if name is not None else ""
    return UserError(f"{where}{os.strerror(error.errno).lower()}. {REMEDIES[error.errno]}")


def printable(name: str | bytes | os.PathLike) -> str:
    """A file's name on one line, with everything escaped that a terminal cannot print."""
    text = os.fsdecode(name)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(problem: object, limit: int | None = 200) -> str:
    """What an error says, on one line of at most so many characters, or of any length."""
    text = printable(" ".join(str(problem).split()) or type(problem).__name__)
    return text if limit is None or len(text) <= limit else f"{text[:limit]} …"
