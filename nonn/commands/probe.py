"""The command ``nonn probe``: how much a set of the teacher's filters knows, by its size and how it was chosen."""

from __future__ import annotations

import argparse

from nonn.commands.tables import write_rows
from nonn.core.numerics import set_numerics
from nonn.core.options import add_settings, at_least, load_settings, numbers, refuse_missing
from nonn.core.paths import Paths

#: Default number of training images that probes are fitted to.
N_IMAGES = 20_000
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
    from nonn.report.plots import drawing_style, save_figure
    from nonn.report.probe_plots import draw_probes
    from nonn.studies.probing import measure_probes

    rows, n_classes = measure_probes(params, paths, options.sets, options.images, options.on)
    name = "probes" if options.on == "validation" else f"probes_{options.on}"
    write_rows(paths / f"{name}.csv", COLUMNS, rows)
    with drawing_style():
        save_figure(draw_probes(rows, rows[0]["teacher"], n_classes), paths / f"figures/{name}", params.figures)
    for row in rows:
        print(
            f"{row['sets']:>3} sets of {row['filters']:>5} filters, {row['method']:<12}"
            f"alone {row['alone_mean']:.2%}, joined {row['joined_mean']:.2%}"
        )
    print(f"{paths / name}.csv: {len(rows)} rows; the teacher is right on {rows[0]['teacher']:.2%}")
