"""Untrained classifiers to split: exported ones, and ones put together by hand in milliseconds."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from nonn.core.architecture import Architecture
from nonn.core.files import write_json
from nonn.deploy.int8 import quantise
from nonn.deploy.onnx_files import Logits, export_onnx
from nonn.split.graph import read_network
from nonn.training.networks import ConvNet

#: Of no model in particular.
COST = dict.fromkeys(("params", "macs", "weight_bytes", "peak_activation_bytes"), 1)


def export_untrained(path: Path, channels: int, size: int, n_filters: int | None = None, **architecture) -> None:
    """Export a classifier of ten classes whose batch norms all differ, as after a training."""
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.full((channels,), 100.0), torch.full((channels,), 60.0)
    network = ConvNet(Architecture(**architecture), channels, 10, n_filters, mean, std)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.3, generator=generator)
    export_onnx(Logits(network), torch.zeros(1, channels, size, size, dtype=torch.uint8), path, "image", "logits")


def write_solo(folder: Path, names: list[str]) -> Path:
    """An export of the models that run alone, which are all the same here, as the stage `export` would write it."""
    folder.mkdir(parents=True)
    export_untrained(folder / "model.onnx", 1, 28, family="fast", widths=[4, 4, 4], depth=1)
    manifest = {
        "classes": [f"class {number}" for number in range(10)],
        "image": {"channels": 1, "size": 28, "dtype": "uint8"},
        "students": [{"file": "model.onnx", "cost": COST}],
    }
    write_json(folder / "manifest.json", dict.fromkeys(names, manifest))
    return folder


class Build:
    """A classifier in the making, with random weights; `map` is the name of its last map so far."""

    def __init__(self, channels: int, size: int, seed: int = 0):
        self.generator = np.random.default_rng(seed)
        self.image = [1, channels, size, size]
        self.nodes, self.constants = [], []
        self.map, self.channels = "image", channels
        self.add("Cast", to=TensorProto.FLOAT)
        self.add("Sub", self.constant(self.generator.uniform(50, 150, (1, channels, 1, 1))))
        self.add("Div", self.constant(self.generator.uniform(50, 80, (1, channels, 1, 1))))

    def constant(self, value: np.ndarray, dtype=np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), f"constant{len(self.constants)}"))
        return self.constants[-1].name

    def add(self, operation: str, *inputs: str, read: str | None = None, **attributes) -> str:
        output = f"map{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, [read or self.map, *inputs], [output], **attributes))
        self.map = output
        return output

    def convolve(self, outputs: int, kernel: int = 3, stride: int = 1, read: str | None = None, inputs: int = 0) -> str:
        inputs = inputs or self.channels
        weight = self.generator.normal(size=(outputs, inputs, kernel, kernel)) / np.sqrt(inputs * kernel**2)
        names = [self.constant(weight), self.constant(self.generator.normal(size=outputs) / 10)]
        pads = [kernel // 2] * 4
        self.channels = outputs
        return self.add(
            "Conv", *names, read=read, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads, dilations=[1, 1]
        )

    def normalize(self) -> str:
        values = [self.generator.uniform(0.5, 1.5, self.channels) for _ in range(4)]
        return self.add("BatchNormalization", *map(self.constant, values))

    def pool(self) -> str:
        return self.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])

    def write(self, path: Path, n_classes: int = 3) -> None:
        axes = self.constant([2, 3], np.int64)
        self.nodes.append(helper.make_node("ReduceMean", [self.map, axes], ["features"], keepdims=0))
        weight = self.constant(self.generator.normal(size=(n_classes, self.channels)))
        bias = self.constant(self.generator.normal(size=n_classes))
        self.nodes.append(helper.make_node("Gemm", ["features", weight, bias], ["logits"], transB=1))
        graph = helper.make_graph(
            self.nodes,
            "built",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, self.image)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, n_classes])],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())


def in_int8(path: Path, images: int = 8) -> Path:
    """Quantise a file in place, calibrated on noise."""
    shape = [d.dim_value for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    quantise(path, np.random.default_rng(9).integers(0, 256, (images, *shape[1:]), dtype=np.uint8))
    return path


def write_tiny(path: Path, seed: int = 0) -> Path:
    """Two 3×3 convolutions, of 4 and 6 channels, on an image of 4×4 pixels: small enough to count by hand."""
    build = Build(channels=1, size=4, seed=seed)
    build.convolve(4)
    build.add("Relu")
    build.convolve(6)
    build.write(path)
    return path


def write_shortcut(path: Path) -> None:
    """A classifier with a pool, a stride and a shortcut; 9 rows and odd widths."""
    build = Build(channels=3, size=9)
    build.convolve(5)
    build.add("Relu")
    before = build.map
    build.convolve(7, stride=2)
    build.normalize()
    branch = build.add("Relu")
    build.convolve(7, kernel=1, stride=2, read=before, inputs=5)
    build.add("Add", branch)
    build.convolve(6)
    build.pool()
    build.add("Relu")
    build.write(path)


def image_of(plan, seed: int = 0) -> np.ndarray:
    shape = plan.parts[0].contract.image_shape[1:]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def random_image(path: Path, seed: int = 0) -> np.ndarray:
    """An image that a network takes, uint8."""
    shape = read_network(path).shapes["image"][1:]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
