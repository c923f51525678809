"""Foreign teachers: torchvision, timm, code of the user's own, ONNX files and exported programs."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import read_subset, tiny_params, train_network, write_dataset
from foreign import CODE, save, section, taught, write_half, write_onnx, write_program, write_source
from torch import Tensor, nn
from torchvision import models

from nonn.core.architecture import Architecture
from nonn.core.errors import UserError
from nonn.core.files import read_json
from nonn.core.params import Params, TeacherParams
from nonn.core.paths import Paths
from nonn.deploy.onnx_files import write_classifier
from nonn.deploy.teacher_files import measure_file_cost, write_teacher
from nonn.deploy.traced_cost import measure_cost
from nonn.method.exporting import check_outputs, export_solo
from nonn.method.filter_graph import activation_hub_graph, live_filters, normalise_activity
from nonn.report.design_plots import draw_architectures
from nonn.runtime.session import run_onnx
from nonn.stages import baseline, evaluate, export
from nonn.stages import graph as graph_stage
from nonn.stages import signals as signals_stage
from nonn.stages import teacher as teacher_stage
from nonn.teachers.foreign import import_foreign, load_foreign
from nonn.teachers.libraries import build_network
from nonn.teachers.loading import load_teacher, tensors_of
from nonn.teachers.signals import as_activity, compute_signals
from nonn.teachers.teacher import import_teacher, score_teacher
from nonn.testbed.deployments import as_network
from nonn.training.networks import ConvNet, predict

pytestmark = pytest.mark.usefixtures("code")

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


@pytest.mark.parametrize("kind", ["module", "onnx", "export"])
def test_weights_of_16_bits_make_a_teacher_too(kind, colour, model):
    """To the precision that they have; a module becomes one of float32."""
    if kind == "module":
        Path("nets/small.py").write_text(f"{CODE}\n\ndef half():\n    return Small().half()\n")
        params = section("module:nets.small:half", weights=save(model.state_dict()))
    elif kind == "onnx":
        write_half(Path("small.onnx"), model)
        params = section("onnx:small.onnx")
    else:
        write_program(Path("small.pt2"), In16Bits(model, torch.float16).eval())
        params = section("export:small.pt2")
    teacher, record = import_teacher(colour, params)
    images = colour.images[:40]
    with torch.no_grad():
        expected = model(images.float() / 255)
    for own in (teacher, load_foreign(record, tensors_of(teacher), colour)):
        features, logits = predict(own, images)
        assert features.dtype == logits.dtype == torch.float32
        assert (logits.argmax(1) == expected.argmax(1)).float().mean() > 0.9
    write_teacher(teacher, colour, Path("teacher.onnx"))
    found = run_onnx(Path("teacher.onnx"), images.numpy())
    check_outputs(Path("teacher.onnx"), found, logits, "float32", teacher.body.tolerance)


def test_what_onnx_runtime_does_not_calculate_in_is_refused(colour, model):
    write_program(Path("small.pt2"), In16Bits(model, torch.bfloat16).eval())
    with pytest.raises(UserError, match=r"small\.pt2 computes in bfloat16, which ONNX Runtime does not"):
        import_teacher(colour, section("export:small.pt2"))


class In16Bits(nn.Module):
    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = copy.deepcopy(model).to(dtype), dtype

    def forward(self, x):
        return self.model(x.to(self.dtype)).float()


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
    assert load_teacher(paths).n_features == 16


def test_what_asks_for_more_filters_is_refused_once_the_teacher_is_loaded(colour, model):
    raw = tiny_params({"signals": {"attention": False}, "graph": {"top_k": 17}})
    raw["networks"]["2s"]["baselines"] = {}
    raw["teacher"] = write_source("module", model).model_dump(exclude_unset=True)
    params = Params.model_validate(raw)
    paths = Paths(params.experiment)
    write_dataset(colour, paths)
    with pytest.raises(UserError, match=r"^params\.yaml: graph\.top_k: is 17, but the teacher has only 16 filters"):
        teacher_stage.run(params, paths)


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
    randomise(network, colour.images)
    with torch.no_grad():  # logits of a network that nobody has trained may be beyond 16 bits
        [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1].weight.mul_(1e-3)
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


def randomise(network: nn.Module, images: Tensor) -> None:
    """Biases that are not zero, and batch norms that have seen images: a fresh network may answer all images alike."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("bias"):
                tensor += 0.1 * torch.randn_like(tensor)
            if name.endswith(("gamma", "layer_scale")):  # ConvNeXt begins with next to nothing in its blocks
                tensor += 0.5
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        network.train()(images / 128 - 1)
        network.eval()


