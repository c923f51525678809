"""Stage `teacher`: train the large network that the students imitate, or import one, see `nonn.teachers.teacher`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nonn.core.files import write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.dataset import load_teacher_dataset
from nonn.data.tensors import write_tensors
from nonn.teachers import selection, teacher
from nonn.teachers.foreign import ForeignTeacher
from nonn.teachers.loading import tensors_of
from nonn.teachers.teacher import import_teacher, score_teacher, train_teacher
from nonn.training.checkpoint import Checkpoint
from nonn.training.hardware import keep_freed_memory
from nonn.training.loop import write_log
from nonn.training.networks import ConvNet


def run(params: Params, paths: Paths) -> None:
    section, data = params.teacher, load_teacher_dataset(paths)
    torch.set_num_threads(section.threads)
    keep_freed_memory()
    inputs = [paths.dataset, paths.teacher_images, Path(selection.__file__), Path(teacher.__file__)]
    checkpoint = Checkpoint.of(["teacher", section.model_dump()], inputs)
    record: dict[str, Any] = {}
    model: ConvNet | ForeignTeacher
    if section.is_trained:
        model, log = train_teacher(data, section, checkpoint)
    else:
        model, record = import_teacher(data, section)
        params.check_filters(model.n_features)
        log = score_teacher(model, data, section)
    write_tensors(paths.teacher, tensors_of(model))
    write_log(paths.log(paths.teacher), log)
    info = {
        "architecture": None if section.is_foreign else section.own_architecture.model_dump(),
        "imported_from": section.weights,
        "n_filters": model.n_features,
        "validation_accuracy": log[-1]["validation_accuracy"],
    }
    write_json(paths.teacher_info, info | record)
    checkpoint.discard()
