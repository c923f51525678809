"""The command ``nonn scaling``: what a job costs apart from its training, and how that grows with their number.

In scratch copies of the repository, with a network of very many seeds, whose trainings take about a second. What comes
before the trainings is run once and not counted. For each number of jobs:

- ``dag_s``, seconds of a dry run, which reads ``dvc.yaml``, looks at every file and builds the graph of jobs;
- ``wall_s``, seconds until all trainings are done;
- ``overhead_per_job_s``, core seconds per job besides its training: (parallel jobs × ``wall_s`` − training time) /
  number of jobs. Under Slurm this includes queueing;
- ``lock_bytes``, size of ``dvc.lock`` in the end;
- ``stage_1_s`` and ``stage_4_s``, seconds until DVC has found that a finished training has nothing to do, of one
  process alone, and a process of four at once. DVC's lock of a repository lets one at a time read ``dvc.yaml``, which
  every job has to do.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from nonn.commands.scratch import ScratchRepository, copy_repository, end_all
from nonn.commands.tables import refuse_other_table, write_rows
from nonn.commands.use import merge, merge_experiment
from nonn.core.errors import UserError
from nonn.core.files import scratch_folder
from nonn.core.paths import DVC_LOCK
from nonn.core.progress import log

NETWORK, EXPERIMENT = "many", "scaling"
#: The training whose check is timed.
FIRST = f"distill@seed0/{NETWORK}/0"
#: A tiny teacher, and students whose training takes about a second on one core.
CHANGES: dict[str, Any] = {
    "experiment": EXPERIMENT,
    "devices": {"small": {"memory_kib": 60, "mmacs": 5}},
    "teacher": {"architecture": {"family": "fast", "widths": [8, 16, 32], "depth": 1}, "epochs": 1, "threads": 1},
    "signals": {"views": 1, "threads": 1},
    "graph": {"top_k": 8},
    "design": {"depths": [1], "min_width": 4, "max_width": 16, "step": 2},
    "distill": {"epochs": 1},
}
#: Resolution of the figure.
DPI = 150
#: Seconds that Snakemake gets to cancel its jobs.
PATIENCE = 20.0
COLUMNS = ("engine", "n_jobs", "wall_s", "overhead_per_job_s", "dag_s", "lock_bytes", "stage_1_s", "stage_4_s")
#: Options of Snakemake by engine; a queue limits the parallel jobs by itself.
ENGINES = {"local": ("--cores", "{}"), "slurm": ("--workflow-profile", "workflow/profiles/slurm")}


class Scratch(ScratchRepository):
    """A scratch copy with a network of so many jobs."""

    def timed(self, *command: str, at_once: int = 1) -> float:
        """Seconds until a command, or several copies of it at once, have ended; a `UserError` if one fails."""
        begun = time.monotonic()
        processes: list[subprocess.Popen] = []
        try:
            for _ in range(at_once):
                processes.append(self.start(command))
            outputs = [process.communicate()[0] for process in processes]
        except BaseException:  # the folder will be deleted
            for number, seconds in ((signal.SIGINT, PATIENCE), (signal.SIGKILL, None)):  # Snakemake cancels its jobs
                end_all(processes, number, seconds)
            raise
        for process, output in zip(processes, outputs, strict=True):
            if process.returncode:
                raise UserError(f"{shlex.join(command[:8])}: failed: {output[-500:].strip()}")
        return time.monotonic() - begun

    def copied(self, folder: Path) -> Scratch:
        shutil.copytree(self.folder, folder, symlinks=True)
        return Scratch(folder)

    def ask_for(self, n_jobs: int) -> list[str]:
        """Write parameters with so many trainings; return the files that these write."""
        params = merge(merge_experiment("mnist5k"), CHANGES)
        seeds = n_jobs // 2
        params["networks"] = {NETWORK: {"devices": ["small", "small"], "seeds": seeds, "baselines": {}}}
        with (self.folder / "params.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(params, file)
        return [
            f"results/{EXPERIMENT}/students/seed{seed}/{NETWORK}/{student}.safetensors"
            for seed in range(seeds)
            for student in range(2)
        ]

    def trainings(self) -> float:
        """Seconds that all trainings of this copy took, from the journal."""
        lines = (self.folder / ".nonn/journal.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        return sum(entry["end"] - entry["start"] for entry in entries if entry.get("stage") == "distill")


def prepared(folder: Path) -> Scratch:
    """A copy in which everything before the trainings is done."""
    folder.mkdir()
    copy_repository(folder)
    scratch = Scratch(folder)
    scratch.ask_for(2)
    scratch.timed("snakemake", "--cores", "all", f"results/{EXPERIMENT}/partition/{NETWORK}")
    return scratch


def measure(scratch: Scratch, engine: str, n_jobs: int, at_once: int, more: Sequence[str], dry: bool) -> dict[str, Any]:
    """A row of the table; see `COLUMNS`. A dry one runs only the first training, which is not counted."""
    files = scratch.ask_for(n_jobs)
    words = [word.format(at_once) for word in ENGINES[engine]]
    command = ["snakemake", *words, *more, "--", *files]
    row: dict[str, Any] = {
        "engine": engine,
        "n_jobs": n_jobs,
        "dag_s": scratch.timed(*command[:1], "--dry-run", "--quiet", "all", *command[1:]),
    }
    job = (sys.executable, "-m", "nonn", "job", FIRST)
    if dry:
        scratch.timed(*job)
    else:
        row["wall_s"] = scratch.timed(*command)
        row["overhead_per_job_s"] = (at_once * row["wall_s"] - scratch.trainings()) / n_jobs
        scratch.timed("snakemake", "--cores", "1", "--", files[0])  # adds the entries of the run to dvc.lock
        row["lock_bytes"] = (scratch.folder / DVC_LOCK).stat().st_size
    row["stage_1_s"], row["stage_4_s"] = scratch.timed(*job), scratch.timed(*job, at_once=4) / 4
    return row


def written(row: dict[str, Any]) -> dict[str, str]:
    """A row with seconds rounded to hundredths."""
    return {
        column: f"{value:.2f}" if isinstance(value := row.get(column, ""), float) else str(value) for column in COLUMNS
    }


def merged(path: Path, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of a file with those of the same engine and number replaced, in order."""
    known: dict[tuple[str, int], dict[str, str]] = {}
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            known = {(row["engine"], int(row["n_jobs"])): row for row in csv.DictReader(file)}
    known |= {(row["engine"], int(row["n_jobs"])): row for row in rows}
    return [known[key] for key in sorted(known)]


