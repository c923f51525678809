"""ONNX files as teachers: ONNX Runtime runs them as they are, with the input of the last layer as one more output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from nonn.core.errors import UserError, one_line, printable
from nonn.core.schema import did_you_mean
from nonn.runtime.session import REFUSALS
from nonn.teachers.bodies import HALF_TOLERANCE, TOLERANCE, check_input
from nonn.teachers.preprocessing import Preprocessing
from nonn.teachers.weight_files import remedy_of_outputs

FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}

#: Kind of an operation, its inputs after the first, and its attributes.
Operation = tuple[str, list[str], dict[str, Any]]
#: Operations of files whose weights are integers.
QUANTISED = {"DequantizeLinear", "MatMulInteger", "QGemm", "QLinearMatMul"}


def read_onnx(path: Path) -> bytes:
    """Content of an ONNX file, with the weights that it keeps in a file beside it."""
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise UserError(f"params.yaml: teacher.source: {path} does not exist. Name an ONNX file.") from None
    except (DecodeError, ValueError) as error:
        raise UserError(
            f"params.yaml: teacher.source: {path} is not an ONNX file ({one_line(error)}). Export it again."
        ) from None
    watched = f"{path.name}.data"  # as `TeacherSource.files` says
    for name in {entry.value for t in _tensors(model.graph) for entry in t.external_data if entry.key == "location"}:
        if name != watched:
            raise UserError(
                f"params.yaml: teacher.source: {path} keeps its weights in {printable(name)}, and only {watched} "
                f"would be watched. Save it by `onnx.save(..., save_as_external_data=True, location={watched!r})`."
            )
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise UserError(
            f"params.yaml: teacher.source: {path} has its weights in a file that is not there or damaged "
            f"({one_line(error)}). Copy it beside the ONNX file."
        ) from None
    return model.SerializeToString(deterministic=True)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Initializers and constants, those of branches too."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield attribute.t
        yield from _tensors(attribute.g)


class OnnxBody(nn.Module):
    """An ONNX model, cut open at its last layer: see `nonn.teachers.bodies`.

    `classifier` is the name of that layer's node or output; None takes the last matrix product of `n_outputs` columns.
    """

    def __init__(self, content: bytes, n_outputs: int | None, classifier: str | None, source: str):
        super().__init__()
        self.content = content
        model = onnx.load_from_string(content)
        self.input_name, self.input_shape, self.dtype = _describe_input(model, source)
        try:
            self.features, self.weight, self.bias = _find_layer(model, n_outputs, classifier, source)
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"params.yaml: teacher.source: {source} is damaged, or no model that a library has exported "
                f"({one_line(error)}). Export it again."
            ) from None
        if any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node):
            raise UserError(
                f"params.yaml: teacher.source: {source} is quantised by what each batch holds, so its answers depend "
                "on the batch. Export it in float32."
            )
        self.n_features, self.n_outputs = self.weight.shape
        is_half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
        self.tolerance = HALF_TOLERANCE if is_half else TOLERANCE
        if len(model.graph.output) != 1:
            names = ", ".join(value.name for value in model.graph.output)
            raise UserError(
                f"params.yaml: teacher.source: {source} has the outputs {names}, not the logits alone. Export it anew."
            )
        self.logits = model.graph.output[0].name
        if self.features != self.logits:
            model.graph.output.append(helper.make_empty_tensor_value_info(self.features))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except REFUSALS as error:
            raise UserError(
                f"params.yaml: teacher.source: {source} is not a model that ONNX Runtime runs ({one_line(error)}). "
                "Export it again."
            ) from None

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        array: np.ndarray = pixels.cpu().numpy().astype(self.dtype)
        batches = np.split(array, len(array)) if self.input_shape[0] == 1 else [array]
        names = [self.features, self.logits]
        pairs = [self.session.run(names, {self.input_name: batch}) for batch in batches]
        features, logits = (torch.from_numpy(np.concatenate(parts)).float() for parts in zip(*pairs, strict=True))
        return features.to(pixels.device), logits.to(pixels.device)

    def classify(self, features: Tensor) -> Tensor:
        return features @ torch.from_numpy(self.weight) + torch.from_numpy(self.bias)

    def weights(self) -> dict[str, Tensor]:
        """Constants of floating point, by name."""
        arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(self.content).graph.initializer}
        return {name: torch.tensor(array) for name, array in arrays.items() if array.dtype.kind == "f"}

    def tensors(self) -> dict[str, Tensor]:
        return {"file": torch.frombuffer(bytearray(self.content), dtype=torch.uint8)}

    def as_classifier(self, settings: Preprocessing, outputs: Sequence[int] | None, image: Sequence[int]) -> bytes:
        """The model for one uint8 `image` (channels, H, W) of the data set: the file, with preprocessing before it.

        Of its logits those at `outputs` stay, in this order; all by default.
        """
        model = onnx.compose.add_prefix(onnx.load_from_string(self.content), "teacher/")
        graph, entry = model.graph, f"teacher/{self.input_name}"
        constants = {
            "nonn/mean": np.array(settings.mean, np.float32).reshape(1, -1, 1, 1),
            "nonn/std": np.array(settings.std, np.float32).reshape(1, -1, 1, 1),
            "nonn/bgr": np.array([2, 1, 0]),
            "nonn/outputs": np.array(outputs or [], np.int64),
        }
        to_float: Operation = ("Cast", [], {"to": TensorProto.FLOAT})
        steps = [to_float]
        if image[0] != settings.channels:  # grey images, for a network of colour ones
            steps.append(("Concat", ["nonn/0"] * (settings.channels - 1), {"axis": 1}))
        if settings.bgr:
            steps.append(("Gather", ["nonn/bgr"], {"axis": 1}))
        steps += [("Sub", ["nonn/mean"], {}), ("Div", ["nonn/std"], {})]
        if self.dtype == np.float16:
            steps.append(("Cast", [], {"to": TensorProto.FLOAT16}))
        before = _chain(steps, "image", entry, "nonn/")
        chosen: list[Operation] = [("Gather", ["nonn/outputs"], {"axis": 1})] if outputs else []
        behind = _chain([to_float, *chosen], f"teacher/{self.logits}", "logits", "nonn/after")
        nodes = [*before, *graph.node, *behind]
        n_logits = len(outputs) if outputs else self.n_outputs
        used = {name for node in (*before, *behind) for name in node.input}
        graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items() if n in used)
        del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
        graph.node.extend(nodes)
        graph.input.append(helper.make_tensor_value_info("image", TensorProto.UINT8, [1, *image]))
        graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, n_logits]))
        return model.SerializeToString(deterministic=True)


def _chain(operations: Sequence[Operation], start: str, end: str, prefix: str) -> list[NodeProto]:
    """Nodes that lead from one value to another; those between are called by the prefix and their number."""
    values = [start, *(f"{prefix}{number}" for number in range(len(operations) - 1)), end]
    return [
        helper.make_node(kind, [source, *others], [target], **attributes)
        for (kind, others, attributes), source, target in zip(operations, values[:-1], values[1:], strict=True)
    ]


def _describe_input(model: onnx.ModelProto, source: str) -> tuple[str, list[int | None], type]:
    """Name, shape (None: any size) and type of the only input."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    shape = [d.dim_value or None for d in inputs[0].type.tensor_type.shape.dim] if inputs else []
    check_input(len(inputs), shape, source)
    kind = inputs[0].type.tensor_type.elem_type
    if kind not in FLOATS:
        raise UserError(
            f"params.yaml: teacher.source: {source} takes images of type {TensorProto.DataType.Name(kind).lower()}, "
            "and float is expected. Export it from float32 images."
        )
    if shape[3] in (1, 3) and shape[1] not in (1, 3):
        raise UserError(
            f"params.yaml: teacher.source: {source} takes images (B, H, W, C), with the channels last. Export it for "
            "images (B, C, H, W)."
        )
    return inputs[0].name, shape, FLOATS[kind]


