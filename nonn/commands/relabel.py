"""The command ``nonn relabel``: new labels for a trained network, from few labelled images, by a new final layer alone.

Students stay as they are. What they send is compared with what students on other partitions send, and KD students.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nonn.commands.tables import write_rows
from nonn.core.errors import UserError
from nonn.core.numerics import set_numerics
from nonn.core.options import add_network, add_settings, at_least, load_settings, numbers, refuse_unknown_networks
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.core.progress import track
from nonn.core.yaml_text import read_yaml
from nonn.project import WORKFLOW

PER_CLASS = (5, 10, 20, 50)
N_DRAWS = 5
N_TEST = 10_000
#: Folder of labellings in a clone; a project takes those of the package.
LABELLINGS = Path("workflow/labels")
COLUMNS = (
    *("experiment", "network", "labelling", "images", "labels", "test_images", "method", "seeds", "values"),
    *("bytes_sent", "per_class", "draws", "accuracy_mean", "accuracy_sd"),
)
LABELS = {
    "nonn": "NoNN, features",
    **{
        "random": "random sets of filters, features",
        "contiguous": "contiguous sets of filters, features",
        "classwise": "classwise sets of filters, features",
        "full": "all filters each, features",
    },
    "ensemble": "KD students, features",
    "ensemble_logits": "KD students, logits",
    "kd": "one KD student, features",
    "teacher": "teacher, features",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network(parser, help="a trained network, such as 4s")
    parser.add_argument("--labels", type=Path, metavar="FILE.yaml", help="new labels, each with a list of old classes")
    parser.add_argument(
        "--images", metavar="EXPERIMENT", help="label the images of its dataset (default: this experiment's own)"
    )
    parser.add_argument(
        "--per-class", type=numbers, default=list(PER_CLASS), metavar="N,…", help="(default: 5,10,20,50)"
    )
    parser.add_argument("--draws", type=at_least(1), default=N_DRAWS, help="of labelled images (default: %(default)s)")
    parser.add_argument(
        "--test", type=at_least(1), default=N_TEST, metavar="N", help="test images at most (default: %(default)s)"
    )
    parser.add_argument("--teacher", action="store_true", help="also ask the teacher, which takes longest")
    add_settings(parser)
    parser.epilog = "example: nonn relabel 4s --labels workflow/labels/parity.yaml"


def run(options: argparse.Namespace) -> None:
    params = load_settings(options)
    set_numerics(params.numerics)
    refuse_unknown_networks(params, [options.network])
    if not options.labels and not options.images:
        raise UserError("give --labels, for other labels of the same images, or --images, for other images, or both")
    if least := [number for number in options.per_class if number < 2]:
        raise UserError(f"--per-class {least[0]}: one image of a label leaves none to choose by; give 2 or more")
    rows = measure(params, options)
    target = Paths(params.experiment) / f"relabel_{rows[0]['labelling']}.csv"
    write_rows(target, COLUMNS, rows)
    print(render(rows))
    print(f"{target}: {len(rows)} rows")


def read_groups(path: Path | None) -> dict[str, Sequence[str]] | None:
    if path is None:
        return None
    if (
        not os.path.lexists(path)
        and path.parent == LABELLINGS
        and (shipped := WORKFLOW / "labels" / path.name).is_file()
    ):
        path = shipped  # a project has none of its own
    groups = read_yaml(path, "Give a file that maps each new label to a list of classes.")
    if not isinstance(groups, dict) or not all(isinstance(members, list) for members in groups.values()):
        raise UserError(f"{path}: has to map each new label to a list of classes, such as `even: [0, 2, 4, 6, 8]`.")
    if empty := [name for name, members in groups.items() if not members]:
        raise UserError(f"{path}: {empty[0]}: lists no class. Name one, or remove this label.")
    return {str(name): [str(member) for member in members] for name, members in groups.items()}


def measure(params: Params, options: Any) -> list[dict]:
    import torch

    from nonn.data.dataset import load_dataset
    from nonn.method.scoring import sd
    from nonn.studies.relabelling import draw, new_labels, other_partitions, score, what_is_sent
    from nonn.teachers.loading import load_teacher

    torch.set_num_threads(1)
    paths = Paths(params.experiment)
    source = Paths(options.images or params.experiment)
    for path in (paths.dataset, source.dataset):
        if not path.is_file():
            raise UserError(f"{path}: is not there. Run the stage `dataset` of that experiment first.")
    training_data, shown = load_dataset(paths), load_dataset(source)
    if (training_data.channels, training_data.size) != (shown.channels, shown.size):
        raise UserError(
            f"--images {options.images}: its images have {shown.channels} channels and {shown.size} pixels a side, the "
            f"students' {training_data.channels} and {training_data.size}; set dataset.size and white alike in both"
        )
    groups = read_groups(options.labels)
    try:
        labelled, labels = new_labels(shown, groups)
    except UserError as error:
        raise UserError(f"{options.labels}: {error}") from None
    data, positions = draw(labelled, len(labels), max(options.per_class), options.draws, options.test)
    if options.teacher and params.image_sizes.teacher != training_data.size:
        raise UserError(
            f"--teacher: it sees images of {params.image_sizes.teacher} pixels a side, devices of "
            f"{training_data.size}; leave it out"
        )
    teacher = load_teacher(paths) if options.teacher else None
    shared = {"experiment": params.experiment, "network": options.network}
    shared |= {"labelling": options.labels.stem if options.labels else options.images, "images": source.experiment}
    shared |= {"labels": len(labels), "test_images": len(data.test)}
    rows = []
    sources = what_is_sent(params, paths, options.network, training_data, data, teacher)
    n_sources = 4 + len(other_partitions(params, paths, options.network)) + bool(teacher)
    for sent in track(sources, "relabel", n_sources):
        for per_class in options.per_class:
            right = score(sent, positions, per_class, data.labels[data.test])
            by_draw = right.mean(0)
            row = {"method": sent.method, "seeds": len(right), "values": sent.train[0].shape[1]}
            row |= {"bytes_sent": sent.bytes_sent, "per_class": per_class, "draws": options.draws}
            row["accuracy_mean"] = float(by_draw.mean())
            row["accuracy_sd"] = sd(by_draw)
            rows.append(shared | row)
    return rows


def render(rows: Sequence[dict]) -> str:
    """The table in Markdown: a row per method, a column per number of labelled images."""
    counts = list(dict.fromkeys(row["per_class"] for row in rows))
    lines = [
        "| What a device sends | Bytes | " + " | ".join(f"{count} a label" for count in counts) + " |",
        "| :-- | --: | " + " | ".join("--:" for _ in counts) + " |",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        cells = [_cell(row) for row in of_method]
        lines.append(f"| {LABELS[method]} | {of_method[0]['bytes_sent']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict) -> str:
    spread = "" if row["accuracy_sd"] is None else f" ± {100 * row['accuracy_sd']:.1f}"
    return f"{100 * row['accuracy_mean']:.1f}{spread} %"
