"""The teacher: trained from labels, or imported, with a public network as the proof."""

import dataclasses
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import REPOSITORY, make_dataset, read_subset
from PIL import Image

from nonn.cli import main
from nonn.core.architecture import Architecture
from nonn.core.errors import UserError
from nonn.core.files import STATE, read_json, sha256_of
from nonn.core.teacher_source import Normalization
from nonn.core.training_params import MuonParams, SelectionParams
from nonn.data.dataset import Dataset
from nonn.data.tensors import write_tensors
from nonn.stages import teacher as teacher_stage
from nonn.teachers import teacher
from nonn.teachers.loading import load_teacher
from nonn.teachers.teacher import import_teacher, score_teacher, train_teacher
from nonn.training.augment import draw_view
from nonn.training.loop import LOG_COLUMNS
from nonn.training.networks import ConvNet, predict, whiten

RESNET_20 = Architecture(family="resnet", depth=20)
PRETRAINED = REPOSITORY.parent / "shared/data/pretrained/resnet20-cifar10.pt"
CIFAR10_ZIP = REPOSITORY.parent / "shared/data/cifar10.zip"
SLOW = pytest.mark.slow
IMAGENET = Normalization(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def colour() -> Dataset:
    return make_dataset(channels=3, size=32)


def make_resnet(architecture: Architecture, n_classes: int = 3) -> ConvNet:
    """Random weights, and batch norms that have seen images."""
    torch.manual_seed(0)
    model = ConvNet(architecture, 3, n_classes)
    model.train()(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8))
    return model.eval()


def public_weights(model: ConvNet) -> dict:
    """The same weights, named as public CIFAR ResNets of 2018 that were saved from several GPUs."""
    names = {"stem.0": "conv1", "stem.1": "bn1", "head": "linear"} | {f"stages.{i}": f"layer{i + 1}" for i in range(3)}
    weights = {}
    for name, tensor in model.state_dict().items():
        for own, public in names.items():
            if name.startswith(f"{own}.") and not name.endswith("num_batches_tracked"):
                weights[f"module.{public}{name.removeprefix(own)}"] = tensor
    return weights


def importing(params, path, architecture=RESNET_20, **changes):
    return params.teacher.model_copy(update={"weights": str(path), "architecture": architecture, **changes})


# Training


def test_a_teacher_learns_and_is_the_same_again(params, data, folder):
    def trained(seed: int, name: str):
        section = params.teacher.model_copy(update={"seed": seed})
        return train_teacher(data, section, teacher.Checkpoint(folder / name))

    model, log = trained(0, "a")
    again, log_again = trained(0, "b")
    other, _ = trained(1, "c")
    assert log[-1]["validation_accuracy"] > 0.9
    assert log == log_again
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(model.head.weight, other.head.weight)
    torch.testing.assert_close(model.normalize.mean.flatten(), data.mean)


SMALL = Architecture(family="airbench", widths=[4, 8, 8], depth=2)


@pytest.mark.parametrize(("depth", "selection"), [(2, None), (3, SelectionParams(keep=0.5, proxy=SMALL))])
def test_a_teacher_of_few_epochs_learns_and_resumes_exactly(params, data, folder, monkeypatch, depth, selection):
    """Family airbench by Muon: killed in the middle of its schedule, it ends in the same weights."""
    architecture = Architecture(family="airbench", widths=[8, 16, 32], depth=depth)
    changes = {"architecture": architecture, "muon": MuonParams(lr=0.1, momentum=0.6), "selection": selection}
    section = params.teacher.model_copy(update=changes)
    whole, log = train_teacher(data, section, teacher.Checkpoint(folder / "whole"))
    assert log[-1]["validation_accuracy"] > 0.9
    assert log[-1]["train_loss"] < log[0]["train_loss"]

    def dies_at_epoch_3(n_images, view, *arguments):
        if view == 3:
            raise KeyboardInterrupt
        return draw_view(n_images, view, *arguments)

    checkpoint = teacher.Checkpoint(folder / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "draw_view", dies_at_epoch_3)
        with pytest.raises(KeyboardInterrupt):
            train_teacher(data, section, checkpoint)
    resumed, log_resumed = train_teacher(data, section, checkpoint)
    assert log_resumed == log
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert (folder / "whole").read_bytes() == checkpoint.path.read_bytes()


def test_the_whitened_layer_comes_from_training_images_and_stays(params, data, checkpoint):
    architecture = Architecture(family="airbench", widths=[4, 8, 8], depth=1)
    section = params.teacher.model_copy(update={"architecture": architecture, "epochs": 2})
    model, _ = train_teacher(data, section, checkpoint)
    expected = ConvNet(architecture, data.channels, data.n_classes, mean=data.mean, std=data.std)
    whiten(expected, read_subset(data, "train")[0])
    assert torch.equal(model.stem[1].weight, expected.stem[1].weight)


