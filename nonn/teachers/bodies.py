"""Foreign networks as *bodies*: modules that return the feature vectors that their classifier is given, and the logits.

A body has ``n_features`` and ``n_outputs``, takes preprocessed images (B, C, H, W), float32, and returns features
(B, n_features) and logits (B, n_outputs), float32. ``classify`` gives the logits of features, to ``tolerance``;
``tensors`` are what is stored of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nonn.core.errors import UserError, one_line
from nonn.core.schema import did_you_mean
from nonn.teachers.weight_files import other_classes

#: Largest difference of the logits from those of the features through the classifier, relative to the largest logit,
#: for weights in float32 and in 16 bits.
TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2
#: What to do about a network that drops the batch axis of a single image.
KEEP_BATCH = "Keep the batch axis for one image too: use `.flatten(1)` instead of `.squeeze()`."


class Body(Protocol):
    """The interface that the docstring of this module describes."""

    n_features: int
    n_outputs: int
    tolerance: float

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...

    def classify(self, features: Tensor) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]: ...


class ModuleBody(nn.Module):
    """A module of the user's or of a library, in float32; a hook reads the input of its classifier."""

    tolerance = TOLERANCE

    def __init__(self, network: nn.Module, classifier: str):
        super().__init__()
        self.network, self.classifier = network, classifier
        self.n_features, self.n_outputs = self.head.in_features, self.head.out_features

    @property
    def head(self) -> nn.Linear:
        return self.network.get_submodule(self.classifier)  # type: ignore[return-value]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        try:
            logits = self.network(pixels)
        finally:
            hook.remove()
        return features[-1].float(), logits.float()  # a network may compute in 16 bits, as within torch.autocast

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features)

    def tensors(self) -> dict[str, Tensor]:
        # Cloned: tied weights share memory, which safetensors refuses.
        return {f"network.{name}": tensor.clone() for name, tensor in self.network.state_dict().items()}


@torch.no_grad()
def find_classifier(network: nn.Module, pixels: Tensor, name: str | None, n_outputs: int, source: str) -> str:
    """Name of the last linear layer of `n_outputs` outputs that the network runs, or of the one that `name` says.

    Raises
    ------
    UserError
        There is none, or the network does not answer images with logits.
    """
    linear = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    if name is not None and name not in linear:
        known = ", ".join(list(linear)[-3:]) or "none"
        raise UserError(
            f"params.yaml: teacher.classifier: {source} has no linear layer {name!r}{did_you_mean(name, linear)}; the "
            f"last are: {known}."
        )
    order: list[str] = []
    hooks = [m.register_forward_hook(lambda *_, n=n: order.append(n)) for n, m in linear.items()]
    try:
        logits = run_network(network, pixels, source)
    finally:
        for hook in hooks:
            hook.remove()
    check_logits(logits, len(pixels), n_outputs, source)
    if name is not None:
        candidates = [name] if name in order else []
    else:
        candidates = [n for n in order if linear[n].out_features == n_outputs]
    if not candidates:
        ran = ", ".join(f"{n} ({linear[n].out_features})" for n in order[-3:]) or "none"
        raise UserError(
            f"params.yaml: teacher.source: {source} runs no linear layer {name or f'of {n_outputs} outputs'}; those "
            f"that it runs last, with their outputs: {ran}. Its last layer has to be an nn.Linear; name it in "
            "teacher.classifier."
        )
    return candidates[-1]


def run_network(network: Any, pixels: Tensor, source: str) -> Any:
    """The network's answer, or a UserError if it has none."""
    try:
        return network(pixels)
    except (Exception, SystemExit) as error:  # a foreign network may raise anything, and end the program
        n_images, channels, height, width = pixels.shape
        what = f"{n_images} image{'s' * (n_images > 1)} of {channels} channels and {height} x {width} pixels"
        remedy = KEEP_BATCH if n_images == 1 else "Set teacher.size to what it was trained with, or mend its code."
        if isinstance(error, TypeError):
            remedy = "Wrap it in a module whose forward takes only the images."
        raise UserError(
            f"params.yaml: teacher.source: {source} fails on {what} ({type(error).__name__}: {one_line(error)}). "
            f"{remedy}"
        ) from None


def check_logits(logits: Any, n_images: int, n_outputs: int, source: str) -> None:
    """Refuse what is not the logits (n_images, n_outputs) of a batch."""
    if not isinstance(logits, Tensor):
        raise UserError(
            f"params.yaml: teacher.source: {source} answers with a {type(logits).__name__}, not with the logits (B, C) "
            "as one tensor. Wrap it in a module whose forward returns them."
        )
    if not logits.is_floating_point():
        raise UserError(
            f"params.yaml: teacher.source: {source} answers with {str(logits.dtype).removeprefix('torch.')}, not with "
            "logits of floating point. Wrap it in a module whose forward returns them."
        )
    if logits.dim() != 2 or len(logits) != n_images:
        remedy = KEEP_BATCH if logits.numel() == n_images * n_outputs else "Name a classifier of images."
        raise UserError(
            f"params.yaml: teacher.source: {source} answers {n_images} image{'s' * (n_images > 1)} with shape "
            f"{tuple(logits.shape)}, not with logits ({n_images}, {n_outputs}). {remedy}"
        )
    if logits.shape[1] != n_outputs:
        raise other_classes(f"params.yaml: teacher.source: {source}", logits.shape[1], n_outputs)


