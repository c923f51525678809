"""Foreign teachers: checkpoints as people have them, and how a teacher sees images and names classes."""

import argparse
import itertools
import re

import numpy as np
import pytest
import torch
from experiments import make_dataset
from foreign import save, section, taught, write_onnx
from safetensors.torch import save_file
from torch import nn

from nonn.commands.head import load_pretrained
from nonn.core.errors import UserError
from nonn.core.teacher_source import Normalization
from nonn.data.dataset import Dataset
from nonn.deploy.teacher_files import write_teacher
from nonn.runtime.session import run_onnx
from nonn.teachers.teacher import import_teacher, score_teacher
from nonn.training.networks import predict

pytestmark = pytest.mark.usefixtures("code")

# Checkpoints as people have them


def wrapped(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


CHECKPOINTS = {
    "plain": lambda w: w,
    "state_dict": lambda w: {"state_dict": wrapped("model.", w), "epoch": 3},
    "lightning": lambda w: {"state_dict": wrapped("net.", w) | {"loss.weight": torch.ones(3)}},
    "model": lambda w: {"model": wrapped("module.", w), "optimizer": {"state": {0: {"step": torch.zeros(())}}}},
    "compiled": lambda w: {"model_state_dict": wrapped("_orig_mod.", w)},
    "compiled on several GPUs": lambda w: {"net": wrapped("module._orig_mod.", w)},
    "twice wrapped": lambda w: wrapped("module.module.", w),
    "a backbone": lambda w: wrapped("_forward_module.backbone.", w) | wrapped("teacher.", {"fc.bias": w["fc.bias"]}),
    "one of a list": lambda w: wrapped("0.", w),
    "averaged model": lambda w: {"n_averaged": torch.tensor(4)} | wrapped("module.", w),
    "timm": lambda w: {"state_dict": w, "args": argparse.Namespace(model="x", lr=0.1), "metric": np.float64(0.9)},
    "averaged alone": lambda w: {"ema": {"module": w}},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_are_read_as_people_have_them(name, colour, model):
    path = save(CHECKPOINTS[name](dict(model.state_dict())))
    teacher, _ = import_teacher(colour, section(weights=path))
    for key, tensor in teacher.body.network.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.parametrize("name", ["saved by torch.safetensors", "safetensors.pt"])
def test_files_are_known_by_their_content(name, colour, model):
    if name.startswith("saved"):
        save(model.state_dict(), name)
    else:
        save_file(dict(model.state_dict()), name)
    teacher, _ = import_teacher(colour, section(weights=name))
    assert torch.equal(teacher.body.network.fc.weight, model.fc.weight)


def test_several_networks_in_one_state_dict_are_named(colour, model):
    both = wrapped("student.", dict(model.state_dict())) | wrapped("teacher.", dict(model.state_dict()))
    with pytest.raises(UserError, match=r"w\.pt: holds several networks \('student\.', 'teacher\.'\)\. Save the"):
        import_teacher(colour, section(weights=save(both)))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_new_last_layer_starts_from_weights_in_any_order(prefix, colour):
    """As .safetensors files have them, sorted: layers after ``head`` in the alphabet are not the last."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    weights = wrapped(prefix, timm.create_model("test_convnext", num_classes=7).state_dict())
    save_file(weights, "start.safetensors")
    model = load_pretrained(colour, section("timm:test_convnext", weights="start.safetensors"))
    assert (model.body.classifier, model.body.n_outputs) == ("head.fc", 7)
    save_file({n: t for n, t in weights.items() if ".head.fc." not in f".{n}"}, "start.safetensors")
    model = load_pretrained(colour, section("timm:test_convnext", weights="start.safetensors"))
    assert (model.body.classifier, model.body.n_outputs) == ("head.fc", 3)


def test_weights_of_another_size_of_images_say_so(colour):
    timm = pytest.importorskip("timm")
    weights = timm.create_model("test_vit", num_classes=3, img_size=64).state_dict()
    with pytest.raises(UserError, match=r"pos_embed is for images of another size\. Set teacher\.size to what these"):
        import_teacher(colour, section("timm:test_vit", weights=save(weights)))


@pytest.mark.parametrize("averaged", ["model_ema", "ema", "state_dict_ema"])
def test_averaged_weights_are_chosen_on_purpose(averaged, colour, model, capsys):
    own = dict(model.state_dict())
    last = {name: tensor * 0 for name, tensor in own.items()}
    path = save({"model": wrapped("module.", last), averaged: own})
    teacher, _ = import_teacher(colour, section(weights=path))
    assert torch.equal(teacher.body.network.fc.weight, own["fc.weight"])
    assert f"takes the averaged weights ({averaged}); teacher.ema: false takes the others" in capsys.readouterr().err
    teacher, _ = import_teacher(colour, section(weights=path, ema=False))
    assert not teacher.body.network.fc.weight.any()


# Preprocessing and classes


def test_preprocessing_travels_with_the_teacher(folder, colour):
    """A grey picture three times, BGR, bytes and normalisation, in torch as in the ONNX file that devices would run."""
    grey = make_dataset(channels=1, size=32)
    write_onnx(folder / "small.onnx", taught(colour))
    normal = Normalization(mean=[103.0, 116.0, 123.0], std=[50.0, 60.0, 70.0])
    params = section("onnx:small.onnx", normalization=normal, pixels="byte", colour_order="bgr")
    for data in (grey, colour):
        teacher, _ = import_teacher(data, params)
        images = data.images[:5]
        bgr = images.expand(-1, 3, -1, -1).flip(1).float()
        mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (normal.mean, normal.std))
        torch.testing.assert_close(teacher.preprocess(images), (bgr - mean) / std)
        write_teacher(teacher, data, folder / "teacher.onnx")
        exported = run_onnx(folder / "teacher.onnx", images.numpy())
        np.testing.assert_allclose(exported, predict(teacher, images)[1], rtol=1e-4, atol=1e-3)


def test_outputs_are_mapped_to_the_classes_of_the_data_set(folder, colour, model):
    """In another order, and with a class more than the data set has."""
    order = ["chequered", "dots", "across", "down"]
    wide = taught(colour)
    wide.fc = nn.Linear(16, 4)
    with torch.no_grad():
        for name, row in (("across", 0), ("down", 1), ("chequered", 2)):
            wide.fc.weight[order.index(name)] = model.fc.weight[row]
            wide.fc.bias[order.index(name)] = model.fc.bias[row]
    write_onnx(folder / "wide.onnx", wide)
    teacher, record = import_teacher(colour, section("onnx:wide.onnx", classes=order))
    assert record["outputs"] == [2, 3, 0]
    with torch.no_grad():
        logits = model(colour.images[:9].float() / 255)
    torch.testing.assert_close(predict(teacher, colour.images[:9])[1], logits, rtol=1e-4, atol=1e-4)
    write_teacher(teacher, colour, folder / "teacher.onnx")
    found = run_onnx(folder / "teacher.onnx", colour.images[:9].numpy())
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)


# What decides about a teacher


def test_a_teacher_in_another_order_is_refused_with_the_order(colour):
    """Near chance: the order that a trial finds is named, and with it the teacher is taken."""
    turned = taught(colour)
    with torch.no_grad():
        turned.fc.weight.copy_(turned.fc.weight[[1, 2, 0]])
        turned.fc.bias.copy_(turned.fc.bias[[1, 2, 0]])
    params = section(weights=save(turned.state_dict()))
    teacher, _ = import_teacher(colour, params)
    with pytest.raises(
        UserError, match=r"0\.0% .* about chance.*teacher\.classes: \[down, chequered, across\]"
    ) as told:
        score_teacher(teacher, colour, params)
    assert len(str(told.value).splitlines()) == 1
    params = section(weights="w.pt", classes=["down", "chequered", "across"])
    teacher, _ = import_teacher(colour, params)
    assert score_teacher(teacher, colour, params)[0]["validation_accuracy"] > 0.9
    for wrong in itertools.permutations(params.classes):  # the advice is of the network, whatever was said before
        if sum(a != b for a, b in zip(wrong, params.classes, strict=True)) == 3:
            told = section(weights="w.pt", classes=list(wrong))
            teacher, _ = import_teacher(colour, told)
            with pytest.raises(UserError, match=r"teacher\.classes: \[down, chequered, across\]"):
                score_teacher(teacher, colour, told)


def test_pixels_of_another_range_are_refused_with_the_right_one(colour, model):
    """Trained on 0 to 1, given 0 to 255."""
    params = section(weights=save(model.state_dict()), pixels="byte", expected_accuracy=0.99)
    teacher, _ = import_teacher(colour, params)
    with pytest.raises(UserError, match=r"Likely cause: how it sees images; with teacher\.pixels: unit it is right on"):
        score_teacher(teacher, colour, params)


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        # Numbers of grey levels from 0 to 255, for a network that was trained on fractions.
        ({"normalization": {"mean": [123.7], "std": [58.4]}}, {"normalization": {"mean": [0.0], "std": [1.0]}}),
        # The same with pixels of that range: they are right together, and the network wants neither.
        (
            {"normalization": {"mean": [123.7], "std": [58.4]}, "pixels": "byte", "expected_accuracy": 0.99},
            {"normalization": {"mean": [0.0], "std": [1.0]}, "pixels": "unit"},
        ),
        # Fractions where the range says grey levels.
        ({"normalization": {"mean": [0.01], "std": [0.9]}, "pixels": "byte"}, {"pixels": "unit"}),
    ],
)
def test_the_remedy_for_a_wrong_normalisation_works(keys, remedy, colour, model):
    """As it is printed: with the keys that it names, the teacher is taken."""
    save(model.state_dict())
    params = section(weights="w.pt", **keys)
    teacher, _ = import_teacher(colour, params)
    written = " and ".join(f"teacher.{key}: {str(value).replace(chr(39), '')}" for key, value in remedy.items())
    with pytest.raises(UserError, match=re.escape(f"how it sees images; with {written} it is right on")):
        score_teacher(teacher, colour, params)
    params = section(weights="w.pt", **keys | remedy)
    teacher, _ = import_teacher(colour, params)
    assert score_teacher(teacher, colour, params)[0]["validation_accuracy"] > 0.9


def test_an_untrained_teacher_is_refused(colour):
    """No other reading of the images helps, so all likely causes are listed."""
    params = section()
    teacher, _ = import_teacher(colour, params)
    with pytest.raises(UserError, match=r"about chance.*Likely causes: normalization, pixels"):
        score_teacher(teacher, colour, params)


def test_a_teacher_that_has_seen_the_validation_images_is_told_from_one_that_has_not(colour, model, capsys):
    """On validation as good as on training, and much better than on test."""
    params = section(weights=save(model.state_dict()))
    teacher, _ = import_teacher(colour, params)
    score_teacher(teacher, colour, params)
    assert "has probably been trained on the validation images" not in capsys.readouterr().err
    from nonn.teachers.sanity_check import leak_warning

    labels = colour.labels.clone()
    labels[colour.test] = (labels[colour.test] + 1) % 3  # test images that it has not learned
    other = Dataset(**{**vars(colour), "labels": labels})
    warning = leak_warning(teacher, 0.95, other)
    assert warning
    assert "Give the data set a folder val/" in warning
    assert leak_warning(teacher, 0.6, colour) is None
