"""Rows of all devices joined, and the paper's ratios, by hand."""

import math

import pandas as pd
import pytest
from deployed import COMPARISONS, FAST, HOME, SLOW, SOLO, TWO, composed, join, live

from nonn.report.deployment_table import (
    COLUMNS,
    ENERGIES,
    LATENCIES,
    PAPER,
    claim_ratios,
    collect_energies,
    collect_latencies,
    collect_ratios,
    compare_splits,
    format_energies,
    format_latencies,
    format_ratios,
    format_splits,
    join_rows,
)
from nonn.report.summary import format_csv


@pytest.fixture
def rows() -> pd.DataFrame:
    return join("solo", "2s", "4s")


def cell(rows: pd.DataFrame, column: str, **where):
    return rows.loc[(rows[list(where)] == pd.Series(where)).all(axis=1), column].item()


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
    split = ["By channels", "By rows"]
    composed = ["NoNN, composed (ms)", *(f"{name}, composed" for name in split)]
    assert list(latencies) == ["Network", "Link", "Images", "NoNN (ms)", "Overhead (ms)", *split, *composed]
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
        composed("teacher_all_cores", FAST, 1, 20.0, energy=7.5) | HOME,
        composed("teacher_int8", FAST, 1, 50.0, energy=9.0) | {"boards": ["pi3b"]},
        composed("teacher_own_board", FAST, 1, 50.0, energy=60.0),
        composed("teacher_int8_own_board", FAST, 1, 50.0, energy=6.0),
    ]
    students = [
        composed("nonn", FAST, 2, 4.0, energy=1.5) | {"energy_total_computing_mj": [3.0, 6.0]},
        composed("nonn_teacher_board", FAST, 2, 4.0, energy=4.0) | {"boards": ["pi3b", "pi3b"]},
    ]
    results = {"solo": {"live": [], "composed": teachers}, "2s": {"live": TWO["live"], "composed": students}}
    rows = join_rows(results, {"2s": 2})
    found = collect_energies(rows, "2s", FAST, "sensor")
    assert list(found) == list(ENERGIES)
    ratios = {name: entry["ratio"] for name, entry in found.items()}
    assert ratios == {
        **{"holds": 8.0, "above_idle": pytest.approx(6 / 2.25, abs=1e-4), "all_cores": 5.0, "int8": 6.0},
        **{"all_devices": 4.0, "all_devices_all_cores": 2.5},
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
        **{"total_latency_scenario": "sensor", "total_latency_ratios": {"channels": 10.0, "rows": 3.0}},
        "energy_ratios": {"holds": 4.0, "above_idle": 4.0, "all_devices": 4.0},
    }


def test_total_latency_by_what_is_assumed():
    """NoNN of the same scenario stands below each ratio; what was not composed is left out."""
    rows = [
        *(composed("nonn", SLOW, 2, 10.0), composed("nonn", SLOW, 2, 40.0) | {"scenario": "broadcast"}),
        *(composed("channels", SLOW, 2, 900.0), composed("channels", SLOW, 2, 1000.0) | {"scenario": "broadcast"}),
        composed("channels_multicast", SLOW, 2, 300.0),
        composed("rows", SLOW, 2, 80.0) | {"memory_bytes": 50 * 1024},
        *(composed("nonn", FAST, 2, 1.0), composed("channels", FAST, 2, 2.0)),
    ]
    timed = [live("nonn", SLOW, 10.0), live("channels", SLOW, 800.0)]
    table = join_rows({"2s": {"live": timed, "composed": rows}}, {"2s": 2})
    found = collect_latencies(table, "2s", SLOW)
    ratios = {name: entry["ratio"] for name, entry in found.items()}
    assert ratios == {"channels": 90.0, "channels_multicast": 30.0, "channels_broadcast": 25.0, "rows": 8.0}
    assert found["rows"]["memory_kib"] == 50.0
    ratios = collect_ratios(table, [COMPARISONS[0]])
    assert ratios["latencies"] == found
    assert format_splits(ratios, {"2s": [40, 48]}).values.tolist()[-1] == [LATENCIES["rows"][0], "50 of 40", "8.0×"]
    assert claim_ratios(table, "2s")["total_latency_ratio"] == 80.0


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
