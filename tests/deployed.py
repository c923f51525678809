"""Rows of the stage `distributed` by hand: of a network that is split, of one that is not, and of the teacher."""

import pandas as pd

from nonn.report.deployment_table import join_rows

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
#: The second network as a third one too, of eight devices.
RESULTS["8s"] = {
    "live": [row | {"p50_ms": row.get("p50_ms", 0) + 1} for row in TWO["live"]],
    "composed": [row | {"n_devices": 8} for row in TWO["composed"]],
}
COMPARISONS = [
    {
        **{"network": "2s", "memory_ratio": 10.0, "performance_ratio": 4.0},
        **{"performance_ratio_low": 3.5, "performance_ratio_high": 4.5},
    },
    {"network": "4s", "memory_ratio": 30.0, "performance_ratio": 3.0},
]


def join(*names: str) -> pd.DataFrame:
    return join_rows({name: RESULTS[name] for name in names}, {"2s": 2, "4s": 4})
