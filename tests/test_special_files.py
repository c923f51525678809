"""Links, pipes, sockets and folders in a data set: followed where DVC watches them, refused elsewhere."""

import errno
import os
import socket
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pictures import (
    SIZE,
    load_images,
    pack,
    write_folder,
)

from nonn.core.errors import UserError
from nonn.core.paths import Paths

PATHS = Paths("test")

pytestmark = pytest.mark.usefixtures("folder")


def test_hard_links_in_a_tar_are_followed(tmp_path):
    folder = write_folder(tmp_path / "pets", ["cat", "dog"], count=2)
    (folder / "dog/1.png").unlink()
    (folder / "dog/1.png").hardlink_to(folder / "cat/0.png")
    raw = load_images(str(pack(folder, tmp_path / "a.tgz")), SIZE)
    np.testing.assert_array_equal(raw.images[3], raw.images[0])


@pytest.mark.parametrize("kind", ["pipe", "socket", "dangling link", "folder"])
def test_what_is_no_regular_file_is_named_and_not_opened(kind, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "images", ["cat", "dog"])
    odd = folder / "cat/odd.png"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "socket":
        monkeypatch.chdir(odd.parent)
        socket.socket(socket.AF_UNIX).bind(odd.name)
    elif kind == "dangling link":
        odd.symlink_to("nowhere")
    else:
        odd.mkdir()
    with pytest.raises(UserError, match=r"^params\.yaml: dataset\.source: .*cat/odd\.png"):
        load_images(str(folder), SIZE)


@pytest.mark.parametrize("kind", ["folder", "a.tar", "a.zip"])
def test_class_folders_that_are_links_are_refused(kind, tmp_path):
    """Never left out without a word."""
    folder, source = write_folder(tmp_path / "images", ["cat", "dog"]), tmp_path / kind
    (folder / ".lock").symlink_to("nowhere")  # as editors leave them
    (tmp_path / "eel").mkdir()
    (folder / "cat/0.png").rename(tmp_path / "eel/0.png")
    link = folder / "eel"
    link.symlink_to("../eel")
    if kind == "folder":
        with pytest.raises(UserError, match=r"eel: is a link to a folder"):
            load_images(str(folder), SIZE)
        link.unlink()
        link.symlink_to("../unmounted")
        source = folder
    elif kind == "a.tar":
        (folder / "dog/alias.png").symlink_to("0.png")  # to a file of the archive, and so read
        with tarfile.open(source, "w") as archive:
            archive.add(folder, "images")
    else:
        pack(folder, source)
        with zipfile.ZipFile(source, "a") as archive:
            info = zipfile.ZipInfo("eel")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "../eel")
    with pytest.raises(UserError, match=r"^params\.yaml: dataset\.source: .*eel is a link that leads to no file there"):
        load_images(str(source), SIZE)


def test_a_link_in_a_circle_is_named_with_its_remedy(tmp_path):
    folder = write_folder(tmp_path / "images", ["cat", "dog"])
    (folder / "eel").symlink_to("eel")
    told = r"^params\.yaml: dataset\.source: .*images/eel: too many levels of symbolic links\. Mend the symbolic link"
    with pytest.raises(UserError, match=told):
        load_images(str(folder), SIZE)


def test_links_to_files_of_a_tar_are_followed(tmp_path):
    folder = write_folder(tmp_path / "images", ["cat", "dog"], count=2)
    (folder / "dog/1.png").unlink()
    (folder / "dog/1.png").symlink_to("../cat/0.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder, "images")
    raw = load_images(str(tmp_path / "a.tar"), SIZE)
    np.testing.assert_array_equal(raw.images[3], raw.images[0])


def test_folders_that_may_not_be_listed_are_refused(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "images", ["cat", "dog", "dog/.Trash-0"], count=2)
    scan = os.scandir

    def refuse(path):
        if Path(path).name in denied:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", refuse)  # root may list all
    denied = {".Trash-0"}
    assert len(load_images(str(folder), SIZE).labels) == 4
    denied = {"dog"}
    with pytest.raises(UserError, match=r"^params\.yaml: dataset\.source: \S+images/dog: permission denied\. Change"):
        load_images(str(folder), SIZE)


@pytest.mark.parametrize("name", ["images.zip", "images.tar", "images"])
def test_a_source_that_is_a_pipe_is_refused(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"dataset\.source: .*(is a named pipe|neither a folder nor)"):
        load_images(str(tmp_path / name), SIZE)
