"""The command ``nonn probe``: how much a set of the teacher's filters knows, by its size and how it was chosen."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nonn.commands.tables import write_rows
from nonn.core.errors import UserError
from nonn.core.numerics import set_numerics
from nonn.core.options import add_settings, at_least, load_settings, numbers, refuse_missing
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.core.progress import track

if TYPE_CHECKING:
    from torch import Tensor

#: Numbers of sets that the filters are divided into, from one student with all filters to sets of a few.
SETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
#: Default number of training images that probes are fitted to.
N_IMAGES = 20_000
#: Random partitions of each size.
N_RANDOM = 3
COLUMNS = (
    *("experiment", "judged_on", "images", "training_images", "teacher", "sets", "filters", "method", "seeds"),
    *("alone_mean", "alone_worst", "alone_vs_random", "alone_error", "alone_p"),
    *("joined_mean", "joined_worst", "joined_vs_random", "joined_error", "joined_p"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sets", type=numbers, metavar="N,…", help="numbers of sets (default: 1 to 48, as far as there are filters)"
    )
    parser.add_argument(
        "--images", type=at_least(1), default=N_IMAGES, metavar="N", help="to fit to (default: %(default)s)"
    )
    parser.add_argument(
        "--on",
        choices=("validation", "test"),
        default="validation",
        help="images that the probes are judged on; the teacher is run on those of test first (default: %(default)s)",
    )
    add_settings(parser)
    parser.epilog = "example: nonn probe --sets 2,4,8,48"


def run(options: argparse.Namespace) -> None:
    params = load_settings(options)
    set_numerics(params.numerics)
    paths = Paths(params.experiment)
    refuse_missing([paths.dataset, paths.signals, paths.graph], "graph")
    rows, n_classes = measure(params, paths, options.sets, options.images, options.on)
    name = "probes" if options.on == "validation" else f"probes_{options.on}"
    from nonn.report.plots import drawing_style, save_figure
    from nonn.report.probe_plots import draw_probes

    write_rows(paths / f"{name}.csv", COLUMNS, rows)
    with drawing_style():
        save_figure(draw_probes(rows, rows[0]["teacher"], n_classes), paths / f"figures/{name}", params.figures)
    for row in rows:
        print(
            f"{row['sets']:>3} sets of {row['filters']:>5} filters, {row['method']:<12}"
            f"alone {row['alone_mean']:.2%}, joined {row['joined_mean']:.2%}"
        )
    print(f"{paths / name}.csv: {len(rows)} rows; the teacher is right on {rows[0]['teacher']:.2%}")


def measure(params: Params, paths: Paths, sets: list[int] | None, n_images: int, on: str) -> tuple[list[dict], int]:
    """Rows of the table, and the number of classes. None stands for all numbers of `SETS` that the filters allow."""
    import torch

    from nonn.data.dataset import load_dataset
    from nonn.method.filter_graph import load_graph
    from nonn.studies.probing import METHODS, probe_all, rows_of
    from nonn.training.loading import load_signals
    from nonn.training.networks import accuracy

    torch.set_num_threads(1)
    data, graph = load_dataset(paths), load_graph(paths)
    signals = load_signals(paths, data)
    kept = torch.linspace(0, len(data.train) - 1, min(n_images, len(data.train))).long()
    train = signals["pooled"][0, kept], data.labels[data.train[kept]]
    judged, logits = _judged(paths, signals, on)
    labels = data.labels[getattr(data, on)]
    n_live = int(graph.live.sum())
    if sets and max(sets) > n_live:
        raise UserError(f"--sets {max(sets)}: the teacher has {n_live} live filters; give numbers up to that")
    jobs = [
        (n, method, seed)
        for n in dict.fromkeys(sets or [n for n in SETS if n <= n_live])
        for method in METHODS[: 1 if n == 1 else None]
        for seed in range(N_RANDOM if method == "random" and n > 1 else 1)
    ]
    probed = dict(track(probe_all(graph, train, (judged, labels), jobs), "probes", total=len(jobs)))
    shared = {"experiment": params.experiment, "judged_on": on, "images": len(labels), "training_images": len(kept)}
    shared["teacher"] = accuracy(logits, labels)
    return [shared | row for row in rows_of(probed, n_live, params.evaluate)], data.n_classes


def _judged(paths: Paths, signals: dict[str, Tensor], on: str) -> tuple[Tensor, Tensor]:
    """The teacher's pooled activations and logits of the images that probes are tested on."""
    if on == "validation":
        return signals["validation_pooled"], signals["validation_logits"].float()
    from nonn.data.dataset import load_teacher_dataset
    from nonn.teachers.loading import load_teacher
    from nonn.teachers.signals import BATCH_SIZE, signals_of
    from nonn.training.networks import concatenated, scaled_batch_size

    data = load_teacher_dataset(paths)
    teacher, images = load_teacher(paths), data.subset(on)[0]
    size = scaled_batch_size(BATCH_SIZE, data.size)
    batches = track(images.split(size), "teacher", total=-(-len(images) // size))
    answers = concatenated((signals_of(teacher, batch, attention=False) for batch in batches), len(images))
    return answers["pooled"], answers["logits"].float()
