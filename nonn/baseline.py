"""Stage `baseline`: what a user could do instead, with the same signals, schedule and seeds.

============ =====================================================================
labels       one student on one device, trained with the labels alone
kd           one student on one device, knowledge distillation
at_kd        the same with attention transfer (https://arxiv.org/abs/1612.03928)
total        one KD student with the budget of all devices of the network
random       the network on a random partition, another one for each seed
contiguous   the network on filters in their order
classwise    the network on filters grouped by the class they respond to
full         the network with every filter for every student: does partitioning help?
============ =====================================================================

An ensemble of N independent KD students, what a user would otherwise do with N devices, needs no
training of its own: the stage `evaluate` forms it from the ``kd`` students.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from nonn.dataset import Dataset, load_dataset
from nonn.design import load_design
from nonn.distill import Classroom, Lesson, distill_student
from nonn.files import read_json, read_tensors, write_json, write_tensors
from nonn.models import Network
from nonn.params import Params
from nonn.partition import load_baseline_sets
from nonn.paths import Paths
from nonn.signals import load_signals
from nonn.training import Checkpoint, keep_freed_memory, write_log

#: Modules that a baseline depends on; `dvc.yaml` lists the same. Random partitions are drawn in this stage.
CODE = ("augment", "baseline", "distill", "losses", "models", "muon", "partition", "training")


def plan_lessons(params: Params, paths: Paths, network: str, method: str, seed: int) -> list[Lesson]:
    """What the students of a baseline are to learn: one lesson for each."""
    section = params.distill
    designs = load_design(paths.design(network, method))
    filter_sets = load_baseline_sets(paths.partition(network, method), seed)
    return [
        Lesson(
            architecture=architecture,
            filters=filters,
            kd_weight=0.0 if method == "labels" else section.kd_weight,
            transfer_weight=section.transfer_weight if filters else 0.0,
            attention_weight=params.baseline.attention_weight if method == "at_kd" else 0.0,
        )
        for (architecture, _), filters in zip(designs, filter_sets, strict=True)
    ]


def pack(students: Sequence[Network]) -> dict[str, Tensor]:
    """State of several students as one set of tensors, each name led by the student's position."""
    return {f"{i}.{name}": t for i, student in enumerate(students) for name, t in student.state_dict().items()}


def load_baseline(path: Path, data: Dataset) -> list[Network]:
    """The students of a baseline, ready to predict, from the file of its weights."""
    tensors, students = read_tensors(path), []
    for position, (architecture, n_filters) in enumerate(load_design(path.with_suffix(".json"))):
        student, prefix = Network(architecture, data.channels, data.n_classes, n_filters), f"{position}."
        student.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        students.append(student.eval())
    return students


def run(params: Params, paths: Paths, network: str, method: str, seed: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    name = f"{network}/{method} seed {seed}"
    checkpoint = Checkpoint.of(
        [name, params.distill.model_dump(), params.baseline.model_dump(), params.signals.model_dump()],
        [paths.dataset, paths.signals, paths.design(network, method), paths.partition(network, method)],
        CODE,
    )
    classroom = Classroom(load_dataset(paths), load_signals(paths), params.signals)
    students, logs = [], []
    for position, lesson in enumerate(plan_lessons(params, paths, network, method, seed)):
        student, log = distill_student(
            classroom,
            lesson,
            params.distill,
            seed=seed * 1000 + position,
            checkpoint=checkpoint.part(position),
            label=f"{name} student {position}",
        )
        students.append(student)
        logs.append(log.assign(student=position))
    target = paths.baseline(network, method, seed)
    write_tensors(target, pack(students))
    write_json(target.with_suffix(".json"), read_json(paths.design(network, method)))
    write_log(paths.log(target), pd.concat(logs))
    checkpoint.discard()
