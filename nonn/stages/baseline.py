"""Stage `baseline`: alternatives to NoNN, trained with the same signals, schedule and seeds.

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

import torch
from torch import Tensor

from nonn.core.artifacts import Designs
from nonn.core.files import damaged, read_json, write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.dataset import load_dataset
from nonn.data.tensors import write_tensors
from nonn.training.checkpoint import Checkpoint
from nonn.training.distillation import VIEW_KEYS, StudentSpec, TransferSet, distill_student
from nonn.training.hardware import keep_freed_memory
from nonn.training.loading import load_baseline_sets, load_design, load_signals
from nonn.training.loop import write_log
from nonn.training.networks import ConvNet


def plan_students(params: Params, paths: Paths, network: str, method: str, seed: int) -> list[StudentSpec]:
    """What each student of a baseline is to learn."""
    section = params.distill
    designs = load_design(paths.design(network, method))
    filter_sets = load_baseline_sets(paths.partition(network, method), seed)
    if len(designs) != len(filter_sets):
        raise damaged(paths.partition(network, method), f"{len(filter_sets)} sets for {len(designs)} students")
    return [
        StudentSpec(
            architecture=architecture,
            filters=filters,
            kd_weight=0.0 if method == "labels" else section.kd_weight,
            transfer_weight=section.transfer_weight if filters else 0.0,
            attention_weight=params.baseline.attention_weight if method == "at_kd" else 0.0,
        )
        for (architecture, _), filters in zip(designs, filter_sets, strict=True)
    ]


def pack(students: Sequence[ConvNet]) -> dict[str, Tensor]:
    """State of several students as one set of tensors, each name led by the student's position."""
    return {f"{i}.{name}": t for i, student in enumerate(students) for name, t in student.state_dict().items()}


def run(params: Params, paths: Paths, network: str, method: str, seed: int) -> None:
    train(params, paths, network, method, seed).discard()


def train(params: Params, paths: Paths, network: str, method: str, seed: int) -> Checkpoint:
    """Write the students of a baseline and their log; return their checkpoint, to be kept until these are in place."""
    torch.set_num_threads(1)
    keep_freed_memory()
    name = f"{network}/{method} seed {seed}"
    specs = plan_students(params, paths, network, method, seed)
    settings = [name, repr(specs), params.distill.model_dump(), params.signals.model_dump(include=VIEW_KEYS)]
    data = load_dataset(paths)
    signals = load_signals(paths, data)
    n_filters = signals["pooled"].shape[-1]
    if any(filter >= n_filters for spec in specs for filter in spec.filters or ()):
        raise damaged(paths.partition(network, method), f"a filter beyond the {n_filters} of the teacher")
    checkpoint = Checkpoint.of(settings, [paths.dataset, paths.signals])
    transfer_set = TransferSet(data, signals, params.signals)
    students, logs = [], []
    for position, spec in enumerate(specs):
        own_seed, part, label = seed * 1000 + position, checkpoint.part(position), f"{name} student {position}"
        student, log = distill_student(transfer_set, spec, params.distill, seed=own_seed, checkpoint=part, label=label)
        students.append(student)
        logs += [row | {"student": position} for row in log]
    target = paths.baseline(network, method, seed)
    write_tensors(target, pack(students))
    write_json(target.with_suffix(".json"), read_json(paths.design(network, method), Designs))
    write_log(paths.log(target), logs)
    return checkpoint
