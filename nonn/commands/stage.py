"""The commands of the stages: run one by hand, on one item of ``params.yaml``, and note when it ran.

What only the stage imports is not imported before it runs, so that its help is instant.
"""

from __future__ import annotations

import importlib
import json
import time

from nonn.core.errors import UserError
from nonn.core.files import STATE, sweep
from nonn.core.jobs import check_jobs
from nonn.core.params import load_params
from nonn.core.paths import Paths, remove_leftovers

#: When each stage ran, one line of JSON for each time.
JOURNAL = STATE / "journal.jsonl"
#: Kind of item that a stage takes, an example, and whether it takes a seed; other stages take neither.
ITEMS = {
    **dict.fromkeys(("design", "partition"), ("NETWORK", "2s", False)),
    "assemble": ("NETWORK", "2s", True),
    "distill": ("NETWORK/STUDENT", "2s/0", True),
    "baseline": ("NETWORK/METHOD", "2s/kd", True),
    **dict.fromkeys(("export", "benchmark", "distributed"), ("NETWORK or solo", "2s", False)),
}


def add_arguments(parser) -> None:
    stage = parser.get_default("command")
    parser.set_defaults(item=None, seed=None)
    kind, item, is_seeded = ITEMS.get(stage, (None, "", False))
    if kind:
        parser.add_argument("item", metavar=kind, help="as named in params.yaml")
    if is_seeded:
        parser.add_argument("--seed", type=int, required=True, help="one of those in params.yaml")
    parser.epilog = f"example: nonn {stage} {item}{' --seed 0' * is_seeded}"


def run(options) -> None:
    """Run one stage on one item, and note in the journal when it ran."""
    stage, item, seed = options.command, options.item, options.seed
    params = load_params()
    paths = Paths(params.experiment)
    arguments = parse_item(stage, item, params) | parse_seed(item, seed, params)
    check_jobs(params)
    sweep(paths.root, STATE / "checkpoints")
    remove_leftovers(params, paths)
    start = time.time()
    importlib.import_module(f"nonn.stages.{stage}").run(params, paths, **arguments)
    entry = {"experiment": params.experiment, "stage": stage, "item": item, "seed": seed}
    entry |= {"start": start, "end": time.time()}
    JOURNAL.parent.mkdir(exist_ok=True)
    is_cut_off = JOURNAL.exists() and not JOURNAL.read_bytes().endswith(b"\n")  # by a crash
    with JOURNAL.open("a") as journal:
        journal.write("\n" * is_cut_off + json.dumps(entry) + "\n")


def parse_item(stage: str, item: str | None, params) -> dict:
    """Keyword arguments of a stage's `run` from an item such as ``2s/0``."""
    if item is None:
        return {}
    if stage in ("design", "partition", "assemble"):
        known = {network: {"network": network} for network in params.networks}
    elif stage in ("export", "benchmark", "distributed"):
        known = {name: {"name": name} for name in [*params.networks, "solo"]}
    elif stage == "distill":
        students = [(name, i) for name, network in params.networks.items() for i in range(len(network.devices))]
        known = {f"{network}/{i}": {"network": network, "student": i} for network, i in students}
    else:
        known = {f"{n}/{method}": {"network": n, "method": method} for n, method, _ in params.baselines()}
    if item not in known:
        raise UserError(f"params.yaml: {item!r} is not there; {stage} takes one of {', '.join(known)}.")
    return known[item]


def parse_seed(item: str | None, seed: int | None, params) -> dict:
    """Keyword argument of a stage's `run` from a seed, for stages that take one.

    A seed that the parameters do not name is refused: what it trained would be nobody's, and swept away.
    """
    if seed is None:
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
