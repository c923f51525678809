"""Rows of all devices joined, the paper's ratios by hand, and figures of them."""

import math

import pandas as pd
import pytest

from nonn.core.architecture import Architecture
from nonn.core.params import Figures
from nonn.report import deployment_plots
from nonn.report.deployment_table import (
    COLUMNS,
    ENERGIES,
    PAPER,
    claim_ratios,
    collect_energies,
    collect_ratios,
    compare_splits,
    format_energies,
    format_latencies,
    format_ratios,
    join_rows,
    list_ratios,
)
from nonn.report.plots import drawing_style, save_figure
from nonn.report.summary import format_csv

FIGURES = Figures(dpi=50)
REFERENCE = Architecture(family="wrn", depth=16, width=2)
#: Wi-Fi, and a link on which a split by channels takes too long.
FAST, SLOW = "wifi20", "ieee802154"


def live(method: str, link: str, p50_ms: float, images: int = 30, emulated: bool = True, **more) -> dict:
    row = {"method": method, "scenario": "sensor", "link": link, "emulated": emulated, "absent": 0, "images": images}
    row |= {"p50_ms": p50_ms, "p95_ms": p50_ms + 1, "p99_ms": p50_ms + 2, "wire_bytes": 1000.0 if emulated else None}
    return row | more


def left_out(method: str, link: str) -> dict:
    return {"method": method, "scenario": "sensor", "link": link, "images": 0, "expected_ms": 99_000.0}


def composed(method: str, link: str, n_devices: int, total_ms: float, energy: float = 1.0) -> dict:
    row = {"method": method, "scenario": "sensor", "link": link, "n_devices": n_devices, "rounds": 2, "macs": 1000}
    row |= {"memory_bytes": 5000, "framing": 2.0, "wire_bytes": 900.0 * n_devices}
    row |= {"compute_ms": 1.0, "link_ms": total_ms - 1.5, "final_ms": 0.5, "total_ms": total_ms}
    row |= {"precision": "int8", "boards": ["cortex_m7"] * n_devices}
    for which in ("node", "total"):
        row[f"energy_{which}_mj"] = [energy / 2, energy]
        row[f"energy_{which}_computing_mj"] = [energy, 2 * energy]
        row[f"energy_{which}_with_idle_mj"] = [2 * energy, 3 * energy]
    return row


#: The teacher on another board than the students.
HOME = {"boards": ["pi3b"], "precision": "float32"}
SOLO = {
    "live": [live("teacher", FAST, 8.0), live("kd", FAST, 4.0)],
    "composed": [
        composed("teacher", FAST, 1, 50.0, energy=12.0) | HOME,
        composed("teacher", SLOW, 1, 60.0, energy=14.0) | HOME,
        composed("kd", FAST, 1, 9.0),
    ],
}
TWO = {
    "live": [
        live("nonn", FAST, 5.0, images=20, overhead_ms=1.25, ideal_over_total=0.75),
        live("channels", FAST, 60.0, images=25),
        live("rows", FAST, 20.0),
        live("nonn", SLOW, 10.0),
        left_out("channels", SLOW),
        live("rows", SLOW, 900.0, images=2),
    ],
    "composed": [
        composed("nonn", FAST, 2, 4.0, energy=3.0),
        composed("channels", FAST, 2, 40.0),
        composed("rows", FAST, 2, 12.0),
        composed("nonn", SLOW, 2, 8.0, energy=7.0),
        composed("channels", SLOW, 2, 90_000.0),
        composed("reference_rows", FAST, 2, 300.0),
    ],
}
#: Without a network of its total budget to split.
FOUR = {
    "live": [live("nonn", FAST, 6.0)],
    "composed": [composed("nonn", FAST, 4, 3.0, energy=1.5), composed("nonn", SLOW, 4, 8.0, energy=1.0)],
}
RESULTS = {"solo": SOLO, "2s": TWO, "4s": FOUR}
COMPARISONS = [
    {
        **{"network": "2s", "memory_ratio": 10.0, "performance_ratio": 4.0},
        **{"performance_ratio_low": 3.5, "performance_ratio_high": 4.5},
    },
    {"network": "4s", "memory_ratio": 30.0, "performance_ratio": 3.0},
]


def join(*names: str) -> pd.DataFrame:
    return join_rows({name: RESULTS[name] for name in names}, {"2s": 2, "4s": 4})


@pytest.fixture
def rows() -> pd.DataFrame:
    return join("solo", "2s", "4s")


