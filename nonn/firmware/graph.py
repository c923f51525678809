"""From the ONNX file of an int8 student to the steps of a firmware.

ONNX Runtime joins the file's operations to convolutions of integers before it runs them, and moves or removes a few
others. A firmware follows that graph, not the file, so that its answers are those of ONNX Runtime bit for bit.

What maps one 8-bit integer to another, value by value (GELU, ReLU, batch norm, a change of scale), is a table of 256
entries. ONNX Runtime itself fills it in, and no such function has to be written in C.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, TensorProto, helper, numpy_helper

from nonn.core.errors import UserError, one_line
from nonn.core.files import regular, scratch_folder
from nonn.firmware.steps import Combine, Conv, FirmwareProgram, KernelCall, Mean, Prepare, Shape, in_pairs
from nonn.runtime.session import REFUSALS

#: Operations that work value by value, constants broadcast.
POINTWISE = {"Add", "BatchNormalization", "Cast", "Clip", "DequantizeLinear", "Div", "Erf", "FusedGelu", "Gelu"}
POINTWISE |= {"HardSigmoid", "HardSwish", "Mul", "QuickGelu", "QuantizeLinear", "Relu", "Sub"}
#: Sums times their scale stay below it, so that rounding and adding the zero point cannot overflow 32 bits.
MAX_SCALED_SUM = 2**30
#: Errors of reading a graph that `nonn export` did not write.
MALFORMED_GRAPH_ERRORS = (IndexError, KeyError, TypeError, ValueError, *REFUSALS)
OPERATIONS = {"Add": "+", "Div": "/", "Mul": "*"}


def read_student(path: Path) -> FirmwareProgram:
    """Read an int8 student that the stage `export` wrote.

    Raises
    ------
    UserError
        There is no such file, or it has an operation that no kernel is there for.
    """
    try:
        return _Reader(path, _optimised(path)).read()
    except MALFORMED_GRAPH_ERRORS as error:
        raise UserError(f"{path}: not a student that `nonn export` wrote ({error}). Export it again.") from None


def _optimised(path: Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs, without layouts that depend on the processor."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    with scratch_folder() as folder:
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        try:
            onnxruntime.InferenceSession(regular(path), options, providers=["CPUExecutionProvider"])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file. Export the students first: `nonn export`.") from None
        except REFUSALS as error:
            raise UserError(
                f"{path}: not a model that ONNX Runtime runs ({one_line(error)}). Export it again."
            ) from None
        return onnx.load(options.optimized_model_filepath)


class NoKernelError(UserError):
    """A student has an operation without a kernel."""


class _Reader:
    def __init__(self, path: Path, model: onnx.ModelProto):
        self.path, self.model = path, model
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.shapes: dict[str, Shape] = {}
        self.vectors: dict[str, int] = {}
        self.planes: dict[str, bool] = {}  # the image, and whether its left and right are swapped

    def refuse(self, why: str) -> NoKernelError:
        remedy = "Give students of design.precision int8 and family fast, or airbench of depth 2 or less."
        return NoKernelError(f"{self.path}: no firmware can be made of it: {why}. {remedy}")

    def read(self) -> FirmwareProgram:
        graph = self.model.graph
        inputs = [value for value in graph.input if value.name not in self.constants]
        image = inputs[0]
        sides = [d.dim_value for d in image.type.tensor_type.shape.dim]
        if len(inputs) != 1 or image.type.tensor_type.elem_type != TensorProto.UINT8 or len(sides) != 4:
            raise self.refuse("its input is not one image of uint8")
        if not any(node.op_type == "QLinearConv" for node in graph.node):
            raise self.refuse("it has no convolution of 8-bit integers, which `nonn firmware --calibrate` makes")
        self.shapes[image.name] = Shape(sides[2], sides[3], sides[1])
        self.planes[image.name] = False
        steps = [step for node in graph.node for step in self.step(node, image.name)]
        features = graph.output[0].name
        if len(graph.output) != 1 or features not in self.vectors:
            raise self.refuse("its output is not one vector of features")
        shape, fused = self.shapes[image.name], self.fused(steps)
        in_pairs(fused)
        return FirmwareProgram(image.name, shape, features, self.vectors[features], fused)

    def step(self, node: NodeProto, image: str) -> list[KernelCall]:
        """The steps of one node: none where it is part of a later one."""
        settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        kind, name = node.op_type, node.output[0]
        if kind == "QLinearConv":
            return [self.convolution(node, settings)]
        if kind == "MaxPool":
            return [self.pooling(node, settings)]
        if kind == "Slice" and node.input[0] == image:
            self.mirror(node)
            return []
        if kind == "QuantizeLinear":
            return [self.table(name, image)]
        if kind == "ReduceMean":
            return [self.mean(node, settings)]
        if kind in OPERATIONS and any(value in self.vectors for value in node.input):
            return [self.combination(node)]
        if kind not in POINTWISE:
            raise self.refuse(f"there is no kernel for {kind} {name}")
        return []

    def mirror(self, node: NodeProto) -> None:
        """A slice that takes the last axis backwards, and nothing else."""
        start, end, axes, step = (self.constants[value].tolist() for value in node.input[1:5])
        if start != [-1] or end[0] > -(2**31) or axes not in ([-1], [3]) or step != [-1]:
            raise self.refuse(f"there is no kernel for Slice {node.output[0]}")
        self.planes[node.output[0]] = True
        self.shapes[node.output[0]] = self.shapes[node.input[0]]

    def convolution(self, node: NodeProto, settings: dict) -> Conv:
        source, in_scale, in_zero, weights, scales, zeros, out_scale, out_zero = node.input[:8]
        if source in self.planes:
            raise self.refuse(f"QLinearConv {node.output[0]} reads the image as it is")
        constants = {name: self.constants[name] for name in node.input[1:] if name}
        kernel, shape = constants[weights], self.shapes[source]
        plain = {"group": 1, "auto_pad": b"NOTSET", "dilations": [1, 1]}
        odd = [key for key, value in plain.items() if settings.get(key, value) != value]
        strides = settings.get("strides", [1, 1])
        if strides[0] != strides[1]:
            odd.append("strides")
        if kernel.dtype != np.int8 or constants[zeros].any() or constants[in_zero].dtype != np.uint8:
            odd.append("type of integers")
        if odd:
            raise self.refuse(f"there is no kernel for the {odd[0]} of QLinearConv {node.output[0]}")
        top, left, bottom, right = settings.get("pads", [0, 0, 0, 0])
        rows = (shape.rows + top + bottom - kernel.shape[2]) // strides[0] + 1
        columns = (shape.columns + left + right - kernel.shape[3]) // strides[0] + 1
        out = Shape(rows, columns, kernel.shape[0])
        zero = int(constants[in_zero])
        sums = kernel.astype(np.int64).sum(axis=(1, 2, 3)) * zero
        bias = self.constants[node.input[8]] if len(node.input) > 8 else np.zeros(len(kernel), np.int32)
        scale = np.float32(constants[in_scale]) * np.broadcast_to(constants[scales], len(kernel))
        scale = (scale / np.float32(constants[out_scale])).astype(np.float32)
        largest_sums = np.abs(kernel.astype(np.int64)).sum(axis=(1, 2, 3)) * 255 + np.abs(bias)
        if largest_sums.max() * scale.max() > MAX_SCALED_SUM:
            raise self.refuse(f"QLinearConv {node.output[0]} has scales far from those of its maps")
        self.shapes[node.output[0]] = out
        return Conv(
            reads=(source,),
            writes=node.output[0],
            shape=shape,
            out=out,
            weights=np.ascontiguousarray(kernel.transpose(0, 2, 3, 1)),
            bias=(bias - sums).astype(np.int32),
            scale=scale,
            stride=strides[0],
            padding=(top, left),
            zeros=(zero, int(constants[out_zero])),
        )

    def pooling(self, node: NodeProto, settings: dict) -> _Pool:
        side = settings["kernel_shape"][0]
        plain: dict[str, object] = {"ceil_mode": 0, "auto_pad": b"NOTSET", "pads": [0, 0, 0, 0], "dilations": [1, 1]}
        plain |= {"kernel_shape": [side, side], "strides": [side, side]}
        if odd := [key for key, value in plain.items() if settings.get(key, value) != value]:
            raise self.refuse(f"there is no kernel for the {odd[0]} of MaxPool {node.output[0]}")
        shape = self.shapes[node.input[0]]
        self.shapes[node.output[0]] = Shape(shape.rows // side, shape.columns // side, shape.channels)
        return _Pool((node.input[0],), node.output[0], side)

    def table(self, name: str, image: str) -> KernelCall:
        """The step that a chain of pointwise operations becomes."""
        source, nodes = self.chain(name)
        shape = self.shapes[source]
        values = self.evaluate(source, nodes, name, shape.channels)
        self.shapes[name] = shape
        if source in self.planes:
            return Prepare((image,), name, shape, values, self.planes[source])
        return _Table((source,), name, values[:1] if (values == values[0]).all() else values)

    def mean(self, node: NodeProto, settings: dict) -> Mean:
        axes = self.constants[node.input[1]] if len(node.input) > 1 else settings.get("axes", ())
        if sorted(axis % 4 for axis in axes) != [2, 3] or settings.get("keepdims", 1):
            raise self.refuse(f"ReduceMean {node.output[0]} is no mean over all pixels")
        source, nodes = self.chain(node.input[0])
        if source in self.planes:
            raise self.refuse(f"ReduceMean {node.output[0]} reads the image as it is")
        values = self.evaluate(source, nodes, node.input[0], self.shapes[source].channels)
        if not (values == values[0]).all():
            raise self.refuse(f"what ReduceMean {node.output[0]} reads differs between channels")
        self.vectors[node.output[0]] = self.shapes[source].channels
        return Mean((source,), node.output[0], self.shapes[source], values[0])

    def combination(self, node: NodeProto) -> Combine:
        vectors = tuple(name for name in node.input if name in self.vectors)
        rest = [self.constants[name] for name in node.input if name in self.constants]
        is_sum = len(vectors) == 2 and node.op_type == "Add"
        scaled = len(vectors) == 1 and len(rest) == 1 and rest[0].size == 1 and node.input[0] == vectors[0]
        if not (is_sum or scaled):
            raise self.refuse(f"there is no kernel for {node.op_type} {node.output[0]} of features")
        self.vectors[node.output[0]] = self.vectors[vectors[0]]
        constant = None if is_sum else float(rest[0].item())
        return Combine(vectors, node.output[0], self.vectors[vectors[0]], OPERATIONS[node.op_type], constant)

    def chain(self, name: str) -> tuple[str, list[NodeProto]]:
        """The map of integers that a tensor is a function of, value by value, and the nodes between, in order."""
        found, sources, waiting = set(), set(), [name]
        while waiting:
            node = self.producer[waiting.pop()]
            if node.op_type not in POINTWISE:
                raise self.refuse(f"there is no kernel for {node.op_type} {node.output[0]}")
            found.add(node.output[0])
            for value in node.input:
                if value in self.shapes:
                    sources.add(value)
                elif value and value not in self.constants and value not in found:
                    waiting.append(value)
        if len(sources) != 1:
            raise self.refuse(f"{self.producer[name].op_type} {name} joins {len(sources)} maps")
        return sources.pop(), [node for node in self.model.graph.node if node.output[0] in found]

    def evaluate(self, source: str, nodes: list[NodeProto], name: str, channels: int) -> np.ndarray:
        """The value at `name` for each of the 256 at `source`, by ONNX Runtime: (channels, 256)."""
        used = {value for node in nodes for value in node.input}
        kind = TensorProto.UINT8 if nodes[-1].op_type == "QuantizeLinear" else TensorProto.FLOAT
        graph = helper.make_graph(
            nodes,
            "table",
            [helper.make_tensor_value_info(source, TensorProto.UINT8, [1, channels, 16, 16])],
            [helper.make_tensor_value_info(name, kind, None)],
            [tensor for tensor in self.model.graph.initializer if tensor.name in used],
        )
        model = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        constants = {name: self.constants[name] for name in used & self.constants.keys()}
        if large := [name for name, values in constants.items() if values.size not in (1, channels)]:
            raise self.refuse(f"{large[0]} differs from pixel to pixel")
        values = np.tile(np.arange(256, dtype=np.uint8), channels).reshape(1, channels, 16, 16)
        return session.run([name], {source: values})[0].reshape(channels, 256)

    def fused(self, steps: list[KernelCall]) -> list[KernelCall]:
        """Poolings and tables become part of the convolution before them."""
        readers = Counter(name for step in steps for name in step.reads)
        result: list[KernelCall] = []
        last: dict[str, Conv] = {}
        for step in steps:
            conv = last.get(step.reads[0])
            if isinstance(step, _Pool | _Table):
                if conv is None or readers[step.reads[0]] > 1 or conv.table is not None:
                    raise self.refuse(f"{step.writes} does not follow a convolution of its own")
                if isinstance(step, _Pool):
                    conv.pool *= step.side
                else:
                    conv.table = step.values
                conv.writes = step.writes
                last[step.writes] = conv
                continue
            if isinstance(step, Conv):
                last[step.writes] = step
            result.append(step)
        return result


class _Pool(KernelCall):
    def __init__(self, reads: tuple[str, ...], writes: str, side: int):
        super().__init__(reads, writes)
        self.side = side


class _Table(KernelCall):
    def __init__(self, reads: tuple[str, ...], writes: str, values: np.ndarray):
        super().__init__(reads, writes)
        self.values = values