@pytest.mark.parametrize("depth", [16, 40])
def test_wide_resnets_of_the_paper_are_trained(params, data, checkpoint, depth):
    few = dataclasses.replace(data, train=data.train[:4], validation=data.validation[:2])
    architecture = Architecture(family="wrn", depth=depth, width=4)
    section = params.teacher.model_copy(
        update={"architecture": architecture, "epochs": 3, "batch_size": 2, "lr": 0.01, "warmup": 0.0}
    )
    model, log = train_teacher(few, section, checkpoint)
    assert model.n_features == 256
    assert log[-1]["train_loss"] < log[0]["train_loss"]


def test_every_epoch_sees_a_view_of_its_own(params, data, checkpoint, monkeypatch):
    drawn = []
    monkeypatch.setattr(teacher, "draw_view", lambda *arguments: drawn.append(arguments) or draw_view(*arguments))
    train_teacher(data, params.teacher, checkpoint)
    n_images, section = len(data.train), params.teacher
    assert drawn == [(n_images, epoch, section.augment, section.seed) for epoch in range(section.epochs)]


def test_the_stage_writes_a_teacher_that_can_be_read(params, data, experiment):
    info, model = read_json(experiment.teacher_info), load_teacher(experiment)
    assert Architecture(**info["architecture"]) == params.teacher.architecture
    assert info["imported_from"] is None
    assert info["n_filters"] == model.n_features == 32
    images, labels = read_subset(data, "validation")
    assert (predict(model, images)[1].argmax(1) == labels).double().mean() == info["validation_accuracy"]
    assert experiment.log(experiment.teacher).read_text().splitlines()[0] == ",".join(LOG_COLUMNS)


def test_the_stage_writes_the_same_bytes_again_and_no_checkpoint(params, experiment):
    before = {path: path.read_bytes() for path in experiment.root.glob("teacher.*")}
    assert len(before) == 3
    for path in before:
        path.unlink()
    teacher_stage.run(params, experiment)
    assert {path: path.read_bytes() for path in experiment.root.glob("teacher.*")} == before
    assert not list((STATE / "checkpoints").iterdir())


# Import


def test_own_weights_come_back_with_their_normalisation(params, data, experiment, tmp_path):
    path = tmp_path / "own.safetensors"
    write_tensors(path, load_teacher(experiment).state_dict())
    section = importing(params, path, params.teacher.architecture)
    model, _ = import_teacher(data, section)
    log = score_teacher(model, data, section)
    assert torch.equal(predict(model, data.images)[1], predict(load_teacher(experiment), data.images)[1])
    assert [row["validation_accuracy"] for row in log] == [read_json(experiment.teacher_info)["validation_accuracy"]]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "best_prec1": 91.7},
        lambda weights: {f"student.{name}": tensor for name, tensor in weights.items()},
    ],
)
def test_a_public_resnet_is_the_same_network(params, colour, tmp_path, wrap):
    model = make_resnet(RESNET_20)
    path = tmp_path / "public.pt"
    torch.save(wrap(public_weights(model)), path)
    imported, _ = import_teacher(colour, importing(params, path, normalization=IMAGENET))
    pixels = colour.images[:8].float() / 255
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    expected = model((pixels - mean) / std)[1]  # its own normalisation is that of zeros and ones
    torch.testing.assert_close(predict(imported, colour.images[:8])[1], expected, rtol=1e-4, atol=1e-4)


def test_a_shared_teacher_is_half_the_size_and_says_the_same(params, data, experiment, capsys):
    main(["share", "shared.safetensors"])
    assert "set teacher.weights to shared.safetensors" in capsys.readouterr().out
    assert Path("shared.safetensors").stat().st_size < 0.6 * experiment.teacher.stat().st_size
    section = importing(params, "shared.safetensors", params.teacher.architecture)
    imported, _ = import_teacher(data, section)
    expected = predict(load_teacher(experiment), data.images)[1]
    torch.testing.assert_close(predict(imported, data.images)[1], expected, rtol=0.02, atol=0.02)


def test_a_teacher_is_shared_as_safetensors_once_it_is_trained(experiment):
    with pytest.raises(SystemExit, match=r"teacher\.pt: the weights are written as safetensors"):
        main(["share", "teacher.pt"])
    with pytest.raises(SystemExit, match=r"teacher\.safetensors: is the teacher itself, of full precision"):
        main(["share", str(experiment.teacher)])
    experiment.teacher.unlink()
    with pytest.raises(SystemExit, match=r"teacher\.safetensors: no such file"):
        main(["share", "shared.safetensors"])