class GraphBody(nn.Module):
    """A program of torch.export, with the input of its last linear layer as one more output."""

    def __init__(self, content: bytes, n_outputs: int | None, source: str):
        super().__init__()
        logging.getLogger("torch.export").setLevel(logging.ERROR)  # it shows a traceback, too
        try:
            program = torch.export.load(BytesIO(content))
            module: Any = program.module()
        except Exception as error:
            raise UserError(
                f"params.yaml: teacher.source: {source} is not a program that torch.export wrote "
                f"({one_line(error)}). Write it with `torch.export.save`."
            ) from None
        self.content = content
        self.input_shape = _placeholder(module.graph, source)
        self.graph_module, self.weight_name, self.bias_name = _cut_open(module, n_outputs, source)
        weight: Any = self._parameter(self.weight_name)
        self.n_outputs, self.n_features = map(int, weight.shape)
        if weight.dtype == torch.bfloat16:
            raise UserError(
                f"params.yaml: teacher.source: {source} computes in bfloat16, which ONNX Runtime does not. Export it "
                "in float32 or float16."
            )
        self.tolerance = HALF_TOLERANCE if weight.itemsize == 2 else TOLERANCE

    def _parameter(self, name: str | None) -> Tensor | None:
        if name is None:
            return None
        owner, _, last = name.rpartition(".")
        return getattr(self.graph_module.get_submodule(owner), last)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        batches = pixels.split(1) if self.input_shape[0] == 1 else [pixels]  # some are exported for one image at a time
        features, logits = zip(*map(self.graph_module, batches), strict=True)
        return torch.cat(features).float(), torch.cat(logits).float()

    def classify(self, features: Tensor) -> Tensor:
        weight, bias = self._parameter(self.weight_name), self._parameter(self.bias_name)
        return F.linear(features, weight.float(), None if bias is None else bias.float())  # type: ignore[union-attr]

    def weights(self) -> dict[str, Tensor]:
        return self.graph_module.state_dict()

    def tensors(self) -> dict[str, Tensor]:
        return {"file": torch.frombuffer(bytearray(self.content), dtype=torch.uint8)}

    def train(self, mode: bool = True) -> GraphBody:  # noqa: ARG002
        """Exported programs stay in the mode that they were exported in, and refuse to be switched."""
        return self


def _placeholder(graph: fx.Graph, source: str) -> list[Any]:
    """Shape of the only input, with None for any size."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    shape = inputs[0].meta["val"].shape if inputs and "val" in inputs[0].meta else ()
    sizes = [size if isinstance(size, int) else None for size in shape]
    check_input(len(inputs), sizes, source)
    if (dtype := inputs[0].meta["val"].dtype) != torch.float32:
        raise UserError(
            f"params.yaml: teacher.source: {source} takes images of type {str(dtype).removeprefix('torch.')}, and "
            "float32 is expected. Export it from float32 images."
        )
    return sizes


def check_input(n_inputs: int, shape: Sequence[int | None], source: str) -> None:
    """Refuse a network that takes neither one image nor any number; `shape` is that of the first input."""
    if n_inputs != 1 or len(shape) != 4:
        raise UserError(
            f"params.yaml: teacher.source: {source} takes {n_inputs} inputs, the first with {len(shape)} dimensions; "
            "expected is one, of images (B, C, H, W)."
        )
    if shape[0] not in (None, 1):
        raise UserError(
            f"params.yaml: teacher.source: {source} takes batches of {shape[0]} images alone. Export it for one image, "
            "or with a dynamic batch."
        )


def _cut_open(module: Any, n_outputs: int | None, source: str) -> tuple[fx.GraphModule, str, str | None]:
    """The same graph with the input of its last linear layer as first output, and names of weight and bias."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result: Any = None
    classifier = None
    for node in module.graph.nodes:
        if node.op == "output":
            result = node.args[0]
        elif node.target != "_guards_fn":
            copied[node] = graph.node_copy(node, copied.__getitem__)
            if node.target is torch.ops.aten.linear.default and (
                n_outputs is None or node.meta["val"].shape[-1] == n_outputs
            ):
                classifier = node
    if classifier is None:
        raise UserError(
            f"params.yaml: teacher.source: {source} has no linear layer of {n_outputs} outputs. Its last layer has to "
            "be an nn.Linear with an output for each class, exported without `run_decompositions`."
        )
    outputs = _flat(result)
    if len(outputs) != 1:
        raise UserError(
            f"params.yaml: teacher.source: {source} has {len(outputs)} outputs, not the logits alone. Export a module "
            "whose forward returns them."
        )
    features, weight, *bias = classifier.args
    if not isinstance(outputs[0], fx.Node):
        raise UserError(
            f"params.yaml: teacher.source: {source} answers with {outputs[0]!r} for every image, not with logits. "
            "Export a module whose forward returns them."
        )
    if any(isinstance(node, fx.Node) and node.op != "get_attr" for node in (weight, *bias)):
        raise UserError(
            f"params.yaml: teacher.source: {source} calculates the weights of its last linear layer for each image, as "
            "weight_norm does. Export it with plain weights (`torch.nn.utils.parametrize.remove_parametrizations`)."
        )
    graph.output((copied[features], copied[outputs[0]]))
    names = [str(node.target) for node in (weight, *bias) if isinstance(node, fx.Node)]
    return fx.GraphModule(module, graph), names[0], names[1] if len(names) > 1 else None


def _flat(value: Any) -> list[fx.Node]:
    if isinstance(value, Mapping):
        value = list(value.values())
    return [node for item in value for node in _flat(item)] if isinstance(value, list | tuple) else [value]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep float32 within mixed precision, which foreign networks may not be made for."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield
