"""The command ``nonn jobs``: write the lists of jobs of ``params.yaml`` for DVC, see `nonn.core.jobs`.

What jobs that are no longer there have written is deleted: DVC compares whole folders, so a student too many would let
what reads its folder run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nonn.commands import project
from nonn.commands.verify import cache_folder, distrust, mend_state
from nonn.core.jobs import FACTS, JOBS_FILE, list_jobs, write_jobs
from nonn.core.options import add_settings, refuse_settings
from nonn.core.params import load_params
from nonn.core.paths import Paths, remove_leftovers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, argparse.SUPPRESS)
    parser.epilog = "example: nonn jobs"


def run(options: argparse.Namespace) -> None:
    refuse_settings(options, "the list of jobs has to be that of params.yaml")
    project.refresh()
    params = load_params()
    remove_leftovers(params, Paths(params.experiment))
    if Path(".dvc").is_dir():
        mend_state()
        distrust(cache_folder())
    news = "written" if write_jobs(params) else "as it was"
    jobs = {name: len(jobs) for name, jobs in list_jobs(params).items() if isinstance(jobs, dict)}
    counts = {name: count for name, count in jobs.items() if name not in FACTS}
    print(f"{JOBS_FILE}: {news}; " + ", ".join(f"{count} {name}" for name, count in counts.items()))
