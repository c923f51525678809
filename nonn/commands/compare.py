"""The command ``nonn compare``: are the results the committed ones, byte for byte?

DVC records a hash of every output in ``dvc.lock``, which is in git. What is trained or calculated is compared with the
hashes of the last commit. Times are measured, and differ from run to run on any machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from nonn.commands.git import content_at
from nonn.core.errors import UserError
from nonn.core.files import existing, intact, read_json
from nonn.core.params import load_params
from nonn.core.paths import DVC_LOCK, TIMED, Paths

#: Stages whose outputs hold measured times; those of the last one are summaries of all.
MEASURED = (*TIMED, "figures")
WHY = {
    "portable": "numerics: portable promises the same bytes with the same code, parameters, versions of the packages, "
    "and an x86-64 processor with AVX2.",
    "fast": "numerics: fast promises the same bytes only on the same type of processor.",
}


def hashes(text: str, name: str, folder: Path) -> dict[str, str]:
    """MD5 by path of the outputs in a folder of all stages but `MEASURED`, from the text of a dvc.lock."""
    try:
        stages = (YAML(typ="safe").load(text) or {}).get("stages") or {}
        return {
            out["path"]: out["md5"]
            for stage, entry in stages.items()
            for out in entry.get("outs", [])
            if stage.partition("@")[0] not in MEASURED and folder in Path(out["path"]).parents
        }
    except (YAMLError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{name}: is not what DVC writes, as a merge in conflict leaves it. Restore it, for example by "
            "`git checkout HEAD dvc.lock`, or run `dvc repro`."
        ) from None


def largest_difference(old: dict[str, Any], new: dict[str, Any]) -> float:
    """Largest difference of the accuracies that both have, in percentage points."""
    shared = [key for key in old.keys() & new.keys() if key.endswith("accuracy")]
    keys = [key for key in shared if old[key] is not None and new[key] is not None]  # there may be no best baseline
    return max((100 * abs(old[key] - new[key]) for key in keys), default=0.0)


def compare(root: Path, numerics: str) -> list[str]:
    """Lines that compare the results in a folder with the committed ones."""
    old = hashes(content_at("HEAD", DVC_LOCK) or "", "the committed dvc.lock", root)
    with intact(DVC_LOCK):
        now = existing(DVC_LOCK).read_text(encoding="utf-8")
    new = hashes(now, str(DVC_LOCK), root)
    if not new:
        raise UserError(f"dvc.lock: lists no results in {root}. Run `snakemake --cores all` or `dvc repro` first.")
    if absent := [path for path in new if not Path(path).exists()]:
        raise UserError(
            f"{absent[0]}: is not here; {len(absent)} of {len(new)} outputs are missing. Run `snakemake --cores all`, "
            "`dvc repro` or `dvc checkout` first."
        )
    if not old:
        return [f"{root}: no results are committed, so there is nothing to compare with."]
    shared = old.keys() & new.keys()
    different = sorted(path for path in shared if old[path] != new[path])
    others = f"; {len(old.keys() ^ new.keys())} are only in one of the two" if old.keys() != new.keys() else ""
    lines = [f"{root}: {len(shared) - len(different)} of {len(shared)} outputs have the committed bytes{others}."]
    if different:
        lines += [f"  other bytes: {path}" for path in different[:5]]
        lines += [f"  … and {len(different) - 5} more"] * (len(different) > 5)
        metrics = root / "metrics.json"
        if (before := content_at("HEAD", metrics)) and metrics.is_file():
            points = largest_difference(json.loads(before), read_json(metrics))
            lines.append(f"Accuracies differ from the committed ones by at most {points:.2f} points.")
        lines.append(WHY[numerics])
    lines.append("Latencies are not compared: they are measured, and differ from run to run.")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: nonn compare"


def run(_: argparse.Namespace) -> None:
    params = load_params()
    print("\n".join(compare(Paths(params.experiment).root, params.numerics)))
