"""The parts of an exported classifier, for splitting it: nodes, shapes and constants of its ONNX file.

In an int8 file each integer map and each weight goes through a ``DequantizeLinear`` of its own; ONNX Runtime fuses
these with the operation between them into one on integers. They stay beside that operation wherever it is cut: those of
weights are taken for parts of the constants, and those of maps belong to the operation that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, helper, numpy_helper

from nonn.core.errors import UserError, one_line
from nonn.core.files import regular
from nonn.core.params import Precision
from nonn.split.plan import IMAGE, Dtype

#: Operations that work value by value, constants broadcast; the batch norm of inference is one.
POINTWISE = {"Add", "BatchNormalization", "Cast", "Div", "Erf", "Mul", "Relu", "Sub"}
WINDOWED = {"Conv", "MaxPool"}
QUANTISING = {"QuantizeLinear", "DequantizeLinear"}
#: Types of maps, which travel as they are.
DTYPES: dict[int, Dtype] = {TensorProto.UINT8: "uint8", TensorProto.FLOAT: "float32"}


class UnsplittableError(UserError):
    """A sound ONNX file of a network that is not of a kind that can be split here."""


@dataclass(frozen=True)
class OnnxGraph:
    """The parts of an exported classifier."""

    nodes: list[NodeProto]  # from the image to the last map, in order
    last: str  # the last map, of which the features are the spatial means
    shapes: dict[str, tuple[int, ...]]  # of all maps, the image included: (1, channels, rows, columns)
    dtypes: dict[str, Dtype]  # of all maps
    constants: dict[str, np.ndarray]
    unpacked: dict[str, NodeProto]  # the nodes that make float32 constants of quantised ones, by their outputs
    weight: np.ndarray  # (C, F), of the last linear layer
    bias: np.ndarray  # (C,)
    opset: int
    ir_version: int

    def maps(self, node: NodeProto) -> list[str]:
        """The maps that a node reads; its other inputs are constants."""
        return [name for name in node.input if name in self.shapes]

    @property
    def precision(self) -> Precision:
        return "int8" if self.unpacked else "float32"

    def stored(self, name: str) -> np.ndarray:
        """A constant as the file holds it, quantised or not."""
        return self.constants[self.unpacked[name].input[0] if name in self.unpacked else name]


def read_network(path: Path) -> OnnxGraph:
    """Read a classifier that the stage `export` wrote (``solo``: image in, logits out).

    Raises
    ------
    UserError
        There is no such file, or it is not of a kind that can be split here.
    """
    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(regular(path), format="protobuf"), strict_mode=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Export the models first: `nonn export solo`.") from None
    except (DecodeError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise UserError(f"{path}: not a sound ONNX file ({one_line(error)}).") from None

    def refuse(why: str) -> UnsplittableError:
        remedy = "Give a classifier of family fast, airbench or wrn from `nonn export`."
        return UnsplittableError(f"{path}: cannot be split: {why}. {remedy}")

    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    described = [*graph.input, *graph.value_info, *graph.output]
    types = {v.name: v.type.tensor_type.elem_type for v in described}
    unpacked = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "DequantizeLinear" and set(node.input) <= set(constants)
    }
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in described}
    shapes = {name: shape for name, shape in shapes.items() if len(shape) == 4 and name not in constants}
    shapes = {name: shape for name, shape in shapes.items() if name not in unpacked}
    inputs = [value for value in graph.input if value.name not in constants]
    if [value.name for value in inputs] != [IMAGE] or inputs[0].type.tensor_type.elem_type != TensorProto.UINT8:
        raise refuse("its input is not one image of uint8")
    if len(shapes.get(IMAGE, ())) != 4 or shapes[IMAGE][0] != 1 or shapes[IMAGE][2] != shapes[IMAGE][3]:
        raise refuse("its input is not one square image")
    if [node.op_type for node in graph.node[-2:]] != ["ReduceMean", "Gemm"]:
        raise refuse("it does not end in a spatial mean and one linear layer")
    *nodes, mean, linear = (node for node in graph.node if node.output[0] not in unpacked)
    settings = attributes_of(mean) | attributes_of(linear)
    spatial = sorted(axis % 4 for axis in constants.get(mean.input[1], np.array([])).tolist()) == [2, 3]
    plain = settings.get("transB") == 1 and settings.get("transA", 0) == 0
    plain = plain and settings.get("alpha", 1) == settings.get("beta", 1) == 1 and settings.get("keepdims", 1) == 0
    if not (spatial and plain and len(linear.input) == 3 and linear.input[0] == mean.output[0]):
        raise refuse("it does not end in a spatial mean and one linear layer")
    for node in nodes:
        if why := _obstacle(node, shapes, types, constants):
            raise refuse(f"{node.op_type} {node.output[0]}: {why}")
    versions = {entry.domain: entry.version for entry in model.opset_import}
    weight, bias = (constants[name] for name in linear.input[1:])
    dtypes = {name: DTYPES[types[name]] for name in shapes}
    return OnnxGraph(
        nodes, mean.input[0], shapes, dtypes, constants, unpacked, weight, bias, versions[""], model.ir_version
    )


def _obstacle(
    node: NodeProto, shapes: dict[str, tuple[int, ...]], types: dict[str, int], constants: dict[str, np.ndarray]
) -> str | None:
    """Why a node cannot be split, if so."""
    if node.op_type not in POINTWISE | WINDOWED | QUANTISING:
        return "an unknown operation"
    if len(node.output) != 1 or node.output[0] not in shapes:
        return "not one map as its output"
    if types[node.output[0]] not in DTYPES:
        return f"a map of {helper.tensor_dtype_to_string(types[node.output[0]]).split('.')[-1].lower()}"
    if node.op_type in QUANTISING and any(name not in constants or constants[name].ndim for name in node.input[1:]):
        return "not one scale for the whole map"
    if node.op_type in WINDOWED:
        settings = attributes_of(node)
        plain = {"group": 1, "auto_pad": b"NOTSET", "ceil_mode": 0, "storage_order": 0, "dilations": [1, 1]}
        if odd := [key for key, value in plain.items() if settings.get(key, value) != value]:
            return f"its {odd[0]}"
    elif any(shapes[name] != shapes[node.output[0]] for name in node.input if name in shapes):
        return "its maps are not of one shape"
    return None


def attributes_of(node: NodeProto) -> dict:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
