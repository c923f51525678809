"""Artifacts: never half-written, the same bytes for the same content, and none left that nobody names."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from experiments import REPOSITORY

from nonn.core import files
from nonn.core.errors import UserError
from nonn.core.files import (
    STATE,
    TEMPORARY,
    read_json,
    remove,
    remove_orphans,
    replacing,
    replacing_all,
    write_json,
    write_text,
)
from nonn.core.paths import Paths, remove_unfinished
from nonn.data.tensors import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("folder")


def temporaries() -> list[Path]:
    return list(Path().rglob(f"{TEMPORARY}*"))


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Writing


def fail_half_way(target: Path) -> None:
    with replacing(target) as temporary:
        write_text(temporary / "half.txt", "half")
        raise RuntimeError


def test_a_failed_write_leaves_everything_as_it_was():
    target = Path("results/a")
    with pytest.raises(RuntimeError):
        fail_half_way(target)
    assert files_below(Path()) == []
    write_text(target / "old.txt", "old")
    with pytest.raises(RuntimeError):
        fail_half_way(target)
    assert files_below(Path()) == ["results/a/old.txt"]
    assert not temporaries()


def test_a_folder_replaces_a_folder_as_a_whole():
    target = Path("results/folder")
    for names in (["a", "b"], ["b", "c"]):
        with replacing(target) as temporary:
            temporary.mkdir()
            for name in names:
                write_text(temporary / f"{name}.txt", name)
        assert files_below(target) == [f"{name}.txt" for name in names]
    assert not temporaries()


@pytest.fixture
def cannot_exchange(monkeypatch):
    """As on file systems that cannot let two paths change places in one step."""
    monkeypatch.setattr(files, "_exchanged", lambda *_: False)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has renameat2")
def test_folders_change_places_in_one_step(monkeypatch):
    target = Path("results/folder")
    write_text(target / "old.txt", "old")
    monkeypatch.setattr(Path, "rename", None)  # so there is no moment at which the target is missing
    with replacing(target) as temporary:
        write_text(temporary / "new.txt", "new")
    assert files_below(Path()) == ["results/folder/new.txt"]


@pytest.mark.usefixtures("cannot_exchange")
def test_a_folder_that_cannot_be_put_in_place_leaves_the_former_one(monkeypatch):
    target, rename = Path("results/folder"), Path.rename
    write_text(target / "old.txt", "old")

    def refuse(path: Path, goal: Path) -> Path:
        if (path / "new.txt").exists():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return rename(path, goal)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"^results/folder: device or resource busy"), replacing(target) as temporary:
        write_text(temporary / "new.txt", "new")
    assert files_below(Path()) == ["results/folder/old.txt"]


@pytest.mark.usefixtures("cannot_exchange")
@pytest.mark.parametrize("renames", [1, 2])
def test_an_interrupt_between_renames_loses_no_folder(monkeypatch, renames):
    target, rename, done = Path("results/folder"), Path.rename, []
    write_text(target / "old.txt", "old")

    def rename_and_stop(path: Path, goal: Path) -> Path:
        rename(path, goal)
        done.append(goal)
        if len(done) == renames:
            raise KeyboardInterrupt
        return goal

    monkeypatch.setattr(Path, "rename", rename_and_stop)
    with pytest.raises(KeyboardInterrupt), replacing(target) as temporary:
        write_text(temporary / "new.txt", "new")
    assert files_below(target) == ["old.txt" if renames == 1 else "new.txt"]


@pytest.mark.parametrize("target", [Path("a"), Path("results/a")])
def test_what_is_replaced_within_what_is_replaced_bears_the_name_of_that(target, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=rf"^{target}/b: no space left"), replacing(target) as temporary:
        write_text(temporary / "b", "b")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ECHILD, errno.EPERM])
def test_a_scratch_folder_bears_the_blame_of_its_file_system_alone(number):
    with pytest.raises((UserError, OSError)) as raised, files.scratch_folder():
        raise OSError(number, os.strerror(number))
    assert isinstance(raised.value, UserError) == (number == errno.ENOSPC)


@pytest.mark.usefixtures("cannot_exchange")
def test_a_former_folder_is_never_half_deleted(monkeypatch):
    target, removed = Path("results/folder"), []
    write_text(target / "old.txt", "old")
    monkeypatch.setattr(files, "remove", removed.append)
    with replacing(target) as temporary:
        write_text(temporary / "new.txt", "new")
    assert files_below(target) == ["new.txt"]
    assert target not in removed


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_what_the_disk_refuses_when_it_is_flushed_leaves_the_former_one(number, monkeypatch):
    target = Path("results/a")
    write_text(target, "old")

    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=rf"^results/a: {os.strerror(number).lower()}"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert not temporaries()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_what_cannot_be_flushed_is_written_all_the_same(number, monkeypatch):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(Path("results/a"), "new")
    assert Path("results/a").read_text() == "new"


def test_of_two_that_belong_together_none_is_replaced_before_both_are_written():
    targets = Path("results/key"), Path("results/certificate")
    for text in ("old", "new"):
        with replacing_all(*targets) as temporaries_:
            for temporary in temporaries_:
                temporary.write_text(text)

    def fail() -> None:
        with replacing_all(*targets) as (first, _):
            first.write_text("newest")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [target.read_text() for target in targets] == ["new", "new"]
    assert not temporaries()


def test_a_file_replaces_a_file_in_a_new_folder():
    write_text(Path("results/deep/down.txt"), "first")
    write_text(Path("results/deep/down.txt"), "größer")
    assert Path("results/deep/down.txt").read_bytes() == "größer".encode()
    assert not temporaries()


def test_json_does_not_depend_on_the_order_of_keys():
    write_json(Path("a.json"), {"b": [1.5, None], "a": {"y": "ä", "x": True}})
    write_json(Path("b.json"), {"a": {"x": True, "y": "ä"}, "b": [1.5, None]})
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    assert Path("a.json").read_text().endswith("}\n")
    assert read_json(Path("a.json")) == {"a": {"x": True, "y": "ä"}, "b": [1.5, None]}


def test_tensors_come_back_and_give_stable_bytes():
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor([1, 2], dtype=torch.uint8)}
    write_tensors(Path("a.safetensors"), tensors)
    write_tensors(Path("b.safetensors"), dict(reversed(tensors.items())))
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert Path("a.safetensors").stat().st_mode & 0o777 == 0o644
    read = read_tensors(Path("a.safetensors"))
    assert set(read) == {"a", "b"}
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


@pytest.mark.parametrize("damage", [b"", slice(100), b"x" * 300])
def test_damaged_tensors_are_refused(damage):
    path = Path("a.safetensors")
    write_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[damage] if isinstance(damage, slice) else damage)
    with pytest.raises(UserError, match=r"a\.safetensors: damaged \(.*Delete it and run the pipeline again"):
        read_tensors(path)


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_a_missing_artifact_says_how_to_make_it(read):
    with pytest.raises(UserError, match=r"results/x: no such file\. Run `dvc repro` or `snakemake"):
        read(Path("results/x"))


def test_remove_takes_files_folders_links_and_nothing():
    Path("kept").mkdir()
    Path("kept/file").touch()
    Path("link").symlink_to("kept")
    Path("folder/below").mkdir(parents=True)
    Path("file").touch()
    for name in ("link", "folder", "file", "nothing"):
        remove(Path(name))
    assert [path.name for path in Path().iterdir()] == ["kept"]
    assert Path("kept/file").exists()


#: Dies in the middle of writing a folder, too suddenly to tidy up.
KILLED = """
import os, pathlib, signal
from nonn.core.files import replacing, write_text
with replacing(pathlib.Path("results/a")) as temporary:
    write_text(temporary / "half.txt", "half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_remove_orphans_removes_what_killed_processes_left(monkeypatch):
    subprocess.run([sys.executable, "-c", KILLED], env={"PYTHONPATH": str(REPOSITORY)}, check=False)
    (orphan,) = temporaries()
    assert not Path("results/a").exists()
    with replacing(Path("results/b")) as temporary:
        temporary.touch()
        with monkeypatch.context() as patch:
            patch.setattr(files, "_HOST", "elsewhere")
            remove_orphans(Path("results"))
        assert orphan.exists(), "another machine cannot know"
        remove_orphans(Path("results"))
        assert temporaries() == [temporary], "this process is alive"


def test_remove_orphans_removes_what_a_dead_process_left_whose_parent_has_not_noticed():
    child = subprocess.Popen([sys.executable, "-c", KILLED], env={"PYTHONPATH": str(REPOSITORY)})
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert temporaries()
    remove_orphans(Path("results"))
    assert not temporaries()
    child.wait()


def test_remove_orphans_is_not_fooled_by_another_process_of_that_number(monkeypatch):
    with replacing(Path("results/a")) as temporary:
        temporary.touch()
        _, began = files._state(os.getpid())
        monkeypatch.setattr(files, "_state", lambda _: ("R", began + 1))
        remove_orphans(Path("results"))
        assert not temporaries()
        temporary.touch()


def test_a_temporary_of_a_version_before_stays_while_its_process_runs():
    own, dead = (Path(f"results/{TEMPORARY}{files._HOST}-{pid}-7.json") for pid in (os.getpid(), 2**22 + 1))
    for path in (own, dead):
        write_text(path, "half")
    remove_orphans(Path("results"))
    assert temporaries() == [own]


def test_without_proc_every_process_of_that_number_counts(monkeypatch):
    monkeypatch.setattr(files, "_state", lambda _: ("", 0))
    with replacing(Path("results/a")) as temporary:
        temporary.touch()
        remove_orphans(Path("results"))
        assert temporaries() == [temporary]


def test_remove_orphans_bears_another_job_that_is_faster(monkeypatch):
    orphan = Path(f"results/{TEMPORARY}{files._HOST}-{2**22 + 1}-1-0")
    for name in "ab":
        write_text(orphan / name, name)
    unlink = os.unlink

    def too_late(path, **options):
        unlink(path, **options)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", too_late)
    remove_orphans(Path("results"))
    assert not temporaries()


def test_what_is_below_stays_where_one_folder_alone_is_swept():
    name = f"{TEMPORARY}{files._HOST}-{2**22 + 1}-1-0"
    for folder in ("results", "results/below"):
        write_text(Path(folder, f"{name}.txt"), "half")
    remove_orphans(Path("results"), below=False)
    assert temporaries() == [Path("results/below") / f"{name}.txt"]


@pytest.mark.parametrize(
    "folder", ["", "workflow", "workflow/experiments", "results/x/deep", str(STATE), f"{STATE}/map"]
)
def test_the_half_written_is_swept_wherever_commands_write(folder):
    write_text(Path(folder, f"{TEMPORARY}{files._HOST}-{2**22 + 1}-1-0.txt"), "half")
    remove_unfinished(Paths("x"))
    assert not temporaries()


def test_remove_orphans_bears_that_there_is_nothing():
    remove_orphans(Path("results"), STATE)
    assert not STATE.exists()


# Targets that users name


def test_what_cannot_be_written_is_one_clear_error():
    Path("folder").mkdir()
    Path("file").write_text("as it was")
    occupied = r"file exists\. Move what is there away, or name another place\."
    for target, said in (("folder", r"folder: is a directory\. Name a file"), ("file/below", f"file: {occupied}")):
        with pytest.raises(UserError, match=f"^{said}"):
            write_text(Path(target), "text")
    assert Path("file").read_text() == "as it was"
    assert not temporaries()
