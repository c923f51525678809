"""The commands ``nonn keep`` and ``nonn restore``: finished trainings, carried from one machine to the next.

DVC's cache stays on its machine. `keep` copies what it holds of the trainings of the current experiment into
a folder, which may be in git; `restore` puts them back into the cache of another clone. There the pipeline
takes a training from its cache in place of running it, if code, parameters and inputs are the same bytes.
Only trainings are kept: they take the hours, and their files are small. Signals take minutes, and hundreds
of megabytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from dvc.dependency.param import ParamsDependency
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.stage import PipelineStage
from ruamel.yaml import YAML

from nonn.core.errors import UserError
from nonn.core.files import replacing
from nonn.core.params import load_params

#: Stages of ``dvc.yaml`` whose results are kept.
TRAININGS = ("baseline", "baseline_once", "distill", "distill_once", "ensemble")


def finished_trainings(repo: Repo) -> dict[str, tuple[dict[str, str], set[str]]]:
    """Command of each training that has run with the current parameters, the MD5s of its inputs, and of its outputs.

    Raises
    ------
    UserError
        Another process of DVC is at work.
    """
    stages = [stage for stage in repo.index.stages if stage.addressing.partition("@")[0] in TRAININGS]
    try:
        with repo.lock:
            finished = [stage for stage in stages if not stage.changed()]
    except LockError as error:
        raise UserError(f"DVC is at work in this folder; try again when it is done. {error}") from None
    return {stage.cmd: (_inputs(stage), {out.hash_info.value for out in stage.outs}) for stage in finished}


def _inputs(stage: PipelineStage) -> dict[str, str]:
    files = [dependency for dependency in stage.deps if not isinstance(dependency, ParamsDependency)]
    return {file.def_path: file.hash_info.value for file in files}


def cached_runs(cache: Path, finished: dict[str, tuple[dict[str, str], set[str]]]) -> Iterator[tuple[Path, set[str]]]:
    """Entries of DVC's run cache with these inputs and outputs, and the MD5s of the outputs."""
    for entry in sorted(cache.glob("runs/*/*/*")):
        run = YAML(typ="safe").load(entry.read_text(encoding="utf-8"))
        hashes = {out["md5"] for out in run["outs"]}
        if finished.get(run["cmd"]) == ({dep["path"]: dep["md5"] for dep in run["deps"]}, hashes):
            yield entry, hashes


def copy(source: Path, target: Path, names: Iterable[Path]) -> int:
    """Copy files to the same names below another folder; return how many were not there yet."""
    missing = [name for name in dict.fromkeys(names) if not (target / name).exists()]
    for name in missing:
        with replacing(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
    return len(missing)


def cache_folder(repo: Repo) -> Path:
    return Path(repo.cache.legacy.path)


def keep(folder: Path) -> None:
    """Copy the finished trainings of the current experiment out of DVC's cache.

    Raises
    ------
    UserError
        There are none.
    """
    load_params()  # refuses what DVC would choke on
    repo = Repo(".")
    cache = cache_folder(repo)
    runs = list(cached_runs(cache, finished_trainings(repo)))
    if not runs:
        raise UserError("params.yaml: no training of this experiment is finished; run `snakemake --cores 2` first.")
    names: list[Path] = []
    for entry, hashes in runs:  # outputs first: an entry never stands there without them
        names += [*(Path("files", "md5", h[:2], h[2:]) for h in sorted(hashes)), entry.relative_to(cache)]
    print(f"{folder}: {len(runs)} trainings, {copy(cache, folder, names)} new files")


def restore(folder: Path) -> None:
    """Copy kept trainings into DVC's cache, for the pipeline to find there.

    Raises
    ------
    UserError
        The folder holds none.
    """
    load_params()  # refuses a folder that is no experiment's
    names = [path.relative_to(folder) for part in ("files", "runs") for path in sorted(folder.glob(f"{part}/**/*"))]
    names = [name for name in names if (folder / name).is_file()]
    if not names:
        raise UserError(f"{folder}: holds no kept trainings; give a folder that `nonn keep` has written.")
    copied = copy(folder, cache_folder(Repo(".")), names)
    print(f"{folder}: {copied} new files in the cache; `snakemake --cores 2` or `dvc repro` will find them there")


def add_arguments(parser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of kept trainings")
    parser.epilog = f"example: nonn {parser.get_default('command')} trainings"


def run(options) -> None:
    {"keep": keep, "restore": restore}[options.command](options.folder)
