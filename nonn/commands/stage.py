"""The commands of the stages: run one by hand, on one item of ``params.yaml``, and note when it ran.

What only the stage imports is not imported before it runs, so that its help is instant.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nonn.core.errors import UserError
from nonn.core.files import STATE, named
from nonn.core.jobs import check_jobs
from nonn.core.numerics import set_numerics
from nonn.core.options import add_settings, complete_from, refuse_settings
from nonn.core.params import PARAMS_FILE, SOLO, Params, load_params
from nonn.core.paths import Paths, remove_leftovers
from nonn.core.progress import log
from nonn.core.yaml_text import read_yaml

#: Long stages before `design`: they check budgets before they begin, so that `design` need not refuse them later.
BEFORE_DESIGN = ("dataset", "teacher", "signals", "graph")
#: The file that declares the parameters of each stage.
DVC_FILE = Path("dvc.yaml")
#: When each stage ran: one line of JSON per run; jobs of `nonn.commands.job` have lines of their own.
JOURNAL = STATE / "journal.jsonl"


def _networks(params: Params) -> dict[str, dict]:
    return {network: {"network": network} for network in params.networks}


def _networks_and_solo(params: Params) -> dict[str, dict]:
    return {name: {"name": name} for name in [*params.networks, SOLO]}


def _students(params: Params) -> dict[str, dict]:
    students = [(name, i) for name, network in params.networks.items() for i in range(len(network.devices))]
    return {f"{network}/{i}": {"network": network, "student": i} for network, i in students}


def _baselines(params: Params) -> dict[str, dict]:
    return {f"{n}/{method}": {"network": n, "method": method} for n, method, _ in params.baselines()}


class Items(NamedTuple):
    """The items that a stage is run on."""

    kind: str
    example: str
    list_all: Callable[[Params], dict[str, dict]]  # all items, each with the keyword arguments that it stands for
    is_seeded: bool = False  # whether it also takes a seed


#: Items of the stages that take one.
ITEMS = {
    **dict.fromkeys(("design", "partition"), Items("NETWORK", "2s", _networks)),
    "assemble": Items("NETWORK", "2s", _networks, is_seeded=True),
    "distill": Items("NETWORK/STUDENT", "2s/0", _students, is_seeded=True),
    "baseline": Items("NETWORK/METHOD", "2s/kd", _baselines, is_seeded=True),
    **dict.fromkeys(("export", "benchmark", "distributed"), Items("NETWORK or solo", "2s", _networks_and_solo)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stage = parser.get_default("command")
    parser.set_defaults(item=None, seed=None)
    example = f"nonn {stage}"
    if items := ITEMS.get(stage):
        complete_from(
            parser.add_argument("item", metavar=items.kind, help="by the names in params.yaml"),
            lambda: items.list_all(load_params()),
        )
        example += f" {items.example}"
        if items.is_seeded:
            parser.add_argument(
                "--seed", type=int, required=True, help="seed of this training, from 0 on; params.yaml has their number"
            )
            example += " --seed 0"
    add_settings(parser, argparse.SUPPRESS)
    parser.epilog = f"example: {example}"


def run(options: argparse.Namespace) -> None:
    """Run one stage on one item, and note in the journal when it ran."""
    stage, item, seed = options.command, options.item, options.seed
    refuse_settings(options, "a stage writes the results of params.yaml, by which DVC knows them")
    params, written = load_params(), read_params()
    paths = Paths(params.experiment)
    arguments = parse_item(stage, item, params) | parse_seed(item, seed, params)
    check_jobs(params)
    remove_leftovers(params, paths)
    set_numerics(params.numerics)
    if stage in BEFORE_DESIGN:
        from nonn.method.feasibility import check_budgets

        for line in check_budgets(params, paths):
            log(f"params.yaml: {line}")
    JOURNAL.parent.mkdir(exist_ok=True)  # an obstacle is reported before the work
    module = importlib.import_module(f"nonn.stages.{stage}")
    start = time.time()
    module.run(params, paths, **arguments)
    refuse_changed(stage, written)
    note(
        {
            "experiment": params.experiment,
            "stage": stage,
            "item": item,
            "seed": seed,
            "start": start,
            "end": time.time(),
        }
    )


def read_params() -> Any:
    """Content of ``params.yaml``, valid or not."""
    return read_yaml(PARAMS_FILE, "Restore it.")


def refuse_changed(stage: str, before: Mapping[str, Any]) -> None:
    """Raise UserError if parameters of a stage have changed: DVC would record the new ones for its outputs."""
    if not DVC_FILE.is_file():
        return
    entry, after = read_yaml(DVC_FILE, "Restore it.")["stages"].get(stage, {}), read_params()
    declared = [key for key in entry.get("do", entry).get("params", []) if isinstance(key, str)]
    for section in dict.fromkeys(["experiment", *(key.partition(".")[0] for key in declared)]):
        if after.get(section) != before.get(section):
            raise UserError(
                f"{PARAMS_FILE}: {section}: has changed while {stage} ran, so what it wrote counts for nothing. Run it "
                "again."
            )


def note(entry: dict[str, Any]) -> None:
    """Append a line to the journal."""
    JOURNAL.parent.mkdir(exist_ok=True)
    is_cut_off = JOURNAL.exists() and not JOURNAL.read_bytes().endswith(b"\n")  # after a crash
    with named(JOURNAL), JOURNAL.open("a") as journal:
        journal.write("\n" * is_cut_off + json.dumps(entry) + "\n")


def parse_item(stage: str, item: str | None, params: Params) -> dict:
    """Keyword arguments of a stage's `run` from an item such as ``2s/0``."""
    if item is None:
        return {}
    items = ITEMS[stage].list_all(params)
    if item not in items:
        raise UserError(f"params.yaml: {item!r} is not there; {stage} takes one of {', '.join(items)}.")
    return items[item]


def parse_seed(item: str | None, seed: int | None, params: Params) -> dict:
    """Keyword argument of a stage's `run` from a seed, for stages that take one.

    A seed that the parameters do not name is refused, since its outputs would belong to no job and be removed.
    """
    if seed is None or item is None:
        return {}
    network, _, part = item.partition("/")
    section, key = params.networks[network], f"networks.{network}.seeds"
    count = section.seeds
    if part in section.baselines:
        key, count = f"networks.{network}.baselines.{part}", section.baselines[part]
    if not 0 <= seed < count:
        raise UserError(
            f"params.yaml: {key}: asks for {count} trainings, seeds 0 to {count - 1}, not {seed}; raise it."
        )
    return {"seed": seed}
