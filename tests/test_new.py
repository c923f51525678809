"""`nonn new`: an experiment for one's own images, teacher and devices that is sound, or one line for each mistake."""

import contextlib
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torchvision
from experiments import REPOSITORY
from foreign import CODE
from pictures import write_photos

from nonn.cli import main
from nonn.commands import new, project
from nonn.core.chips import FAMILIES
from nonn.core.jobs import check_jobs
from nonn.core.params import load_params


@pytest.fixture
def clone(folder):
    """What `nonn new` needs of a clone, and photographs of two classes."""
    shutil.copytree(REPOSITORY / "workflow", folder / "workflow", ignore=shutil.ignore_patterns("report", "envs"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(REPOSITORY / name, folder)
    write_photos(folder / "photos")
    return folder


def refusal(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["new", "pets", "--images", "photos/", *arguments])
    return str(stopped.value.code)


@pytest.mark.usefixtures("clone")
def test_the_experiment_is_sound_and_active(capsys):
    main(["new", "pets", "--images", "photos/", "--devices", "4×stm32f7", "--set", "distill.epochs=3"])
    shown = capsys.readouterr().out
    assert "photos/: 12 images of 2 classes" in shown
    assert "workflow/experiments/pets.yaml: written and active" in shown
    assert "Network 4s: `nonn plan --devices '4×stm32f7'` says" in shown
    params = load_params()
    check_jobs(params)
    assert (params.experiment, params.dataset.source, params.dataset.size) == ("pets", "photos/", 96)
    assert params.networks["4s"].devices == ["stm32f7"] * 4
    assert (params.design.family, params.design.precision, params.distill.epochs) == ("mobilenet", "int8", 3)
    assert len(params.teacher.architecture.widths) == 4
    assert params.networks["4s"].baselines == {"kd": 4}, "as many as an ensemble needs"
    text = Path("workflow/experiments/pets.yaml").read_text()
    assert all(line.startswith(("#", " ")) or ":" in line or not line for line in text.splitlines())
    main(["use", "mnist5k"])
    main(["use", "pets"])
    assert load_params().experiment == "pets"
    comments = {line.partition("#")[2] for line in Path("params.yaml").read_text().splitlines()}
    main(["use", "pets", "--set", "distill.epochs=4", "--set", "teacher.architecture.depth=3"])
    assert {line.partition("#")[2] for line in Path("params.yaml").read_text().splitlines()} == comments
    assert refusal("--devices", "4×stm32f7").startswith("nonn new: workflow/experiments/pets.yaml: is there already")


@pytest.mark.usefixtures("clone")
def test_small_images_get_students_of_three_stages():
    main(["new", "pets", "--images", "photos/", "--devices", "2xstm32f4", "--size", "32", "--precision", "float32"])
    assert load_params().design.family == "fast"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--devices", "4×stm32f7", "--images", "nowhere"), "dataset.source: nowhere does not exist"),
        (("--devices", "4×stm32f7", "--images", "photos/cats"), "has 0 class folders, needs two at least"),
        (("--devices", "4 of those"), "--devices: '4 of those' is not NUMBERxNAME"),
        (("--devices", "1×stm32f7"), "--devices: a network has 2 to 16 devices"),
        (("--devices", "2×nosuchboard"), "--devices: no device 'nosuchboard'"),
        (("--devices", "2×stm32f7", "--size", "512"), "no student of `design` fits device 'stm32f7'"),
        (("--devices", "2×stm32f7", "--size", "5"), "dataset.size: input should be greater than or equal to 28"),
        (("--devices", "2×stm32f7", "--weights", "best.pth"), "--weights: belongs to a --teacher"),
        (("--devices", "2×stm32f7", "--set", "distill.lrs=1"), "distill.lrs: unknown key"),
    ],
)
def test_each_mistake_is_one_line_and_changes_nothing(arguments, expected, clone):
    before = {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()}
    said = refusal(*arguments)
    assert expected in said
    assert all(len(line) < 400 for line in said.splitlines())
    after = {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()}
    assert {path: content for path, content in after.items() if path.name != "jobs.yaml"} == {
        path: content for path, content in before.items() if path.name != "jobs.yaml"
    }


@pytest.mark.usefixtures("clone")
def test_experiments_that_somebody_is_still_writing_are_passed_over():
    for name, text in (("half", "devices:\n"), ("other", "devices: 5\n"), ("list", "- a\n")):
        Path(f"workflow/experiments/{name}.yaml").write_text(text)
    main(["new", "flowers", "--images", "photos", "--devices", "2×stm32f7", "--size", "32"])
    assert load_params().experiment == "flowers"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["123", "1e5", "2024-01-01", "null"])
def test_names_that_yaml_reads_otherwise_are_refused_before_anything_is_written(name, folder):
    with pytest.raises(SystemExit, match=rf"nonn new: {name}: is a number, a date or no text at all for YAML"):
        main(["new", name])
    assert not list(folder.iterdir())


def test_names_of_the_package_s_experiments_are_refused(folder):
    main(["new", "p"])
    for place in (folder, folder / "p"):
        with contextlib.chdir(place), pytest.raises(SystemExit, match="mnist5k: comes with the package; take another"):
            main(["new", "mnist5k"])
        assert not list(place.rglob("mnist5k*"))


