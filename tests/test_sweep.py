"""Experiments of DVC are compared by what is in git, and the efficient networks are found."""

import json
import shutil
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
from experiments import REPOSITORY, tiny_params
from ruamel.yaml import YAML

from nonn.cli import main
from nonn.commands import sweep
from nonn.core.errors import UserError

SUMMARY = (
    "method,network,accuracy_mean,feature_bytes,latency_p50_ms\nteacher,,0.99,40,2.0\nnonn,2s,{},{},{}\nkd,2s,0.5,1,1\n"
)
DISTRIBUTED = "network,method,badge,memory_bytes\n2s,nonn,measured,\n2s,nonn,modelled,{}\n2s,split,modelled,9\n"
#: Of each experiment: memory of the device, then accuracy, bytes sent, latency and bytes of memory.
EXPERIMENTS = {
    "HEAD": (60, (0.90, 64, 0.20, 61440)),
    "small-one": (40, (0.80, 32, 0.10, 40960)),
    "wasteful": (90, (0.89, 64, 0.20, 92160)),
}


def git(*words: str) -> str:
    done = subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], capture_output=True, check=True)
    return done.stdout.decode().strip()


def write(memory: int, numbers: tuple) -> None:
    accuracy, sent, latency, memory_bytes = numbers
    params = tiny_params({"figures": {"dpi": 50}})
    params["devices"]["large"]["memory_kib"] = memory
    with Path("params.yaml").open("w") as file:
        YAML().dump(params, file)
    Path("results/tiny").mkdir(parents=True, exist_ok=True)
    Path("results/tiny/summary.csv").write_text(SUMMARY.format(0.5, sent, latency))
    Path("results/tiny/metrics.json").write_text(json.dumps({"2s_validation_accuracy": accuracy}))
    Path("results/tiny/distributed.csv").write_text(DISTRIBUTED.format(memory_bytes))


@pytest.fixture
def repository(folder) -> Path:
    """A repository with results, and experiments where DVC keeps them."""
    git("init", "--quiet")
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text("[core]\n    analytics = false\n")
    for name, (memory, numbers) in EXPERIMENTS.items():
        write(memory, numbers)
        git("add", "--all")
        git("commit", "--quiet", "--message", name)
        if name == "HEAD":
            head = git("rev-parse", "HEAD")
        else:
            git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", "HEAD")
            git("reset", "--quiet", "--hard", head)
    return folder


def test_one_command_makes_table_and_figure_of_all_experiments(repository, capsys):
    main(["sweep"])
    table = pd.read_csv("results/tiny/sweep.csv")
    assert dict(zip(table["experiment"], table["devices.large.memory_kib"], strict=True)) == {
        name: memory for name, (memory, _) in EXPERIMENTS.items()
    }
    assert dict(zip(table["experiment"], table["efficient"], strict=True)) == {
        "HEAD": True,
        "small-one": True,
        "wasteful": False,
    }
    numbers = table.set_index("experiment").loc["small-one", list(sweep.CRITERIA)]
    assert numbers.tolist() == [0.80, 40.0, 0.10, 32]
    assert (repository / "results/tiny/figures/sweep.svg").stat().st_size > 1000
    assert "devices.large.memory_kib" in capsys.readouterr().out


@pytest.mark.usefixtures("repository")
def test_what_has_no_results_is_left_out_and_said(capsys):
    git("rm", "--quiet", "results/tiny/summary.csv")
    git("commit", "--quiet", "--message", "none")
    with pytest.raises(SystemExit) as error:
        main(["sweep"])
    assert "no experiment with results" in str(error.value)
    assert "HEAD: has no summary.csv" in capsys.readouterr().err


def test_equal_networks_do_not_beat_each_other():
    same = {"accuracy": 0.9, "memory_kib": 1.0, "latency_ms": 1.0, "sent_bytes": 1}
    table = pd.DataFrame([same, same, same | {"accuracy": 0.8}, same | {"accuracy": 0.8, "memory_kib": 0.5}])
    assert sweep.is_efficient(table).tolist() == [True, True, False, True]


