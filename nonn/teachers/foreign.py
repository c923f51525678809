"""Teachers that are not of our own families: any network that gives features and logits.

The pipeline needs the input and the output of a teacher's last linear layer, the *classifier*, for each image.
`ForeignTeacher` gives them, whether the network is one of torchvision or timm, of the user's own code, an ONNX file or
an exported program; it is called like `nonn.training.networks.ConvNet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard
from unicodedata import normalize

import torch
from torch import Tensor, nn

from nonn.core.errors import UserError, printable
from nonn.core.params import TeacherParams
from nonn.core.progress import log
from nonn.core.schema import did_you_mean
from nonn.data.dataset import Dataset
from nonn.teachers.bodies import Body, GraphBody, ModuleBody, check_logits, find_classifier, full_precision, run_network
from nonn.teachers.libraries import Built, build_network, digest_code, input_channels
from nonn.teachers.onnx_body import OnnxBody, read_onnx
from nonn.teachers.preprocessing import Preprocess, Preprocessing
from nonn.teachers.weight_files import check_finite, check_kinds, check_sum, fill, read_weights

#: Images on which a teacher is examined.
PROBE_IMAGES = 16


class ForeignTeacher(nn.Module):
    """A foreign network, called as our own are.

    It takes uint8 images (B, channels, H, W) of the data set and returns feature vectors (B, `n_features`), of any
    sign, and logits (B, C), float32, in the order of the data set's classes. `outputs` are the positions of these
    classes among the network's outputs; None if the two are the same.
    """

    mirrors = False

    def __init__(self, body: Body, preprocessing: Preprocessing, outputs: Sequence[int] | None):
        super().__init__()
        self.body, self.preprocess = body, Preprocess(preprocessing)
        self.outputs = list(outputs) if outputs is not None else None
        self.n_features = body.n_features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(images.device):
            features, logits = self.body(self.preprocess(images))
        return features, logits if self.outputs is None else logits[:, self.outputs]


def import_foreign(data: Dataset, params: TeacherParams) -> tuple[ForeignTeacher, dict[str, Any]]:
    """Build a foreign teacher, examine it on images, and return it with what `load_foreign` needs besides its tensors.

    A UserError says why it cannot be a teacher.
    """
    images = data.subset("validation")[0][:PROBE_IMAGES]
    n_outputs = len(params.classes) if params.classes else data.n_classes
    record: dict[str, Any] = {"source": params.source, "classifier": params.classifier}
    classes = tuple(params.classes) if params.classes else None
    body: Body
    if params.kind in ("onnx", "export"):
        body, settings = _read_file(params, data, n_outputs)
    else:
        built, settings = _build(params, data, n_outputs)
        classes = classes or built.classes
        n_outputs = len(classes) if classes else n_outputs
        network, origin = built.network, params.weights or params.source
        network.eval().float()
        check_kinds(network.state_dict(), origin)
        check_finite(network.state_dict(), origin)
        pixels = Preprocess(settings)(images)
        record["classifier"] = find_classifier(network, pixels, params.classifier, n_outputs, params.source)
        body = ModuleBody(network, record["classifier"])
        if params.kind == "module":
            record["code_sha256"] = digest_code(params.source)
    outputs = order_of(classes, data.classes, params) if classes else None
    examine(body, Preprocess(settings)(images), n_outputs, params.source)
    record |= {"preprocessing": asdict(settings), "n_outputs": n_outputs, "outputs": outputs}
    means = ", ".join(f"{value:.4g}" for value in settings.mean)
    deviations = ", ".join(f"{value:.4g}" for value in settings.std)
    log(
        f"{params.source}: sees {'BGR' if settings.bgr else 'RGB' if settings.channels == 3 else 'grey'} images less "
        f"{means}, divided by {deviations}, of grey levels from 0 to 255"
    )
    return ForeignTeacher(body, settings, outputs).eval(), record


def load_foreign(record: Mapping[str, Any], tensors: Mapping[str, Tensor], data: Dataset) -> ForeignTeacher:
    """The teacher again from what `import_foreign` returned, and the tensors of its body."""
    source, kind = record["source"], record["source"].partition(":")[0]
    settings, n_outputs = Preprocessing(**record["preprocessing"]), record["n_outputs"]
    body: Body
    if kind == "onnx":
        body = OnnxBody(tensors["file"].numpy().tobytes(), n_outputs, record["classifier"], source)
    elif kind == "export":
        body = GraphBody(tensors["file"].numpy().tobytes(), n_outputs, source)
    else:
        if kind == "module" and digest_code(source) != record["code_sha256"]:
            raise UserError(
                f"params.yaml: teacher.source: the code of {source} has changed since the stage teacher. Run the "
                "pipeline again."
            )
        weights = {name.removeprefix("network."): tensor for name, tensor in tensors.items()}
        params = TeacherParams(source=source, threads=1)
        network = build_network(params, settings.channels, data.size, n_outputs, weights, download=False).network
        network.float().load_state_dict(weights)
        body = ModuleBody(network, record["classifier"])
    return ForeignTeacher(body, settings, record["outputs"]).eval()


def _build(params: TeacherParams, data: Dataset, n_outputs: int) -> tuple[Built, Preprocessing]:
    """A network with its weights, and how it sees images."""
    weights, options = read_weights(params) if params.weights else (None, {})
    download = weights is None and params.kind != "module"
    built = build_network(params, data.channels, data.size, n_outputs, weights, download)
    if weights is not None:
        linear = [
            n for n, m in built.network.named_modules() if isinstance(m, nn.Linear) and m.out_features == n_outputs
        ]
        head = params.classifier or (linear[-1] if linear else None)
        fill(built.network, weights, Path(str(params.weights)), f"teacher.source {params.source}", head, n_outputs)
    moments = built.moments
    mean, std = options.get("mean"), options.get("std")
    if _are_numbers(mean) and _are_numbers(std):  # of timm's training script
        moments = tuple(mean), tuple(std)
    channels = input_channels(built.network) or data.channels
    return built, Preprocessing.of(params, channels, data.channels, moments)


def _are_numbers(values: Any) -> TypeGuard[Sequence[float]]:
    return isinstance(values, list | tuple) and bool(values) and all(isinstance(v, int | float) for v in values)


def _read_file(params: TeacherParams, data: Dataset, n_outputs: int) -> tuple[GraphBody | OnnxBody, Preprocessing]:
    path = Path(params.target)
    try:
        check_sum(path, params)
    except FileNotFoundError:
        raise UserError(f"params.yaml: teacher.source: {printable(path)} does not exist. Name a file.") from None
    if params.weights_sha256 and len(params.files) > 1:
        raise UserError(
            f"params.yaml: teacher.weights_sha256: is that of {path} alone, whose weights are in "
            f"{printable(params.files[1])}. Save it as one file, or set the key to null."
        )
    body: GraphBody | OnnxBody
    if params.kind == "onnx":
        body = OnnxBody(read_onnx(path), n_outputs, params.classifier, params.source)
    else:
        body = GraphBody(path.read_bytes(), n_outputs, params.source)
    _, channels, *sides = body.input_shape
    if None not in sides and sides[0] != sides[1]:
        raise UserError(
            f"params.yaml: teacher.source: {params.source} takes images of {sides[0]} x {sides[1]} pixels, and those "
            "here are square. Export it for square images, or for any size."
        )
    if any(side not in (None, data.size) for side in sides):
        raise UserError(
            f"params.yaml: teacher.source: {params.source} takes images of {sides[0]} x {sides[1]} pixels, and those "
            f"of the data set have {data.size}. Set teacher.size to {sides[0]}, or export it for other sizes."
        )
    check_finite(body.weights(), path)
    return body, Preprocessing.of(params, channels or data.channels, data.channels)


def order_of(classes: Sequence[str], data_classes: Sequence[str], params: TeacherParams) -> list[int] | None:
    """Positions among the teacher's `classes` of those of the data set; None if they are the same in the same order."""
    classes, data_classes = ([normalize("NFC", name) for name in names] for names in (classes, data_classes))
    absent = [name for name in data_classes if name not in classes]
    if absent:
        key = "teacher.classes" if params.classes else f"teacher.source: {params.source}"
        raise UserError(
            f"params.yaml: {key}: class {absent[0]!r} of the data set is not among the teacher's {len(classes)} "
            f"classes{did_you_mean(absent[0], classes)}. List the names of all its outputs, in order, in "
            "teacher.classes, with the names of the data set's folders."
        )
    order = [classes.index(name) for name in data_classes]
    return None if order == list(range(len(classes))) else order