def even_numbers(text: str) -> list[int]:
    """Even numbers from 2 on, with commas between them; may be empty."""
    found = [int(word) for word in text.split(",") if word]
    if any(number < 2 or number % 2 for number in found):
        raise ValueError
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=ENGINES, default="local", help="(default: %(default)s)")
    parser.add_argument(
        "--jobs", type=even_numbers, default="10,100", metavar="N,N", help="to run (default: %(default)s)"
    )
    parser.add_argument(
        "--dry", type=even_numbers, default="1000", metavar="N,N", help="only dry runs (default: %(default)s)"
    )
    parser.add_argument(
        "--at-once", type=int, default=2, metavar="N", help="jobs that run at once (default: %(default)s)"
    )
    parser.add_argument("--snakemake", default="", metavar="ARGS", help="for snakemake, such as '--slurm-no-account'")
    parser.add_argument(
        "--output", type=Path, default=Path("results/scaling_jobs.csv"), metavar="FILE", help="(default: %(default)s)"
    )
    parser.epilog = "example: nonn scaling --jobs 10,100 --dry 1000,10000"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn scaling``; each row is written as soon as it is measured."""
    from nonn.core.params import FiguresParams
    from nonn.report.plots import drawing_style, save_figure
    from nonn.report.scaling_plots import draw_job_scaling

    if options.at_once < 1:
        raise UserError("--at-once: give at least 1")
    if not (options.jobs or options.dry):
        raise UserError("--jobs and --dry: both name no number of jobs; give one of them some")
    refuse_other_table("--output", options.output, COLUMNS)
    with scratch_folder() as folder:
        base = prepared(folder / "base")
        more = shlex.split(options.snakemake)
        for n_jobs, dry in [*((n, False) for n in options.jobs), *((n, True) for n in options.dry)]:
            scratch = base.copied(folder / f"{n_jobs}{'-dry' * dry}")
            row = measure(scratch, options.engine, n_jobs, options.at_once, more, dry)
            rows = merged(options.output, [written(row)])
            write_rows(options.output, COLUMNS, rows)
            log(", ".join(f"{column} {value}" for column, value in written(row).items() if value))
            shutil.rmtree(scratch.folder)
    with drawing_style():
        save_figure(draw_job_scaling(rows, ENGINES), options.output.with_suffix(""), FiguresParams(dpi=DPI))