@pytest.mark.usefixtures("folder")
def test_a_project_that_is_told_to_stop_leaves_nothing(folder, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(project, "keep_versions", lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        main(["new", "half"])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not list(folder.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("clone")
def test_an_experiment_that_is_told_to_stop_is_not_made_the_active_one(monkeypatch):
    before = Path("params.yaml").read_bytes()
    monkeypatch.setattr(new, "check_all", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        main(["new", "half"])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert Path("params.yaml").read_bytes() == before
    assert not Path("workflow/experiments/half.yaml").exists()


@pytest.mark.usefixtures("clone")
def test_images_that_are_nowhere_are_one_line():
    assert len(refusal("--images", "nowhere", "--devices", "2×stm32f7").splitlines()) == 1


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--images", "a\udcff"), r"nonn new: --images a\udcff: is not text in UTF-8. Rename it."),
        (("--teacher", "timm:resnet18", "--weights", ""), "nonn new: --weights: is empty. Give a value, or leave the"),
    ],
)
def test_names_that_no_file_can_hold_are_refused(arguments, expected):
    assert expected in refusal("--devices", "2×stm32f7", *arguments)


@pytest.mark.usefixtures("clone")
def test_two_mistakes_are_two_lines():
    said = refusal("--images", "nowhere", "--devices", "2×stm32f7", "--set", "distill.lrs=1").splitlines()
    assert len(said) == 2
    assert not Path("workflow/experiments/pets.yaml").exists()


@pytest.fixture
def small_teacher(clone, monkeypatch):
    """Weights of a small network of torchvision for two classes, and images at which it is quick."""
    monkeypatch.setattr("nonn.commands.new.TEACHER_SIZE", 64)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=2).state_dict(), clone / "best.pth")
    return "--devices", "2×stm32f7", "--size", "64", "--teacher", "torchvision:resnet18", "--weights", "best.pth"


def test_a_library_s_teacher_sees_larger_images_than_the_students(small_teacher):
    main(["new", "pets", "--images", "photos/", *small_teacher])
    params = load_params()
    assert params.teacher.source == "torchvision:resnet18"
    assert (params.design.input, params.teacher.size) == (64, 64)


def test_a_teacher_of_other_classes_is_refused(small_teacher, clone):
    shutil.copytree(clone / "photos/cats", clone / "photos/eels")
    assert "3 classes" in refusal(*small_teacher)
    assert not Path("workflow/experiments/pets.yaml").exists()


@pytest.mark.usefixtures("code")
def test_a_teacher_that_cannot_be_exported_is_refused_before_anything_is_trained(clone):
    Path("nets/branch.py").write_text(
        f"{CODE}\n\nclass make(Small):\n    def forward(self, x):\n"
        "        return super().forward(x if x.sum() > 0 else -x)\n"
    )
    shutil.copytree(clone / "photos/cats", clone / "photos/eels")
    teacher = (
        "--devices",
        "2×stm32f7",
        "--size",
        "64",
        "--set",
        "graph.top_k=8",
        "--teacher",
        "module:nets.branch:make",
    )
    assert re.search(r"the teacher cannot be exported to ONNX \(.*Export it yourself", refusal(*teacher))


@pytest.mark.usefixtures("clone")
def test_students_of_firmware_are_of_a_family_that_it_has_kernels_for():
    main(["new", "pets", "--images", "photos/", "--devices", "1×stm32h743 + 1×pi_zero2w"])
    assert load_params().design.family in FAMILIES


@pytest.mark.usefixtures("clone")
def test_boards_of_the_catalogue_are_devices(capsys):
    main(["new", "pets", "--images", "photos/", "--devices", "2×rp2350 + 2×pi_zero2w"])
    assert "On rp2350 neither a node nor firmware of nonn runs" in capsys.readouterr().out
    params = load_params()
    assert params.devices["pi_zero2w"].board == "pi_zero2w"
    assert params.networks["4s"].devices == ["rp2350", "rp2350", "pi_zero2w", "pi_zero2w"]


@pytest.mark.usefixtures("clone")
def test_images_in_files_of_mnist_s_format_are_taken():
    Path("digits").mkdir()
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            Path(f"digits/{split}-{kind}-ubyte").touch()
    main(["new", "pets", "--images", "digits", "--devices", "2×stm32f4", "--size", "28"])
    assert load_params().dataset.source == "digits"


def test_own_code_for_a_project_that_is_not_there_yet_is_refused(folder):
    with pytest.raises(
        SystemExit, match=r"--teacher: module:nets:make is looked for in the project, which is not there"
    ):
        main(["new", "pets", "--images", "photos", "--devices", "2×stm32f4", "--teacher", "module:nets:make"])
    assert not (folder / "pets").exists()


def test_other_values_stand_in_the_experiment(clone):
    """So that they are there when it is made the active one again."""
    main(["new", "pets", "--images", "photos/", "--devices", "2×stm32f4", "--size", "28", "--set", "distill.epochs=3"])
    assert "# trainings; 3 or more show the spread" in (clone / "workflow/experiments/pets.yaml").read_text()
    main(["use", "mnist5k"])
    main(["use", "pets"])
    assert load_params().distill.epochs == 3


@pytest.mark.usefixtures("clone")
def test_other_values_may_be_parts_of_what_stands_as_a_whole():
    values = ("networks.2s.seeds=5", "teacher.architecture.depth=1", "devices.stm32f4.memory_kib=150")
    main(["new", "plain", *(word for value in values for word in ("--set", value))])
    params = load_params()
    assert (params.networks["2s"].seeds, params.teacher.own_architecture.depth, len(params.networks)) == (5, 1, 2)
    assert (params.devices["stm32f4"].memory_kib, params.devices["stm32f4"].mmacs) == (150, 10)