def test_an_onnx_file_of_a_library_gives_the_same_signals(folder, colour, params):
    """Of a small network: the same features and logits to 1e-4 as the module."""
    model = taught(colour)
    write_onnx(folder / "small.onnx", model, batch=1)  # image by image, as most files are made
    teacher, _ = import_teacher(colour, section("onnx:small.onnx"))
    views = params.signals.model_copy(update={"views": 1, "attention": False})
    signals = compute_signals(teacher, colour, views)
    with torch.no_grad():
        logits = model(read_subset(colour, "validation")[0].float() / 255)
    torch.testing.assert_close(signals["validation_logits"].float(), logits, rtol=1e-3, atol=1e-2)  # float16


def test_code_that_has_changed_since_the_import_is_refused(colour, model):
    teacher, record = import_teacher(colour, section(weights=save(model.state_dict())))
    Path("nets/other.py").write_text("# may be imported by the network's code\n")
    with pytest.raises(UserError, match=r"the code of module:nets\.small:make has changed since the stage teacher"):
        load_foreign(record, tensors_of(teacher), colour)


@pytest.mark.parametrize("source", ["module:single:make", "module:nets.single:make"])
def test_code_that_imports_what_is_not_watched_is_refused(source, colour):
    Path("helper.py").write_text(CODE)
    Path(source.split(":")[1].replace(".", "/")).with_suffix(".py").write_text(
        "def make():\n    import helper\n    return helper.make()\n"
    )
    with pytest.raises(UserError, match=rf"{source} imports helper\.py, which is not watched\. Put all its code into"):
        import_teacher(colour, section(source))


@pytest.mark.parametrize("source", ["module:single:make", "module:nets:make", "module:nets.both:make"])
def test_code_of_one_file_or_one_package_is_watched(source, colour):
    Path("single.py").write_text(CODE)
    for name in ("__init__", "both"):
        Path(f"nets/{name}.py").write_text("from .small import make\n")
    import_teacher(colour, section(source))


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


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("has_auxiliary", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_networks_with_auxiliary_classifiers_are_built_as_their_weights_are(name, has_auxiliary, prefix):
    saved = models.get_model(name, weights=None, init_weights=False, aux_logits=has_auxiliary, num_classes=3)
    params = TeacherParams(source=f"torchvision:{name}", threads=1)
    weights = {f"{prefix}{key}": tensor for key, tensor in saved.state_dict().items()}
    built = build_network(params, 3, 299, 3, weights, download=False).network
    built.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_what_a_library_does_to_images_is_told_by_their_moments(name, monkeypatch):
    """Downloaded weights come with a transform of the images, which nothing that is saved would tell."""
    asked = []
    monkeypatch.setattr(models, "get_model", lambda *_, **options: asked.append(options))
    built = build_network(TeacherParams(source=f"torchvision:{name}", threads=1), 3, 299, 1000, None, True)
    assert asked[0]["transform_input"] is False
    # The same pixels: those normalised as ImageNet's, put back, and then taken to values from -1 to 1.
    assert built.moments == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_convolution_is_told_from_others_of_its_name(prefix, reverse):
    timm = pytest.importorskip("timm")
    saved = timm.create_model("resnet10t", in_chans=1, num_classes=3)
    weights = {f"{prefix}{key}": tensor for key, tensor in sorted(saved.state_dict().items(), reverse=reverse)}
    built = build_network(TeacherParams(source="timm:resnet10t", threads=1), 3, 32, 3, weights, download=False).network
    built.load_state_dict(saved.state_dict())
