"""Reading and writing artifacts: deterministic bytes, never a half-written file, and only regular files are opened."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nonn.core.errors import UserError, one_line, printable, refusal

#: Ignored by git: checkpoints, downloads and the journal of jobs.
STATE = Path(".nonn")
#: Prefix of temporaries. Git and DVC ignore them.
TEMPORARY = ".nonn-tmp-"

_HOST = platform.node().replace("-", "_")[:64] or "localhost"
_NUMBERS = itertools.count()
#: Errors of fsync(2) on file systems without it, some for folders alone; any other means that content is lost.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES)
#: Flags of ``renameat2``: paths are relative to the working directory, and both have to exist.
_FROM_HERE, _EXCHANGE = -100, 2
#: Refusals of a whole file system: if such an error names no file, it concerns the folder that is written to.
_OF_FILE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `target` in one rename, if the block succeeds; see `replacing_all`."""
    with replacing_all(target) as (temporary,):
        yield temporary


@contextlib.contextmanager
def replacing_all(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Yield temporary paths that become `targets`, if the block succeeds, one right after the other.

    Everything is written before the first rename, so a full disk or a kill leaves the old files. Only a kill between
    two renames leaves one new and one old. An old folder changes places with the new one. Where the file system cannot
    do that, the old folder is renamed before it is deleted: a kill at that moment leaves no target, but never half of
    one.

    A temporary lies beside its target, because a rename is atomic only within a file system. Its name holds the machine
    and the process, so `remove_orphans` recognises what a killed stage has left, and a process that outlives its
    scheduler cannot write into the file of its successor.

    Raises
    ------
    UserError
        The operating system refuses, or a target is a folder that the working directory lies in.
    """
    # The parent of "." is "." again, so names of the working directory are made absolute.
    parents = [target.parent if target.name else target.absolute().parent for target in targets]
    temporaries = tuple(_temporary(parent, target.suffix) for parent, target in zip(parents, targets, strict=True))
    pairs = list(zip(temporaries, targets, strict=True))
    try:
        for parent in parents:
            parent.mkdir(parents=True, exist_ok=True)
        yield temporaries
        for temporary, target in pairs:
            _flush(temporary)
            if temporary.is_dir() and Path.cwd().is_relative_to(target.resolve()):
                raise UserError(f"{target}: is the working directory, or around it. Name another folder.")
        for temporary, target in pairs:
            _rename(temporary, target)
        for parent in dict.fromkeys(parents):
            _flush(parent, below=False)
    except OSError as error:
        blamed = next((target for temporary, target in pairs if str(error.filename).startswith(str(temporary))), None)
        if blamed:
            error.filename = None  # a reader knows the target, not its temporary
        if user_error := refusal(error, blamed or targets[0]):
            raise user_error from None
        raise
    except UserError as error:  # it may name a temporary in place of its target
        message = str(error)
        for temporary, target in pairs:
            message = message.replace(printable(temporary), printable(target))
        error.args = (message,)
        raise
    finally:
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                remove(temporary)


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Yield a folder that is deleted after the block: in `parent`, where `remove_orphans` finds it, or the system's."""
    folder = _temporary(parent) if parent else Path(tempfile.mkdtemp(prefix="nonn-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        if error.errno in _OF_FILE_SYSTEM and (user_error := refusal(error, folder)):
            raise user_error from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn a refusal of the operating system into a UserError, which names `path` if the error names no file."""
    try:
        yield
    except OSError as error:
        if user_error := refusal(error, path):
            raise user_error from None
        raise


def _temporary(parent: Path, suffix: str = "") -> Path:
    """A path that neither another process nor this one has used."""
    pid = os.getpid()
    return parent / f"{TEMPORARY}{_HOST}-{pid}-{_state(pid)[1]}-{next(_NUMBERS)}{suffix}"


def _rename(temporary: Path, target: Path) -> None:
    """Put a file or folder into the place of a former one."""
    if not (temporary.is_dir() and os.path.lexists(target)):
        temporary.replace(target)
        return
    if _exchanged(temporary, target):
        return  # the temporary is the former folder now, and is deleted
    former = _temporary(temporary.parent)  # a folder cannot be renamed over a full one
    try:
        target.rename(former)
        temporary.rename(target)
    except BaseException:
        if os.path.lexists(former) and not os.path.lexists(target):
            former.rename(target)
        raise
    with contextlib.suppress(OSError):
        remove(former)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two paths change places in one step, where the system and the file system can: see ``man 2 renameat2``."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(_FROM_HERE, os.fsencode(one), _FROM_HERE, os.fsencode(other), _EXCHANGE) == 0


@contextlib.contextmanager
def restored_on_error(*paths: Path) -> Iterator[None]:
    """Put files back as they were, or delete those that were not there, if the block fails or is interrupted."""
    before = {path: path.read_bytes() if path.is_file() else None for path in paths}
    try:
        yield
    except BaseException:
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                with replacing(path) as temporary:
                    temporary.write_bytes(content)
        raise


def _flush(path: Path, below: bool = True) -> None:
    """Flush files to the disk, so that a power cut cannot leave the new name with the old content."""
    inner = (Path(folder, name) for folder, _, files in os.walk(path) for name in files) if below else ()
    for file in (*inner, path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # NFS and quotas refuse here what they took before
            if error.errno not in _CANNOT_SYNC:
                error.filename = str(file)
                raise
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or folder; nothing happens if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_orphans(*roots: Path, below: bool = True) -> None:
    """Delete the temporaries in these folders whose processes, on this machine, were killed."""
    # Former versions named a temporary by process and number alone.
    pattern = re.compile(rf"{re.escape(f'{TEMPORARY}{_HOST}')}-(\d+)(?:-(\d+))?-\d+")
    for root in roots:
        for folder, folders, files in os.walk(root):
            for name in [*folders, *files]:
                if (found := pattern.match(name)) and not _is_running(int(found[1]), int(found[2] or 0)):
                    path = Path(folder, name)
                    shutil.rmtree(path, ignore_errors=True)  # another job may do so at the same time
                    with contextlib.suppress(OSError):
                        path.unlink()
            folders[:] = [name for name in folders if below and not name.startswith(TEMPORARY)]


def _is_running(pid: int, began: int) -> bool:
    """Whether the process that a temporary is named after still runs.

    A zombie does not, nor does another process that has got the same number since. If the start of either process is
    unknown, as without ``/proc``, any process of that number counts.
    """
    try:
        os.kill(pid, 0)  # sends nothing, only asks
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    state, start = _state(pid)
    return state not in ("Z", "X") and (start == began or 0 in (start, began))


def _state(pid: int) -> tuple[str, int]:
    """Letter of a process's state, and the time when it began, in ticks since the machine did; "", 0 if unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *fields = text.rpartition(")")[2].split()
        return state, int(fields[18])
    except (OSError, ValueError, IndexError):
        return "", 0


def regular(path: Path) -> Path:
    """The path, if a regular file is there: a named pipe would be waited for, and a device read, for ever.

    Raises
    ------
    UserError
        There is something else, or a link that leads nowhere.
    FileNotFoundError
        There is nothing.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(
                f"{printable(path)}: is a link to {printable(path.readlink())}, which is not there. "
                "Mend the link, or name a file."
            ) from None
        raise
    if stat.S_ISREG(mode):
        return path
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    raise UserError(f"{printable(path)}: is {kinds.get(stat.S_IFMT(mode), 'no file')}. Name a regular file.")


def stamp_of(path: Path) -> tuple[int, ...]:
    """A value that differs whenever the file has changed; empty if the file cannot be examined."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


def sha256_of(path: Path) -> str:
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write JSON with sorted keys, so that equal data gives equal bytes."""
    write_text(path, json.dumps(data, indent=1, sort_keys=True) + "\n")


def read_json(path: Path, kind: Any = Any) -> Any:
    """Content of an artifact that a stage has written; a UserError if it is damaged.

    `kind` is what it has to be: see `nonn.core.artifacts`.
    """
    with intact(path):
        data = json.loads(existing(path).read_text(encoding="utf-8"))
        if kind is not Any:
            from pydantic import TypeAdapter  # what only writes does without

            TypeAdapter(kind).validate_python(data)
    return data


def existing(path: Path) -> Path:
    """The path of an artifact that some stage has written."""
    try:
        return regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file. Run `dvc repro` or `snakemake --cores 2` first.") from None


@contextlib.contextmanager
def intact(path: Path) -> Iterator[None]:
    """Turn errors that a damaged or foreign artifact causes in the block into a UserError."""
    try:
        with named(path):
            yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, problem: Any) -> UserError:
    """The error for an artifact that is not what its stage writes: what is wrong, and how to make it again."""
    kind, text = type(problem).__name__, problem
    if kind == "ValidationError":  # of pydantic: the first problem, with its place
        first = problem.errors()[0]
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    elif isinstance(problem, LookupError):
        text = f"{text} is missing" if kind == "KeyError" else text
    return UserError(f"{printable(path)}: damaged ({one_line(text)}). Delete it and run the pipeline again.")
