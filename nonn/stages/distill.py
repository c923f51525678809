"""Stage `distill`: train one student of a network with one seed, see `nonn.training.distillation`."""

from __future__ import annotations

import torch

from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.dataset import load_dataset
from nonn.data.tensors import write_tensors
from nonn.training.checkpoint import Checkpoint
from nonn.training.distillation import VIEW_KEYS, StudentSpec, TransferSet, distill_student
from nonn.training.hardware import keep_freed_memory
from nonn.training.loading import load_design, load_filters, load_signals
from nonn.training.loop import write_log


def run(params: Params, paths: Paths, network: str, student: int, seed: int) -> None:
    train(params, paths, network, student, seed).discard()


def train(params: Params, paths: Paths, network: str, student: int, seed: int) -> Checkpoint:
    """Write a student and its log; return its checkpoint, to be kept until these are in place."""
    # One thread per student: students are trained side by side, and sums come out the same on every machine.
    torch.set_num_threads(1)
    keep_freed_memory()
    section = params.distill
    data = load_dataset(paths)
    signals = load_signals(paths, data)
    architecture, _ = load_design(paths.design(network, student))[0]
    spec = StudentSpec(
        architecture=architecture,
        filters=load_filters(paths.partition(network, student), signals),
        kd_weight=section.kd_weight,
        transfer_weight=section.transfer_weight,
    )
    name = f"{network}/{student} seed {seed}"
    settings = [name, repr(spec), section.model_dump(), params.signals.model_dump(include=VIEW_KEYS)]
    checkpoint = Checkpoint.of(settings, [paths.dataset, paths.signals])
    transfer_set = TransferSet(data, signals, params.signals)
    own_seed = seed * 1000 + student  # students of one network differ in their initial weights, too
    model, log = distill_student(transfer_set, spec, section, seed=own_seed, checkpoint=checkpoint, label=name)
    target = paths.student(network, student, seed)
    write_tensors(target, model.state_dict())
    write_log(paths.log(target), log)
    return checkpoint
