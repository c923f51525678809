"""Figures of the devices at work."""

import pandas as pd
import pytest
from deployed import COMPARISONS, FAST, RESULTS, SOLO, TWO, join

from nonn.core.architecture import Architecture
from nonn.core.params import FiguresParams
from nonn.report import deployment_plots
from nonn.report.deployment_table import PAPER, collect_ratios, join_rows, list_ratios
from nonn.report.plots import drawing_style, save_figure

FIGURES = FiguresParams(dpi=50)
REFERENCE = Architecture(family="wrn", depth=16, width=2)


@pytest.fixture
def rows() -> pd.DataFrame:
    return join("solo", "2s", "4s")


def draw_all(rows: pd.DataFrame, comparisons: list[dict], reference: Architecture | None):
    yield deployment_plots.draw_communication(rows, reference)
    yield deployment_plots.draw_latency(rows, "cortex_m7")
    yield deployment_plots.draw_scaling(rows, comparisons, "cortex_m7")
    yield deployment_plots.draw_ratios(collect_ratios(rows, comparisons), list_ratios(rows, comparisons))


def labels_of(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def save_all(rows: pd.DataFrame, comparisons: list[dict], reference: Architecture | None, folder) -> list[bytes]:
    with drawing_style():
        for number, figure in enumerate(draw_all(rows, comparisons, reference)):
            save_figure(figure, folder / f"{number}.svg", FIGURES)
    return [path.read_bytes() for path in sorted(folder.glob("*.svg"))]


@pytest.mark.parametrize("networks", [["2s"], ["4s"], ["2s", "4s", "8s"]], ids="-".join)
def test_figures_of_any_number_of_networks_are_the_same_bytes_again(networks, folder):
    counts = {"2s": 2, "4s": 4, "8s": 8}
    rows = join_rows({name: RESULTS[name] for name in ["solo", *networks]}, counts)
    comparisons = [{"network": name, "memory_ratio": 9.0, "performance_ratio": 3.0} for name in networks]
    reference = REFERENCE if "2s" in networks else None
    before = save_all(rows, comparisons, reference, folder)
    assert len(before) == len(set(before)) == 4
    assert all(content.startswith(b"<?xml") for content in before)
    assert save_all(rows.copy(), comparisons, reference, folder) == before


def test_figures_where_links_cannot_be_emulated(folder):
    """Then everything is timed on loopback, splits too."""
    here = [row | {"link": "loopback", "emulated": False} for row in TWO["live"] if row["link"] == FAST]
    results = {"solo": SOLO, "2s": TWO | {"live": here}}
    rows = join_rows(results, {"2s": 2})
    assert collect_ratios(rows, COMPARISONS[:1])["total_latency"]["link"] == "loopback"
    assert len(save_all(rows, COMPARISONS[:1], REFERENCE, folder)) == 4


def test_a_ratio_below_one_is_seen(rows):
    """Where NoNN needs more than the baseline, its bar shows it, to the left of 1."""
    ratios = collect_ratios(rows, COMPARISONS)
    ratios["total_latency_rows"]["ratio"] = 0.5
    with drawing_style():
        (axis,) = deployment_plots.draw_ratios(ratios, list_ratios(rows, COMPARISONS)).axes
    assert axis.get_xlim()[0] < 0.5
    assert axis.get_xlim()[1] > max(PAPER.values())


def test_the_largest_ratios_are_of_those_that_are_listed(rows):
    listed = list_ratios(rows, COMPARISONS)
    largest = listed.groupby("claim")["ratio"].max()
    ratios = collect_ratios(rows, COMPARISONS)
    for claim in ("memory", "performance", "energy_per_node", "total_latency"):
        assert ratios[claim]["ratio"] == pytest.approx(largest[claim])
    assert (listed["claim"] == "memory").sum() == len(COMPARISONS)
    assert not ((listed["claim"] == "total_latency") & (listed["badge"] == "modelled")).any()


def test_nothing_leads_from_the_teacher_to_the_networks(rows):
    """The teacher is no network of one device, so a line from it would be a trend that is not there."""
    with drawing_style():
        speed, _ = deployment_plots.draw_scaling(rows, COMPARISONS, "cortex_m7").axes
    (level,) = [line for line in speed.lines if line.get_linestyle() == "--"]
    assert set(level.get_ydata()) == {1}
    points = [container.lines[0] for container in speed.containers]
    assert [point.get_xydata().tolist() for point in points] == [[[2, 4.0]], [[4, 3.0]]]
    ((bar,),) = [container.lines[2] for container in speed.containers][:1]
    assert bar.get_segments()[0][:, 1].tolist() == [3.5, 4.5]


def test_networks_without_energy_are_drawn():
    """Of boards whose power is not known no energy is composed."""
    without = [{k: v for k, v in row.items() if not k.startswith("energy")} for row in TWO["composed"]]
    rows = join_rows({"2s": TWO | {"composed": without}}, {"2s": 2})
    ratios = collect_ratios(rows, COMPARISONS[:1])
    assert ratios["energy_per_node"] is None
    with drawing_style():
        scaling = deployment_plots.draw_scaling(rows, COMPARISONS[:1], "cortex_m7")
        deployment_plots.draw_ratios(ratios, list_ratios(rows, COMPARISONS[:1])).canvas.draw()
    assert [text.get_text() for text in scaling.axes[1].texts] == ["not composed: no power is known"]


def test_what_was_timed_has_a_bar_to_its_95th_percentile(rows):
    with drawing_style():
        figure = deployment_plots.draw_latency(rows, "cortex_m7")
    bars = [bar for axis in figure.axes for container in axis.containers for bar in container.lines[2]]
    ends = [tuple(segment[:, 1]) for bar in bars for segment in bar.get_segments()]
    assert (5.0, 6.0) in ends
    (legend,) = figure.legends
    assert "composed for another processor, Cortex-M7, teacher on Raspberry Pi 3B" in labels_of(legend)


@pytest.mark.parametrize(("board", "named"), [("cortex_m7", False), ("pi3b", True)])
def test_a_teacher_on_another_board_is_labelled(board, named):
    teacher = [row | {"boards": [board]} for row in SOLO["composed"] if row["method"] == "teacher"]
    rows = join_rows({"solo": SOLO | {"composed": teacher}, "2s": TWO}, {"2s": 2})
    with drawing_style():
        (legend,) = deployment_plots.draw_scaling(rows, COMPARISONS[:1], "cortex_m7").legends
    assert any(label.endswith("on Raspberry Pi 3B") for label in labels_of(legend)) is named