def cell(rows: pd.DataFrame, column: str, **where):
    return rows.loc[(rows[list(where)] == pd.Series(where)).all(axis=1), column].item()


# Rows


def test_rows_are_joined_without_those_left_out(rows):
    assert list(rows.columns) == list(COLUMNS)
    n_live = 2 + 5 + 1
    assert (rows["badge"] == "emulated").sum() == n_live
    assert (rows["badge"] == "modelled").sum() == len(rows) - n_live == 3 + 6 + 2
    where = {"network": "2s", "method": "nonn", "link": FAST}
    assert cell(rows, "total_ms", badge="emulated", **where) == 5.0
    assert cell(rows, "total_ms", badge="modelled", **where) == 4.0
    assert cell(rows, "energy_node_mj_low", badge="modelled", **where) == 1.5
    assert cell(rows, "energy_total_computing_mj_high", badge="modelled", **where) == 6.0
    assert cell(rows, "energy_total_with_idle_mj_high", badge="modelled", **where) == 9.0
    assert cell(rows, "boards", badge="modelled", **where) == "cortex_m7"
    assert math.isnan(cell(rows, "p99_ms", badge="modelled", **where))
    assert set(rows[rows["network"] == ""]["method"]) == {"teacher", "kd"}
    assert set(rows[rows["network"] == ""]["n_devices"]) == {1}
    assert rows[(rows["method"] == "channels") & (rows["link"] == SLOW)]["badge"].tolist() == ["modelled"]


def test_on_loopback_the_badge_is_measured():
    rows = join_rows({"2s": {"live": [live("nonn", FAST, 5.0, emulated=False)], "composed": []}}, {"2s": 2})
    assert rows["badge"].tolist() == ["measured"]
    assert rows["wire_bytes"].isna().all()
    line = format_csv(rows, COLUMNS).splitlines()[1]
    assert line.startswith(f"2s,nonn,2,{FAST},sensor,measured,,,30,0,5.000,6.000,7.000,")


def test_csv_by_hand(rows):
    header, *lines = format_csv(rows, COLUMNS).splitlines()
    assert header == ",".join(COLUMNS)
    assert len(lines) == len(rows)
    assert lines[0] == f",teacher,1,{FAST},sensor,emulated,,,30,0,8.000,9.000,10.000,,,,,1000,,,,,,,,,,,,,,,"
    energies = "".join(2 * pair for pair in ("1.50000,3.00000,", "3.00000,6.00000,", "6.00000,9.00000,"))
    modelled = f"2s,nonn,2,{FAST},sensor,modelled,int8,cortex_m7,,,4.000,,,1.0000,2.500,0.5000,2,1800,5000,{energies},"
    assert modelled in lines
    assert f"2s,nonn,2,{FAST},sensor,emulated,,,20,0,5.000,6.000,7.000,,,,,1000,,,,,,,,,,,,,,1.250,0.750" in lines


# Ratios


def test_splits_against_nonn_by_hand(rows):
    splits = compare_splits(rows)
    table = {
        (row.link, row.badge, row.method): (row.nonn_ms, row.split_ms, row.ratio, row.images)
        for row in splits.itertuples()
    }
    assert set(splits["network"]) == {"2s"}  # of the other there is no split
    assert table.pop((FAST, "emulated", "channels")) == (5, 60, 12, 20)  # the fewer of 20 and 25 images
    assert table.pop((FAST, "emulated", "rows")) == (5, 20, 4, 20)
    assert table.pop((SLOW, "emulated", "rows")) == (10, 900, 90, 2)
    ratios = {key: value[2] for key, value in table.items()}
    modelled = {(FAST, "channels"): 10, (FAST, "rows"): 3, (SLOW, "channels"): 11_250}
    assert ratios == {(link, "modelled", method): ratio for (link, method), ratio in modelled.items()}


