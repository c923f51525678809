"""When each job of a run ran, and how parallel the jobs were.

Reads the journal that `nonn.commands.stage` keeps of every stage it runs. A stage that DVC restored from its
cache did not run, and one that failed left no entry.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from nonn.commands.stage import JOURNAL
from nonn.core.files import write_text
from nonn.core.options import add_settings, load_settings
from nonn.core.paths import Paths
from nonn.core.progress import log
from nonn.report.plots import drawing_style, save_figure
from nonn.report.timeline_plots import draw_timeline
from nonn.stages import STAGES

#: After so many seconds without a job, the next job belongs to another run.
IDLE = 120.0
COLUMNS = ["stage", "item", "seed", "start_s", "end_s"]


def read_journal(path: Path, experiment: str) -> pd.DataFrame:
    """Read all jobs of an experiment, in order of their start; seconds since the epoch; empty if none has run."""
    entries = [entry for entry in read_lines(path) if entry.get("experiment") == experiment]
    return pd.DataFrame(entries, columns=None if entries else ["start", "end"]).sort_values(
        ["start", "end"], ignore_index=True
    )


def read_lines(path: Path) -> list[dict]:
    """Read a journal, without lines that were cut off when the machine went down."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and _is_timed(entry)]


def _is_timed(entry: dict) -> bool:
    return all(isinstance(entry.get(key), int | float) for key in ("start", "end"))


def last_run(jobs: pd.DataFrame) -> pd.DataFrame:
    """Select the jobs of the last run from those of `read_journal`.

    A run begins with the first job, with the stage `dataset`, and after `IDLE` seconds in which no job ran.
    """
    idle = jobs["start"] - jobs["end"].cummax().shift()
    begins = (idle > IDLE) | (jobs["stage"] == "dataset")
    return jobs[begins.cumsum() == begins.sum()]


def assign_lanes(starts: Iterable[float], ends: Iterable[float]) -> list[int]:
    """Give each job, in order of its start, the first free lane, so that there are as many as jobs ran at once."""
    lanes: list[int] = []
    free_at: list[float] = []
    for start, end in zip(starts, ends, strict=True):
        lane = next((i for i, free in enumerate(free_at) if free <= start), len(free_at))
        free_at[lane : lane + 1] = [end]
        lanes.append(lane)
    return lanes


def describe_parallelism(jobs: pd.DataFrame, name: str) -> str:
    """Line on the time from the first start to the last end, and the sum of the jobs' times."""
    elapsed = jobs["end_s"].max() - jobs["start_s"].min()
    total = (jobs["end_s"] - jobs["start_s"]).sum()
    ratio = total / elapsed if elapsed > 0 else 1.0
    return f"{name}: {len(jobs)} jobs, elapsed {elapsed:.1f} s, sum {total:.1f} s, {ratio:.2f} x parallel"


def describe_overhead(path: Path, jobs: pd.DataFrame) -> str | None:
    """Line on the overhead of `jobs`; None if they were not run by `nonn.commands.job`.

    A job lasts from its start by Snakemake until DVC has cached its outputs. Its work is the time of the stage itself
    in the journal, after all imports; the rest is overhead.
    """
    whole = [entry for entry in read_lines(path) if "job" in entry]
    begin, end = jobs["start"].min(), jobs["end"].max()
    whole = [entry for entry in whole if entry["end"] > begin and entry["start"] < end]
    if not whole:
        return None
    total = sum(entry["end"] - entry["start"] for entry in whole)
    overhead = total - (jobs["end"] - jobs["start"]).sum()
    return (
        f"apart from their work: {overhead:.1f} s of {total:.1f} s ({overhead / total:.0%}), for Python, imports, DVC"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="draw every job on record, not only the last run")
    add_settings(parser)
    parser.epilog = "example: nonn timeline --all"


def run(options: argparse.Namespace) -> None:
    """Write ``timeline.csv`` and ``figures/timeline``, and print how parallel the jobs were."""
    params = load_settings(options)
    paths = Paths(params.experiment)
    jobs = read_journal(JOURNAL, params.experiment)
    if jobs.empty:
        log(f"{JOURNAL}: no stage of {params.experiment} has run here, so there is no timeline")
        return
    jobs = jobs if options.all else last_run(jobs)
    overhead = describe_overhead(JOURNAL, jobs)
    begin = jobs["start"].min()
    lanes = assign_lanes(jobs["start"], jobs["end"])
    seconds = {"start_s": (jobs["start"] - begin).round(1), "end_s": (jobs["end"] - begin).round(1)}
    jobs = jobs.assign(**seconds, lane=lanes).astype({"seed": "Int64"})
    write_text(paths / "timeline.csv", jobs[COLUMNS].to_csv(index=False, float_format="%.1f"))
    with drawing_style():
        figure = draw_timeline(jobs, STAGES)
        save_figure(figure, paths / "figures/timeline", params.figures)
    print(describe_parallelism(jobs, "all stages"))
    training = jobs[jobs["stage"].isin(["distill", "baseline"])]
    if len(training):
        print(describe_parallelism(training, "distill and baseline"))
    if overhead:
        print(overhead)
