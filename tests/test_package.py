"""What is built from the repository, installed elsewhere: projects in which the pipeline runs as in a clone."""

import errno
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from experiments import REPOSITORY, tiny_params
from pictures import write_photos
from ruamel.yaml import YAML
from test_pipeline import BIN, PIPELINE, Clone

import nonn
from nonn.cli import main
from nonn.commands import project
from nonn.commands.scratch import copy_repository
from nonn.commands.verify import md5_of
from nonn.core.errors import UserError
from nonn.core.params import load_params

PHOTOS = "--images", "photos/", "--devices", "2×stm32f4", "--size", "32", "--precision", "float32"
pytestmark = pytest.mark.xdist_group("package")  # one worker makes what they share


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the package in it, as an installation of the wheel leaves it; the wheel comes from the sdist."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    copy_repository(source, REPOSITORY)
    command = [BIN / "uv", "build", "--quiet", "--offline", "--no-build-isolation", "--python", sys.executable]
    subprocess.run(command, cwd=source, check=True)
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture
def photos(folder) -> Path:
    """A folder that is no clone, with photographs of two classes in it."""
    write_photos(folder / "photos")
    return folder


def call(site: Path, folder: Path, *command: str) -> str:
    """What a command prints that has the installed package, and no other."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_carries_the_workflow(site):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "workflow"]
    listed = subprocess.check_output(command, cwd=REPOSITORY, text=True).split()
    wanted = {Path(name): REPOSITORY / name for name in listed if name != "workflow/jobs.yaml"}
    shipped = site / "nonn/project"
    found = {path.relative_to(shipped) for path in (shipped / "workflow").rglob("*") if path.is_file()}
    assert found == set(wanted)
    assert all((shipped / name).read_bytes() == path.read_bytes() for name, path in wanted.items())
    assert (shipped / "stages.yaml").read_bytes() == (REPOSITORY / "dvc.yaml").read_bytes()


def test_an_installed_package_makes_a_project_and_runs_it(site, photos):
    call(site, photos, sys.executable, "-m", "nonn", "new", "pets", *PHOTOS)
    pets = photos / "pets"
    assert (pets / "nonn").readlink() == site / "nonn"
    call(site, pets, "snakemake", "--cores", "2", "dataset")
    lock = YAML(typ="safe").load(pets / "dvc.lock")["stages"]["dataset"]
    code = {entry["path"]: entry["md5"] for entry in lock["deps"]}
    assert code["nonn/stages/dataset.py"] == md5_of(REPOSITORY / "nonn/stages/dataset.py"), "as a clone's"
    planned = call(site, pets, "snakemake", "--cores", "2", "--dry-run")
    assert "distill" in planned
    assert "dataset:" not in planned
    assert subprocess.check_output(["git", "status", "--short", "nonn"], cwd=pets, text=True) == ""


def test_a_project_is_made_where_there_is_no_clone(photos, capsys, monkeypatch):
    main(["new", "pets", *PHOTOS])
    assert "pets: a project of its own" in capsys.readouterr().out
    monkeypatch.chdir("pets")
    assert load_params().dataset.source == str(photos / "photos")
    main(["use", "mnist5k"])
    assert "from the package's mnist5k.yaml" in Path("params.yaml").read_text()
    main(["new", "plain"])
    assert (load_params().experiment, load_params().dataset.source) == ("plain", "mnist5k")
    assert not Path("plain").exists(), "a project holds several experiments"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--images", "nowhere", "--devices", "2×stm32f7"), "dataset.source: nowhere does not exist"),
        (("--images", "photos"), "--images: belongs to --devices; give both"),
        (("--devices", "2×stm32f7"), "--devices: belongs to --images; give both"),
        (("--teacher", "timm:resnet18"), "--teacher: belongs to --images and --devices; give both"),
        (("--set", "distill.lrs=1"), "distill.lrs: unknown key"),
    ],
)
def test_a_project_that_is_refused_leaves_nothing(arguments, expected, photos):
    with pytest.raises(SystemExit, match=expected):
        main(["new", "pets", *arguments])
    assert not (photos / "pets").exists()


def test_what_is_there_stays(photos):
    with pytest.raises(UserError, match="photos: is there already"), project.created(photos / "photos"):
        pass


@pytest.mark.parametrize("place", ["nothing", "empty", "link"])
def test_a_project_that_fails_half_way_leaves_what_was_there(place, folder, monkeypatch):
    pets = folder / "pets"
    if place != "nothing":
        (folder / "empty").mkdir()
        pets.symlink_to(folder / "empty") if place == "link" else (folder / "empty").rename(pets)
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(project, "refresh", refuse_to_write)
    with pytest.raises(SystemExit, match=r"^nonn new: pets/dvc\.yaml: no space left on device\. Free some space"):
        main(["new", "pets"])
    assert sorted(folder.rglob("*")) == before


def refuse_to_write(folder):
    raise OSError(errno.ENOSPC, "full", str(folder / "dvc.yaml"))


@pytest.mark.parametrize("name", ["mnist5k pictures", "cats: and dogs", "onnx:pictures"])
def test_any_folder_of_pictures_is_found(name, photos):
    (photos / "photos").rename(photos / name)
    main(["new", "pets", "--images", name, "--devices", "2×stm32f7"])
    assert str(photos / name) in (photos / "pets/params.yaml").read_text()


def test_a_project_follows_the_package(folder, capsys):
    with project.created(folder / "demo"):
        pass
    assert Path("demo/nonn").resolve() == Path(nonn.__file__).resolve().parent
    before = Path("demo/dvc.yaml").read_bytes()
    Path("demo/nonn").unlink()
    Path("demo/nonn").symlink_to(folder / "another version")
    Path("demo/dvc.yaml").write_text("of another version")
    project.refresh(folder / "demo")
    assert Path("demo/nonn").resolve() == Path(nonn.__file__).resolve().parent
    assert Path("demo/dvc.yaml").read_bytes() == before
    assert "dvc.yaml: written anew, as of nonn" in capsys.readouterr().err
    assert not project.is_project(REPOSITORY)


@pytest.mark.slow
def test_a_project_writes_the_bytes_of_a_clone(site, tmp_path):
    """The tiny experiment, all of it, in both."""
    clone = Clone(tmp_path / "clone")
    call(site, tmp_path, sys.executable, "-m", "nonn", "new", "tiny")
    made = Clone(tmp_path / "tiny", is_copy=True)
    made.environment["PYTHONPATH"] = str(site)
    shutil.copy(clone.folder / "images.zip", made.folder)
    made.edit(lambda params: params.update(tiny_params(PIPELINE)))
    for each in (clone, made):
        each.call([BIN / "snakemake", "--cores", "2"])
    assert made.results() == clone.results()
    assert made.stages_of(["sh", "-c", "nonn jobs && dvc repro"]) == []
