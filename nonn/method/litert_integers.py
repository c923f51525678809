"""Give a LiteRT file the integers of a student's ONNX file: weights, and what stands for numbers between layers.

The quantisers of the two choose other ranges, and weights of 8 and of 7 bits, so that their answers are only alike.
With the same integers they calculate the same, up to how single products are rounded. ONNX Runtime quantises the output
of a convolution with one scale, and what ReLU makes of it with another, so each ReLU is an operator of its own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: Least and greatest 8-bit integer.
LEAST, GREATEST = -128, 127


class Quantised(NamedTuple):
    """How 8-bit integers stand for real numbers: ``(q - zero) * scale``."""

    scale: float
    zero: int

    def encode(self, values: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(values / self.scale) + self.zero, LEAST, GREATEST).astype(np.int8)

    def decode(self, values: np.ndarray) -> np.ndarray:
        return ((values.astype(np.float32) - self.zero) * self.scale).astype(np.float32)

    def times(self, factor: float) -> Quantised:
        return Quantised(self.scale * factor, self.zero)


class Convolution(NamedTuple):
    """A convolution of an ONNX file: `weights` int8 (outputs, inputs, height, width), and of each output a scale and an
    int32 bias; how its input and its output are quantised.
    """

    weights: np.ndarray
    scales: np.ndarray
    bias: np.ndarray
    input: Quantised
    output: Quantised


def convolutions_of(path: Path) -> list[Convolution]:
    """Convolutions of a chain, in order.

    A student that also looks at the mirrored image has other ranges there; those of the first pass are taken.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    values = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
    quantised = {node.input[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    restored = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}

    def form(node: Any) -> Quantised:
        _, scale, zero = node.input
        return Quantised(float(values[scale]), int(values[zero]) + LEAST)

    found: dict[str, Convolution] = {}
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1] not in found:  # both passes have the same weights
            source, weights = (restored[name] for name in node.input[:2])
            integers, scales = values[weights.input[0]], values[weights.input[1]]
            has_bias = len(node.input) > 2
            bias = values[restored[node.input[2]].input[0]] if has_bias else np.zeros(len(integers), np.int32)
            found[node.input[1]] = Convolution(integers, scales, bias, form(source), form(quantised[node.output[0]]))
    return list(found.values())


def with_integers(content: bytes, convolutions: list[Convolution], slope: float) -> bytes:
    """A LiteRT file of the same chain with the integers of these convolutions.

    What a LOGISTIC and a MUL take is `slope` times as large as in the ONNX file. Features have the range of the last
    convolution's output, so that none is cut off.

    Raises
    ------
    ValueError
        The convolutions are those of another student.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    graph, kinds = model.subgraphs[0], schema.BuiltinOperator
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    relu = schema.OperatorCodeT()
    relu.builtinCode = relu.deprecatedBuiltinCode = kinds.RELU
    model.operatorCodes.append(relu)

    def set_form(tensor: Any, scale: Any, zero: Any) -> None:
        tensor.quantization.scale = np.array(scale, np.float32, ndmin=1)
        tensor.quantization.zeroPoint = np.array(zero, np.int64, ndmin=1)
        tensor.quantization.min = tensor.quantization.max = None

    def set_constant(tensor: Any, integers: np.ndarray, scales: np.ndarray) -> None:
        if tensor.shape.tolist() != list(integers.shape):
            raise ValueError("weights of another shape")
        model.buffers[tensor.buffer].data = np.frombuffer(integers.tobytes(), np.uint8)
        set_form(tensor, scales, np.zeros(len(scales)))

    # Order of the axes of weights; a convolution is depthwise where its input has one channel.
    axes = {kinds.CONV_2D: (0, 2, 3, 1), kinds.DEPTHWISE_CONV_2D: (1, 2, 3, 0)}
    if sum(codes[operator.opcodeIndex] in axes for operator in graph.operators) != len(convolutions):
        raise ValueError("another number of convolutions")
    left, operators = list(convolutions), []
    form, factor = left[0].input, 1.0  # of what the current operator reads, and how much larger that is
    for position, operator in enumerate(graph.operators):
        kind, result = codes[operator.opcodeIndex], graph.tensors[operator.outputs[0]]
        operators.append(operator)
        if kind in axes:
            own = left.pop(0)
            behind = [codes[other.opcodeIndex] for other in graph.operators[position + 1 : position + 3]]
            grown = slope if kinds.LOGISTIC in behind else 1.0
            source, weights, bias = (graph.tensors[number] for number in operator.inputs)
            set_form(source, *own.input.times(factor))
            scales = own.scales * np.float32(grown / factor)
            set_constant(weights, np.ascontiguousarray(own.weights.transpose(axes[kind])), scales)
            set_constant(bias, own.bias, scales * np.float32(own.input.scale * factor))
            form, factor = own.output.times(grown), grown
        elif kind == kinds.LOGISTIC:
            continue  # its output has the only form that there is
        elif kind == kinds.MUL:
            form = left[0].input.times(factor)
        elif kind == kinds.MEAN:
            form = Quantised((GREATEST - form.zero) * form.scale / (GREATEST - LEAST), LEAST)
        if getattr(operator.builtinOptions, "fusedActivationFunction", 0) == schema.ActivationFunctionType.RELU:
            operator.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.NONE
            signed = copy.deepcopy(result)
            signed.name += b"/signed"
            set_form(signed, *form)
            graph.tensors.append(signed)
            rectifier = schema.OperatorT()
            rectifier.opcodeIndex = len(codes)
            rectifier.inputs, rectifier.outputs = [len(graph.tensors) - 1], operator.outputs
            operator.outputs = rectifier.inputs
            operators.append(rectifier)
            form = left[0].input if left else form
        set_form(result, *form)
    graph.operators = operators
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
