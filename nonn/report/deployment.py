"""Tables of the devices at work: rows of the stage `distributed` joined, and the paper's four ratios.

Nothing is measured here. Every row and ratio carries a badge:

measured
    Timed on this machine, nothing in between.
emulated
    Timed on this machine, over a link that a relay slows down.
modelled
    Calculated: counted bytes and multiply-accumulates, times stated constants.
cited
    The paper's own number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

#: Columns of ``distributed.csv``.
COLUMNS = {
    "network": "{}",
    "method": "{}",
    "n_devices": "{:d}",
    "link": "{}",
    "scenario": "{}",
    "badge": "{}",
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
    "energy_node_mj_low": "{:.5f}",
    "energy_node_mj_high": "{:.5f}",
    "energy_total_mj_low": "{:.5f}",
    "energy_total_mj_high": "{:.5f}",
    "energy_node_with_idle_mj_low": "{:.5f}",
    "energy_node_with_idle_mj_high": "{:.5f}",
    "energy_total_with_idle_mj_low": "{:.5f}",
    "energy_total_with_idle_mj_high": "{:.5f}",
    "overhead_ms": "{:.3f}",
    "ideal_over_total": "{:.3f}",
}
#: What the paper's abstract claims, each "up to".
PAPER = {"memory": 24.0, "performance": 12.0, "energy_per_node": 14.0, "total_latency": 33.0}


def join_rows(results: Mapping[str, Mapping], n_devices: Mapping[str, int]) -> pd.DataFrame:
    """All rows of the stage `distributed`, as `COLUMNS`; where a cell does not apply it is missing.

    Parameters
    ----------
    results : mapping
        Name of a network, or ``solo``, to what the stage wrote.
    n_devices : mapping
        Name to the number of devices.
    """
    rows = []
    for name, result in results.items():
        about = {"network": "" if name == "solo" else name, "n_devices": n_devices.get(name, 1)}
        for row in result["live"]:
            if not row["images"]:  # one image would have taken too long: the composed row stands alone
                continue
            badge = "emulated" if row["emulated"] else "measured"
            rows.append(about | {"badge": badge, "total_ms": row["p50_ms"]} | row)
        for row in result["composed"]:
            energies = {
                f"{key}_{end}": value
                for key in row
                if key.endswith("_mj")
                for end, value in zip(("low", "high"), row[key], strict=True)
            }
            rows.append(about | row | energies | {"badge": "modelled"})
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS))


def write_csv(rows: pd.DataFrame) -> str:
    text = {
        name: [None if pd.isna(value) else form.format(value) for value in rows[name]] for name, form in COLUMNS.items()
    }
    return pd.DataFrame(text).to_csv(index=False, lineterminator="\n")


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
    split = rows.loc[rows["method"].isin(["channels", "rows"]), columns].rename(columns={"total_ms": "split_ms"})
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
        From `nonn.report.methods.compare_network`: memory and latency of one device against the teacher's.

    Returns
    -------
    dict
        ``memory``, ``performance``, ``energy_per_node`` and ``total_latency``: each ``ratio``, the
        ``baseline`` that it is against, ``link`` and ``scenario`` (None where none takes part), ``n``
        devices, ``network``, ``images`` timed, and ``badge``. Total latency is against the split by
        channels; ``total_latency_rows`` is the same against the split by rows, of the same network on
        the same link, and ``paper`` holds the paper's ratios.
    """
    sizes = rows.groupby("network")["n_devices"].first()
    ratios: dict[str, Any] = {}
    for name, key, badge in (("memory", "memory_ratio", "modelled"), ("performance", "performance_ratio", "measured")):
        best = max(comparisons, key=lambda comparison, key=key: comparison[key])
        ratios[name] = _ratio(best[key], "teacher", best["network"], int(sizes[best["network"]]), badge)
    ratios["energy_per_node"] = _energy_ratio(rows)
    splits = compare_splits(rows)
    live = splits[splits["badge"] != "modelled"]
    for name, method in (("total_latency", "channels"), ("total_latency_rows", "rows")):
        candidates = live[live["method"] == method]
        if name == "total_latency_rows" and ratios["total_latency"]:
            chosen = ratios["total_latency"]
            same = ["network", "link", "scenario"]
            candidates = candidates[(candidates[same] == [chosen[key] for key in same]).all(axis=1)]
        if candidates.empty:
            ratios[name] = None
            continue
        best = candidates.loc[candidates["ratio"].idxmax()]
        ratios[name] = _ratio(best["ratio"], f"split by {method}", best["network"], best["n_devices"], best["badge"])
        ratios[name] |= {"link": best["link"], "scenario": best["scenario"], "images": int(best["images"])}
    ratios["paper"] = {name: {"ratio": ratio, "badge": "cited"} for name, ratio in PAPER.items()}
    return ratios


