"""Whether an imported teacher works: its accuracy on validation images, and the likely causes of a bad one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from nonn.core.errors import UserError
from nonn.core.params import TeacherParams
from nonn.core.progress import log
from nonn.core.teacher_source import Normalization
from nonn.data.dataset import Dataset
from nonn.data.image_store import spaced
from nonn.teachers.foreign import ForeignTeacher
from nonn.teachers.preprocessing import IMAGENET, Preprocess, Preprocessing
from nonn.training.networks import accuracy, predict

#: How far a teacher may stay below ``teacher.expected_accuracy``: its validation images need not be the published ones.
MARGIN = 0.05
#: A difference of accuracies of more standard errors than this is no chance.
SIGNIFICANT_ERRORS = 3.0
#: Images of a trial of other preprocessing, and of each split in the search for a leak.
TRIAL_IMAGES = 300
LIBRARIES = ("torchvision", "timm")
CAUSES = "normalization, pixels (unit or byte), colour_order, the order of classes, or a head of other classes"


def check_teacher(model: nn.Module, logits: Tensor, data: Dataset, params: TeacherParams) -> None:
    """Refuse a teacher that is not better than chance, or far worse than expected; `logits` (M, C) are of validation.

    A line warns if it was probably trained on the validation images.

    Raises
    ------
    UserError
        The teacher is refused; the message names the likely causes, and those that a trial has confirmed.
    """
    labels = data.labels[data.validation]
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            f"{_where(params)}: NaN or infinite logits on validation images. Look at its weights, and at "
            "teacher.pixels and teacher.normalization."
        )
    score = accuracy(logits, labels)
    chance = float(torch.bincount(labels, minlength=data.n_classes).max()) / len(labels)
    limit = chance + SIGNIFICANT_ERRORS * _error(chance, len(labels))
    if score <= min(limit, (1 + chance) / 2):
        raise _refusal(
            f"{score:.1%} of the validation images are right, about chance ({chance:.1%})", model, logits, data, params
        )
    if params.expected_accuracy and score < params.expected_accuracy - MARGIN:
        reason = (
            f"{score:.1%} of the validation images are right, and teacher.expected_accuracy is "
            f"{params.expected_accuracy:.1%}"
        )
        raise _refusal(reason, model, logits, data, params)
    if warning := leak_warning(model, score, data):
        log(f"{_where(params)}: {warning}")


def leak_warning(model: nn.Module, score: float, data: Dataset) -> str | None:
    """A line if the teacher was probably trained on the validation images; `score` is its accuracy on them.

    It then is right on these as often as on training images, and clearly more often than on test images. The test
    images decide nothing: they tell whether to believe the numbers.
    """
    scores, tried = {}, {}
    for split in ("train", "test"):
        indices = getattr(data, split)
        if not len(indices):
            return None
        indices = indices[spaced(len(indices), TRIAL_IMAGES)]
        tried[split] = len(indices)
        with torch.inference_mode():
            scores[split] = accuracy(predict(model, data.images[indices])[1], data.labels[indices])
    n = len(data.validation)
    gap = score - scores["test"]
    doubt = math.hypot(_error(score, n), _error(scores["test"], tried["test"]))
    like_training = score >= scores["train"] - 2 * _error(score, n)
    if not (like_training and gap > SIGNIFICANT_ERRORS * doubt):
        return None
    return (
        f"right on {score:.1%} of the validation images, {scores['train']:.1%} of training and {scores['test']:.1%} of "
        "test images: it has probably been trained on the validation images, and choices made on them flatter. Give "
        "the data set a folder val/ of images that it has not seen"
    )


def _where(params: TeacherParams) -> str:
    return str(params.weights or params.source)


def _error(share: float, n: int) -> float:
    """Standard error of a share of n."""
    return math.sqrt(share * (1 - share) / n)


def _refusal(reason: str, model: nn.Module, logits: Tensor, data: Dataset, params: TeacherParams) -> UserError:
    remedies = list(_remedies(model, logits, data, params))
    likely = f"Likely cause: {remedies[0]}." if remedies else f"Likely causes: {CAUSES}; see these keys of teacher."
    return UserError(f"{_where(params)}: {reason}. {likely}")


def _remedies(model: nn.Module, logits: Tensor, data: Dataset, params: TeacherParams) -> Iterator[str]:
    """Changes that make the teacher much better in a trial on validation images, each with the accuracy it then has."""
    images, labels = data.subset("validation")
    score = accuracy(logits, labels)
    better = score + (1 - score) / 2  # half of the errors gone
    confusion = torch.zeros(data.n_classes, data.n_classes).index_put(
        (labels, logits.argmax(1)), torch.tensor(1.0), accumulate=True
    )
    rows, columns = linear_sum_assignment(-confusion.numpy())
    assigned = float(confusion[rows, columns].sum()) / len(labels)
    # The best of all orders is better than chance even at random, by about the root of the images for each class.
    outputs = list(getattr(model, "outputs", None) or range(data.n_classes))  # of the network, of each column
    is_all = sorted(outputs) == list(range(data.n_classes))
    if is_all and assigned - math.sqrt(data.n_classes / len(labels)) > better:
        names = [data.classes[row] for row in sorted(rows, key=lambda row: outputs[columns[row]])]
        listed = ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:12])}, …"
        yield f"the order of classes; with teacher.classes: [{listed}] it is right on {assigned:.1%}"
    if not isinstance(model, ForeignTeacher):
        return
    few = spaced(len(labels), TRIAL_IMAGES)
    original = model.preprocess
    tried: dict[str, float] = {}
    for name, settings in _readings(params, original.settings):
        model.preprocess = Preprocess(settings)
        with torch.inference_mode():
            tried[name] = accuracy(predict(model, images[few])[1], labels[few])
    model.preprocess = original
    best = max(tried, key=lambda name: tried[name])
    if tried[best] > better:
        yield f"how it sees images; with teacher.{best} it is right on {tried[best]:.1%}"


def _readings(params: TeacherParams, settings: Preprocessing) -> Iterator[tuple[str, Preprocessing]]:
    """Other preprocessing, by the keys of ``teacher`` that ask for it."""
    plain, half = Normalization(mean=[0.0], std=[1.0]), Normalization(mean=[0.5], std=[0.5])
    changes: list[dict[str, Any]] = [{"pixels": "byte"}]
    if params.normalization or params.kind not in LIBRARIES:  # else the library's normalization would change, too
        changes += [{"pixels": "unit"}]
    changes += [{"normalization": normalization, "pixels": "unit"} for normalization in (plain, half)]
    changes += [{"normalization": plain, "pixels": "byte"}]
    if settings.channels == 3:
        imagenet = Normalization(mean=list(IMAGENET[0]), std=list(IMAGENET[1]))
        changes += [{"normalization": imagenet, "pixels": "unit"}]
        changes += [{"colour_order": "rgb" if settings.bgr else "bgr"}]
    for change in changes:
        new = {key: value for key, value in change.items() if value != getattr(params, key)}
        keys = " and teacher.".join(f"{key}: {_written(value)}" for key, value in new.items())
        if list(new) == ["colour_order"]:
            yield keys, replace(settings, bgr=not settings.bgr)
        elif new:
            changed = params.model_copy(update=change)
            yield keys, Preprocessing.of(changed, settings.channels, settings.channels)


def _written(value: Normalization | str) -> str:
    """As one writes it in ``params.yaml``."""
    return value if isinstance(value, str) else f"{{mean: {value.mean}, std: {value.std}}}"
