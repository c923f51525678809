"""A foreign teacher of the user's own, as code and in every form that `teacher.source` takes."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from experiments import read_subset
from onnx import helper, numpy_helper
from torch import nn

from nonn.core.params import TeacherParams
from nonn.data.dataset import Dataset

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


def taught(data: Dataset) -> nn.Module:
    """The user's network, its last layer fitted to the training images by least squares."""
    scope: dict = {}
    exec(CODE, scope)
    model = scope["make"]().eval()
    images, labels = read_subset(data, "train")
    with torch.no_grad():
        features = model.more(model.conv(images.float() / 255)).mean((2, 3))
        inputs = torch.cat([features, torch.ones(len(images), 1)], 1).double()
        targets = F.one_hot(labels, 3).double() * 10
        ridge = torch.linalg.solve(inputs.T @ inputs + 1e-6 * torch.eye(17), inputs.T @ targets).float()
        model.fc.weight.copy_(ridge[:-1].T)
        model.fc.bias.copy_(ridge[-1])
    return model


@contextlib.contextmanager
def code_package(folder: Path) -> Iterator[Path]:
    """The network's code as a package below the working directory; all code there is forgotten at the end."""
    (folder / "nets").mkdir()
    (folder / "nets/__init__.py").touch()
    (folder / "nets/small.py").write_text(CODE)
    yield folder
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", None)).startswith(f"{folder}/")]:
        del sys.modules[name]
    with contextlib.suppress(ValueError):
        sys.path.remove(str(folder))


def section(source: str = "module:nets.small:make", **keys) -> TeacherParams:
    return TeacherParams(source=source, threads=1, **keys)


def save(weights, name: str = "w.pt") -> str:
    torch.save(weights, name)
    return name


def write_onnx(
    path: Path, model: nn.Module, batch: int | str = "N", tail: list | None = None, training: bool = False
) -> None:
    """The user's network as an ONNX file, made by hand: the exporter takes seconds."""
    weights = {name: t.numpy() for name, t in model.state_dict().items() if t.dim()}
    norm = [f"more.0.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], strides=[2, 2]),
        helper.make_node(
            "BatchNormalization", ["a", *norm], ["b", "m", "v"][: 3 if training else 1], training_mode=training
        ),
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


def write_half(path: Path, model: nn.Module) -> None:
    """The same in float16, inputs and outputs too."""
    write_onnx(path, model)
    file = onnx.load(path)
    for tensor in file.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float16"), tensor.name))
    for value in (*file.graph.input, *file.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(file, path)


def write_program(path: Path, model: nn.Module, batch: bool = True) -> None:
    """The network as an exported program, for any number of images or for one alone."""
    example = torch.zeros(4 if batch else 1, 3, 32, 32)
    shapes = ({0: torch.export.Dim("batch")},) if batch else None
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=shapes), path)


def write_source(kind: str, model: nn.Module) -> TeacherParams:
    """The user's network as a source of this kind, and the section that names it."""
    if kind == "onnx":
        write_onnx(Path("small.onnx"), model)
        return section("onnx:small.onnx")
    if kind == "export":
        write_program(Path("small.pt2"), model)
        return section("export:small.pt2")
    return section(weights=save(model.state_dict()))
