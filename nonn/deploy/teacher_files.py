"""Foreign teachers as ONNX files like those of our own networks, and what running such a file costs a device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from nonn.core.cost import Cost
from nonn.core.errors import UserError, one_line
from nonn.data.dataset import Dataset
from nonn.deploy.analytic_cost import BYTES, CostStep, peak_values
from nonn.deploy.onnx_files import Logits, export_onnx
from nonn.runtime.session import open_session
from nonn.teachers.foreign import ForeignTeacher
from nonn.teachers.onnx_body import OnnxBody

#: Operations of an ONNX graph that a deployed runtime fuses into the one before, or that only rename.
FUSED = {"BatchNormalization", "Cast", "Clip", "Dropout", "Flatten", "HardSigmoid", "HardSwish", "Identity", "Relu"}
FUSED |= {"Reshape", "Sigmoid", "Gelu", "Squeeze", "Unsqueeze", "Erf", "Tanh"}


def write_teacher(model: ForeignTeacher, data: Dataset, path: Path) -> None:
    """Write a foreign teacher in float32; an ONNX file stays as it is, preceded by its preprocessing."""
    if isinstance(model.body, OnnxBody):
        image = (data.channels, data.size, data.size)
        path.write_bytes(model.body.as_classifier(model.preprocess.settings, model.outputs, image))
        return
    try:
        export_onnx(Logits(model), data.images[:1], path, "image", "logits")
    except Exception as error:  # the exporter may raise anything on a network that it does not know
        raise UserError(
            f"{path.name}: the teacher cannot be exported to ONNX ({one_line(error)}). Export it yourself, and set "
            "teacher.source to onnx:FILE."
        ) from None


def measure_file_cost(path: Path) -> Cost:
    """Count the cost of one image through an ONNX file of one float32 model, by running it once.

    As `measure_cost`, it counts multiply-accumulates of convolutions and matrix products, and activations by liveness.
    Operations within loops and branches are not counted.
    """
    model = onnx.load(path)
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = [name for node in graph.node for name in node.output if name]
    outputs = {value.name for value in graph.output}
    graph.output.extend(helper.make_empty_tensor_value_info(name) for name in made if name not in outputs)
    session = open_session(model.SerializeToString())
    entry = session.get_inputs()[0]
    image = np.zeros(entry.shape, np.uint8)
    values = [output.name for output in session.get_outputs()]
    shapes = {name: np.shape(a) for name, a in zip(values, session.run(None, {entry.name: image}), strict=True)}
    shapes[entry.name] = image.shape
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    inner = constants | {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    shape_of = {**{name: weights[name].shape for name in weights}, **shapes}
    params = sum(weights[name].size for name in constants if weights[name].dtype.kind == "f")
    return Cost(
        params=params,
        macs=sum(_node_macs(node, shape_of) for node in nodes),
        weight_bytes=sum(weights[name].nbytes for name in constants if weights[name].dtype.kind == "f"),
        peak_activation_bytes=BYTES["float32"] * peak_values(_steps(nodes, shapes, inner, entry.name)),
    )


def _node_macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if node.op_type == "Conv":
        return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type in ("MatMul", "Gemm"):
        turned = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if turned else -1]
    return 0


def _steps(
    nodes: Sequence[onnx.NodeProto], shapes: Mapping[str, tuple[int, ...]], constants: set[str], entry: str
) -> list[CostStep]:
    """The operations of a graph in its order, one for each output, and one that reads the answers, as no other does."""
    steps, number = [CostStep(math.prod(shapes[entry]))], {entry: 0}
    for node in nodes:
        reads = tuple(number[name] for name in node.input if name in number)
        for output in node.output:
            if node.op_type in FUSED and reads:
                steps.append(CostStep(0, reads, shares=reads[0]))
            elif output and output not in constants:
                steps.append(CostStep(math.prod(shapes.get(output, ())), reads))
            else:
                continue
            number[output] = len(steps) - 1
    read = {number for step in steps for number in step.reads}
    answers = (number for number, step in enumerate(steps) if step.shares is None and number not in read)
    return [*steps, CostStep(0, tuple(answers))]
