"""Tables of the devices at work: rows of the stage `distributed` joined, and the paper's four ratios.

Nothing is measured here. Every row and ratio carries a badge:

measured
    Timed on this machine, nothing in between.
emulated
    Timed on this machine, over a link that a relay slows down.
modelled
    Calculated: memory is counted; latency and energy are counted bytes and multiply-accumulates, times constants.
cited
    The paper's own number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from nonn.core.params import SOLO
from nonn.report.method_table import format_interval

#: Columns of ``distributed.csv`` and how each is written.
COLUMNS = {
    "network": "{}",
    "method": "{}",
    "n_devices": "{:d}",
    "link": "{}",
    "scenario": "{}",
    "badge": "{}",
    "precision": "{}",
    "boards": "{}",
    "images": "{:.0f}",
    "absent": "{:.0f}",
    "total_ms": "{:.3f}",
    "p95_ms": "{:.3f}",
    "p99_ms": "{:.3f}",
    "compute_ms": "{:.4f}",
    "link_ms": "{:.3f}",
    "final_ms": "{:.4f}",
    "rounds": "{:.0f}",
    "wire_bytes": "{:.0f}",
    "memory_bytes": "{:.0f}",
    **{
        f"energy_{which}_mj_{end}": "{:.5f}"
        for which in (f"{who}{idle}" for idle in ("", "_computing", "_with_idle") for who in ("node", "total"))
        for end in ("low", "high")
    },
    "overhead_ms": "{:.3f}",
    "ideal_over_total": "{:.3f}",
}
#: What the paper's abstract claims, each "up to".
PAPER = {"memory": 24.0, "performance": 12.0, "energy_per_node": 14.0, "total_latency": 33.0}
#: Ratios of energy: the assumption, the two methods, and the columns of their energies, of the neediest device or of
#: all. The first ratio is the one that is claimed: see `collect_energies`.
ENERGIES = {
    "holds": ("teacher on the board that holds it", "teacher", "nonn", "node_computing"),
    "above_idle": ("the same, without what a board draws anyway", "teacher", "nonn", "node"),
    "all_cores": (
        "teacher on all cores of that board",
        "teacher_all_cores",
        "nonn",
        "node_computing",
    ),
    "all_devices": (
        "all students together, teacher on the board that holds it",
        "teacher",
        "nonn",
        "total_computing",
    ),
    "all_devices_all_cores": (
        "all students together, teacher on all cores of that board",
        "teacher_all_cores",
        "nonn",
        "total_computing",
    ),
    "int8": ("int8 teacher on the board that holds it", "teacher_int8", "nonn", "node_computing"),
    "same_board": ("students, too, on the teacher's board", "teacher", "nonn_teacher_board", "node_computing"),
    "int8_as_if": (
        "int8 teacher on the students' board, as if it fitted",
        "teacher_int8_own_board",
        "nonn",
        "node_computing",
    ),
    "as_if": ("teacher on the students' board, as if it fitted", "teacher_own_board", "nonn", "node_computing"),
}
#: Ratios of total latency, composed: what is assumed, the split, and the scenario. The first is like the one claimed.
LATENCIES = {
    "channels": ("split by channels, each device with a camera of its own", "channels", "sensor"),
    "channels_multicast": ("the same, each map sent once to all devices", "channels_multicast", "sensor"),
    "channels_broadcast": ("split by channels, the image sent to each device", "channels", "broadcast"),
    "rows": ("split by rows, each device with a camera of its own", "rows", "sensor"),
    "rows_broadcast": ("split by rows, the image sent to each device", "rows", "broadcast"),
}
#: What each ratio is against.
BASELINES = {
    **dict.fromkeys(("memory", "performance", "energy_per_node"), "teacher"),
    "total_latency": "split by channels",
    "total_latency_rows": "split by rows",
}
RATIO_LABELS = {
    "memory": "Memory of a device",
    "performance": "Time of a device",
    "energy_per_node": "Energy of a device",
    "total_latency": "Total latency, against a split by channels",
    "total_latency_rows": "Total latency, against a split by rows",
}


def join_rows(results: Mapping[str, Mapping], n_devices: Mapping[str, int]) -> pd.DataFrame:
    """All rows of the stage `distributed`, as `COLUMNS`; where a cell does not apply it is missing.

    Parameters
    ----------
    results : mapping
        Name of a network, or ``solo``, to what the stage wrote.
    n_devices : mapping
        Of each network.
    """
    rows = []
    for name, result in results.items():
        about = {"network": "" if name == SOLO else name, "n_devices": n_devices.get(name, 1)}
        for row in result["live"]:
            if row["images"]:  # else one image would have taken too long: the composed row stands alone
                badge = "emulated" if row["emulated"] else "measured"
                rows.append(about | {"badge": badge, "total_ms": row["p50_ms"]} | row)
        for row in result["composed"]:
            energies = [key for key in row if key.endswith("_mj")]
            bounds = {f"{key}_{end}": row[key][i] for key in energies for i, end in enumerate(("low", "high"))}
            boards = " + ".join(dict.fromkeys(row.get("boards", ())))
            rows.append(about | row | bounds | {"badge": "modelled", "boards": boards})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def compare_splits(rows: pd.DataFrame) -> pd.DataFrame:
    """How many times longer an image takes on a split network than on NoNN with the same devices and link.

    Returns
    -------
    DataFrame
        ``network``, ``n_devices``, ``link``, ``scenario``, ``badge``, ``images`` (the fewer of the two),
        ``method`` of the split, ``nonn_ms``, ``split_ms`` and ``ratio``.
    """
    keys = ["network", "n_devices", "link", "scenario", "badge"]
    columns = [*keys, "method", "images", "total_ms"]
    nonn = rows.loc[rows["method"] == "nonn", columns].rename(columns={"total_ms": "nonn_ms", "images": "nonn_images"})
    splits = {method for _, method, _ in LATENCIES.values()}
    split = rows.loc[rows["method"].isin(splits), columns].rename(columns={"total_ms": "split_ms"})
    both = split.merge(nonn.drop(columns="method"), on=keys)
    both["images"] = both[["images", "nonn_images"]].min(axis=1)
    both["ratio"] = both["split_ms"] / both["nonn_ms"]
    return both.drop(columns="nonn_images")


def collect_ratios(rows: pd.DataFrame, comparisons: list[dict]) -> dict[str, Any]:
    """The paper's four ratios, each the largest over the networks and links, as the paper's "up to".

    Parameters
    ----------
    rows : DataFrame
        From `join_rows`.
    comparisons : list of dict
        From `nonn.report.method_table.compare_network`: memory and latency of one device against the teacher's.

    Returns
    -------
    dict
        ``memory``, ``performance``, ``energy_per_node`` and ``total_latency``: each ``ratio`` with the ends
        ``ratio_low`` and ``ratio_high`` of its interval (None for all but performance), the ``baseline`` that it is
        against, ``link`` and ``scenario`` (None where none takes part), ``n`` devices, ``network``, ``images`` timed,
        and ``badge``. Energy is the first of `collect_energies`; ``energies`` holds those of the same network, link
        and scenario by assumption, ``latencies`` what `collect_latencies` says of the network and link of the total
        latency. Total latency is against the split by channels; ``total_latency_rows`` is the same
        against the split by rows, of the same network on the same link, and ``paper`` holds the paper's ratios.
    """
    candidates = list_ratios(rows, comparisons)
    ratios: dict[str, Any] = {}
    for name, baseline in BASELINES.items():
        own = candidates[candidates["claim"] == name]
        if name == "total_latency_rows" and (chosen := ratios.get("total_latency")):
            same = ["network", "link", "scenario"]
            own = own[(own[same] == [chosen[key] for key in same]).all(axis=1)]
        ratios[name] = None if own.empty else _ratio(own.loc[own["ratio"].idxmax()], baseline)
    if chosen := ratios["total_latency"]:
        ratios["latencies"] = collect_latencies(rows, chosen["network"], chosen["link"])
    if chosen := ratios["energy_per_node"]:
        ratios["energies"] = collect_energies(rows, chosen["network"], chosen["link"], chosen["scenario"])
    return ratios | {"paper": {name: {"ratio": ratio, "badge": "cited"} for name, ratio in PAPER.items()}}


def list_ratios(rows: pd.DataFrame, comparisons: list[dict]) -> pd.DataFrame:
    """The ratios among which `collect_ratios` takes the largest: one a ``claim``, network and link."""
    sizes = rows.groupby("network")["n_devices"].first()
    counted = [
        {"claim": name, "network": c["network"], "n_devices": sizes[c["network"]], "badge": badge}
        | {key: c.get(f"{name}_{key}") for key in ("ratio", "ratio_low", "ratio_high")}
        for name, badge in (("memory", "modelled"), ("performance", "measured"))
        for c in comparisons
    ]
    both = _compare_energies(rows, *ENERGIES["holds"][1:])
    live = compare_splits(rows).query("badge != 'modelled'")
    claims = {"channels": "total_latency", "rows": "total_latency_rows"}
    live = live.assign(claim=live["method"].map(claims))
    tables = [table for table in (both.assign(claim="energy_per_node"), live) if not table.empty]
    listed = [*counted, *(row for table in tables for row in table.to_dict("records"))]
    columns = ["claim", "network", "n_devices", "link", "scenario", "badge", "images", "ratio", "ratio_low"]
    table = pd.DataFrame(listed, columns=[*columns, "ratio_high"])
    return table.astype({"ratio": float, "ratio_low": float, "ratio_high": float})


def _compare_energies(rows: pd.DataFrame, teacher: str, nonn: str, column: str) -> pd.DataFrame:
    """Energy of a teacher over that of a network, its neediest device or all, on every link: middles of their ranges.

    With ``ratio_low`` and ``ratio_high``, where one has the lower bound of its range and the other the upper; on the
    same board both have the same, since the power of a board is not at both ends of its range.
    """
    modelled = rows.loc[rows["badge"] == "modelled"].drop(columns="images")
    own, other = modelled[modelled["method"] == nonn], modelled[modelled["method"] == teacher]
    both = own.merge(other, on=["link", "scenario"], suffixes=("", "_teacher"))
    low, high = (both[f"energy_{column}_mj_{end}"] for end in ("low", "high"))
    teacher_low, teacher_high = (both[f"energy_{column}_mj_{end}_teacher"] for end in ("low", "high"))
    ratios = {"ratio": (teacher_low + teacher_high) / (low + high)}
    ends = pd.DataFrame({"low": teacher_low / low, "high": teacher_high / high})
    is_same = both["boards"] == both["boards_teacher"]
    ratios["ratio_low"] = ends.min(axis=1).where(is_same, teacher_low / high)
    ratios["ratio_high"] = ends.max(axis=1).where(is_same, teacher_high / low)
    return both.assign(**ratios).dropna(subset=["ratio"])


def collect_energies(rows: pd.DataFrame, network: str, link: str, scenario: str) -> dict[str, dict[str, Any]]:
    """How many times more energy the teacher takes than a network, by what is assumed: `ENERGIES`.

    Each has ``ratio``, ``ratio_low``, ``ratio_high``, ``teacher_board`` and ``boards`` of the students. All that a
    board draws while it computes is counted, and the radio. `nonn.testbed.placing` says which boards these are. What
    was not composed is left out.
    """
    found = {}
    for name, (_, teacher, nonn, column) in ENERGIES.items():
        both = _compare_energies(rows, teacher, nonn, column)
        here = both[(both["network"] == network) & (both["link"] == link) & (both["scenario"] == scenario)]
        for row in here.to_dict("records"):
            ratios = {key: round(row[key], 4) for key in ("ratio", "ratio_low", "ratio_high")}
            found[name] = ratios | {"teacher_board": row["boards_teacher"], "boards": row["boards"]}
    return found


def collect_latencies(rows: pd.DataFrame, network: str, link: str) -> dict[str, dict[str, Any]]:
    """How many times longer an image takes on a split network than on NoNN, composed, by what is assumed: `LATENCIES`.

    Each has ``ratio``, and ``memory_kib``, what a device of the split needs at least: intermediate activations are not
    counted. Any ratio is with NoNN in the same scenario. What was not composed is left out.
    """
    own = rows[(rows["network"] == network) & (rows["link"] == link) & (rows["badge"] == "modelled")]
    both = compare_splits(own).set_index(["method", "scenario"])["ratio"]
    memory = own.drop_duplicates("method").set_index("method")["memory_bytes"]
    return {
        name: {"ratio": round(both[method, scenario], 4), "memory_kib": round(memory[method] / 1024, 1)}
        for name, (_, method, scenario) in LATENCIES.items()
        if (method, scenario) in both.index
    }


def claim_ratios(rows: pd.DataFrame, network: str) -> dict[str, Any]:
    """The ratios of one network that ``claims.json`` adds to those of `nonn.report.method_table.compare_network`.

    Returns
    -------
    dict
        ``total_latency_ratio``, against the split by channels, the largest over the links on which both were timed,
        with ``total_latency_link`` and ``total_latency_scenario``; ``total_latency_rows_ratio``, against the split by
        rows on that link; ``total_latency_ratios``, composed, by what is assumed: `collect_latencies`;
        ``energy_ratio``, the first of `collect_energies`, with the ends of its range, there or else on the first link,
        and ``energy_ratios`` by what is assumed. None where there is none.
    """
    keys = ["total_latency_ratio", "total_latency_link", "total_latency_scenario", "total_latency_rows_ratio"]
    keys += ["energy_ratio", "energy_ratio_low", "energy_ratio_high"]
    claims: dict[str, Any] = dict.fromkeys(keys) | {"energy_ratios": {}}
    own = rows[(rows["network"] == network) | (rows["network"] == "")]
    timed = compare_splits(own).query("badge != 'modelled'")
    link, scenario = own.loc[own["badge"] == "modelled", ["link", "scenario"]].iloc[0]
    channels = timed[timed["method"] == "channels"]
    if not channels.empty:
        best = channels.loc[channels["ratio"].idxmax()]
        link, scenario = best["link"], best["scenario"]
        claims |= {"total_latency_ratio": round(best["ratio"], 4)}
        claims |= {"total_latency_link": link, "total_latency_scenario": scenario}
        by_rows = timed[(timed["method"] == "rows") & (timed["link"] == link) & (timed["scenario"] == scenario)]
        claims["total_latency_rows_ratio"] = None if by_rows.empty else round(by_rows["ratio"].iloc[0], 4)
    energies = collect_energies(own, network, link, scenario)
    if first := energies.get("holds"):
        claims |= {f"energy_{key}": first[key] for key in ("ratio", "ratio_low", "ratio_high")}
    claims["total_latency_ratios"] = {name: e["ratio"] for name, e in collect_latencies(own, network, link).items()}
    return claims | {"energy_ratios": {name: entry["ratio"] for name, entry in energies.items()}}


def _ratio(best: pd.Series, baseline: str) -> dict[str, Any]:
    known = best.astype(object).where(best.notna(), None)
    entry = {key: known[key] for key in ("network", "link", "scenario", "badge")}
    entry |= {key: None if known[key] is None else round(known[key], 4) for key in ("ratio", "ratio_low", "ratio_high")}
    images = None if known["images"] is None else int(known["images"])
    return entry | {"baseline": baseline, "n": int(known["n_devices"]), "images": images}


def format_ratios(ratios: Mapping[str, Any]) -> pd.DataFrame:
    """The paper's ratios for readers, beside what the paper says."""
    lines = [
        {
            "": label,
            "NoNN": format_interval(entry, "ratio"),
            **{key.capitalize(): str(entry[key] or "–") for key in ("network", "link", "images", "badge")},
            "Paper": f"{PAPER[name]:.0f}×" if name in PAPER else "–",
        }
        for name, label in RATIO_LABELS.items()
        if (entry := ratios[name])
    ]
    return pd.DataFrame(lines)