def _ratio(ratio: float, baseline: str, network: str, n_devices: int, badge: str) -> dict[str, Any]:
    entry = {"ratio": round(float(ratio), 4), "baseline": baseline, "network": network, "n": int(n_devices)}
    return entry | {"link": None, "scenario": None, "images": None, "badge": badge}


def _energy_ratio(rows: pd.DataFrame) -> dict[str, Any]:
    """Energy of the teacher on one device over that of NoNN's neediest device; upper bounds, without idle draw."""
    modelled = rows[rows["badge"] == "modelled"]
    keys = ["link", "scenario"]
    teacher = modelled[modelled["method"] == "teacher"].set_index(keys)["energy_node_mj_high"]
    nonn = modelled[modelled["method"] == "nonn"]
    ratio = nonn.join(teacher.rename("teacher"), on=keys).eval("teacher / energy_node_mj_high")
    best = nonn.loc[ratio.idxmax()]
    entry = _ratio(ratio.max(), "teacher", best["network"], best["n_devices"], "modelled")
    return entry | {"link": best["link"], "scenario": best["scenario"]}


RATIO_LABELS = {
    "memory": "Memory of a device",
    "performance": "Time of a device",
    "energy_per_node": "Energy of a device",
    "total_latency": "Total latency, against a split by channels",
    "total_latency_rows": "Total latency, against a split by rows",
}
RATIO_NOTE = (
    'Each is the best over networks and links, as the paper\'s "up to"; the rows below show all. The paper splits by '
    "channels; splitting by rows is the better baseline, and stands beside it on the same link. *Images*: timed of the "
    "two that are compared, whichever has fewer. *Measured*: timed on this machine; *emulated*: over a link that a "
    "relay slows down; *modelled*: calculated from counted bytes and multiply-accumulates with published constants; "
    "*cited*: the paper's."
)
LATENCY_NOTE = (
    "From the image to its class: median of all devices at once as processes over an emulated link, each with a "
    "sensor of its own (*n* images of NoNN; in parentheses p99), and how much of it exceeds the slowest node's own "
    "inference and a round trip of plain TCP messages of the same sizes (*overhead*); then composed of each device's "
    "own computing and of the counted bytes as on {board}. *a* and *b*: how many times longer one network of the same "
    "total size takes, split over the devices by channels and by rows, of fewer images where it is slow (at least two: "
    "`distributed.csv`). Dashes: not timed, since one image would take longer than {longest:g} s on the link, or not "
    "composed."
)


def describe_deployment(rows: pd.DataFrame, ratios: Mapping[str, Any], board: str, longest: float) -> list[str]:
    """Lines of the report: the paper's ratios, and latencies of every network on every link."""
    lines = [
        "## On devices",
        "",
        "| | NoNN | Network | Link | Images | Badge | Paper |",
        "| :-- | --: | :-- | :-- | --: | :-- | --: |",
    ]
    for name, label in RATIO_LABELS.items():
        if not (entry := ratios[name]):
            continue
        paper = f"{PAPER[name]:.0f}×" if name in PAPER else "–"
        about = [entry["network"], entry["link"] or "–", str(entry["images"] or "–"), entry["badge"]]
        lines.append("| " + " | ".join([label, f"{entry['ratio']:.1f}×", *about, paper]) + " |")
    lines += ["", RATIO_NOTE, ""]
    lines += ["| Network | Link | n | NoNN (ms) | Overhead (ms) | a | b | NoNN, composed (ms) | a | b |"]
    lines += ["| :-- | :-- |" + " --: |" * 8]
    splits, nonn = compare_splits(rows), rows[(rows["method"] == "nonn") & (rows["scenario"] == "sensor")]
    for (network, link), group in nonn.groupby(["network", "link"], sort=False):
        cells = [network, link]
        for is_modelled in (False, True):
            own = group[(group["badge"] == "modelled") == is_modelled]
            total = "–"
            if not own.empty:
                row = own.iloc[0]
                total = f"{row['total_ms']:.1f}" + ("" if is_modelled else f" ({row['p99_ms']:.1f})")
            if not is_modelled:
                cells.append("–" if own.empty else f"{own.iloc[0]['images']:.0f}")
            cells.append(total)
            if not is_modelled:
                overhead = own["overhead_ms"].dropna()
                cells.append("–" if overhead.empty else f"{overhead.iloc[0]:.1f}")
            here = splits.query("network == @network and link == @link and scenario == 'sensor'")
            here = here[(here["badge"] == "modelled") == is_modelled].set_index("method")["ratio"]
            cells += [f"{here[method]:.1f}×" if method in here else "–" for method in ("channels", "rows")]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", LATENCY_NOTE.format(board=board.replace("_", "-"), longest=longest), ""]
