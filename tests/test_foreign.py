"""Foreign teachers: torchvision, timm, code of the user's own, ONNX files and exported programs."""

import argparse
import contextlib
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from experiments import make_dataset, tiny_params, train_network, write_dataset
from onnx import helper, numpy_helper
from torch import Tensor, nn

from nonn.core.errors import UserError
from nonn.core.files import read_json
from nonn.core.jobs import check_named_files, list_jobs
from nonn.core.params import Architecture, Normalization, Params, Teacher
from nonn.core.paths import Paths
from nonn.data.dataset import Dataset
from nonn.deploy.cost import measure_cost
from nonn.deploy.onnx_files import write_classifier
from nonn.deploy.teacher_files import measure_file_cost, write_teacher
from nonn.method.exporting import export_solo
from nonn.method.filter_graph import activation_hub_graph, live_filters, normalise_activity
from nonn.report.design_plots import draw_architectures
from nonn.runtime.session import run_onnx
from nonn.stages import baseline, evaluate, export
from nonn.stages import graph as graph_stage
from nonn.stages import signals as signals_stage
from nonn.stages import teacher as teacher_stage
from nonn.teachers.foreign import import_foreign, load_foreign
from nonn.teachers.signals import as_activity, compute_signals
from nonn.teachers.store import load_teacher, tensors_of
from nonn.teachers.teacher import import_teacher, score_teacher
from nonn.testbed.deployments import as_network
from nonn.training.networks import ConvNet, predict

#: A network as a user writes it: SiLU features, which are of any sign, and ``fc`` as its classifier.
CODE = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, channels=3, n_classes=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 24, 3, stride=2)
        self.more = nn.Sequential(nn.BatchNorm2d(24), nn.SiLU(), nn.Conv2d(24, 16, 3), nn.SiLU())
        self.fc = nn.Linear(16, n_classes)

    def forward(self, x):
        return self.fc(self.more(self.conv(x)).mean((2, 3)))

def make():
    torch.manual_seed(0)
    return Small()
"""


@pytest.fixture(scope="module")
def colour() -> Dataset:
    return make_dataset(channels=3, size=32)


def taught(data: Dataset) -> nn.Module:
    """The user's network, its last layer fitted to the training images by least squares."""
    scope: dict = {}
    exec(CODE, scope)
    model = scope["make"]().eval()
    images, labels = data.split("train")
    with torch.no_grad():
        features = model.more(model.conv(images.float() / 255)).mean((2, 3))
        inputs = torch.cat([features, torch.ones(len(images), 1)], 1).double()
        targets = F.one_hot(labels, 3).double() * 10
        ridge = torch.linalg.solve(inputs.T @ inputs + 1e-6 * torch.eye(17), inputs.T @ targets).float()
        model.fc.weight.copy_(ridge[:-1].T)
        model.fc.bias.copy_(ridge[-1])
    return model


@pytest.fixture(scope="module")
def model(colour) -> nn.Module:
    return taught(colour)


@pytest.fixture(autouse=True)
def code(folder):
    """The network's code as a package below the working directory, forgotten after the test."""
    (folder / "nets").mkdir()
    (folder / "nets/__init__.py").touch()
    (folder / "nets/small.py").write_text(CODE)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        del sys.modules[name]
    with contextlib.suppress(ValueError):
        sys.path.remove(str(folder))


def section(source: str = "module:nets.small:make", **keys) -> Teacher:
    return Teacher(source=source, threads=1, **keys)


def save(weights, name: str = "w.pt") -> str:
    torch.save(weights, name)
    return name


