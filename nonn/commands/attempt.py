"""The command ``nonn try``: train a network or a baseline with changed params, and ask validation.

For choosing params without running the pipeline: the stages from `graph` to `distill` or `baseline` run in a folder of
their own, on the dataset and the signals of the experiment, whose results stay as they are. No test image is looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from nonn.commands.tables import refuse_other_table
from nonn.core.artifacts import Filters
from nonn.core.errors import UserError
from nonn.core.files import STATE, named, read_json, scratch_folder
from nonn.core.numerics import set_numerics
from nonn.core.options import add_settings, complete_from, refuse_missing, seed_number
from nonn.core.params import BASELINE_METHODS, Params, load_params
from nonn.core.paths import Paths, remove_unfinished
from nonn.core.schema import parse_changes
from nonn.data.dataset import load_dataset
from nonn.deploy.traced_cost import measure_cost
from nonn.method.final_layer import averaged_layer, fit_by_epoch, logits_of, steps_of
from nonn.method.loading import load_baseline, load_students
from nonn.runtime.final import FinalLayer
from nonn.stages import baseline, design, distill, graph, partition
from nonn.teachers.loading import load_teacher
from nonn.training.checkpoint import Checkpoint
from nonn.training.hardware import pick_device
from nonn.training.networks import ConvNet, accuracy, predict

#: Of the table of attempts. `validation_accuracy` and `validation_loss` are those of the averaged logits. Accuracies
#: `fitted` and `classifier` are of other final layers: one fitted to the training images, after its last epoch, so that
#: nothing is chosen, and the teacher's own classifier, of a network alone.
COLUMNS = (
    *("item", "changes", "epochs", "seed", "students", "params_per_student", "mmacs_per_student"),
    *("validation_images", "validation_accuracy", "validation_loss", "student_accuracy"),
    *("fitted_accuracy", "classifier_accuracy", "cpu_minutes"),
)
#: Sections that an attempt depends on: it begins with the experiment's signals and ends with its students.
OPEN = ("networks", "devices", "graph", "partition", "design", "distill", "baseline")
VIEWS_KEY = "signals.views"


@dataclass(frozen=True)
class AttemptPaths(Paths):
    """Paths of an attempt: it reads the experiment's dataset and signals, and writes into a folder of its own."""

    folder: Path = STATE / "attempts"

    @property
    def root(self) -> Path:
        return self.folder

    @property
    def dataset(self) -> Path:
        return Paths(self.experiment).dataset

    @property
    def dataset_info(self) -> Path:
        return Paths(self.experiment).dataset_info

    @property
    def signals(self) -> Path:
        return Paths(self.experiment).signals


def train_item(
    params: Params, paths: Paths, item: str, seed: int
) -> tuple[list[ConvNet], list[list[int]], list[Checkpoint]]:
    """Run the stages from `graph` on for a network, such as ``2s``, or a baseline, such as ``2s/kd``.

    Returns the students, the filters of each (of a network alone), and checkpoints at the end of their trainings.
    """
    network, _, method = item.partition("/")
    if network not in params.networks:
        raise UserError(f"{item}: params.yaml has no network {network!r}; choose of {', '.join(params.networks)}")
    if method and method not in BASELINE_METHODS:
        raise UserError(f"{item}: no method {method!r}; choose of {', '.join(BASELINE_METHODS)}")
    graph.run(params, paths)
    design.run(params, paths, network)
    partition.run(params, paths, network)
    data = load_dataset(paths)
    if method:
        checkpoint = baseline.train(params, paths, network, method, seed)
        return load_baseline(paths.baseline(network, method, seed), data), [], [checkpoint]
    students = range(len(params.networks[network].devices))
    checkpoints = [distill.train(params, paths, network, student, seed) for student in students]
    sets = [read_json(paths.partition(network, student), Filters)["filters"] for student in students]
    return load_students(params, paths, data, network, seed)[0], sets, checkpoints


