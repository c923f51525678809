"""The command ``nonn job``: run one stage as ``dvc repro`` would, but leave ``dvc.lock`` to the end of the run.

DVC reads and writes the whole of ``dvc.lock`` for every stage, so that a job costs more the more jobs there are, and
parallel jobs wait for each other. Here a job notes its own entry in a file, and `merge_entries` adds the entries of a
run to ``dvc.lock`` at once. All else is DVC's: outputs come from its cache where a run with these inputs is known,
otherwise the stage runs and is kept there. A run that is killed before its entries are merged loses nothing: they are
merged when the next one begins.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dvc import dvcfile
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError
from dvc.stage.serialize import to_lockfile
from dvc.utils.serialize import loads_yaml
from dvc.utils.serialize._yaml import _dump

from nonn.commands.stage import note
from nonn.core.errors import UserError, one_line, refusal
from nonn.core.files import STATE, read_json, remove, write_json, write_text
from nonn.core.options import complete_from
from nonn.core.params import PARAMS_FILE, load_params
from nonn.core.paths import DVC_LOCK, Paths
from nonn.core.progress import log

#: Entries of finished jobs that are not in ``dvc.lock`` yet, and the expected seconds of a run's jobs.
ENTRIES, RUN = STATE / "entries", STATE / "run.json"


class EntryFile(dvcfile.Lockfile):
    """Stands in for ``dvc.lock``: it knows nothing of earlier runs, and keeps the entry of one stage."""

    def load(self) -> dict[str, Any]:
        return {}

    def dump_stages(self, stages, **kwargs) -> None:
        for stage in stages:
            write_text(entry_of(stage.name), json.dumps(to_lockfile(stage, **kwargs)))  # in the order of ``dvc.lock``


def entry_of(name: str) -> Path:
    return ENTRIES / f"{quote(name, safe='')}.json"


def run_job(address: str) -> None:
    """Bring the outputs of one stage up to date, from the cache or by running it."""
    dvcfile.Lockfile = EntryFile
    logging.getLogger("dvc").setLevel(logging.ERROR)
    try:
        repo = Repo(".", _wait_for_lock=True)
        repo.reproduce(address, single_item=True)
    except DvcException as error:
        cause = error.__cause__ or error
        if isinstance(cause, StageCmdFailedError):
            raise SystemExit(1) from None  # the stage has said why
        if absent := _missing_file(cause):
            path = Path(absent).absolute()
            is_made = any(path.is_relative_to(out.fs_path) for out in repo.index.outs)
            remedy = f"Run `dvc repro {address}`, which makes it." if is_made else "Put it there: no stage makes it."
            raise UserError(f"{address}: {absent} is not there. {remedy}") from None
        if told := _refused(cause):
            raise told from None
        raise UserError(f"{address}: DVC: {one_line(cause, limit=None)}") from None


def refuse_other_outputs(address: str, expected: Sequence[str]) -> None:
    """Raise UserError unless a job writes what Snakemake expects of it: another experiment may be active by now."""
    if not expected:
        return
    root = Paths(load_params().experiment).root
    if other := [name for name in expected if root not in Path(name).parents]:
        raise UserError(f"{address}: {PARAMS_FILE} is of {root} by now, and this run makes {other[0]}. Run it again.")


def _missing_file(error: BaseException | None) -> str | None:
    """The missing file that made DVC fail, if any."""
    while error is not None:
        if isinstance(error, FileNotFoundError) and error.filename:
            return os.path.relpath(error.filename)
        error = error.__cause__ or error.__context__
    return None


def _refused(error: BaseException | None) -> UserError | None:
    """The refusal of the operating system that made DVC fail, if any."""
    while error is not None:
        if isinstance(error, OSError) and (told := refusal(error)):
            return told
        error = error.__cause__ or error.__context__
    return None


def merge_entries(order: Iterable[str]) -> bool:
    """Add the entries of finished jobs to ``dvc.lock``, in the order of ``dvc.yaml``, and say whether there were any.

    Entries of jobs that are not in the order have gone from ``dvc.yaml``, and go from ``dvc.lock``.
    """
    if not any(ENTRIES.glob("*.json")):
        return False
    with Repo(".", _wait_for_lock=True).lock:
        files = sorted(ENTRIES.glob("*.json"))
        old = loads_yaml(DVC_LOCK.read_text(encoding="utf-8")) if DVC_LOCK.is_file() else None
        stages = (old or {}).get("stages", {})
        for file in files:
            stages |= read_json(file)
        text = StringIO()
        _dump({"schema": "2.0", "stages": {name: stages[name] for name in order if name in stages}}, text)
        write_text(DVC_LOCK, text.getvalue())
        for file in files:
            remove(file)
    return bool(files)


def begin_run(expected: dict[str, float]) -> None:
    """Note when a run begins, and how long each of its jobs may take; only the proportion of the times counts."""
    write_json(RUN, {"start": time.time(), "expected": expected})


def say_what_is_left() -> None:
    """One line: how many jobs of the run are done, and an estimate of the time that the others take."""
    if not RUN.is_file():
        return
    run = read_json(RUN)
    expected = run["expected"]
    done = [name for name in expected if entry_of(name).is_file()]
    if not done or len(done) == len(expected):
        return
    share = sum(map(expected.__getitem__, done)) / sum(expected.values())
    minutes = (time.time() - run["start"]) * (1 / share - 1) / 60
    log(f"{len(done)} of {len(expected)} jobs done, about {max(minutes, 0.1):.1f} minutes left")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stage = parser.add_argument("address", metavar="STAGE", help="as `dvc stage list` names it")
    complete_from(stage, lambda: [found.addressing for found in Repo(".").index.stages])
    parser.add_argument("--writes", nargs="+", default=[], help=argparse.SUPPRESS)  # as Snakemake expects of the job
    parser.epilog = "example: nonn job distill@seed0/2s/0"


def run(options: argparse.Namespace) -> None:
    if not options.address:
        raise UserError("the stage is empty, which DVC would take for all of them; name one of `dvc stage list`")
    if options.address.endswith((".yaml", ".dvc")):
        raise UserError(
            f"{options.address}: is a file, which DVC takes for all its stages; name one of `dvc stage list`"
        )
    refuse_other_outputs(options.address, options.writes)
    start = time.time()
    run_job(options.address)
    note({"job": options.address, "start": start, "end": time.time()})
    if options.writes:
        say_what_is_left()
