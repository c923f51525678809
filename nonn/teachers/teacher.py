"""Training the large network that the students will imitate, or importing one.

The last epoch's weights are kept; nothing is selected. What the teacher says of each image is
computed once, by the stage `signals`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nonn.core.errors import UserError
from nonn.core.files import sha256_of
from nonn.core.params import Teacher
from nonn.data.dataset import Dataset
from nonn.data.tensors import read_tensors
from nonn.teachers.selection import Proxy
from nonn.training.augment import View, apply_view, draw_view
from nonn.training.checkpoint import Checkpoint
from nonn.training.hardware import mixed_precision, pick_device
from nonn.training.loop import LOG_COLUMNS, Log, train
from nonn.training.networks import ConvNet, accuracy, predict, whiten

#: Names of a public CIFAR ResNet (https://github.com/akamaster/pytorch_resnet_cifar10) and ours.
PUBLIC_NAMES = {"conv1": "stem.0", "bn1": "stem.1", "linear": "head", "fc": "head"}
PUBLIC_NAMES |= {f"layer{stage + 1}": f"stages.{stage}" for stage in range(3)}


def train_teacher(data: Dataset, params: Teacher, checkpoint: Checkpoint) -> tuple[ConvNet, Log]:
    """Train a teacher from scratch on labels; return it with its log, one row an epoch."""
    torch.manual_seed(params.seed)
    device = pick_device()
    model = ConvNet(params.architecture, data.channels, data.n_classes, mean=data.mean, std=data.std)
    images, labels = data.part("train")
    whiten(model, images)
    proxy = None
    if params.selection:
        small = ConvNet(params.selection.proxy, data.channels, data.n_classes, mean=data.mean, std=data.std)
        whiten(small, images)
        proxy = Proxy(small, params, params.selection.keep, params.label_smoothing)

    @lru_cache(maxsize=1)  # an epoch sees one view
    def view_of(epoch: int) -> View:
        return draw_view(len(images), epoch, params.augment, params.seed)

    def batch_loss(index: Tensor, epoch: int) -> Tensor:
        batch = apply_view(images, view_of(epoch), index, params.augment).to(device)
        targets = labels[index].to(device)
        if proxy:
            hardest = proxy.hardest(batch, targets)
            batch, targets = batch[hardest], targets[hardest]
        with mixed_precision(device):
            _, logits = model(batch)
        return F.cross_entropy(logits.float(), targets, label_smoothing=params.label_smoothing)

    log = train(
        model,
        batch_loss,
        len(images),
        params,
        seed=params.seed,
        validation=data.part("validation"),
        checkpoint=checkpoint,
        device=device,
        label="teacher",
        proxy=proxy,
        proxy_optimizers=proxy.optimizers if proxy else (),
    )
    return model, log


def import_teacher(data: Dataset, params: Teacher) -> tuple[ConvNet, Log]:
    """Build the teacher from a file of weights, and score it on the validation images.

    A UserError says what does not fit `teacher.architecture` or the dataset.
    """
    model = ConvNet(params.architecture, data.channels, data.n_classes, mean=data.mean, std=data.std)
    weights = {_own_name(name): tensor for name, tensor in _read_weights(params).items()}
    expected = model.state_dict()
    if params.normalization:
        for name in ("mean", "std"):
            values = torch.tensor(getattr(params.normalization, name)) * 255
            if len(values) != data.channels:
                raise UserError(
                    f"params.yaml: teacher.normalization.{name}: has {len(values)} channels, the images have "
                    f"{data.channels}; give one number a channel."
                )
            weights[f"normalize.{name}"] = values.reshape(1, -1, 1, 1)
    # A file need not hold the normalisation, and old ones do not count the batches, which nothing reads.
    given = {n: t for n, t in expected.items() if n.startswith("normalize.") or n.endswith("num_batches_tracked")}
    weights = given | weights
    missing, surplus = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    misfits = [n for n in expected.keys() & weights.keys() if expected[n].shape != weights[n].shape]
    if missing or surplus or misfits:
        example = (missing + surplus + sorted(misfits))[0]
        raise UserError(
            f"{params.weights}: does not fit teacher.architecture in params.yaml ({len(missing)} tensors missing, "
            f"{len(surplus)} unknown, {len(misfits)} of another shape, such as {example}). Set family, depth and "
            f"widths to those it was trained with, for {data.n_classes} classes and {data.channels} channels."
        )
    model.load_state_dict(weights)
    images, labels = data.part("validation")
    _, logits = predict(model, images)
    row = [0, float("nan"), F.cross_entropy(logits, labels).item(), accuracy(logits, labels)]
    return model, [dict(zip(LOG_COLUMNS, row, strict=True))]


def _read_weights(params: Teacher) -> dict[str, Tensor]:
    path = Path(str(params.weights))
    if not path.is_file():
        raise UserError(f"{path}: no such file. Mend teacher.weights in params.yaml, or set it to null to train.")
    if params.weights_sha256 not in (None, found := sha256_of(path)):
        raise UserError(
            f"params.yaml: teacher.weights_sha256: {path} has SHA-256 {found}, not {params.weights_sha256} as stated. "
            "Fetch the right file, or correct the key."
        )
    if path.suffix == ".safetensors":
        try:
            return read_tensors(path)
        except UserError:
            raise UserError(f"params.yaml: teacher.weights: {path} is damaged. Fetch or save it again.") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged data, torch raises almost anything
        raise UserError(
            f"{path}: not a readable state dict. Save `model.state_dict()` and name that file in teacher.weights."
        ) from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(
            f"{path}: holds no state dict. Save `model.state_dict()` and name that file in teacher.weights."
        )
    return loaded


def _own_name(name: str) -> str:
    """Our name of a parameter of a public ResNet; our own names stay as they are."""
    first, _, rest = name.removeprefix("module.").partition(".")
    return f"{PUBLIC_NAMES.get(first, first)}.{rest}"