def write_onnx(path: Path, model: nn.Module, batch: int | str = "N", tail: list | None = None) -> None:
    """The user's network as an ONNX file, made by hand: the exporter takes seconds."""
    weights = {name: t.numpy() for name, t in model.state_dict().items() if t.dim()}
    norm = [f"more.0.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], strides=[2, 2]),
        helper.make_node("BatchNormalization", ["a", *norm], ["b"]),
        helper.make_node("Sigmoid", ["b"], ["c"]),
        helper.make_node("Mul", ["b", "c"], ["d"]),
        helper.make_node("Conv", ["d", "more.2.weight", "more.2.bias"], ["e"]),
        helper.make_node("Sigmoid", ["e"], ["f"]),
        helper.make_node("Mul", ["e", "f"], ["g"]),
        helper.make_node("GlobalAveragePool", ["g"], ["h"]),
        helper.make_node("Flatten", ["h"], ["features"]),
        helper.make_node("Gemm", ["features", "fc.weight", "fc.bias"], ["y"], name="fc", transB=1),
        *(tail or []),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, 3, 32, 32])],
        [helper.make_tensor_value_info("y" if not tail else "z", onnx.TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def write_program(path: Path, model: nn.Module, batch: bool = True) -> None:
    """The network as an exported program, for any number of images or for one alone."""
    example = torch.zeros(4 if batch else 1, 3, 32, 32)
    shapes = ({0: torch.export.Dim("batch")},) if batch else None
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=shapes), path)


def write_source(kind: str, model: nn.Module) -> Teacher:
    """The user's network as a source of this kind, and the section that names it."""
    if kind == "onnx":
        write_onnx(Path("small.onnx"), model)
        return section("onnx:small.onnx")
    if kind == "export":
        write_program(Path("small.pt2"), model)
        return section("export:small.pt2")
    return section(weights=save(model.state_dict()))


# All kinds


@pytest.mark.parametrize("kind", ["module", "onnx", "export"])
def test_a_network_is_the_same_teacher_whatever_it_comes_as(kind, colour, model):
    """Features and logits to 1e-4, at import and as later stages load it; and its ONNX file says the same."""
    params = write_source(kind, model)
    teacher, record = import_teacher(colour, params)
    images = colour.images[:40]
    with torch.no_grad():
        expected = model.more(model.conv(images.float() / 255)).mean((2, 3))
        logits = model.fc(expected)
        again = load_foreign(record, tensors_of(teacher), colour)
        for own in (teacher, again):
            found = predict(own, images)
            torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found[1], logits, rtol=1e-4, atol=1e-4)
    assert expected.min() < 0  # or nothing here is about features of any sign
    assert score_teacher(teacher, colour, params)[0]["validation_accuracy"] > 0.9
    if kind == "onnx":  # the others take the exporter's seconds: see the slow test below
        write_teacher(teacher, colour, Path("teacher.onnx"))
        exported = run_onnx(Path("teacher.onnx"), images.numpy())
        np.testing.assert_allclose(exported, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["module", "onnx"])
def test_the_stages_run_with_a_foreign_teacher(kind, colour, model):
    """From the teacher to the graph, whose activity is not negative; its source stands where an architecture would."""
    written = write_source(kind, model).model_dump(exclude_unset=True)
    raw = tiny_params({"signals": {"attention": False}})
    raw["networks"]["2s"]["baselines"] = {}
    raw["teacher"] = written
    params = Params.model_validate(raw)
    paths = Paths(params.experiment)
    write_dataset(colour, paths)
    for stage in (teacher_stage, signals_stage, graph_stage):
        stage.run(params, paths)
    info, graph = read_json(paths.teacher_info), read_json(paths.graph_info)
    assert info["architecture"] is None
    assert info["source"] == params.teacher.source
    assert info["n_filters"] == graph["n_filters"] == 16
    assert graph["n_live"] > 1
    assert load_teacher(paths, colour).n_features == 16


@pytest.mark.slow
def test_a_foreign_teacher_teaches_a_network(colour, model):
    """From the teacher to the scores and the exported files: students learn, and the teacher is among the rows."""
    raw = tiny_params({"signals": {"attention": False}, "distill": {"epochs": 30, "lr": 0.1}})
    raw["networks"]["2s"]["baselines"] = {"kd": 2}
    raw["teacher"] = write_source("onnx", model).model_dump(exclude_unset=True)
    params = Params.model_validate(raw)
    paths = Paths(params.experiment)
    write_dataset(colour, paths)
    for stage in (teacher_stage, signals_stage, graph_stage):
        stage.run(params, paths)
    train_network(params, paths)
    for seed in range(2):
        baseline.run(params, paths, "2s", "kd", seed)
    evaluate.run(params, paths)
    scores = {row["method"]: row for row in read_json(paths.evaluation)["rows"]}
    assert scores["teacher"]["accuracy_mean"] > 0.9
    assert scores["nonn"]["accuracy_mean"] > 0.6  # of three classes
    export.run(params, paths, "solo")
    assert read_json(paths.export("solo") / "manifest.json")["teacher"]["students"][0]["cost"]["macs"] > 0
    as_network(paths.export("solo"), "teacher", Path("split"))  # as the test bed runs it on a device
    assert run_onnx(Path("split/0.onnx"), colour.images[:2].numpy()).shape == (2, 3)


