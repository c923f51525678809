"""What ``dvc.yaml`` declares against what the code does: imports, and what git keeps.

Code that a stage imports decides what it writes, so an edit there must run it again. Too few dependencies give stale
results; whole packages would train again because a figure changed. So each stage lists modules, or a folder in which
it needs nearly everything, and this test follows the imports.
"""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import grimp
import pytest
from dvc.repo import Repo
from experiments import REPOSITORY
from ruamel.yaml import YAML

from nonn.stages import STAGES

#: Modules that hand over what decides, and decide nothing: parameters, files and paths are dependencies themselves.
CARRIERS = {
    f"nonn.core.{name}"
    for name in (
        "architecture",
        "artifacts",
        "devices",
        "errors",
        "files",
        "jobs",
        "names",
        "options",
        "params",
        "paths",
        "progress",
        "schema",
        "teacher_source",
        "training_params",
        "yaml_text",
    )
}

#: What each stage of ``dvc.yaml`` runs.
MODULES = {stage: f"nonn.stages.{stage}" for stage in STAGES}
MODULES |= {"export_solo": "nonn.stages.export", "cluster": "nonn.runtime.cluster"}


@pytest.fixture(scope="module")
def jobs() -> dict:
    """The first job of each stage of the shipped experiment."""
    first = {}
    for job in Repo(str(REPOSITORY)).index.stages:
        first.setdefault(job.addressing.partition("@")[0], job)
    # Of what this experiment has no job for, the code alone.
    stages = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
    for name in stages.keys() - first:
        first[name] = SimpleNamespace(deps=stages[name]["do"]["deps"], outs=[])
    return first


@pytest.fixture(scope="module")
def imports():
    graph = grimp.build_graph("nonn", cache_dir=None)
    for carrier in CARRIERS:
        graph.remove_module(carrier)
    return graph


def declared(job) -> list[Path]:
    """Code that a job lists, relative to the repository."""
    paths = [Path(str(dependency)) for dependency in job.deps]
    paths = [path.relative_to(REPOSITORY) if path.is_absolute() else path for path in paths]
    # Stands for a source or weights that no file of the user's holds.
    return [path for path in paths if path.parts[0] == "nonn" and path.name not in ("packaged.py",)]


@pytest.mark.parametrize(("stage", "module"), MODULES.items())
def test_code_that_a_stage_imports_is_declared_and_no_other(stage, module, jobs, imports):
    needed = {module, *imports.find_upstream_modules(module)}
    packages = {module for module in needed if (REPOSITORY / module.replace(".", "/")).is_dir()}
    files = {Path(module.replace(".", "/") + ".py") for module in needed - packages}
    listed = declared(jobs[stage])
    missing = sorted(file for file in files if not any(path in (file, *file.parents) for path in listed))
    assert not missing, f"dvc.yaml: {stage} does not list code that it imports"
    idle = [path for path in listed if not any(path in (file, *file.parents) for file in files | started(listed))]
    assert not idle, f"dvc.yaml: {stage} lists code that it does not import"


def started(listed: list[Path]) -> set[Path]:
    """Modules that are run as processes of their own, not imported."""
    return {path for path in listed if path.stem == "relay"}


def test_code_that_is_declared_is_there(jobs):
    for job in jobs.values():
        for path in declared(job):
            assert (REPOSITORY / path).exists(), path


def test_git_keeps_what_the_cache_does_not(jobs):
    for job in jobs.values():
        for out in job.outs:
            ignored = subprocess.run(["git", "check-ignore", "--quiet", str(out)], cwd=REPOSITORY, check=False)
            assert (ignored.returncode == 0) == out.use_cache, out