def score(students: Sequence[ConvNet], params: Params, paths: Paths, sets: Sequence[list[int]], seed: int) -> dict:
    """What the students cost, and how right they are together on the validation images, in float32.

    `sets` are the filters of each student of a network; empty for a baseline, of which the teacher's classifier cannot
    be asked.
    """
    data = load_dataset(paths)
    images, labels = data.subset("validation")
    device = pick_device()
    outputs = [predict(student, images, device) for student in students]
    features = [f for f, _ in outputs]
    averaged = averaged_layer([student.head.cpu() for student in students])
    logits = logits_of(averaged, features)
    train_images, train_labels = data.subset("train")
    train_features = [predict(student, train_images, device)[0] for student in students]
    for student in students:
        student.cpu()
    epochs = (steps_of(len(train_labels), epoch, seed) for epoch in range(params.assemble.epochs))
    *_, fitted = (averaged, *fit_by_epoch(averaged, train_features, train_labels, epochs, params.assemble.lr))
    classifier = _classifier(load_teacher(Paths(params.experiment)), sets)
    costs = [measure_cost(student, data.channels, data.size) for student in students]
    own = [accuracy(own_logits, labels) for _, own_logits in outputs]
    return {
        "students": len(students),
        "params_per_student": max(cost.params for cost in costs),
        "mmacs_per_student": round(max(cost.macs for cost in costs) / 1e6, 2),
        "validation_images": len(labels),
        "validation_accuracy": round(accuracy(logits, labels), 4),
        "validation_loss": round(F.cross_entropy(logits, labels).item(), 4),
        "student_accuracy": round(sum(own) / len(own), 4),
        "fitted_accuracy": round(accuracy(logits_of(fitted, features), labels), 4),
        "classifier_accuracy": classifier and round(accuracy(logits_of(classifier, features), labels), 4),
    }


def _classifier(teacher: Any, sets: Sequence[list[int]]) -> FinalLayer | None:
    """The columns of the teacher's classifier that read the students' filters; None if there are none."""
    if not sets or not isinstance(teacher, ConvNet):
        return None
    weight, bias = teacher.head.weight.detach().numpy(), teacher.head.bias.detach().numpy()
    return FinalLayer({i: (weight[:, filters], bias / len(sets)) for i, filters in enumerate(sets)})


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a table of attempts, which is created if missing; other processes may add rows at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with named(path), path.open("a+", encoding="utf-8", newline="") as file:
        with contextlib.suppress(OSError):  # the file system may have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        table, content = csv.DictWriter(file, COLUMNS), file.read()
        if not content:
            table.writeheader()
        elif not content.endswith("\n"):  # a row was cut off
            file.write("\r\n")
        table.writerow(row)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    item = parser.add_argument("item", metavar="NETWORK[/METHOD]", help="a network, or a baseline of it, such as 2s/kd")
    complete_from(item, lambda: load_params().networks)
    add_settings(parser)
    parser.add_argument("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="append the result to this table")
    parser.epilog = "example: nonn try 2s/kd --set distill.lr=0.1 --table attempts.csv"


def run(options: argparse.Namespace) -> None:
    """Make one attempt; print its row, and append it to a table."""
    item, settings, seed, table = options.item, options.set, options.seed, options.table
    changes = parse_changes(settings)
    params = load_params(changes=changes)
    set_numerics(params.numerics)  # sets only the precision, since torch is loaded already
    if idle := [key for key in changes if key.split(".")[0] not in OPEN and key != VIEWS_KEY]:
        raise UserError(
            f"{idle[0]}: has no effect on an attempt, which begins with the experiment's signals and ends with its "
            f"students; change params.yaml instead. What can be tried: {VIEWS_KEY}, {', '.join(OPEN)}"
        )
    if params.signals.views > (there := load_params().signals.views):
        raise UserError(f"{VIEWS_KEY}: the experiment's signals have {there}, of which an attempt may take fewer")
    if item.endswith("/at_kd") and not params.signals.attention:
        raise UserError(f"{item}: needs attention maps; set signals.attention to true in params.yaml")
    if table:
        refuse_other_table("--table", table, COLUMNS)
    paths = AttemptPaths(params.experiment)
    refuse_missing([paths.dataset, paths.signals], "signals")
    remove_unfinished(paths)
    start = time.process_time()
    with scratch_folder(paths.root) as folder:  # an interrupted attempt goes on from checkpoints, which are elsewhere
        paths = AttemptPaths(params.experiment, folder)
        students, sets, checkpoints = train_item(params, paths, item, seed)
        scores = score(students, params, paths, sets, seed)
    minutes = (time.process_time() - start) / 60
    row = {"item": item, "changes": " ".join(settings), "epochs": params.distill.epochs, "seed": seed}
    row |= scores | {"cpu_minutes": round(minutes, 1)}
    print("\n".join(f"{name:<20} {row[name]}" for name in COLUMNS))
    if table:
        append_row(table, row)
    for checkpoint in checkpoints:
        checkpoint.discard()