@torch.inference_mode()
def examine(body: Body, pixels: Tensor, n_outputs: int, source: str) -> None:
    """Check on preprocessed images (B, channels, H, W) that the features through the classifier give the logits.

    Raises
    ------
    UserError
        They do not, to the tolerance of the body; the network answers with something else than features and logits,
        also for one image alone; or its answer for an image is random, or depends on the others of its batch.
    """
    features, logits = run_network(body, pixels, source)
    check_logits(logits, len(pixels), n_outputs, source)
    check_logits(run_network(body, pixels[:1], source)[1], 1, n_outputs, source)
    if features.dim() != 2 or features.shape != (len(pixels), body.n_features):
        raise UserError(
            f"params.yaml: teacher.source: {source}: the classifier is given values of shape "
            f"{tuple(features.shape)}, and one feature vector an image is expected, ({len(pixels)}, "
            f"{body.n_features}). Name the last layer in teacher.classifier."
        )
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            f"params.yaml: teacher.source: {source} answers with NaN or infinite logits on images of the data set. "
            "Look at its weights, and at teacher.pixels and teacher.normalization."
        )
    limit = body.tolerance * max(1.0, float(logits.abs().max()))
    # The same images beside others, in a batch of the same size: one of another size may be summed in another order.
    first = pixels[: -(-len(pixels) // 2)]
    _, again = run_network(body, torch.cat([first, first])[: len(pixels)], source)
    if not _difference(again[: len(first)], logits[: len(first)]) <= limit:
        raise UserError(
            f"params.yaml: teacher.source: {source} answers differently when asked again, or in another batch. Export "
            "it in evaluation mode (`model.eval()`); in code, say `training=self.training` to F.dropout and the like."
        )
    difference = _difference(body.classify(features), logits)
    if not difference <= limit:
        sums = logits.sum(1)
        softmax = bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())
        reason = "a softmax follows it" if softmax else "something follows it, or it is not the last layer"
        remedy = "Let it return the logits themselves, or name the last layer in teacher.classifier."
        if any(torch.equal(logits, logits.to(kind).float()) for kind in (torch.bfloat16, torch.float16)):
            reason, remedy = "it computes in 16 bits", "Let it compute in float32, without torch.autocast."
        raise UserError(
            f"params.yaml: teacher.source: {source}: the features through its last linear layer should give its "
            f"logits to {body.tolerance:g}, and differ by {difference:.2g}: {reason}. {remedy}"
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference of an element; infinite for another shape."""
    return float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
