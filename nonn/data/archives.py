"""Files of a folder or an archive: their names, and their content in the order in which it is stored."""

from __future__ import annotations

import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from posixpath import dirname, join, normpath

from nonn.core.errors import UserError, printable, refusal
from nonn.core.files import regular
from nonn.data.clutter import sort_out

ZIP = (".zip",)
TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ZSTANDARD = (".tar.zst", ".tzst")  # Python reads it from 3.14 on
ARCHIVES = (*ZIP, *TAR, *(ZSTANDARD if "zst" in tarfile.TarFile.OPEN_METH else ()))

#: Larger files are not read, since a file is read whole.
MAX_FILE_BYTES = 1 << 30

#: What a file holds, or a function that reads it: so each decoding thread reads its own files.
Content = bytes | Callable[[], bytes]


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVES)


def list_names(path: Path) -> Iterator[str]:
    """Yield the names of all files and, with a slash at the end, folders.

    Raises
    ------
    UserError
        A folder may not be listed, or a link leads to nothing or to a folder: all that is in there would be left out,
        or read without being watched by DVC.
    tarfile.ReadError
        A tar is cut off or damaged.
    """
    if path.is_dir():
        yield from _walk(path)
    elif _is_zip(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = _with_slashes(info.filename)
                if stat.S_ISLNK(info.external_attr >> 16):
                    _refuse_link(path, name, "Pack what it leads to in its place (`zip` without `-y`).")
                yield name
    else:
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            _check_end(archive)
            files = {normpath(member.name) for member in members if not member.isdir()}
            for member in members:
                if member.issym() and normpath(join(dirname(member.name), member.linkname)) not in files:
                    _refuse_link(path, member.name, "Pack what it leads to in its place (`tar -h`).")
                yield member.name + "/" * member.isdir()


def _check_end(archive: tarfile.TarFile) -> None:
    """Refuse a tar that does not end in zeros: `tarfile` takes a header that is damaged or missing for the end."""
    if file := archive.fileobj:
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it is cut off or damaged")


def _walk(path: Path, within: str = "") -> Iterator[str]:
    """Names in a folder of `path` and below."""
    folder = path / within
    try:
        entries = list(os.scandir(folder))
    except PermissionError as error:
        if within and _is_clutter(within):
            return
        raise (refusal(error) or error) from None
    for entry in entries:
        name = within + entry.name
        if entry.is_dir():
            if entry.is_symlink() and not _is_clutter(f"{name}/"):
                raise UserError(
                    f"{printable(entry.path)}: is a link to a folder, whose images DVC does not watch. Put the folder "
                    "itself there, or link its files one by one."
                )
            yield f"{name}/"
            if not entry.is_symlink():
                yield from _walk(path, f"{name}/")
        else:
            if entry.is_symlink() and not Path(entry.path).exists():
                _refuse_link(path, name, "Mend or remove it.")
            yield name


def _refuse_link(path: Path, name: str, remedy: str) -> None:
    if not _is_clutter(name):
        raise UserError(f"{path}: {printable(name)} is a link that leads to no file there. {remedy}")


def _is_clutter(name: str) -> bool:
    return name not in sort_out([name])[0]


def read_contents(path: Path, wanted: Iterable[str]) -> Iterator[tuple[str, Content]]:
    """Yield name and content of the `wanted` files in the order in which they are stored, the only one of a tar."""
    if path.is_dir():
        yield from ((name, _reader(path / name)) for name in wanted)
    elif _is_zip(path):
        with zipfile.ZipFile(path) as archive:
            stored = {_with_slashes(name): name for name in archive.namelist()}
            yield from ((name, _member(archive, stored[name])) for name in wanted)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name in wanted:
                    if (file := archive.extractfile(member)) is None:
                        raise tarfile.ReadError(f"{member.name} is not a file")
                    yield member.name, _too_large(member.size) or file.read()
            while archive.fileobj and archive.fileobj.read(1 << 20):
                pass  # checksums stand at the end of what is compressed


def read_file(path: Path, name: str) -> bytes:
    """One file of a folder or archive.

    Raises
    ------
    UserError
        It holds no such file.
    """
    try:
        _, content = next(iter(read_contents(path, [name])))
    except (KeyError, StopIteration):
        raise UserError(f"{path}: holds no {name}. Fetch it again.") from None
    return content() if callable(content) else content


def _is_zip(path: Path) -> bool:
    return path.name.lower().endswith(ZIP)


def _with_slashes(name: str) -> str:
    """A name with slashes, as the format demands: some programs on Windows write backslashes."""
    return name if "/" in name else name.replace("\\", "/")


def _reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        fail = _too_large(regular(path).stat().st_size)
        return fail() if fail else path.read_bytes()

    return read


def _member(archive: zipfile.ZipFile, name: str) -> Content:
    """A file of a zip; if it is damaged, decoding it fails, and the other files are read all the same."""
    try:
        return _too_large(archive.getinfo(name).file_size) or archive.read(name)
    except (zipfile.BadZipFile, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        return failing(error)


def _too_large(size: int) -> Callable[[], bytes] | None:
    """A content whose reading fails, for a file that is too large for a picture; None for any other."""
    return failing(ValueError(f"{size / 2**30:.1f} GiB, too large for a picture")) if size > MAX_FILE_BYTES else None


def failing(error: Exception) -> Callable[[], bytes]:
    """The content of a picture that cannot be read: the decoder lists it as broken."""

    def fail() -> bytes:
        raise error

    return fail
