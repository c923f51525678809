"""Stages that are killed, starved of disk or fed damaged files leave, in the end, the bytes of an undisturbed run."""

import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from dvc.lock import make_lock
from experiments import REPOSITORY, tiny_params
from ruamel.yaml import YAML

from nonn.commands import torture
from nonn.commands.torture import DisturbedRepository, Outcome
from nonn.commands.verify import damaged_objects, distrust, md5_of, mend_cache, mend_state
from nonn.core.errors import UserError
from nonn.core.files import STATE, TEMPORARY, remove_orphans

DISTILL = [sys.executable, "-m", "nonn", "distill", "2s/0", "--seed", "0"]
DESIGN = [sys.executable, "-m", "nonn", "design", "2s"]
pytestmark = pytest.mark.xdist_group("torture")  # one worker makes what they share


@pytest.fixture(scope="module")
def trained(built, tmp_path_factory) -> Path:
    """The tiny experiment, of which one student trained long enough to be disturbed. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "experiment"
    shutil.copytree(built, folder)
    (folder / "nonn").symlink_to(REPOSITORY / "nonn")
    YAML().dump(tiny_params({"distill": {"epochs": 60}}), folder / "params.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        code, output = DisturbedRepository(folder).call(DISTILL)
    assert code == 0, output
    return folder


@pytest.fixture
def repository(trained, tmp_path, monkeypatch) -> DisturbedRepository:
    """A copy of it, in the working directory."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(trained, tmp_path / "experiment", symlinks=True)
    monkeypatch.chdir(tmp_path / "experiment")
    repository = DisturbedRepository(Path().absolute())
    repository.expected = repository.digests()
    assert len(repository.expected) > 20
    return repository


def wait_for_checkpoint(*_) -> float:
    """In the place of a random moment: one at which the training has a checkpoint."""
    give_up = time.monotonic() + 120
    while not any(not path.name.startswith(TEMPORARY) for path in (STATE / "checkpoints").glob("*")):
        assert time.monotonic() < give_up, "no checkpoint within two minutes"
        time.sleep(0.01)
    return 0.0


def test_a_killed_stage_leaves_the_same_bytes_in_the_end(repository):
    repository.generator = SimpleNamespace(uniform=wait_for_checkpoint)
    assert torture.kill(repository, "distill", DISTILL, DISTILL, within=0.0) == Outcome("kill", "distill", True, "")


def test_a_damaged_checkpoint_costs_time_and_no_bytes(repository):
    outcome = torture.damage_checkpoint(repository, "distill", DISTILL, DISTILL)
    assert outcome == Outcome("damaged checkpoint", "distill", True, "")


def test_a_full_disk_is_one_line_and_nothing_half_written(repository):
    outcome = torture.fill(repository, "design", DESIGN, DESIGN, largest=20)
    assert outcome == Outcome("full disk", "design", True, "")


def test_what_hangs_is_seen(repository):
    repository.longest = 0.1
    assert repository.again(["sleep", "60"]) == "exit -1: it did not end within 0 s"


def test_what_a_killed_stage_leaves_elsewhere_is_inside_and_swept(repository):
    code, output = repository.call(["sh", "-c", "mktemp -d .nonn-tmp-XXXXXX --tmpdir"])
    assert (code, Path(output.strip()).parent) == (0, repository.temporary)
    assert repository.differences() == ""
    assert repository.again(["true"]) == ""
    assert not Path(output.strip()).exists()


def test_what_differs_is_seen(repository):
    path = sorted((repository.folder / "results").rglob("*.safetensors"))[0]
    torture.flip(repository, path)
    (path.parent / ".nonn-tmp-elsewhere-1-0").touch()
    assert "differs" in repository.differences()
    assert "is left" in repository.differences()
    assert "1     1           0" in torture.table([Outcome("kill", "x", True, repository.differences())])


def test_damaged_objects_of_the_cache_are_found_and_deleted_with_what_came_of_them(folder):
    cache = Path("cache")
    for content in (b"sound", b"other"):
        Path("content").write_bytes(content)
        name = md5_of(Path("content"))
        (cache / name[:2]).mkdir(parents=True)
        (cache / name[:2] / name[2:]).write_bytes(content)
    assert list(damaged_objects(cache)) == []
    torture.flip(DisturbedRepository(folder), cache / name[:2] / name[2:])
    restored = Path("results/restored")
    restored.parent.mkdir()
    restored.write_bytes((cache / name[:2] / name[2:]).read_bytes())
    Path("results/else").write_bytes(b"sound")
    assert mend_cache(cache, Path("results")) == [cache / name[:2] / name[2:], restored]
    assert not restored.exists()
    assert Path("results/else").exists()
    assert list(damaged_objects(cache)) == []
    remove_orphans(STATE)


def test_objects_are_not_trusted_for_being_read_only(tmp_path):
    path = tmp_path / "ab/cdef"
    path.parent.mkdir()
    path.write_bytes(b"content")
    path.chmod(0o444)
    (path.parent / "gone").symlink_to("nowhere")  # as one that is deleted meanwhile
    distrust(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", [".dvc/tmp/rwlock", "dvc.lock"])
@pytest.mark.parametrize("kept", [0.0, 0.6])
def test_what_dvc_has_half_written_is_deleted_and_what_is_whole_stays(tmp_path, capsys, name, kept):
    whole = {
        ".dvc/tmp/rwlock": '{"read": {}, "write": {"/a": {"pid": 1, "cmd": "dvc repro"}}}',
        "dvc.lock": "schema: '2.0'\nstages:\n  dataset:\n    cmd: python -m nonn dataset\n",
    }
    for file, text in whole.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    mend_state(tmp_path)
    assert {file: (tmp_path / file).read_text() for file in whole} == whole
    assert capsys.readouterr().err == ""
    content = whole[name]
    (tmp_path / name).write_text(content[: int(kept * len(content))] + "{" * bool(kept))
    mend_state(tmp_path)
    assert not (tmp_path / name).exists()
    assert f"{name}: DVC was killed while it wrote this" in capsys.readouterr().err
    mend_state(tmp_path)


@pytest.mark.parametrize(("name", "lock"), [(".dvc/tmp/rwlock", "rwlock.lock"), ("dvc.lock", "lock")])
def test_what_dvc_may_be_writing_now_is_not_deleted(tmp_path, name, lock):
    temporary, path = tmp_path / ".dvc/tmp", tmp_path / name
    temporary.mkdir(parents=True)
    path.write_text("{")
    with make_lock(str(temporary / lock)):
        mend_state(tmp_path)
        assert path.exists()
    mend_state(tmp_path)
    assert not path.exists()


def test_a_merge_in_conflict_is_not_deleted(tmp_path):
    (tmp_path / "dvc.lock").write_text("<<<<<<< HEAD\nschema: '2.0'\n=======\n>>>>>>> other\n")
    with pytest.raises(UserError, match=r"dvc\.lock: is in conflict after a merge\. Resolve it"):
        mend_state(tmp_path)
    assert (tmp_path / "dvc.lock").exists()