def test_a_foreign_onnx_file_is_exported_with_its_cost(folder, colour, model):
    write_onnx(folder / "small.onnx", model)
    teacher, _ = import_teacher(colour, section("onnx:small.onnx"))
    manifest = export_solo({"teacher": teacher}, colour, folder, "float32")["teacher"]  # compares outputs itself
    cost = manifest["students"][0]["cost"]
    macs = 24 * 15 * 15 * 3 * 9 + 16 * 13 * 13 * 24 * 9 + 16 * 3
    constants = 3 + 3  # of the preprocessing: no mean and no deviation a channel, but one for all
    assert cost["macs"] == macs
    assert abs(cost["params"] - sum(t.numel() for t in model.state_dict().values() if t.dim())) <= constants
    assert cost["peak_activation_bytes"] >= 4 * (24 * 15 * 15 + 16 * 13 * 13)


@pytest.mark.slow
def test_the_cost_of_a_file_is_that_of_the_network(data):
    """Counted by running the file, as `measure_cost` counts it from the network."""
    student = ConvNet(Architecture(family="wrn", depth=10), 1, 3).eval()
    write_classifier(student, data, Path("student.onnx"), "float32")
    expected, found = measure_cost(student, 1, 28), measure_file_cost(Path("student.onnx"))
    assert found.macs == expected.macs
    assert found.peak_activation_bytes == pytest.approx(expected.peak_activation_bytes, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["module", "export"])
def test_modules_and_programs_are_exported_to_onnx(kind, colour, model):
    teacher, _ = import_teacher(colour, write_source(kind, model))
    export_solo({"teacher": teacher}, colour, Path(), "float32")


# Libraries

QUICK = ["torchvision:mobilenet_v3_small", "timm:test_vit", "timm:test_convnext"]
SLOW = [
    "resnet18",
    "wide_resnet50_2",
    "vgg11",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "convnext_tiny",
    "regnet_y_400mf",
]
SLOW = [*(f"torchvision:{name}" for name in (*SLOW, "vit_b_16")), "timm:efficientnet_b0", "timm:vit_tiny_patch16_224"]


