"""Figure of the jobs of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nonn.report.plots import STUDENT_COLOURS, legend_below, plural


def draw_timeline(jobs: pd.DataFrame, stages: Sequence[str]) -> Figure:
    """Draw a bar per job, in lanes of jobs that follow one another.

    Parameters
    ----------
    jobs : DataFrame
        ``stage``, ``item``, ``seed``, ``start_s``, ``end_s`` and ``lane``.
    stages : sequence of str
        All stages, in order: a stage has the same colour whichever others ran.
    """
    colours = dict(zip(stages, STUDENT_COLOURS, strict=False))
    n_lanes = int(jobs["lane"].max()) + 1
    figure = Figure(figsize=(10, 1.5 + 0.5 * n_lanes), layout="constrained")
    axis = figure.subplots()
    length, widths = jobs["end_s"].max(), jobs["end_s"] - jobs["start_s"]
    style = {"color": jobs["stage"].map(colours), "edgecolor": axis.get_facecolor(), "linewidth": 0.6}
    bars = axis.barh(jobs["lane"], widths, left=jobs["start_s"], **style)
    # About 190 characters of this size fill the width.
    room = widths / max(length, 1e-9) * 190
    names = jobs["item"].fillna(jobs["stage"])
    shown = names.where(names.str.len() < room, "")
    for text, stage in zip(axis.bar_label(bars, shown, label_type="center", size=6), jobs["stage"], strict=True):
        luma = np.dot(to_rgb(colours[stage]), (0.299, 0.587, 0.114))
        text.set_color("white" if luma < 0.6 else "black")
    axis.set(xlim=(0, max(length, 1e-9)), xlabel="time since the start (s)", ylabel="jobs at once")
    axis.set_yticks(range(n_lanes), range(1, n_lanes + 1))
    axis.set_ylim(n_lanes - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.set_title(f"{plural(len(jobs), 'job')} in {length:.0f} s")
    ran = [stage for stage in colours if stage in set(jobs["stage"])]
    legend_below(figure, [Patch(color=colours[stage], label=stage) for stage in ran], columns=7)
    return figure
