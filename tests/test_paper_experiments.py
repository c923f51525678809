"""The experiments on the paper's data sets of photographs, whose teacher is a pretrained ResNet: each on a generated
tree of the data set's own layout. And `nonn head`, which gives such a teacher its last layer."""

import argparse
import contextlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import REPOSITORY, tiny_params
from PIL import Image
from ruamel.yaml import YAML
from torchvision.models import ResNet18_Weights, resnet18

from nonn.commands import head
from nonn.commands.use import merge_experiment
from nonn.core.errors import UserError
from nonn.core.files import read_json
from nonn.core.jobs import check_named_files
from nonn.core.params import Params, TeacherParams
from nonn.core.paths import Paths
from nonn.core.teacher_source import IMAGENET_CLASSES
from nonn.data.dataset import load_teacher_dataset
from nonn.stages import dataset, teacher

PER_CLASS, SIZE = 12, 32
WNIDS = ["n01440764", "n02123045", "n15075141"]
NAMES = {"scenes": ["attic", "bar", "cloister"], "birds": ["001.Auk", "002.Wren", "003.Kite"], "imagenet": WNIDS}


def save(path: Path, kind: int, number: int) -> None:
    """A picture of the colour of its class, with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hue = np.roll([210, 120, 40], kind)
    pixels = np.random.default_rng(100 * kind + number).normal(hue, 30, (SIZE, SIZE, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, "JPEG")


def write_scenes(root: Path) -> None:
    lists: dict[bool, list[str]] = {False: [], True: []}
    for kind, name in enumerate(NAMES["scenes"]):
        for number in range(PER_CLASS):
            save(root / f"Images/{name}/{number}.jpg", kind, number)
            lists[number < 8].append(f"{name}/{number}.jpg")
    (root / "TrainImages.txt").write_text("\n".join(lists[True]))
    (root / "TestImages.txt").write_text("\n".join(lists[False]))


def write_birds(root: Path) -> None:
    pictures = [(kind, number) for kind in range(3) for number in range(PER_CLASS)]
    names = [f"{NAMES['birds'][kind]}/{number}.jpg" for kind, number in pictures]
    for name, (kind, number) in zip(names, pictures, strict=True):
        save(root / "images" / name, kind, number)
    for file, values in {
        "images.txt": names,
        "image_class_labels.txt": [kind + 1 for kind, _ in pictures],
        "train_test_split.txt": [int(number < 8) for _, number in pictures],
        "classes.txt": NAMES["birds"],
    }.items():
        (root / file).write_text("".join(f"{i + 1} {value}\n" for i, value in enumerate(values)))


def write_imagenet(root: Path) -> None:
    for kind, name in enumerate(WNIDS):
        for number in range(PER_CLASS):
            split = "train" if number < 8 else "val"
            save(root / f"{split}/{name}/ILSVRC2012_{split}_{number:08}.JPEG", kind, number)


def prepare(name: str) -> Params:
    """The shipped experiment as `params.yaml`, on a tree of its layout and of tiny pictures."""
    {"scenes": write_scenes, "birds": write_birds, "imagenet": write_imagenet}[name](Path("pictures"))
    with contextlib.chdir(REPOSITORY):
        raw = merge_experiment(name)
    raw["dataset"].update(source="pictures", size=SIZE, validation=0.25)
    raw["teacher"]["threads"] = 1
    YAML().dump(raw, Path("params.yaml"))
    return Params.model_validate(raw)


def write_start(n_classes: int = 7) -> Path:
    """A ResNet-18 of random weights, in place of the pretrained ones."""
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=n_classes).state_dict(), "start.pth")
    return Path("start.pth")


def fit(*settings: str) -> None:
    head.run(argparse.Namespace(start=write_start(), set=list(settings)))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["scenes", "birds"])
def test_a_pretrained_resnet_teaches_other_classes(name, capsys):
    params = prepare(name)
    paths = Paths(name)
    with pytest.raises(UserError, match=rf"teacher\.weights: data/resnet18-{name}\.pth does not exist\. Name a file"):
        check_named_files(params)
    dataset.run(params, paths)
    fit()
    assert f"data/resnet18-{name}.pth: torchvision:resnet18 for 3 classes, right on" in capsys.readouterr().err
    check_named_files(params)
    teacher.run(params, paths)
    info = read_json(paths.teacher_info)
    assert (info["source"], info["n_filters"], info["n_outputs"]) == ("torchvision:resnet18", 512, 3)
    assert info["validation_accuracy"] > 0.8
    assert load_teacher_dataset(paths).classes == tuple(NAMES[name])


@pytest.mark.usefixtures("folder")
def test_the_outputs_of_a_network_for_imagenet_are_found_by_the_names_of_folders():
    params, paths = prepare("imagenet"), Paths("imagenet")
    assert params.teacher.weights is None, "they are downloaded"
    dataset.run(params, paths)
    data = load_teacher_dataset(paths)
    start = {"weights": str(write_start(1000)), "classes": None}
    model = head.load_pretrained(data, params.teacher.model_copy(update=start))
    layer, _ = head.fit_head(model, data)
    rows = [params.teacher.classes.index(name) for name in WNIDS]
    network = model.body.network
    network.fc.weight.data[rows], network.fc.bias.data[rows] = layer.weight.data, layer.bias.data
    torch.save(network.state_dict(), "fitted.pth")
    teacher.run(
        params.model_copy(update={"teacher": params.teacher.model_copy(update={"weights": "fitted.pth"})}), paths
    )
    info = read_json(paths.teacher_info)
    assert info["outputs"] == rows == [0, 281, 999]
    assert info["validation_accuracy"] > 0.8


def test_the_list_of_imagenet_is_that_of_torchvision():
    if not (timm := find_spec("timm")):
        pytest.skip("timm, which knows the names of the numbers, is not installed")
    lemmas = Path(timm.origin).parent / "data/_info/imagenet_synset_to_lemma.txt"
    known = dict(line.split("\t") for line in lemmas.read_text().splitlines())
    classes = TeacherParams(source="torchvision:resnet18", threads=1, classes="imagenet").classes
    assert classes == IMAGENET_CLASSES.read_text().split() == sorted(set(classes))
    pairs = list(zip(classes, ResNet18_Weights.DEFAULT.meta["categories"], strict=True))
    same = [name.lower().replace("_", " ") in known[wnid].lower() for wnid, name in pairs]
    assert [name for (_, name), is_same in zip(pairs, same, strict=True) if not is_same] == [
        "crane bird",  # to tell it from the machine
        "maillot tank suit",  # without its comma
    ]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"source": "train"}, r"teacher\.source: train is none of torchvision or timm"),
        ({"weights": None}, r"teacher\.weights: null; name the file that is to be written"),
        ({"weights": "there.pth"}, r"teacher\.weights: there\.pth is there already\. Remove it"),
        ({"weights": "new.safetensors"}, r"new\.safetensors is to be written; give it the suffix \.pt or \.pth"),
    ],
)
def test_what_gets_no_last_layer_is_refused(keys, said):
    Path("there.pth").touch()
    raw = tiny_params({"teacher": {"source": "torchvision:resnet18", "weights": "new.pth"} | keys})
    raw["signals"]["attention"], raw["networks"]["2s"]["baselines"] = False, {}
    YAML().dump(raw, Path("params.yaml"))
    with pytest.raises(UserError, match=said):
        fit()