@pytest.mark.parametrize("source", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_architectures_of_libraries_pass_the_check_and_make_a_graph(source, colour, params):
    """Random weights, from a file; the check compares the features through the classifier with the logits."""
    if source.startswith("timm"):
        pytest.importorskip("timm")
    from nonn.teachers.libraries import build_network

    torch.manual_seed(0)
    network = build_network(section(source), 3, 32, 3, None, download=False).network
    randomise(network)
    teacher, record = import_foreign(colour, section(source, weights=save(network.state_dict())))
    assert record["outputs"] is None
    views = params.signals.model_copy(update={"views": 1, "attention": False})
    signals = compute_signals(teacher, colour, views)
    pooled = signals["validation_pooled"]
    assert pooled.min() >= 0
    assert pooled.shape == (30, teacher.n_features)
    assert live_filters(pooled).sum() > 1
    few = normalise_activity(pooled, 8)[:, :200]
    assert activation_hub_graph(few).isfinite().all()
    reloaded = load_foreign(record, tensors_of(teacher), colour)
    torch.testing.assert_close(predict(reloaded, colour.images[:4]), predict(teacher, colour.images[:4]))


def randomise(network: nn.Module) -> None:
    """Batch norms that have seen images, and biases that are not zero: a fresh network may answer all images alike."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("running_mean", "bias")):
                tensor += 0.1 * torch.randn_like(tensor)
            if name.endswith(("gamma", "layer_scale")):  # ConvNeXt begins with next to nothing in its blocks
                tensor += 0.5


def test_an_onnx_file_of_a_library_gives_the_same_signals(folder, colour, params):
    """Of a small network: the same features and logits to 1e-4 as the module."""
    model = taught(colour)
    write_onnx(folder / "small.onnx", model, batch=1)  # image by image, as most files are made
    teacher, _ = import_teacher(colour, section("onnx:small.onnx"))
    views = params.signals.model_copy(update={"views": 1, "attention": False})
    signals = compute_signals(teacher, colour, views)
    with torch.no_grad():
        logits = model(colour.split("validation")[0].float() / 255)
    torch.testing.assert_close(signals["validation_logits"].float(), logits, rtol=1e-3, atol=1e-2)  # float16


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


def test_pixels_of_another_range_are_refused_with_the_right_one(colour, model):
    """Trained on 0 to 1, given 0 to 255."""
    params = section(weights=save(model.state_dict()), pixels="byte", expected_accuracy=0.99)
    teacher, _ = import_teacher(colour, params)
    with pytest.raises(UserError, match=r"Likely cause: how it sees images; with teacher\.pixels: unit it is right on"):
        score_teacher(teacher, colour, params)


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
    from nonn.teachers.verdict import seen_before

    labels = colour.labels.clone()
    labels[colour.test] = (labels[colour.test] + 1) % 3  # test images that it has not learned
    other = Dataset(**{**vars(colour), "labels": labels})
    told = seen_before(teacher, 0.95, other)
    assert told
    assert "Give the data set a folder val/" in told
    assert seen_before(teacher, 0.6, colour) is None


# Wrong teachers


def bad(name: str, model: nn.Module) -> Teacher:
    """Write one wrong teacher into the working directory; return the section that names it."""
    weights, module = dict(model.state_dict()), section
    nan = weights | {"conv.weight": weights["conv.weight"].clone().fill_(float("nan"))}
    inf = weights | {"fc.bias": weights["fc.bias"] / 0}
    if name.startswith("code "):
        body = {
            "fails": "def make():\n    return 1 / 0",
            "does not parse": "def make(:",
            "no module": "def make():\n    return [1, 2]",
            "softmax": f"{CODE}\n\ndef make():\n    return nn.Sequential(Small(), nn.Softmax(1))",
            "tuple": f"{CODE}\n\nclass make(Small):\n    def forward(self, x):\n        return super().forward(x), x\n",
            "no linear layer": "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 3, 3), "
            "nn.AdaptiveAvgPool2d(1), nn.Flatten())",
            "maps": "from torch import nn\ndef make():\n    return nn.Conv2d(3, 3, 3)",
            "fixed size": "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))",
        }[name.removeprefix("code ")]
        Path("nets/wrong.py").write_text(body)
        return section("module:nets.wrong:make")
    if name == "ONNX with softmax":
        write_onnx(Path("a.onnx"), model, tail=[helper.make_node("Softmax", ["y"], ["z"])])
        return section("onnx:a.onnx")
    if name in ("ONNX cut off", "ONNX with its weights elsewhere"):
        write_onnx(Path("a.onnx"), model)
        if name == "ONNX cut off":
            Path("a.onnx").write_bytes(Path("a.onnx").read_bytes()[:500])
        else:
            onnx.save(onnx.load("a.onnx"), "b.onnx", save_as_external_data=True, location="b.data", size_threshold=0)
            Path("b.data").unlink()
        return section("onnx:a.onnx" if name == "ONNX cut off" else "onnx:b.onnx")
    if name == "batches of 8":
        write_onnx(Path("a.onnx"), model, batch=8)
        return section("onnx:a.onnx")
    if name == "no program":
        Path("a.pt2").write_bytes(b"no program")
        return section("export:a.pt2")
    if name == "a folder":
        Path("folder.onnx").mkdir()
        return section("onnx:folder.onnx")
    if name == "Keras":
        Path("w.pt").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    if name == "Git LFS":
        Path("w.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    if name == "web page":
        Path("w.pt").write_text("<!DOCTYPE html><html>Not found</html>")
    if name == "ONNX as weights":
        write_onnx(Path("w.onnx"), model)
        return section(weights="w.onnx")
    if name == "program as weights":
        write_program(Path("w.pt"), model)
    contents = {
        "NaN": nan,
        "infinity": inf,
        "a pickled model": nn.Linear(2, 2),
        "two networks": {"generator": weights, "critic": weights},
        "optimizer alone": {"optimizer": {"state": {}}, "epoch": 3},
        "another model": {"a.weight": torch.zeros(2, 2)},
        "other classes": weights | {"fc.weight": torch.zeros(10, 16), "fc.bias": torch.zeros(10)},
    }
    if name in contents:
        save(contents[name])
    keys = {
        "no such library model": {"source": "torchvision:resnet19"},
        "no such module": {"source": "module:nets.missing:make"},
        "no such factory": {"source": "module:nets.small:build"},
        "no such layer": {"classifier": "fcc"},
        "unknown classes": {"classes": ["across", "dwon", "chequered"]},
    }
    if name in keys:
        return section(**keys[name])
    return module(weights="w.pt")


BAD = {
    "NaN": r"w\.pt: NaN or infinite values in 1 of \d+ tensors, such as conv\.weight",
    "infinity": r"NaN or infinite values in 1 of \d+ tensors, such as fc\.bias",
    "a pickled model": r"w\.pt: a pickle that needs code \(torch\.nn\.modules\.linear\.Linear\)",
    "two networks": r"holds several state dicts \('generator', 'critic'\)",
    "optimizer alone": r"holds no state dict",
    "another model": r"does not fit teacher\.source module:nets\.small:make \(\d+ tensors missing, 1 unknown",
    "other classes": r"the teacher has 10 outputs, and 3 classes are expected",
    "Keras": r"is an HDF5 file, as Keras writes it; export the model to ONNX",
    "Git LFS": r"is a pointer of Git LFS",
    "web page": r"is a web page, as a failed download leaves it",
    "ONNX as weights": r"is an ONNX file; set teacher\.source to onnx:w\.onnx",
    "program as weights": r"is an exported program; set teacher\.source to export:w\.pt",
    "ONNX with softmax": r"differ by [\d.]+: a softmax follows it",
    "ONNX cut off": r"a\.onnx is not an ONNX file",
    "ONNX with its weights elsewhere": r"b\.onnx has its weights in a file that is not there or damaged",
    "batches of 8": r"takes batches of 8 images alone",
    "no program": r"is not a program that torch\.export wrote",
    "a folder": r"is a folder\. Name a regular file",
    "no such library model": r"torchvision has no classifier 'resnet19' \(did you mean 'resnet1?\d'\?\)",
    "no such module": r"there is no module nets\.missing",
    "no such factory": r"module nets\.small has no 'build'",
    "no such layer": r"has no linear layer 'fcc' \(did you mean 'fc'\?\)",
    "unknown classes": r"class 'down' of the data set is not among .* \(did you mean 'dwon'\?\)",
    "code fails": r"fails \(ZeroDivisionError: division by zero\)",
    "code does not parse": r"fails \(SyntaxError",
    "code no module": r"returns a list, not an nn\.Module",
    "code softmax": r"a softmax follows it",
    "code tuple": r"answers with a tuple, not with the logits",
    "code no linear layer": r"runs no linear layer of 3 outputs",
    "code maps": r"answers 16 images with shape \(16, 3, 30, 30\)",
    "code fixed size": r"fails on images of 3 channels and 32 x 32 pixels",
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_teachers_are_refused_in_one_line(name, colour, model):
    params = bad(name, model)
    with pytest.raises(UserError, match=BAD[name]) as told:
        import_teacher(colour, params)
    assert len(str(told.value).splitlines()) == 1, told.value
    assert str(told.value).endswith((".", "`")), told.value


def test_weights_of_torchvision_in_our_families_are_told_apart(colour):
    """A state dict of torchvision's ResNet-18 given to a CIFAR ResNet: the remedy is another source."""
    weights = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer4.0.conv1.weight": torch.zeros(512, 256, 3, 3)}
    params = Teacher.model_validate(
        {"architecture": {"family": "resnet", "depth": 20}, "weights": save(weights), "threads": 1}
    )
    with pytest.raises(UserError, match=r"set teacher\.source to torchvision:NAME or timm:NAME"):
        import_teacher(colour, params)


def test_downloads_that_fail_are_one_line(folder, colour, monkeypatch):
    def refuse(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(folder))
    with pytest.raises(UserError, match=r"null takes the weights that torchvision downloads for resnet18, and the dow"):
        import_teacher(colour, section("torchvision:resnet18"))


# Parameters


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"source": "tv:resnet18"}, r"no source 'tv:resnet18'; write one of train, torchvision:NAME"),
        ({"source": "torchvison:resnet18"}, r"did you mean 'torchvision'\?"),
        ({"source": "module:nets"}, r"is not of the form module:PACKAGE\.FILE:FACTORY"),
        ({"source": "onnx:"}, r"is not of the form onnx:FILE\.onnx"),
        ({"source": "onnx:a.onnx", "weights": "a.pt"}, r"holds its weights itself"),
        ({"source": "torchvision:resnet18", "weights": "https://host/w.pt"}, r"is an address; download it"),
        ({"source": "torchvision:resnet18", "classes": ["a", "b", "a"]}, r"'a' is listed twice"),
        ({}, r"architecture: source train needs one"),
        ({"architecture": {"family": "wrn", "depth": 10}, "expected_accuracy": 0.9}, r"belongs to an imported teacher"),
    ],
)
def test_keys_that_do_not_suit_the_source_are_refused(keys, complaint):
    with pytest.raises(ValueError, match=complaint):
        Teacher.model_validate({"threads": 1, **keys})