def test_the_stage_notes_where_a_teacher_comes_from(params, experiment):
    weights = experiment.teacher.rename("own.safetensors")
    section = importing(params, weights, params.teacher.architecture)
    teacher_stage.run(params.model_copy(update={"teacher": section}), experiment)
    info = read_json(experiment.teacher_info)
    assert info["imported_from"] == "own.safetensors"
    assert info["validation_accuracy"] > 0.9
    load_teacher(experiment)


@pytest.mark.parametrize(
    "content",
    [b"", b"no weights\n", b"PK\x03\x04 cut off", {"epoch": 3}, [torch.zeros(2)], torch.nn.ReLU()],
    ids=["empty", "text", "cut", "no tensors", "list", "module"],
)
def test_files_without_a_state_dict_are_refused(params, colour, tmp_path, content):
    path = tmp_path / "teacher.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=r"teacher\.pt: .*state dict.*teacher\.weights"):
        import_teacher(colour, importing(params, path))


def test_the_sum_of_the_weights_is_checked(params, data, experiment):
    section = importing(params, experiment.teacher, params.teacher.architecture)
    import_teacher(data, section.model_copy(update={"weights_sha256": sha256_of(experiment.teacher)}))
    with pytest.raises(UserError, match=r"weights_sha256: .*teacher\.safetensors has SHA-256 [0-9a-f]{64}, not"):
        import_teacher(data, section.model_copy(update={"weights_sha256": "0" * 64}))


def test_a_missing_file_is_named(params, colour, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pt: no such file.*teacher\.weights in params\.yaml"):
        import_teacher(colour, importing(params, tmp_path / "nowhere.pt"))


def test_damaged_safetensors_are_refused(params, colour, tmp_path):
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"teacher\.weights: .*teacher\.safetensors is damaged"):
        import_teacher(colour, importing(params, path))


@pytest.mark.parametrize(
    ("architecture", "n_classes", "complaint"),
    [
        (
            Architecture(family="resnet", depth=8),
            3,
            r"0 tensors missing, 60 unknown, 0 of another shape, such as stages",
        ),
        (Architecture(family="resnet", depth=26), 3, r"30 tensors missing, 0 unknown"),
        (Architecture(family="resnet", depth=20, width=2), 3, r"0 tensors missing, 0 unknown, \d+ of another shape"),
        (Architecture(family="wrn", depth=10), 3, r"such as"),
        (RESNET_20, 10, r"2 of another shape, such as head\.bias.*for 3 classes and 3 channels"),
    ],
    ids=["too deep", "too shallow", "width", "family", "classes"],
)
def test_weights_of_another_architecture_are_refused(params, colour, tmp_path, architecture, n_classes, complaint):
    path = tmp_path / "public.pt"
    torch.save(public_weights(make_resnet(RESNET_20, n_classes)), path)
    with pytest.raises(
        UserError, match=rf"public\.pt: does not fit teacher\.architecture in params\.yaml.*{complaint}"
    ):
        import_teacher(colour, importing(params, path, architecture))


def test_normalisation_must_have_a_number_a_channel(params, colour, tmp_path):
    path = tmp_path / "public.pt"
    torch.save(public_weights(make_resnet(RESNET_20)), path)
    grey = Normalization(mean=[0.5], std=[0.2])
    with pytest.raises(UserError, match=r"teacher\.normalization\.mean: has 1 channels, the teacher's images have 3"):
        import_teacher(colour, importing(params, path, normalization=grey))


@pytest.mark.skipif(not PRETRAINED.exists() or not CIFAR10_ZIP.exists(), reason="needs CIFAR-10 and a public ResNet-20")
@pytest.mark.parametrize(("step", "least", "most"), [(20, 0.88, 1), pytest.param(1, 0.9168, 0.9178, marks=SLOW)])
def test_a_public_resnet_20_reaches_its_accuracy_on_cifar10(params, step, least, most):
    """It is right on 91.73 % of the 10,000 test images; by default every twentieth of them is shown to it."""
    with zipfile.ZipFile(CIFAR10_ZIP) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("test/") and name.endswith(".png"))[
            ::step
        ]
        images = [np.asarray(Image.open(BytesIO(archive.read(name)))).transpose(2, 0, 1) for name in names]
    classes = sorted({name.split("/")[1] for name in names})
    labels = torch.tensor([classes.index(name.split("/")[1]) for name in names])
    none, everything = torch.arange(0), torch.arange(len(names))
    data = Dataset(
        torch.from_numpy(np.stack(images)),
        labels,
        none,
        everything,
        none,
        torch.zeros(3),
        torch.ones(3),
        tuple(classes),
    )
    section = importing(params, PRETRAINED, normalization=IMAGENET)
    log = score_teacher(import_teacher(data, section)[0], data, section)
    assert least < log[-1]["validation_accuracy"] <= most
