"""`nonn try` trains as the pipeline does, with other params, and touches none of its results."""

import csv
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from nonn.cli import main
from nonn.commands import attempt
from nonn.commands.attempt import COLUMNS
from nonn.core.errors import UserError
from nonn.core.files import _HOST, STATE, TEMPORARY, read_json


def run(item: str, settings: list[str], seed: int, table: Path | None) -> None:
    attempt.run(SimpleNamespace(item=item, set=settings, seed=seed, table=table))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_without_changes_it_is_the_network_of_the_pipeline(experiment, tmp_path):
    before = contents(experiment.root)
    run("2s", [], 0, tmp_path / "table.csv")
    assert contents(experiment.root) == before
    assert not list((STATE / "attempts").iterdir())
    (row,) = rows_of(tmp_path / "table.csv")
    summary = read_json(experiment.network("2s", 0).with_suffix(".json"))
    assert float(row["validation_accuracy"]) == pytest.approx(summary["validation_accuracy_averaged"], abs=1e-4)
    assert int(row["params_per_student"]) == max(student["cost"]["params"] for student in summary["students"])
    assert (row["item"], row["students"], row["seed"]) == ("2s", "2", "0")


def test_changes_reach_the_stages_and_rows_add_up(experiment, tmp_path, capsys):
    table = tmp_path / "new/table.csv"
    narrow = ["devices.large.memory_kib=40", "distill.epochs=1"]
    run("2s", narrow, 0, table)
    by_muon = [
        "distill.epochs=2",
        "design.family=airbench",
        "design.min_width=2",
        "distill.muon={lr: 0.1, momentum: 0.6}",
    ]
    run("2s/kd", by_muon, 3, table)
    network, student = rows_of(table)
    assert tuple(network) == COLUMNS
    assert (network["changes"], network["epochs"]) == (" ".join(narrow), "1")
    large = read_json(experiment.design("2s", 1))[0]
    assert int(network["params_per_student"]) < large["cost"]["params"]  # both devices are small now
    assert (student["item"], student["students"], student["seed"], student["epochs"]) == ("2s/kd", "1", "3", "2")
    assert f"{'validation_accuracy':<20} {student['validation_accuracy']}" in capsys.readouterr().out


@pytest.mark.usefixtures("experiment")
def test_fewer_views_than_there_are_can_be_tried(tmp_path):
    table = tmp_path / "table.csv"
    for settings in ([], ["signals.views=1"]):
        run("2s/kd", settings, 0, table)
    both, one = rows_of(table)
    assert one["changes"] == "signals.views=1"
    assert one["validation_loss"] != both["validation_loss"]


@pytest.mark.parametrize(("item", "n_students"), [("2s", 2), ("2s/kd", 1)])
@pytest.mark.usefixtures("experiment")
def test_what_was_trained_before_an_interruption_is_not_trained_again(item, n_students, monkeypatch, tmp_path, capsys):
    table = tmp_path / "table.csv"
    with monkeypatch.context() as patch:
        patch.setattr(attempt, "score", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(item, [], 1, table)
    capsys.readouterr()
    run(item, [], 1, table)
    assert capsys.readouterr().err.count("resumed at 5 of 5") == n_students
    assert not list((STATE / "checkpoints").iterdir())
    assert len(rows_of(table)) == 1


@pytest.mark.usefixtures("experiment")
def test_an_attempt_leaves_an_equal_one_beside_it_alone_and_sweeps_up_after_the_killed(tmp_path):
    theirs, dead = (STATE / "attempts" / f"{TEMPORARY}{name}-1-0" for name in ("elsewhere-1", f"{_HOST}-{2**22 + 1}"))
    for folder in (theirs, dead):
        folder.mkdir(parents=True)
    run("2s/kd", ["distill.epochs=1"], 0, tmp_path / "table.csv")
    assert list((STATE / "attempts").iterdir()) == [theirs]


def test_a_row_that_was_cut_off_does_not_swallow_the_next(tmp_path):
    table, row = tmp_path / "table.csv", dict.fromkeys(COLUMNS, "1")
    attempt.append_row(table, row)
    with table.open("a") as file:
        file.write("2s,,")
    attempt.append_row(table, row)
    assert [tuple(found.values())[:2] for found in rows_of(table)] == [("1", "1"), ("2s", ""), ("1", "1")]


@pytest.mark.parametrize(
    ("item", "settings", "problem"),
    [
        ("3s", [], "params.yaml has no network '3s'; choose of 2s"),
        ("2s/best", [], "no method 'best'; choose of labels, kd"),
        ("2s", ["distill.epoch=1"], "distill.epoch: unknown key; remove it (did you mean 'epochs'?)"),
        ("2s", ["distil.epochs=1"], "distil: unknown key; remove it (did you mean 'distill'?)"),
        ("2s", ["distill.epochs=none"], "distill.epochs: "),
        ("2s", ["distill.epochs"], "distill.epochs: is not KEY=VALUE"),
        ("2s", ["distill.muon={lr: 0.1"], "is not KEY=VALUE with a value in YAML"),
        (
            "2s",
            ["signals.views=3"],
            "signals.views: the experiment's signals have 2, of which",
        ),
        ("2s", ["signals.threads=1"], "signals.threads: has no effect on an attempt, which begins with"),
        ("2s", ["teacher.lr=1"], "teacher.lr: has no effect on an attempt"),
        ("2s", ["assemble.lr=1"], "What can be tried: signals.views, networks, devices,"),
        ("2s", ["devices.small.memory_kib=1"], "no student of `design` fits device 'small': memory_kib is 1 KiB"),
    ],
)
@pytest.mark.usefixtures("experiment")
def test_what_cannot_be_tried_is_refused(item, settings, problem):
    with pytest.raises(UserError) as error:
        run(item, settings, 0, None)
    assert problem in str(error.value)


@pytest.mark.usefixtures("experiment")
def test_what_would_be_lost_after_the_training_is_refused_before(tmp_path):
    (tmp_path / "file").touch()
    for table in (tmp_path, tmp_path / "file" / "table.csv"):
        with pytest.raises(UserError, match=r"--table: .* cannot be written"):
            run("2s/kd", [], 0, table)
    (tmp_path / "file").write_text("x,y\n1,2\n")
    with pytest.raises(UserError, match=r"--table: .*file has other columns than this table"):
        run("2s/kd", [], 0, tmp_path / "file")


def test_it_begins_with_the_signals(experiment):
    experiment.signals.unlink()
    arguments = ["try", "2s/kd", "--set", "distill.epochs=1", "--seed", "2", "--table", "table.csv"]
    with pytest.raises(SystemExit, match=r"signals\.safetensors: is not there\. Run `dvc repro signals` first"):
        main(arguments)
    assert not Path("table.csv").exists()
