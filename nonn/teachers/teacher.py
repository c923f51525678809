"""Training the large network that the students will imitate, or importing one.

The last epoch's weights are kept; nothing is selected. The stage `signals` computes the teacher's answers for all
images once.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nonn.core.params import TeacherParams
from nonn.data.dataset import Dataset
from nonn.teachers.foreign import ForeignTeacher, import_foreign, order_of
from nonn.teachers.preprocessing import other_channels
from nonn.teachers.sanity_check import check_teacher
from nonn.teachers.selection import Proxy
from nonn.teachers.weight_files import Mismatch, load_into, read_weights, strip_prefixes
from nonn.training.augment import View, apply_view, draw_view
from nonn.training.checkpoint import Checkpoint
from nonn.training.hardware import mixed_precision, pick_device, resident
from nonn.training.loop import LOG_COLUMNS, Log, train
from nonn.training.networks import ConvNet, accuracy, predict, whiten

#: What wrappers often put before each name: DataParallel, torch.compile, Lightning and their like.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
#: Names of a public CIFAR ResNet (https://github.com/akamaster/pytorch_resnet_cifar10) and ours.
PUBLIC_NAMES = {"conv1": "stem.0", "bn1": "stem.1", "linear": "head", "fc": "head"}
PUBLIC_NAMES |= {f"layer{stage + 1}": f"stages.{stage}" for stage in range(3)}
#: Prefixes of names in torchvision's and timm's networks, translated by `PUBLIC_NAMES`, that ours never have.
LIBRARY_NAMES = ("layer4.", "features.", "classifier.", "blocks.", "encoder.", "conv_proj.", "trunk_output.", "patch_")


def train_teacher(data: Dataset, params: TeacherParams, checkpoint: Checkpoint) -> tuple[ConvNet, Log]:
    """Train a teacher from scratch on labels; return it with its log, one row an epoch."""
    torch.manual_seed(params.seed)
    device = pick_device()
    model = ConvNet(params.own_architecture, data.channels, data.n_classes, mean=data.mean, std=data.std)
    stored, labels = data.subset("train")
    whiten(model, stored)
    proxy = None
    if params.selection:
        small = ConvNet(params.selection.proxy, data.channels, data.n_classes, mean=data.mean, std=data.std)
        whiten(small, stored)
        proxy = Proxy(small, params, params.selection.keep, params.label_smoothing)

    images, place = resident(stored, device)
    labels = labels.to(place)

    @lru_cache(maxsize=1)  # an epoch sees one view
    def view_of(epoch: int) -> View:
        return draw_view(len(images), epoch, params.augment, params.seed).to(place)

    def batch_of(index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        index = index.to(place)
        batch = apply_view(images, view_of(epoch), index, params.augment).to(device)
        targets = labels[index].to(device)
        if proxy:
            hardest = proxy.hardest(batch, targets)
            batch, targets = batch[hardest], targets[hardest]
        return batch, targets

    def loss_of(batch: Tensor, targets: Tensor) -> Tensor:
        with mixed_precision(device):
            _, logits = model(batch)
        return F.cross_entropy(logits.float(), targets, label_smoothing=params.label_smoothing)

    log = train(
        model,
        batch_of,
        loss_of,
        len(images),
        params,
        seed=params.seed,
        validation=data.subset("validation"),
        checkpoint=checkpoint,
        device=device,
        label="teacher",
        section="teacher",
        proxy=proxy,
        proxy_optimizers=proxy.optimizers if proxy else (),
    )
    return model, log


def import_own(data: Dataset, params: TeacherParams) -> ConvNet:
    """Build a teacher of one of our families from a file of weights.

    Raises
    ------
    UserError
        They do not fit `teacher.architecture` or the dataset.
    """
    path = Path(str(params.weights))
    model = ConvNet(params.own_architecture, data.channels, data.n_classes, mean=data.mean, std=data.std)
    expected = model.state_dict()
    weights, _ = read_weights(params)
    firsts = {name.partition(".")[0] for name in expected}
    weights = strip_prefixes({_own_name(name, firsts): t for name, t in weights.items()}, expected, path)
    weights |= _own_normalization(data, params)
    if params.classes and (order := order_of(params.classes, data.classes, params)):
        weights |= {n: weights[n][order] for n in ("head.weight", "head.bias") if len(weights.get(n, ())) > max(order)}
    if params.colour_order == "bgr" and data.channels == 3:
        first = next(name for name, tensor in expected.items() if tensor.dim() == 4 and "normalize" not in name)
        weights[first] = weights[first].flip(1) if first in weights else torch.empty(0)
    # A file need not hold the normalisation, and old ones do not count the batches, which nothing reads.
    defaults = {n: t for n, t in expected.items() if n.startswith("normalize.") or n.endswith("num_batches_tracked")}
    weights = defaults | weights
    if any(mismatch := Mismatch.of(expected, weights)):
        remedy = (
            "Its names are those of another library: set teacher.source to torchvision:NAME or timm:NAME."
            if any(name.startswith(LIBRARY_NAMES) for name in weights)
            else f"Set family, depth and widths to those it was trained with, for {data.n_classes} classes and "
            f"{data.channels} channels."
        )
        raise mismatch.refusal(params.weights, "teacher.architecture in params.yaml", remedy)
    load_into(model, weights, params.weights)
    return model


def _own_normalization(data: Dataset, params: TeacherParams) -> dict[str, Tensor]:
    """Mean and deviation in grey levels from the parameters; empty if the file or the data set decides them."""
    tensors = {}
    for name, values in (params.normalization.model_dump() if params.normalization else {}).items():
        if len(values) != data.channels:
            raise other_channels(name, len(values), data.channels)
        grey = torch.tensor(values) * (255 if params.pixels == "unit" else 1)
        grey = grey.flip(0) if params.colour_order == "bgr" else grey
        tensors[f"normalize.{name}"] = grey.reshape(1, -1, 1, 1)
    return tensors


def import_teacher(data: Dataset, params: TeacherParams) -> tuple[ConvNet | ForeignTeacher, dict[str, Any]]:
    """Build an imported teacher; return it with what `nonn.teachers.loading.load_teacher` needs besides its tensors.

    A UserError says why it cannot be a teacher of this data set.
    """
    return import_foreign(data, params) if params.is_foreign else (import_own(data, params).eval(), {})


def score_teacher(model: ConvNet | ForeignTeacher, data: Dataset, params: TeacherParams) -> Log:
    """A log of one row for an imported teacher; a UserError if `check_teacher` refuses it."""
    images, labels = data.subset("validation")
    with torch.inference_mode():
        _, logits = predict(model, images)
    check_teacher(model, logits, data, params)
    row = [0, float("nan"), F.cross_entropy(logits, labels).item(), accuracy(logits, labels)]
    return [dict(zip(LOG_COLUMNS, row, strict=True))]


def _own_name(name: str, firsts: Collection[str]) -> str:
    """Our name for a parameter of a public ResNet, behind what wrappers put before it.

    Names of our own stay as they are; their first parts are `firsts`.
    """
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    parts = name.split(".")
    position = next((i for i, part in enumerate(parts) if part in firsts or part in PUBLIC_NAMES), 0)
    if parts[position] not in firsts:
        parts[position] = PUBLIC_NAMES.get(parts[position], parts[position])
    return ".".join(parts)
