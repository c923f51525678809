"""The command ``nonn sweep``: run experiments over values of some parameters, and compare their networks.

DVC queues and runs the experiments [1]_, each in a folder of its own, and takes from its cache what was trained with
the same values before. Their tables are in git; this command reads them there, so that experiments which DVC ran by
itself, or fetched by ``dvc exp pull``, are compared in the same way.

References
----------
.. [1] https://dvc.org/doc/command-reference/exp/run
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from dvc.exceptions import DvcException
from dvc.repo import Repo

from nonn.commands.git import content_at
from nonn.commands.project import LINK, is_project
from nonn.core.errors import UserError, one_line
from nonn.core.files import intact, write_text
from nonn.core.jobs import list_jobs
from nonn.core.params import PARAMS_FILE, Params, load_params
from nonn.core.paths import Paths
from nonn.core.progress import log
from nonn.core.schema import parse_changes
from nonn.core.yaml_text import parse_yaml
from nonn.report.plots import drawing_style, save_figure
from nonn.report.sweep_plots import draw_sweep

#: Criteria of networks: column of the table, description, and whether more is better.
CRITERIA = {
    "accuracy": ("accuracy on the validation images (%)", True),  # to compare experiments is to choose
    "memory_kib": ("memory of one device (KiB)", False),
    "latency_ms": ("latency of the slowest student (ms)", False),
    "sent_bytes": ("bytes that one device sends", False),
}
#: Files of each experiment that git has.
READ = ("summary.csv", "distributed.csv", "metrics.json")
#: Suffix of the metrics that networks are chosen by.
SCORE = "_validation_accuracy"
#: Name of the results that are committed, beside those of DVC's experiments.
HERE = "HEAD"
#: Groups of parameters that change no network.
OUTSIDE = ("figures", "experiment")


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in params.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def read_networks(revision: str) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """Parameters of a revision by dotted key, and its networks with `CRITERIA` as columns; None without results."""
    params = parse_yaml(content_at(revision, PARAMS_FILE) or "{}", f"{PARAMS_FILE} of {revision}")
    if not isinstance(params, dict):
        return {}, None
    folder = Path("results") / str(params.get("experiment"))
    contents = [content for name in READ if (content := content_at(revision, folder / name)) is not None]
    if len(contents) < len(READ) or SCORE not in contents[-1]:  # metrics of a former version lack it
        return flat(params), None
    with intact(folder / "summary.csv"):
        return flat(params), networks_of(*contents)


def networks_of(summary: str, distributed: str, metrics: str) -> pd.DataFrame:
    """Networks with `CRITERIA` as columns, from the content of the files of `READ`."""
    scores = json.loads(metrics)
    # A network may be called NA.
    methods, runs = (
        pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""]) for text in (summary, distributed)
    )
    methods, runs = methods[methods["method"] == "nonn"], runs[runs["method"] == "nonn"]
    memory = runs.groupby("network")["memory_bytes"].max()
    return pd.DataFrame(
        {
            "network": methods["network"],
            "accuracy": [scores[f"{network}{SCORE}"] for network in methods["network"]],
            "memory_kib": methods["network"].map(memory) / 1024,
            "latency_ms": methods["latency_p50_ms"],
            "sent_bytes": methods["feature_bytes"],
        }
    )


def is_efficient(table: pd.DataFrame) -> pd.Series:
    """Which rows are Pareto-optimal: no other row is as good in all `CRITERIA` and better in one."""
    values = table[list(CRITERIA)].to_numpy(float) * [1 if more else -1 for _, more in CRITERIA.values()]
    beaten = [((values >= row).all(1) & (values > row).any(1)).any() for row in values]
    return ~pd.Series(beaten, index=table.index, dtype=bool)


def compare(revisions: Mapping[str, str]) -> pd.DataFrame:
    """One row for each network of each experiment, by its name, with the parameters in which the experiments differ.

    Raises
    ------
    UserError
        None of them has results.
    """
    read = {name: read_networks(revision) for name, revision in revisions.items()}
    for name in [name for name, (_, networks) in read.items() if networks is None]:
        log(f"{name}: has no {', '.join(READ)} in git as today's stage figures writes them, and is left out")
        del read[name]
    if not read:
        raise UserError("no experiment with results. Run some: nonn sweep devices.NAME.memory_kib=96,192")
    values = {name: params for name, (params, _) in read.items()}
    keys = {key: None for params in values.values() for key in params if not key.startswith(OUTSIDE)}
    swept = [key for key in keys if len({repr(params.get(key)) for params in values.values()}) > 1]
    rows = [
        networks.assign(experiment=name, **{key: [values[name].get(key)] * len(networks) for key in swept})
        for name, (_, networks) in read.items()
        if networks is not None
    ]
    table = pd.concat(rows, ignore_index=True)
    table = table[["experiment", *swept, "network", *CRITERIA]]
    # The committed results may be those of an experiment of the sweep.
    table = table.drop_duplicates([*swept, "network", *CRITERIA], ignore_index=True)
    return table.assign(efficient=is_efficient(table))


def experiments() -> dict[str, str]:
    """Revisions of DVC's experiments on the current commit, and of that commit."""
    try:
        by_commit = Repo(".").experiments.ls()
    except DvcException as error:
        raise UserError(f"DVC: {one_line(error, limit=None)}") from None
    return {HERE: "HEAD"} | {name: revision for listed in by_commit.values() for name, revision in sorted(listed)}