def test_few_lines_are_enough_for_a_foreign_teacher():
    raw = tiny_params({"signals": {"attention": False}})
    raw["networks"]["2s"]["baselines"] = {}
    raw["teacher"] = {"source": "torchvision:resnet18", "threads": 2}
    assert Params.model_validate(raw).teacher.is_foreign
    raw["signals"]["attention"] = True
    with pytest.raises(ValueError, match=r"signals\.attention: only teachers of source train have attention maps"):
        Params.model_validate(raw)


def test_dvc_watches_the_files_of_a_source():
    raw = tiny_params({"signals": {"attention": False}})
    raw["networks"]["2s"]["baselines"] = {}

    def jobs(**keys) -> dict:
        return list_jobs(Params.model_validate(raw | {"teacher": {"threads": 1, **keys}}))

    assert jobs(source="onnx:a.onnx")["teacher"] == "a.onnx"
    Path("a.onnx.data").touch()
    assert jobs(source="onnx:a.onnx")["teacher_data"] == "a.onnx.data"
    assert jobs(source="module:nets.small:make")["teacher"] == "nets"
    assert jobs(source="module:nets.small:make", weights="w.pt")["weights"] == "w.pt"
    params = Params.model_validate(raw | {"teacher": {"threads": 1, "source": "onnx:missing.onnx"}})
    with pytest.raises(UserError, match=r"teacher\.source: missing\.onnx does not exist\. Name a file"):
        check_named_files(params)


