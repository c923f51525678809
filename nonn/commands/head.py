"""The command ``nonn head``: a pretrained network of torchvision or timm gets a last layer for the data set's classes.

The layer is fitted to the feature vectors of the training images, as multinomial logistic regression; the rest of the
network stays as it is (a *linear probe*, https://arxiv.org/abs/1610.01644). Fine-tuning all layers gives a better
teacher and takes a GPU; this takes one pass over the images.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nonn.core.errors import UserError
from nonn.core.files import replacing
from nonn.core.numerics import set_numerics
from nonn.core.options import add_settings, load_settings
from nonn.core.params import Params, TeacherParams
from nonn.core.paths import Paths
from nonn.core.progress import log

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nonn.data.dataset import Dataset
    from nonn.teachers.foreign import ForeignTeacher

#: Weights of the L2 penalty on the layer; validation images choose one.
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)
STEPS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--start", type=Path, metavar="FILE", help="weights to start from, for any classes; without: the library's own"
    )
    add_settings(parser)
    parser.epilog = "example: nonn head --start resnet18.pth"


def run(options: argparse.Namespace) -> None:
    """Write the file that ``teacher.weights`` names."""
    params = load_settings(options)
    if options.start and not options.start.exists():
        raise UserError(f"--start {options.start}: no such file. Name weights that are there, or leave it out.")
    target = _target(params)
    set_numerics(params.numerics)
    import torch

    from nonn.data.dataset import load_teacher_dataset

    torch.set_num_threads(params.teacher.threads)
    data = load_teacher_dataset(Paths(params.experiment))
    start = {"weights": str(options.start) if options.start else None, "weights_sha256": None}
    model = load_pretrained(data, params.teacher.model_copy(update=start))
    layer, score = fit_head(model, data)
    body: Any = model.body
    body.network.set_submodule(body.classifier, layer)
    with replacing(target) as temporary:
        content = io.BytesIO()  # PyTorch hides errors of the operating system
        torch.save(body.network.state_dict(), content)
        temporary.write_bytes(content.getvalue())
    log(
        f"{target}: {params.teacher.source} for {data.n_classes} classes, right on {score:.1%} of the validation images"
    )


def _target(params: Params) -> Path:
    section = params.teacher
    if section.kind not in ("torchvision", "timm"):
        raise UserError(
            f"params.yaml: teacher.source: {section.source} is none of torchvision or timm, which alone get a new last "
            "layer here. Train it on the classes of the data set."
        )
    if section.weights is None:
        raise UserError("params.yaml: teacher.weights: null; name the file that is to be written.")
    target = Path(section.weights)
    if target.suffix not in (".pt", ".pth"):
        raise UserError(f"params.yaml: teacher.weights: {target} is to be written; give it the suffix .pt or .pth.")
    if target.exists():
        raise UserError(f"params.yaml: teacher.weights: {target} is there already. Remove it, or name another file.")
    return target


def load_pretrained(data: Dataset, params: TeacherParams) -> ForeignTeacher:
    """The network of ``teacher.source``, with the weights of ``teacher.weights`` or the library, for their classes."""
    from nonn.teachers.bodies import ModuleBody, find_classifier
    from nonn.teachers.foreign import PROBE_IMAGES, ForeignTeacher, examine
    from nonn.teachers.libraries import Built, build_network, input_channels
    from nonn.teachers.preprocessing import Preprocess, Preprocessing
    from nonn.teachers.weight_files import fill, read_weights, strip_prefixes

    weights = read_weights(params)[0] if params.weights else None

    def build(n_outputs: int) -> Built:
        return build_network(params, data.channels, data.size, n_outputs, weights, download=weights is None)

    n_outputs = data.n_classes
    built = build(n_outputs)
    network = built.network.eval()
    settings = Preprocessing.of(params, input_channels(network) or data.channels, data.channels, built.moments)
    pixels = Preprocess(settings)(data.subset("validation")[0][:PROBE_IMAGES])
    if weights is None:
        n_outputs = _count_outputs(network, pixels)  # of the library's own weights
    else:
        name = find_classifier(network, pixels, params.classifier, n_outputs, params.source)
        path = Path(str(params.weights))
        stripped = strip_prefixes(weights, network.state_dict(), path)
        n_outputs = len(stripped.get(f"{name}.weight", range(n_outputs)))
        network = build(n_outputs).network.eval()
        new = {n: t for n, t in network.state_dict().items() if n.startswith(f"{name}.")}  # where the file has none
        fill(network, new | stripped, path, f"teacher.source {params.source}", None, n_outputs)
    body = ModuleBody(network, find_classifier(network, pixels, params.classifier, n_outputs, params.source))
    examine(body, pixels, n_outputs, params.source)
    return ForeignTeacher(body, settings, None).eval()


def _count_outputs(network: nn.Module, pixels: Tensor) -> int:
    import torch

    with torch.inference_mode():
        return network(pixels).shape[1]


def fit_head(model: ForeignTeacher, data: Dataset) -> tuple[nn.Linear, float]:
    """A layer from feature vectors to the classes of the data set, and its accuracy on validation images."""
    import torch

    from nonn.training.networks import accuracy, predict

    with torch.inference_mode():
        parts = {name: predict(model, data.subset(name)[0])[0] for name in ("train", "validation")}
    features, labels = parts["train"].clone(), data.labels[data.train]
    scale = float(features.std()) or 1.0
    best: tuple[nn.Linear, float] | None = None
    for penalty in PENALTIES:
        layer = _fit(features / scale, labels, data.n_classes, penalty)
        layer.weight.data /= scale
        with torch.inference_mode():
            score = accuracy(layer(parts["validation"]), data.labels[data.validation])
        if best is None or score > best[1]:
            best = layer, score
    assert best is not None
    return best


def _fit(features: Tensor, labels: Tensor, n_classes: int, penalty: float) -> nn.Linear:
    import torch
    import torch.nn.functional as F

    layer = torch.nn.Linear(features.shape[1], n_classes)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(features), labels) + penalty * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return layer