def run_experiments(changes: Sequence[str], targets: Sequence[str]) -> None:
    """Queue an experiment for each combination of values, ``key=value,value``, and run them one after another."""
    carried = ["--copy-paths", str(LINK)] if is_project() else []  # which git ignores
    settings = [word for change in changes for word in ("--set-param", change)]
    before = failed_experiments()
    for words in (["--queue", *settings, *carried, *targets], ["--run-all"]):
        command = [sys.executable, "-m", "dvc", "exp", "run", *words]
        if subprocess.run(command, check=False).returncode:
            raise UserError("dvc exp run: failed, for the reason above. `dvc queue status` lists what is left.")
    if names := sorted(failed_experiments() - before):  # DVC exits with 0 all the same
        raise UserError(f"{', '.join(names)}: failed, for the reason above. `dvc queue logs {names[0]}` has it again.")


def check_changes(changes: Sequence[str], params: Params) -> None:
    """Refuse changes that no experiment can run with, before DVC is called.

    Raises
    ------
    UserError
        A change is no ``KEY=VALUE,VALUE``; a key or value is refused as in ``params.yaml``; or a value changes the
        lists of jobs, which are written before DVC begins.
    """
    listed, settings = list_jobs(params), []
    for change in changes:
        key, equals, values = change.partition("=")
        if not (key and equals and values):
            raise UserError(f"{change!r}: write KEY=VALUE,VALUE.")
        if re.fullmatch(r"\w+\(.*\)", values):  # range(…) and alike, which DVC expands
            if key not in flat(params.model_dump()):
                raise UserError(f"{key}: unknown key; take one of params.yaml")
            continue
        settings.append([f"{key}={value}" for value in split_values(values)])
    for combination in itertools.product(*settings):
        if list_jobs(load_params(changes=parse_changes(combination))) != listed:
            raise UserError(
                f"{' '.join(combination)}: changes the lists of jobs, which are written before DVC begins, and so "
                f"cannot be swept. Run it by itself: nonn use {params.experiment} --set {' --set '.join(combination)}"
            )


def split_values(text: str) -> list[str]:
    """Split at the commas outside of brackets and braces."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]


def failed_experiments() -> set[str]:
    """Names of the experiments in DVC's queue that have failed."""
    return {str(entry.name) for entry, _ in Repo(".").experiments.celery_queue.iter_failed()}


def render(table: pd.DataFrame) -> str:
    """The table as text, the efficient rows marked."""
    shown = table.assign(
        accuracy=table["accuracy"].map("{:.2%}".format),
        memory_kib=table["memory_kib"].map("{:,.0f}".format),
        latency_ms=table["latency_ms"].map("{:.3f}".format),
        efficient=table["efficient"].map({True: "*", False: ""}),
    )
    return shown.to_string(index=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "changes", nargs="*", metavar="KEY=VALUE,VALUE", help="run an experiment for each combination (default: none)"
    )
    parser.add_argument(
        "--target", action="append", default=[], metavar="STAGE", help="of DVC, repeatable (default: all)"
    )
    parser.epilog = "example: nonn sweep devices.stm32f4.memory_kib=96,128,192"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn sweep``."""
    params = load_params()
    check_changes(options.changes, params)
    experiments()  # says what is wrong with the repository
    if options.changes and not os.access(".dvc", os.W_OK):
        raise UserError(".dvc: cannot be written, and DVC keeps its queue there. Make it writable.")
    if options.changes:
        run_experiments(options.changes, options.target)
    table, paths = compare(experiments()), Paths(params.experiment)
    write_text(paths / "sweep.csv", table.to_csv(index=False, float_format="%.6g"))
    with drawing_style():
        figure = draw_sweep(table, {name: label for name, (label, _) in CRITERIA.items()})
        save_figure(figure, paths / "figures/sweep", params.figures)
    print(render(table))
    log(f"{paths / 'sweep.csv'} and {paths / 'figures/sweep.png'}: written")
