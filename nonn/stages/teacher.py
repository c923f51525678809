"""Stage `teacher`: train the large network that the students imitate, or import one, see `nonn.teachers.teacher`."""

from __future__ import annotations

import torch

from nonn.core.files import write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.dataset import load_teacher_dataset
from nonn.data.tensors import write_tensors
from nonn.teachers.teacher import import_teacher, train_teacher
from nonn.training.checkpoint import Checkpoint
from nonn.training.hardware import keep_freed_memory
from nonn.training.loop import write_log


def run(params: Params, paths: Paths) -> None:
    section, data = params.teacher, load_teacher_dataset(paths)
    torch.set_num_threads(section.threads)
    keep_freed_memory()
    checkpoint = Checkpoint.of(["teacher", section.model_dump()], [paths.dataset, paths.teacher_images])
    if section.weights:
        model, log = import_teacher(data, section)
    else:
        model, log = train_teacher(data, section, checkpoint)
    write_tensors(paths.teacher, model.state_dict())
    write_log(paths.log(paths.teacher), log)
    write_json(
        paths.teacher_info,
        {
            "architecture": section.architecture.model_dump(),
            "imported_from": section.weights,
            "n_filters": model.n_features,
            "validation_accuracy": log[-1]["validation_accuracy"],
        },
    )
    checkpoint.discard()
