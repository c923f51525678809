"""Stage `signals`: what the teacher says of every training image, see `nonn.teachers.signals`."""

from __future__ import annotations

import torch

from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.dataset import load_dataset, load_teacher_dataset
from nonn.data.tensors import write_tensors
from nonn.teachers.loading import load_teacher
from nonn.teachers.signals import compute_signals


def run(params: Params, paths: Paths) -> None:
    torch.set_num_threads(params.signals.threads)
    data, students = load_teacher_dataset(paths), load_dataset(paths)
    signals = compute_signals(load_teacher(paths), data, params.signals, students.size)
    write_tensors(paths.signals, signals)
