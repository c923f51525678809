"""The command ``nonn jobs``: write the lists of jobs of ``params.yaml`` for DVC, see `nonn.core.jobs`."""

from __future__ import annotations

from nonn.core.jobs import JOBS_FILE, list_jobs, write_jobs
from nonn.core.params import load_params


def add_arguments(parser) -> None:
    parser.epilog = "example: nonn jobs"


def run(options) -> None:
    del options
    params = load_params()
    news = "written" if write_jobs(params) else "as it was"
    counts = {name: len(jobs) for name, jobs in list_jobs(params).items() if isinstance(jobs, dict)}
    print(f"{JOBS_FILE}: {news}; " + ", ".join(f"{count} {name}" for name, count in counts.items()))