def test_code_that_has_changed_since_the_import_is_refused(colour, model):
    teacher, record = import_teacher(colour, section(weights=save(model.state_dict())))
    Path("nets/other.py").write_text("# may be imported by the network's code\n")
    with pytest.raises(UserError, match=r"the code of module:nets\.small:make has changed since the stage teacher"):
        load_foreign(record, tensors_of(teacher), colour)


def test_activity_is_what_is_positive_of_a_feature():
    """Rectified features stay as they are, to the bit."""
    features = Tensor([[0.0, 2.5, -0.1]])
    assert as_activity(features).tolist() == [[0.0, 2.5, 0.0]]
    assert torch.equal(as_activity(features.relu()), features.relu())


def test_live_filters_are_those_that_are_not_constant():
    pooled = Tensor([[0.0, 2.0, 0.1], [0.0, 2.0, 0.3]])
    assert live_filters(pooled).tolist() == [False, False, True]


def test_figures_call_a_foreign_teacher_by_its_source():
    cost = {"weight_bytes": 1024, "peak_activation_bytes": 1024, "macs": 10**6}
    row = {"title": "Teacher", "method": "teacher", "architecture": "timm:vit", "n_filters": None, "cost": cost}
    own = row | {"title": "Student", "architecture": Architecture(family="wrn", depth=10)}
    (axis,) = draw_architectures([row, own], 3, 32).axes
    assert any("Teacher\ntimm:vit\n2 KiB" in text.get_text() for text in axis.texts)
