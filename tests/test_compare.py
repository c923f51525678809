"""Results beside the committed ones."""

import json
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from nonn.commands.compare import compare, largest_difference
from nonn.core.errors import UserError

ROOT = Path("results/small")


def write_lock(**hashes):
    outs = {
        "teacher": [{"path": "results/small/teacher.safetensors", "md5": hashes.get("teacher", "1")}],
        "distill@2s/0": [{"path": "results/small/students/0.safetensors", "md5": hashes.get("student", "2")}],
        "benchmark@2s": [{"path": "results/small/benchmark/2s.json", "md5": hashes.get("times", "3")}],
        "graph": [{"path": "results/another/graph.json", "md5": hashes.get("other", "4")}],
    }
    for out in (out for listed in outs.values() for out in listed):
        Path(out["path"]).parent.mkdir(parents=True, exist_ok=True)
        Path(out["path"]).touch()
    with Path("dvc.lock").open("w") as file:
        YAML().dump({"schema": "2.0", "stages": {name: {"cmd": name, "outs": out} for name, out in outs.items()}}, file)


def write_metrics(accuracy):
    (ROOT / "metrics.json").write_text(json.dumps({"teacher_accuracy": accuracy, "memory_ratio": 9}))


@pytest.fixture
def repository(folder):
    ROOT.mkdir(parents=True)
    write_lock()
    write_metrics(0.95)
    for command in ("init -q", "add .", "-c user.name=n -c user.email=e commit -q -m first"):
        subprocess.run(["git", *command.split()], check=True)
    return folder


@pytest.mark.usefixtures("repository")
def test_the_same_bytes_are_said_and_times_left_out():
    write_lock(times="other", other="other")
    first, last = compare(ROOT, "portable")
    assert first == "results/small: 2 of 2 outputs have the committed bytes."
    assert last.startswith("Latencies are not compared")


@pytest.mark.usefixtures("repository")
def test_other_bytes_are_named_with_the_difference_and_the_reason():
    write_lock(student="other")
    write_metrics(0.9475)
    lines = compare(ROOT, "fast")
    assert lines[0] == "results/small: 1 of 2 outputs have the committed bytes."
    assert lines[1] == "  other bytes: results/small/students/0.safetensors"
    assert "at most 0.25 points" in lines[2]
    assert "same type of processor" in lines[3]


def test_a_best_baseline_that_is_none_is_not_compared():
    assert largest_difference({"4s_best_baseline_accuracy": None}, {"4s_best_baseline_accuracy": 0.5}) == 0


@pytest.mark.usefixtures("folder")
def test_an_experiment_that_is_not_committed_has_nothing_to_be_compared_with():
    ROOT.mkdir(parents=True)
    write_lock()
    assert compare(ROOT, "fast") == ["results/small: no results are committed, so there is nothing to compare with."]


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    "content", [b"<<<<<<< HEAD\nschema: '2.0'\n=======\n", b"stages:\n  a: 3\n", b"- 1\n", b"\xff\xfe", b"a: [\x00"]
)
def test_a_lock_that_dvc_has_not_written_is_refused(content):
    Path("dvc.lock").write_bytes(content)
    with pytest.raises(UserError, match=r"^dvc\.lock: .*") as told:
        compare(ROOT, "fast")
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.usefixtures("repository")
def test_results_that_are_not_here_are_not_compared():
    (ROOT / "students/0.safetensors").unlink()
    with pytest.raises(UserError, match=r"students/0\.safetensors: is not here; 1 of 2 outputs are missing"):
        compare(ROOT, "fast")


@pytest.mark.usefixtures("repository")
def test_without_git_nothing_is_said_of_the_last_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="git: not found"):
        compare(ROOT, "fast")


@pytest.mark.usefixtures("repository")
def test_a_lock_without_stages_lists_no_results():
    Path("dvc.lock").write_text("stages:\n")
    with pytest.raises(UserError, match="lists no results"):
        compare(ROOT, "fast")


@pytest.mark.usefixtures("repository")
def test_without_results_the_user_is_told_what_to_run():
    with pytest.raises(UserError, match="snakemake --cores all"):
        compare(Path("results/never"), "fast")