def test_the_papers_ratios_by_hand(rows):
    ratios = collect_ratios(rows, COMPARISONS)
    counted = {"ratio_low": None, "ratio_high": None}
    nowhere = counted | {"link": None, "scenario": None, "images": None}
    best = {"baseline": "teacher", "network": "4s", "n": 4, "badge": "modelled"}
    assert ratios["memory"] == nowhere | best | {"ratio": 30.0}
    best = {"baseline": "teacher", "network": "2s", "n": 2, "badge": "measured"}
    assert ratios["performance"] == nowhere | best | {"ratio": 4.0, "ratio_low": 3.5, "ratio_high": 4.5}
    # 14 / 1 on the slow link, beyond 12 / 1.5 on the fast one.
    best = {"baseline": "teacher", "network": "4s", "n": 4, "badge": "modelled", "link": SLOW}
    # Each known as a range whose upper end is twice the lower.
    energy = {"ratio": 14.0, "ratio_low": 7.0, "ratio_high": 28.0}
    assert ratios["energy_per_node"] == energy | best | {"scenario": "sensor", "images": None}
    # What was left out on the slow link does not count, however large its composed ratio.
    best = {"ratio": 12.0, "baseline": "split by channels", "network": "2s", "n": 2, "badge": "emulated"}
    assert ratios["total_latency"] == counted | best | {"link": FAST, "scenario": "sensor", "images": 20}
    # On the same link, though it is larger on the other.
    best = {"ratio": 4.0, "baseline": "split by rows", "network": "2s", "n": 2, "badge": "emulated"}
    assert ratios["total_latency_rows"] == counted | best | {"link": FAST, "scenario": "sensor", "images": 20}
    assert {name: entry["ratio"] for name, entry in ratios["paper"].items()} == PAPER


def test_both_splits_are_compared_on_the_same_network():
    """Also where another network has as many devices."""
    other = {"live": [live("nonn", FAST, 1.0), live("rows", FAST, 50.0), live("channels", FAST, 2.0)], "composed": []}
    results = {"solo": SOLO, "2s": TWO, "2b": other}
    ratios = collect_ratios(join_rows(results, {"2s": 2, "2b": 2}), COMPARISONS[:1])
    assert (ratios["total_latency"]["network"], ratios["total_latency"]["ratio"]) == ("2s", 12.0)
    assert (ratios["total_latency_rows"]["network"], ratios["total_latency_rows"]["ratio"]) == ("2s", 4.0)


def test_without_a_split_there_is_no_ratio_of_it():
    rows = join("solo", "4s")
    assert compare_splits(rows).empty
    ratios = collect_ratios(rows, COMPARISONS[1:])
    assert ratios["total_latency"] is ratios["total_latency_rows"] is None
    assert ratios["energy_per_node"]["ratio"] == 14.0
    assert not format_ratios(ratios)[""].str.contains("Total latency").any()
    assert ["4s", FAST, "30", "6.0 (8.0)", "–", "–", "–", "3.0", "–", "–"] in format_latencies(rows).to_numpy().tolist()


def test_tables_for_readers_by_hand(rows):
    ratios = format_ratios(collect_ratios(rows, COMPARISONS))
    assert list(ratios) == ["", "NoNN", "Network", "Link", "Images", "Badge", "Paper"]
    assert ratios.to_numpy().tolist() == [
        ["Memory of a device", "30.0×", "4s", "–", "–", "modelled", "24×"],
        ["Time of a device", "4.0×, 3.5 to 4.5", "2s", "–", "–", "measured", "12×"],
        ["Energy of a device", "14.0×, 7.0 to 28.0", "4s", SLOW, "–", "modelled", "14×"],
        ["Total latency, against a split by channels", "12.0×", "2s", FAST, "20", "emulated", "33×"],
        ["Total latency, against a split by rows", "4.0×", "2s", FAST, "20", "emulated", "–"],
    ]
    latencies = format_latencies(rows)
    split = ["a", "b"]
    composed = ["NoNN, composed (ms)", *split]
    assert list(latencies) == ["Network", "Link", "n", "NoNN (ms)", "Overhead (ms)", *split, *composed]
    assert latencies.to_numpy().tolist() == [
        ["2s", FAST, "20", "5.0 (7.0)", "1.2", "12.0×", "4.0×", "4.0", "10.0×", "3.0×"],
        ["2s", SLOW, "30", "10.0 (12.0)", "–", "–", "90.0×", "8.0", "11250.0×", "–"],
        ["4s", FAST, "30", "6.0 (8.0)", "–", "–", "–", "3.0", "–", "–"],
        ["4s", SLOW, "–", "–", "–", "–", "–", "8.0", "–", "–"],
    ]


# Energy by what is assumed, and claims


