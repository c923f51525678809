"""Students of one or two convolutions, small enough for an emulated microcontroller."""

import json
import shutil

import numpy as np
import onnx
import pytest
from clusters import N_FEATURES, SIZE, sha256, write_export
from onnx import TensorProto, helper, numpy_helper

from nonn.core.files import write_json
from nonn.firmware.build import COMPILER, EMULATOR
from nonn.runtime.exported import QUANTISATION_SCHEME

needs_toolchain = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason="needs arm-none-eabi-gcc and qemu-system-arm (make system-deps)",
)


def write_conv(
    path, *, channels=5, filters=6, kernel=3, stride=1, pads=(1, 1, 1, 1), pool=1, side=7, scale=0.5, step=1.0, before=0
):
    """One convolution of random integers: image → features, which are means of its output.

    `before` is the number of filters of another in front of it, 0 for none.

    Scales are powers of two, so that half of all sums times their scale lie right between two integers. The mean is of
    integers times `step`: the order of its sums matters if that is no power of two.
    """
    rng = np.random.default_rng(channels * side + filters)
    constants = {
        "one": np.float32(1),
        "step": np.float32(step),
        "in_zero": np.uint8(7),
        "weights": rng.integers(-64, 65, (filters, before or channels, kernel, kernel), dtype=np.int8),
        "scales": np.full(filters, scale / 32, np.float32),
        "zeros": np.zeros(filters, np.int8),
        "out_zero": np.uint8(120),
        "bias": rng.integers(-500, 500, filters, dtype=np.int32),
        "axes": np.array([2, 3]),
    }
    conv = ["map", "one", "in_zero", "weights", "scales", "zeros", "one", "out_zero", "bias"]
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", ["float", "one", "in_zero"], ["map"]),
        helper.make_node("QLinearConv", conv, ["sums"], strides=[stride, stride], pads=pads),
        helper.make_node("MaxPool", ["sums"], ["pooled"], kernel_shape=[pool, pool], strides=[pool, pool]),
        helper.make_node("DequantizeLinear", ["pooled" if pool > 1 else "sums", "step", "out_zero"], ["values"]),
        helper.make_node("ReduceMean", ["values", "axes"], ["features"], keepdims=0),
    ]
    if pool == 1:
        del nodes[3]
    if before:
        constants |= {
            "first": rng.integers(-64, 65, (before, channels, 1, 1), dtype=np.int8),
            "first_scales": np.full(before, 1 / 128, np.float32),
            "first_zeros": np.zeros(before, np.int8),
        }
        inputs = ["map", "one", "in_zero", "first", "first_scales", "first_zeros", "one", "out_zero"]
        nodes.insert(2, helper.make_node("QLinearConv", inputs, ["first_sums"]))
        nodes[3].input[0], nodes[3].input[2] = "first_sums", "out_zero"
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, [1, channels, side, side])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, filters])
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "conv", [image], [features], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def noise(shape, count=4):
    return np.random.default_rng(1).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_int8_export(folder):
    """The export of `write_export` with int8 students, of which firmware can be made."""
    write_export(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for position, (entry, filters) in enumerate(zip(manifest["students"], N_FEATURES, strict=True)):
        path = write_conv(folder / entry["file"], channels=1, side=SIZE, filters=filters, scale=2, step=0.1 + position)
        entry |= {"sha256": sha256(path), "feature_limit": None}
    write_json(folder / "manifest.json", manifest | {"quantisation": QUANTISATION_SCHEME})
    return folder
