"""What `nonn scaling` writes; its runs take minutes."""

import csv
import json

import pytest
from experiments import REPOSITORY
from ruamel.yaml import YAML

from nonn.cli import main
from nonn.commands import scaling
from nonn.commands.scaling import Scratch, even_numbers, merged, written
from nonn.core.errors import UserError
from nonn.core.jobs import list_jobs
from nonn.core.params import load_params


@pytest.fixture
def scratch(folder, monkeypatch) -> Scratch:
    monkeypatch.chdir(REPOSITORY)  # where experiments are looked for
    return Scratch(folder)


def test_parameters_ask_for_so_many_trainings(scratch, monkeypatch):
    files = scratch.ask_for(10)
    monkeypatch.chdir(scratch.folder)
    jobs = list_jobs(load_params())
    assert files == [f"results/scaling/students/{key}.safetensors" for key in jobs["students"]]
    assert len(files) == 10
    assert jobs["baselines"] == {}


def test_overhead_is_what_is_not_training(scratch, monkeypatch):
    (scratch.folder / ".nonn").mkdir()
    entries = [{"stage": "distill", "start": 0.0, "end": 1.5}] * 10 + [{"job": "distill@0", "start": 0, "end": 9}]
    (scratch.folder / ".nonn/journal.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (scratch.folder / "dvc.lock").write_bytes(bytes(1234))
    calls = []

    def timed(*command, at_once=1):
        calls.append((command, at_once))
        return 3.0 if "--dry-run" in command else 40.0

    monkeypatch.setattr(scratch, "timed", timed)
    row = scaling.measure(scratch, "local", 10, 2, ["--quiet"], dry=False)
    assert row["overhead_per_job_s"] == (2 * 40 - 15) / 10
    assert (row["dag_s"], row["lock_bytes"], row["stage_1_s"], row["stage_4_s"]) == (3.0, 1234, 40.0, 10.0)
    assert calls[1][0][:5] == ("snakemake", "--cores", "2", "--quiet", "--")
    assert len(calls[1][0]) == 5 + 10
    assert [at_once for command, at_once in calls if "job" in command] == [1, 4]
    calls.clear()
    row = scaling.measure(scratch, "slurm", 10, 8, [], dry=True)
    assert row == {"engine": "slurm", "n_jobs": 10, "dag_s": 3.0, "stage_1_s": 40.0, "stage_4_s": 10.0}
    assert [at_once for _, at_once in calls] == [1, 1, 1, 4], "dry run, the first training, and twice that it is done"


def test_rows_take_the_place_of_older_ones(folder):
    path = folder / "jobs.csv"
    rows = merged(path, [written({"engine": "local", "n_jobs": n, "dag_s": 1.0}) for n in (100, 10)])
    assert [row["n_jobs"] for row in rows] == ["10", "100"]
    with path.open("w") as file:
        table = csv.DictWriter(file, scaling.COLUMNS)
        table.writeheader()
        table.writerows(rows)
    rows = merged(path, [written({"engine": "local", "n_jobs": 10, "dag_s": 2.345, "lock_bytes": 7})])
    assert [(row["dag_s"], row["lock_bytes"], row["wall_s"]) for row in rows] == [("2.35", "7", ""), ("1.00", "", "")]


def test_a_command_that_fails_is_one_line(scratch):
    with pytest.raises(UserError, match="failed: what was wrong"):
        scratch.timed("sh", "-c", "echo what was wrong; exit 3", at_once=2)


def test_a_table_that_cannot_take_the_rows_is_refused_before_anything_is_measured(folder, monkeypatch):
    monkeypatch.setattr(scaling, "prepared", lambda _: pytest.fail("measures"))
    (folder / "other.csv").write_text("a,b\n1,2\n")
    for name, said in {"other.csv": "has other columns", ".": "cannot be written"}.items():
        with pytest.raises(SystemExit, match=f"--output: {name} {said}"):
            main(["scaling", "--output", name])


@pytest.mark.parametrize("text", ["3", "0", "ten"])
def test_odd_numbers_of_jobs_are_refused(text, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["scaling", "--jobs", text])
    assert "argument --jobs: " in capsys.readouterr().err
    assert even_numbers("") == []


def test_no_number_of_jobs_at_all_is_refused():
    with pytest.raises(SystemExit, match="--jobs and --dry"):
        main(["scaling", "--jobs", "", "--dry", ""])


def test_the_parameters_are_those_of_an_experiment():
    assert {*scaling.CHANGES} - {"experiment"} <= {*YAML(typ="safe").load(REPOSITORY / "params.yaml")}