def format_energies(ratios: Mapping[str, Any]) -> pd.DataFrame:
    """The ratio of energy by what is assumed, for readers."""
    lines = [
        {
            "Assumed": ENERGIES[name][0],
            "Teacher on": entry["teacher_board"],
            "Students on": entry["boards"],
            "Ratio": format_interval(entry, "ratio"),
        }
        for name, entry in ratios.get("energies", {}).items()
    ]
    return pd.DataFrame(lines, columns=["Assumed", "Teacher on", "Students on", "Ratio"])


def format_splits(ratios: Mapping[str, Any], budgets: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """The ratio of total latency by what is assumed, and the memory that the split would need, for readers.

    `budgets` are the memories, in KiB, that the devices of each network have.
    """
    lines = []
    for name, entry in ratios.get("latencies", {}).items():
        least = min(budgets[ratios["total_latency"]["network"]])
        memory = f"{entry['memory_kib']:,.0f} of {least:,.0f}"
        lines.append({"Assumed": LATENCIES[name][0], "Memory (KiB)": memory, "Ratio": f"{entry['ratio']:.1f}×"})
    return pd.DataFrame(lines, columns=["Assumed", "Memory (KiB)", "Ratio"])


def format_latencies(rows: pd.DataFrame) -> pd.DataFrame:
    """Latencies of every network on every link for readers, timed and composed; a dash where there is none.

    Beside each latency stands how many times longer a split by channels and by rows takes.
    """
    keys = ["network", "link"]
    rows = rows[rows["scenario"] == "sensor"]
    nonn = rows[rows["method"] == "nonn"].set_index(keys)
    splits = compare_splits(rows).set_index(keys)
    columns = [nonn.index.to_frame().set_axis(["Network", "Link"], axis=1).drop_duplicates()]
    for is_modelled in (False, True):
        own, split = (table[(table["badge"] == "modelled") == is_modelled] for table in (nonn, splits))
        total = own["total_ms"].map("{:.1f}".format)
        if is_modelled:
            columns.append(total.rename("NoNN, composed (ms)"))
        else:
            columns.append(own["images"].map("{:.0f}".format).rename("Images"))
            columns.append((total + own["p99_ms"].map(" ({:.1f})".format)).rename("NoNN (ms)"))
            columns.append(own["overhead_ms"].map("{:.1f}".format, na_action="ignore").rename("Overhead (ms)"))
        for method in ("channels", "rows"):
            name = f"By {method}{', composed' if is_modelled else ''}"
            columns.append(split.loc[split["method"] == method, "ratio"].map("{:.1f}×".format).rename(name))
    return pd.concat(columns, axis=1).astype(object).fillna("–")