def test_energies_by_hand():
    """Teacher and students are charged alike, and no assumption is taken for another."""
    teachers = [
        composed("teacher", FAST, 1, 50.0, energy=12.0) | HOME | {"energy_node_mj": [2.0, 4.0]},
        composed("teacher_int8", FAST, 1, 50.0, energy=9.0) | {"boards": ["pi3b"]},
        composed("teacher_own_board", FAST, 1, 50.0, energy=60.0),
        composed("teacher_int8_own_board", FAST, 1, 50.0, energy=6.0),
    ]
    students = [
        composed("nonn", FAST, 2, 4.0, energy=1.5),
        composed("nonn_teacher_board", FAST, 2, 4.0, energy=4.0) | {"boards": ["pi3b", "pi3b"]},
    ]
    results = {"solo": {"live": [], "composed": teachers}, "2s": {"live": TWO["live"], "composed": students}}
    rows = join_rows(results, {"2s": 2})
    found = collect_energies(rows, "2s", FAST, "sensor")
    assert list(found) == list(ENERGIES)
    ratios = {name: entry["ratio"] for name, entry in found.items()}
    assert ratios == {
        **{"holds": 8.0, "above_idle": pytest.approx(6 / 2.25, abs=1e-4), "int8": 6.0},
        **{"same_board": 3.0, "int8_as_if": 4.0, "as_if": 40.0},
    }
    # Of the second the teacher takes 2 to 4 mJ above what its board draws anyway, and students 0.75 to 1.5.
    ends = [found["above_idle"][key] for key in ("ratio_low", "ratio_high")]
    assert ends == pytest.approx([2 / 1.5, 4 / 0.75], abs=1e-4)
    # On one board both have the same end of its range, whatever that is.
    for name in ("same_board", "int8_as_if", "as_if"):
        assert found[name]["ratio_low"] == found[name]["ratio_high"] == found[name]["ratio"]
    assert (found["holds"]["teacher_board"], found["holds"]["boards"]) == ("pi3b", "cortex_m7")
    assert (found["same_board"]["teacher_board"], found["same_board"]["boards"]) == ("pi3b", "pi3b")
    # The first is the one that is claimed, though others are larger.
    ratios = collect_ratios(rows, [COMPARISONS[0]])
    assert ratios["energy_per_node"]["ratio"] == 8.0
    assert ratios["energies"] == found
    table = format_energies(ratios)
    assert table["Assumed"].tolist() == [label for label, *_ in ENERGIES.values()]
    assert table.iloc[0].tolist()[1:] == ["pi3b", "cortex_m7", "8.0×, 4.0 to 16.0"]
    assert collect_energies(rows, "2s", SLOW, "sensor") == {}
    assert format_energies({"energy_per_node": None}).empty


def test_claims_of_one_network_by_hand(rows):
    claims = claim_ratios(rows, "2s")
    # The largest that was timed, by channels, and by rows on that link; energy there: 12 mJ over 3.
    assert claims == {
        **{"total_latency_ratio": 12.0, "total_latency_link": FAST, "total_latency_rows_ratio": 4.0},
        **{"energy_ratio": 4.0, "energy_ratio_low": 2.0, "energy_ratio_high": 8.0},
        "energy_ratios": {"holds": 4.0, "above_idle": 4.0},
    }


def test_what_was_not_split_or_composed_claims_nothing(rows):
    claims = claim_ratios(rows, "4s")
    assert claims["total_latency_ratio"] is claims["total_latency_link"] is claims["total_latency_rows_ratio"] is None
    assert claims["energy_ratio"] == 8.0  # on the first link: 12 over 1.5
    alone = claim_ratios(join_rows({"2s": TWO}, {"2s": 2}), "2s")  # no board holds the teacher
    assert alone["energy_ratio"] is alone["energy_ratio_low"] is None
    assert alone["energy_ratios"] == {}
    assert alone["total_latency_ratio"] == 12.0


def test_results_of_before_have_no_energy_to_compare():
    """Those that another version of the stage wrote say nothing of what a board draws while it computes."""
    rows = join("solo", "2s").drop(columns=[name for name in COLUMNS if "computing" in name])
    rows = rows.reindex(columns=list(COLUMNS)).astype({name: float for name in COLUMNS if "computing" in name})
    assert collect_ratios(rows, COMPARISONS[:1])["energy_per_node"] is None
    assert claim_ratios(rows, "2s")["energy_ratio"] is None


# Figures


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


#: The second network as a third one too, of eight devices.
RESULTS["8s"] = {
    "live": [row | {"p50_ms": row.get("p50_ms", 0) + 1} for row in TWO["live"]],
    "composed": [row | {"n_devices": 8} for row in TWO["composed"]],
}


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
