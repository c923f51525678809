"""Jobs that leave dvc.lock alone: what they keep, what is merged, what a killed run loses (nothing)."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
from dvc.exceptions import CacheLinkError
from experiments import REPOSITORY, tiny_params
from ruamel.yaml import YAML

from nonn.cli import main
from nonn.commands import job, stage
from nonn.commands.job import ENTRIES, merge_entries, run_job, say_what_is_left
from nonn.core.errors import UserError
from nonn.core.files import STATE, write_json

BIN = Path(sys.executable).parent
PIPELINE = """\
stages:
  letters:
    foreach: [a, b]
    do:
      cmd: echo ran >> runs.txt; echo ${item} > ${item}.txt
      deps: [input.txt]
      outs: ["${item}.txt"]
  both:
    cmd: cat a.txt b.txt > both.txt
    deps: [a.txt, b.txt]
    outs: [both.txt]
"""
ORDER = ["letters@a", "letters@b", "both"]


@pytest.fixture
def repository(folder):
    """A DVC repository of three quick stages."""
    Path("dvc.yaml").write_text(PIPELINE)
    Path("input.txt").write_text("1\n")
    Path("runs.txt").touch()
    for command in (
        ["git", "init", "-q"],
        [BIN / "dvc", "init", "-q"],
        [BIN / "dvc", "config", "core.analytics", "false"],
    ):
        subprocess.run(command, check=True)
    return folder


def run_jobs(*names):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for name in names:
        subprocess.run([sys.executable, "-m", "nonn", "job", name], env=environment, check=True)


@pytest.mark.usefixtures("folder")
def test_an_entry_that_is_noted_while_others_wait_for_the_lock_is_merged_too(monkeypatch):
    def note(name: str) -> None:
        write_json(ENTRIES / f"{name}.json", {name: {"cmd": name}})

    def end(*_) -> None:
        assert not list(ENTRIES.iterdir()), "what another merges would be deleted unread"

    note("both")
    lock = MagicMock()
    lock.__enter__.side_effect, lock.__exit__.side_effect = lambda *_: note("letters@a"), end
    monkeypatch.setattr(job, "Repo", lambda *_, **__: Mock(lock=lock))
    assert merge_entries(ORDER)
    assert list(YAML(typ="safe").load(Path("dvc.lock"))["stages"]) == ["letters@a", "both"]


@pytest.mark.usefixtures("repository")
def test_jobs_that_are_merged_leave_nothing_for_dvc_to_do():
    run_jobs("letters@b", "letters@a", "both")
    assert not Path("dvc.lock").exists()
    assert merge_entries(ORDER)
    assert list(YAML(typ="safe").load(Path("dvc.lock"))["stages"]) == ORDER, "as in dvc.yaml, whichever ended first"
    assert not merge_entries(ORDER)
    lock = Path("dvc.lock").read_bytes()
    status = subprocess.run([BIN / "dvc", "status"], capture_output=True, text=True, check=True)
    assert "up to date" in status.stdout
    subprocess.run([BIN / "dvc", "repro", "-q", "--force"], check=True)
    assert Path("dvc.lock").read_bytes() == lock, "the bytes that DVC itself writes"


@pytest.mark.usefixtures("repository")
def test_a_job_that_was_not_merged_comes_back_from_the_cache():
    run_jobs("letters@a")
    for path in (*ENTRIES.iterdir(), Path("a.txt")):
        path.unlink()
    run_jobs("letters@a")
    assert Path("a.txt").read_text() == "a\n"
    assert Path("runs.txt").read_text() == "ran\n"


@pytest.mark.usefixtures("repository")
def test_entries_of_jobs_that_have_gone_leave_the_lock():
    run_jobs("letters@a", "letters@b")
    merge_entries(ORDER)
    Path("input.txt").write_text("2\n")
    run_jobs("letters@b")
    merge_entries(["letters@b"])
    assert list(YAML(typ="safe").load(Path("dvc.lock"))["stages"]) == ["letters@b"]


@pytest.mark.usefixtures("repository")
def test_a_stage_that_fails_ends_the_job_with_its_own_message_alone():
    text = PIPELINE.replace("cat a.txt b.txt > both.txt", "echo the reason >&2; false")
    Path("dvc.yaml").write_text(text)
    run_jobs("letters@a", "letters@b")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    job = [sys.executable, "-m", "nonn", "job", "both"]
    done = subprocess.run(job, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "the reason\n")


@pytest.mark.usefixtures("repository")
def test_a_job_whose_inputs_are_not_there_says_what_makes_them():
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    job = [sys.executable, "-m", "nonn", "job", "both"]
    done = subprocess.run(job, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "nonn job: both: a.txt is not there. Run `dvc repro both`, which makes it.\n"
    Path("input.txt").unlink()
    job[-1] = "letters@a"
    done = subprocess.run(job, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == "nonn job: letters@a: input.txt is not there. Put it there: no stage makes it.\n"


def test_a_job_of_another_experiment_than_the_run_s_is_refused(folder):
    YAML().dump(tiny_params(), folder / "params.yaml")
    with pytest.raises(
        SystemExit, match=r"teacher: params\.yaml is of results/tiny by now, and this run makes results/o/t"
    ):
        main(["job", "teacher", "--writes", "results/o/teacher.json"])


def test_a_stage_whose_parameters_change_meanwhile_counts_for_nothing(folder):
    def write(**changes) -> None:
        YAML().dump(tiny_params(changes), folder / "params.yaml")

    shutil.copy(REPOSITORY / "dvc.yaml", folder)
    write()
    before = stage.read_params()
    write(figures={"dpi": -50})  # of no interest to it, sound or not
    stage.refuse_changed("distill", before)
    write(distill={"temperature": 9.0})
    with pytest.raises(UserError, match=r"params\.yaml: distill: has changed while distill ran, so what it wrote"):
        stage.refuse_changed("distill", before)
    write(experiment="other")
    with pytest.raises(UserError, match=r"params\.yaml: experiment: has changed while design ran"):
        stage.refuse_changed("design", before)


def test_no_stage_is_not_all_of_them():
    with pytest.raises(SystemExit, match=r"^nonn job: the stage is empty, which DVC would take for all"):
        main(["job", ""])


@pytest.mark.usefixtures("folder")
def test_what_is_left_is_estimated_from_what_earlier_runs_took(monkeypatch, capsys):
    monkeypatch.setattr("time.time", lambda: 160.0)
    write_json(STATE / "run.json", {"start": 100.0, "expected": {"a@1": 10.0, "a@2": 10.0, "b": 40.0}})
    write_json(ENTRIES / "a%401.json", {})
    say_what_is_left()
    assert capsys.readouterr().err == "1 of 3 jobs done, about 5.0 minutes left\n"


@pytest.mark.parametrize("address", ["", "dvc.yaml", "./dvc.yaml", "results/some.dvc"])
def test_what_stands_for_several_stages_is_refused(address):
    with pytest.raises(SystemExit, match="name one of `dvc stage list`"):
        main(["job", address])


def test_a_full_disk_is_told_as_such(monkeypatch):
    def fail(*_, **__):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "results/a")
        except OSError as error:
            raise CacheLinkError(["results/a"]) from error

    monkeypatch.setattr("nonn.commands.job.Repo", Mock(return_value=Mock(reproduce=fail)))
    with pytest.raises(UserError, match="results/a: no space left on device"):
        run_job("dataset")
