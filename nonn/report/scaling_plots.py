"""The figure of the overhead of jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from nonn.report.plots import STUDENT_COLOURS, panels

#: Column to its label and its unit.
PANELS = {
    "overhead_per_job_s": ("overhead of a job (s)", 1),
    "dag_s": ("dry run (s)", 1),
    "lock_bytes": ("size of dvc.lock (KB)", 1000),
}


def draw_job_scaling(rows: Sequence[Mapping[str, str]], engines: Iterable[str]) -> Figure:
    """Draw each of `PANELS` by the number of jobs; `rows` are those of ``scaling_jobs.csv``, as text."""
    figure, axes = panels(len(PANELS), 3.2, 2.8)
    for axis, (column, (label, unit)) in zip(axes, PANELS.items(), strict=True):
        for engine, colour in zip(engines, STUDENT_COLOURS, strict=False):
            points = [(int(r["n_jobs"]), float(r[column]) / unit) for r in rows if r["engine"] == engine and r[column]]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=engine)
        axis.set(xlabel="jobs", ylabel=label, xscale="log", yscale="log")
        axis.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)),
            major_formatter=StrMethodFormatter("{x:g}"),
            minor_formatter=NullFormatter(),
        )
        axis.xaxis.set(major_formatter=StrMethodFormatter("{x:,.0f}"), minor_formatter=NullFormatter())
    axes[0].legend()
    return figure
