"""The command ``nonn map``: train around the active experiment, and say when NoNN is ahead of an ensemble.

What is varied stands in ``workflow/map.yaml``. Trainings are kept under ``.nonn/map``: an interrupted map goes on where
it was, and a further value of a factor trains what is new. Students of the pipeline are not trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from nonn.commands.tables import write_rows
from nonn.core.errors import UserError
from nonn.core.numerics import set_numerics
from nonn.core.options import natural, refuse_missing
from nonn.core.params import Params, load_params
from nonn.core.paths import Paths, remove_unfinished
from nonn.core.progress import track
from nonn.core.schema import Section, load_yaml
from nonn.project import WORKFLOW
from nonn.report.map_plots import draw_map
from nonn.report.plots import drawing_style, save_figure

PLAN = Path("workflow/map.yaml")
#: The plan of the package, for projects without one.
DEFAULT_PLAN = WORKFLOW / PLAN.name
COLUMNS = (
    *("experiment", "factor", "value", "network", "method", "n_seeds", "accuracy_mean", "accuracy_sd"),
    *("difference_vs_fitted_ensemble", "ci_low", "ci_high", "p"),
)

#: Factors that multiply what the experiment has.
Part = Annotated[float, Field(gt=0, le=100)]
Parts = Annotated[list[Part], Field(min_length=1)]
Shares = Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]


class Factors(Section):
    """What is varied, and its values."""

    epochs: Parts | None = None
    budget: Parts | None = None
    images: Shares | None = None
    classes: Shares | None = None


class MapConfig(Section):
    """All of ``workflow/map.yaml``."""

    networks: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[int, Field(ge=1, le=100)]
    factors: Factors
    most_repeats: Annotated[float, Field(ge=1)] = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=natural, default=1, help="trainings at a time (default: %(default)s)")
    parser.add_argument("--factors", metavar="NAME,…", help="only these and the centre (default: all of the plan)")
    parser.epilog = "example: nonn map --jobs 2 --factors epochs,budget"


def run(options: argparse.Namespace) -> None:
    params = load_params()
    set_numerics(params.numerics)
    path = PLAN if os.path.lexists(PLAN) else DEFAULT_PLAN
    config = load_yaml(path, MapConfig, "write one")
    factors = config.factors.model_dump(exclude_none=True)
    chosen = options.factors.split(",") if options.factors is not None else list(factors)
    if unknown := [name for name in chosen if name and name not in factors]:
        raise UserError(f"--factors {unknown[0]}: {path} has no such factor; choose of {', '.join(factors)}")
    factors = {name: values for name, values in factors.items() if name in chosen}
    if absent := [name for name in config.networks if name not in params.networks]:
        edit = "take it out" if path == PLAN else f"copy the file to {PLAN} and take it out there"
        raise UserError(f"{path}: networks: params.yaml has no network {absent[0]!r}; {edit}, or add it to params.yaml")
    paths = Paths(params.experiment)
    needed = [paths.dataset, paths.signals, *(paths.partition(name, 0) for name in config.networks)]
    refuse_missing(needed, "partition")
    remove_unfinished(paths)
    rows = list(make_map(params, config, factors, max(1, options.jobs)))
    write_rows(paths / "map.csv", COLUMNS, rows)
    if factors:
        with drawing_style():
            save_figure(draw_map(rows), paths / "figures/map", params.figures)
    print(f"{paths / 'map.csv'}: {len(rows)} rows")


def make_map(
    params: Params, config: MapConfig, factors: Mapping[str, Sequence[float]], jobs: int
) -> Iterator[dict[str, Any]]:
    """The rows of the table, point by point as in the plan; `factors` are those of its factors that are varied."""
    from nonn.studies import factor_map

    points, seeds = factor_map.points_of(factors, config.most_repeats, params), range(config.seeds)
    n_devices = {name: len(params.networks[name].devices) for name in config.networks}
    most_devices = max(n_devices.values())
    wanted: dict[Any, None] = {}
    for point, seed, (name, n) in product(points, seeds, n_devices.items()):
        for random in (False, True) if point.factor == "centre" else (False,):
            wanted |= {factor_map.Training(point, name, i, seed, random).same: None for i in range(n)}
        wanted |= {training.same: None for training in factor_map.kd_trainings(params, point, name, seed, most_devices)}
    for training in wanted:
        factor_map.spec_of(params, training)  # what no device can hold is refused before anything is trained
    finished = _finished(params, wanted)
    with _workers(jobs) as pool:
        trainings: list[Future] = [pool.submit(_train, params, each, finished.get(each)) for each in wanted]
        for done in track(as_completed(trainings), "map", total=len(trainings)):
            done.result()
        scored = {
            (point, name): [
                pool.submit(factor_map.score, params, point, name, seed, most_devices, point.factor == "centre")
                for seed in seeds
            ]
            for point in points
            for name in n_devices
        }
        for (point, name), futures in scored.items():
            for row in factor_map.rows_of(params, point, name, [future.result() for future in futures]):
                yield {"experiment": params.experiment, **row}


@contextlib.contextmanager
def _workers(n: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are terminated if the block fails or is interrupted; their trainings have checkpoints."""
    with ProcessPoolExecutor(n, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


def _end_with_parent() -> None:
    """Make a worker process end with its parent, so that a killed map leaves no training behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the parent, too

    def wait() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _finished(params: Params, trainings: Iterable[Any]) -> dict[Any, Path]:
    """Weights of the students that the pipeline has trained, unless DVC finds them out of date."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    from nonn.studies import factor_map

    made = {training: found for training in trainings if (found := factor_map.of_pipeline(params, training))}
    if not made:
        return {}
    try:
        changed = Repo(".").status(targets=sorted({stage for stage, _ in made.values()}))
    except DvcException:  # no repository of DVC, or a stage that has gone: all is trained here
        return {}
    return {training: weights for training, (stage, weights) in made.items() if stage not in changed}


def _train(params: Params, training: Any, weights: Path | None) -> None:
    """Train one student in a worker process, with one thread as in the pipeline."""
    import torch

    from nonn.studies import factor_map
    from nonn.training.hardware import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    factor_map.train(params, training, weights)