@pytest.mark.usefixtures("repository")
def test_experiments_are_queued_with_dvc_and_then_run(monkeypatch):
    commands = []

    def record(command, **_):
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", record)
    sweep.run_experiments(["devices.large.memory_kib=40,60"], ["figures"])
    assert commands == [
        ["dvc", "exp", "run", "--queue", "--set-param", "devices.large.memory_kib=40,60", "figures"],
        ["dvc", "exp", "run", "--run-all"],
    ]
    monkeypatch.setattr(sweep.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(UserError, match="dvc exp run"):
        sweep.run_experiments(["a=1"], [])


@pytest.mark.usefixtures("repository")
def test_an_experiment_that_fails_is_named(monkeypatch):
    """DVC ends well then, and earlier failures stay in its queue."""
    failed = iter([{"old-one"}, {"old-one", "new-one"}])
    monkeypatch.setattr(sweep, "failed_experiments", lambda: next(failed))
    monkeypatch.setattr(sweep.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0))
    with pytest.raises(UserError, match=r"^new-one: failed, for the reason above. `dvc queue logs new-one` has it"):
        sweep.run_experiments(["a=1"], [])


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("summary.csv", "", r"results/tiny/summary\.csv: damaged"),
        ("summary.csv", "<<<<<<< HEAD\n" + SUMMARY, r"results/tiny/summary\.csv: damaged"),
        ("metrics.json", '{"4s_validation_accuracy": 0.5}', r"results/tiny/summary\.csv: damaged"),
        ("metrics.json", '{"2s_accuracy": 0.5}', "no experiment with results"),
        ("distributed.csv", "network,method\n2s,nonn\n", r"results/tiny/summary\.csv: damaged"),
        ("../../params.yaml", "- a\n", "no experiment with results"),
        ("../../params.yaml", "a: [", "params.yaml of HEAD: line 2 is not valid YAML"),
    ],
)
def test_damaged_tables_of_a_commit_are_one_line(file, content, said):
    good = Path("params.yaml").read_text()
    (Path("results/tiny") / file).write_text(content)
    git("commit", "--quiet", "--all", "--message", "damaged")
    Path("params.yaml").write_text(good)
    with pytest.raises(SystemExit, match=said):
        main(["sweep"])


def test_a_network_may_be_called_na():
    networks = sweep.networks_of(
        SUMMARY.format(0.9, 64, 0.2).replace("2s", "NA"),
        DISTRIBUTED.format(1024).replace("2s", "NA"),
        '{"NA_validation_accuracy": 0.9}',
    )
    assert (list(networks["network"]), list(networks["memory_kib"])) == (["NA"], [1.0])


@pytest.mark.usefixtures("repository")
def test_a_change_without_values_is_refused():
    with pytest.raises(SystemExit) as error:
        main(["sweep", "devices.large.memory_kib"])
    assert "KEY=VALUE,VALUE" in str(error.value)


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("distill.epochs=", "write KEY=VALUE,VALUE"),
        ("foo=1", "foo: unknown key"),
        ("distill.epochs=2,x", r"distill\.epochs"),
        (
            "networks.2s.seeds=1,2",
            r"networks\.2s\.seeds=[12]: changes the lists of jobs.*: nonn use tiny --set",
        ),
    ],
)
def test_values_that_no_experiment_can_have_are_refused_before_dvc_is_asked(change, said, monkeypatch):
    monkeypatch.setattr(sweep, "run_experiments", Mock(side_effect=AssertionError))
    with pytest.raises(SystemExit, match=said):
        main(["sweep", change])


@pytest.mark.usefixtures("repository")
def test_lists_and_ranges_are_values(params):
    sweep.check_changes(["distill.epochs=1,2", "design.depths=[1,2],[1]", "signals.seed=range(1,5)"], params)
    together = ["design.min_width=20", "design.max_width=24,26"]  # neither is valid without the other
    sweep.check_changes([*together, "signals.augment={pad: 2, flip: false},{pad: 1, flip: true}"], params)
    with pytest.raises(UserError, match="foo: unknown key"):
        sweep.check_changes(["foo=range(1,3)"], params)


def test_without_a_repository_one_line_says_so(folder):
    shutil.copy(REPOSITORY / "params.yaml", folder)
    with pytest.raises(SystemExit, match=r"not a git repository|not inside of a DVC repository") as told:
        main(["sweep", "distill.epochs=1"])
    assert len(str(told.value).splitlines()) == 1