def _find_layer(
    model: onnx.ModelProto, n_outputs: int | None, name: str | None, source: str
) -> tuple[str, np.ndarray, np.ndarray]:
    """Name of the input of the last linear layer, its weight (F, C) and bias (C,)."""
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
        elif node.op_type in ("Identity", "Transpose") and node.input[0] in constants:  # a weight by another name
            array = numpy_helper.to_array(constants[node.input[0]])
            turned = array.transpose(*_permutation(node)) if node.op_type == "Transpose" else array
            constants[node.output[0]] = numpy_helper.from_array(np.ascontiguousarray(turned))
    layers: list[tuple[NodeProto, np.ndarray, np.ndarray]] = []
    for node in model.graph.node:
        if node.op_type in ("Gemm", "MatMul") and node.input[1] in constants:
            weight = numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
            if weight.ndim == 2 and (layer := _linear(model, node, weight, constants)):
                layers.append((node, *layer))
    if name is not None:
        named = [layer for layer in layers if name in (layer[0].name, *layer[0].output)]
        if not named:
            known = [layer[0].name or layer[0].output[0] for layer in layers]
            raise UserError(
                f"params.yaml: teacher.classifier: {source} has no linear layer {name!r}{did_you_mean(name, known)}; "
                f"the last are: {', '.join(known[-3:]) or 'none'}."
            )
        layers = named
    fitting = [layer for layer in layers if n_outputs is None or layer[1].shape[1] == n_outputs]
    if not fitting and any(node.op_type in QUANTISED for node in model.graph.node):
        raise UserError(
            f"params.yaml: teacher.source: {source} is quantised, and its last linear layer has to be one of floating "
            "point. Export it in float32."
        )
    if not fitting:
        found = ", ".join(f"{node.name or node.output[0]} ({w.shape[1]})" for node, w, _ in layers[-3:]) or "none"
        sizes = [size.dim_value for output in model.graph.output[:1] for size in output.type.tensor_type.shape.dim]
        remedy = "Its last layer has to be a matrix product with constant weights (Gemm or MatMul)."
        if layers and n_outputs not in sizes[-1:]:
            remedy = remedy_of_outputs(layers[-1][1].shape[1], n_outputs)
        raise UserError(
            f"params.yaml: teacher.source: {source} has no linear layer of {n_outputs} outputs; its last, with their "
            f"outputs: {found}. {remedy}"
        )
    node, weight, bias = fitting[-1]
    return node.input[0], weight, bias


def _permutation(node: NodeProto) -> Sequence[int]:
    return next((a.ints for a in node.attribute if a.name == "perm"), (1, 0))


def _linear(
    model: onnx.ModelProto, node: NodeProto, weight: np.ndarray, constants: dict[str, TensorProto]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Weight (F, C) and bias (C,) of a matrix product, whose bias may be added by the next node; None for others."""
    options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if options.get("transB"):
        weight = weight.T
    if options.get("transA") or options.get("alpha", 1) != 1 or options.get("beta", 1) != 1:
        return None
    bias = np.zeros(weight.shape[1], np.float32)
    added = [node.input[2]] if len(node.input) > 2 and node.input[2] else []
    users = [other for other in model.graph.node if node.output[0] in other.input]
    if node.op_type == "MatMul" and len(users) == 1 and users[0].op_type == "Add":
        added = [name for name in users[0].input if name != node.output[0]]
    if added and added[0] in constants:
        bias = bias + numpy_helper.to_array(constants[added[0]]).astype(np.float32).reshape(-1)
    return np.ascontiguousarray(weight), bias
