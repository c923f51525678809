"""The command ``nonn``: help, items, errors and the journal."""

import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from experiments import REPOSITORY
from processes import running
from ruamel.yaml import YAML

from nonn import __version__
from nonn.cli import COMMANDS, main
from nonn.commands.stage import ITEMS, JOURNAL, parse_item, parse_seed
from nonn.core.errors import UserError
from nonn.core.files import STATE, read_json
from nonn.core.params import PARAMS_FILE
from nonn.stages import STAGES

#: The arguments of each stage's example.
EXAMPLES = dict.fromkeys(STAGES, "") | {
    stage: f"{items.example}{' --seed 0' * items.is_seeded}" for stage, items in ITEMS.items()
}


def call(*arguments: str) -> None:
    main(list(arguments))


def stop(*arguments: str):
    """What `nonn` exits with."""
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    return stopped.value.code


def test_help_names_every_command(capsys):
    assert stop() == stop("--help") == 0
    shown = capsys.readouterr().out
    assert shown[: len(shown) // 2] == shown[len(shown) // 2 :], "without a command it is help, too"
    for command, (group, _, summary) in COMMANDS.items():
        below = shown.split(f"\n{group}:\n")[1].split("\n\n")[0].splitlines()
        assert f"{command} {summary}" in [" ".join(line.split()) for line in below]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example_that_it_accepts(command, capsys, monkeypatch):
    _, name, summary = COMMANDS[command]
    assert stop(command, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert summary in shown
    accepted = []
    monkeypatch.setattr(importlib.import_module(f"nonn.{name}"), "run", accepted.append)
    nonn, *example = shlex.split(shown.split("example: ")[1])
    assert (nonn, example[0]) == ("nonn", command)
    call(*example)
    assert [options.command for options in accepted] == [command]


def complete(line: str) -> list[str]:
    """What a shell is told when its user presses Tab at the end of a line."""
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": "answer", "_ARGCOMPLETE_IFS": "\n", "PATH": ""}
    asked["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-m", "nonn"], env=asked, check=True)
    answer = Path("answer").read_text()
    Path("answer").unlink()
    return [word.strip() for word in answer.splitlines()]


@pytest.mark.usefixtures("experiment")
def test_a_shell_completes_commands_items_and_options():
    assert complete("nonn di") == ["distill", "distributed"]
    assert complete("nonn distill 2") == ["2s/0", "2s/1"]
    assert complete("nonn predict --clu") == ["--cluster"]
    Path("params.yaml").write_text("devises: {}\n")
    assert complete("nonn distill 2") == []


def test_settings_stand_in_for_values_of_the_file(experiment, capsys):
    call("check", "--set", "experiment=other", "--set", "graph.top_k=null")
    assert "experiment other" in capsys.readouterr().out
    assert stop("check", "--set", "graph.top=3").startswith("nonn check: params.yaml: graph.top: unknown key")
    call("share", "a.safetensors")
    assert "a.safetensors: is there already. Remove it, or name another file." in stop("share", "a.safetensors")
    assert str(experiment.root).replace("tiny", "other") in stop("share", "b.safetensors", "--set", "experiment=other")


@pytest.mark.usefixtures("experiment")
@pytest.mark.parametrize("command", [["jobs"], *([stage, *shlex.split(EXAMPLES[stage])] for stage in STAGES)])
def test_what_dvc_records_is_that_of_the_file(command):
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    said = stop(*command, "--set", "distill.lr=0.1")
    assert said.startswith(f"nonn {command[0]}: --set distill.lr=0.1: ")
    assert "change distill.lr in params.yaml" in said
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("experiment")
def test_settings_without_effect_are_refused():
    said = stop("predict", "image.png", "--cluster", "cluster.yaml", "--set", "experiment=other")
    assert said.startswith("nonn predict: --set: has an effect only where params.yaml names the network")


def test_stages_are_those_of_the_pipeline():
    assert tuple(name for name, (_, module, _) in COMMANDS.items() if module == "commands.stage") == STAGES
    pipeline = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
    commands = [(stage.get("do") or stage)["cmd"] for stage in pipeline.values()]
    # `cluster` is a command of the runtime that the pipeline calls too.
    assert {re.search(r"nonn (\w+)", command)[1] for command in commands} == {*STAGES, "cluster"}


def test_version(capsys):
    assert stop("--version") == 0
    assert capsys.readouterr().out == f"nonn {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["distill", "--help"]])
def test_help_does_not_load_what_is_heavy(arguments):
    code = "import atexit, sys, nonn.cli; atexit.register(lambda: print(*sys.modules)); nonn.cli.main(sys.argv[1:])"
    shown = subprocess.check_output([sys.executable, "-c", code, *arguments], cwd=REPOSITORY, text=True)
    loaded = set(shown.splitlines()[-1].split())
    assert "nonn.cli" in loaded
    assert not {"torch", "numpy", "pandas", "matplotlib"} & loaded


@pytest.mark.parametrize("stage", STAGES)
def test_items_become_the_arguments_of_a_stage(stage, params):
    items = ITEMS.get(stage)
    arguments = parse_item(stage, items and items.example, params) | ({"seed": 0} if items and items.is_seeded else {})
    inspect.signature(importlib.import_module(f"nonn.stages.{stage}").run).bind(params, "paths", **arguments)


def test_items_by_hand(params):
    assert parse_item("dataset", None, params) == {}
    assert parse_item("design", "2s", params) == {"network": "2s"}
    assert parse_item("export", "solo", params) == {"name": "solo"}
    assert parse_item("distill", "2s/1", params) == {"network": "2s", "student": 1}
    assert parse_item("baseline", "2s/at_kd", params) == {"network": "2s", "method": "at_kd"}


@pytest.mark.parametrize(
    ("stage", "item", "known"),
    [
        ("design", "9s", "2s"),
        ("assemble", "2s/0", "2s"),
        ("export", "alone", "2s, solo"),
        ("distill", "2s/2", "2s/0, 2s/1"),
        ("distill", "2s", "2s/0, 2s/1"),
        ("baseline", "2s/full", "2s/labels, 2s/kd, 2s/random, 2s/at_kd"),
    ],
)
def test_unknown_items_are_refused(stage, item, known, params):
    with pytest.raises(UserError) as refusal:
        parse_item(stage, item, params)
    assert str(refusal.value) == f"params.yaml: '{item}' is not there; {stage} takes one of {known}."


def test_seeds_that_nobody_asked_for_are_refused(params):
    assert parse_seed("2s", None, params) == {}
    assert parse_seed("2s/0", 0, params) == {"seed": 0}
    assert parse_seed("2s/kd", 1, params) == {"seed": 1}
    wrong = {
        ("2s/0", 1): "seeds: asks for 1 trainings, seeds 0 to 0, not 1; raise it",
        ("2s", -1): "seeds: ",
        ("2s/kd", 2): r"baselines\.kd: asks for 2 ",
        ("2s/at_kd", 1): r"baselines\.at_kd: asks for 1 ",
    }
    for (item, seed), problem in wrong.items():
        with pytest.raises(UserError, match=rf"params\.yaml: networks\.2s\.{problem}"):
            parse_seed(item, seed, params)


@pytest.mark.usefixtures("experiment")
def test_a_mistake_ends_in_one_message_and_1():
    command = [sys.executable, "-m", "nonn", "distill", "9s/0", "--seed", "0"]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "nonn distill: params.yaml: '9s/0' is not there; distill takes one of 2s/0, 2s/1.\n"
    assert not JOURNAL.exists()


def test_a_stage_needs_its_item_and_seed(capsys):
    assert stop("design") == 2
    assert stop("distill", "2s/0") == 2
    assert stop("nothing") == 2
    assert "required: --seed" in capsys.readouterr().err


def test_seeds_below_zero_are_refused(capsys):
    for command in (["try", "2s/kd"], ["fuzz", "export"], ["soak", "export"]):
        assert stop(*command, "--seed", "-1") == 2
        assert "argument --seed: -1 is below 0; give 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["nan", "inf", "-1", "soon"])
def test_times_without_an_end_are_refused(number, capsys):
    with pytest.raises(SystemExit):
        main(["health", f"--wait={number}"])
    assert "argument --wait: " in capsys.readouterr().err


def test_a_soak_too_short_to_judge_is_refused(capsys):
    assert stop("soak", "export", "--requests", "999") == 2
    assert "argument --requests: 999 is below 1000" in capsys.readouterr().err


def test_a_stage_runs_and_is_noted_in_the_journal(experiment):
    before = read_json(experiment.filter_counts("2s"))
    experiment.filter_counts("2s").unlink()
    STATE.mkdir(exist_ok=True)
    JOURNAL.write_text('{"stage": "eval')  # as a crash would leave it
    call("design", "2s")
    call("distill", "2s/0", "--seed", "0")
    assert read_json(experiment.filter_counts("2s")) == before
    cut, design, distill = JOURNAL.read_text().splitlines()
    assert cut == '{"stage": "eval'
    design, distill = json.loads(design), json.loads(distill)
    assert (design["stage"], design["item"], design["seed"]) == ("design", "2s", None)
    assert design["experiment"] == distill["experiment"] == "tiny"
    assert (distill["stage"], distill["item"], distill["seed"]) == ("distill", "2s/0", 0)
    assert design["start"] <= design["end"] <= distill["start"] <= distill["end"]


def test_a_failed_stage_is_not_noted(experiment):
    experiment.graph_info.unlink()
    assert "graph.json: no such file" in stop("design", "2s")
    assert not JOURNAL.exists()


def test_a_stage_clears_what_is_no_longer_named(experiment):
    leftover = experiment.student("2s", 7, 0)
    leftover.touch()
    call("design", "2s")
    assert not leftover.exists()


@pytest.mark.usefixtures("experiment")
def test_check_reads_the_parameters_only(capsys):
    call("check")
    assert capsys.readouterr().out == "params.yaml is sound: experiment tiny, 2 students.\n"
    with Path("params.yaml").open("a") as file:
        file.write("devises: {}\n")
    assert stop("check") == "nonn check: params.yaml: devises: unknown key; remove it (did you mean 'devices'?)"


@pytest.mark.usefixtures("experiment")
def test_check_knows_the_datasets_of_torchvision():
    said = stop("check", "--set", "dataset.source=torchvision:CIFAR11")
    assert "torchvision:CIFAR11 is not known (did you mean 'CIFAR10'?); name one of" in said


def test_a_terminal_of_another_encoding_gets_what_it_can_show():
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-m", "nonn", "devices"], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"1.975?3.7" in done.stdout


def test_standard_output_may_be_closed():
    command = f"{shlex.quote(sys.executable)} -m nonn devices >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("seed", ["-1", str(2**32), "x"])
def test_seeds_that_no_generator_takes_are_refused(seed, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["try", "2s", "--seed", seed])
    assert stopped.value.code == 2
    assert "argument --seed" in capsys.readouterr().err


def test_predict_asks_for_an_export_first(folder):
    shutil.copy(REPOSITORY / PARAMS_FILE, folder)  # where the pipeline may have run
    assert "manifest.json: no such file" in stop("predict", "image.png")


def test_an_interrupted_command_exits_as_the_shell_expects(monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nonn.commands.check.run", interrupt)
    assert stop("check") == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_stop_tidies_up_and_exits_as_the_shell_expects(number, monkeypatch):
    before, tidied = signal.signal(number, signal.SIG_DFL), []

    def wait(_):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # a terminal sends it twice
            tidied.append(True)

    monkeypatch.setattr("nonn.commands.check.run", wait)
    try:
        assert stop("check") == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert tidied


#: Not by a `preexec_fn`, which forks: what gRPC, if a test has loaded it, does after a fork may end the child.
AS_IN_A_TERMINAL = """\
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""


#: A command of several tasks, each of which tidies up until standard input closes, so that no signal comes too late;
#: `nonn.commands.check` stands in for those of asyncio.
OF_TASKS = """\
import asyncio, sys
from nonn import cli
from nonn.commands import check

async def work():
    try:
        while True:
            await asyncio.sleep(0)
    finally:
        print("told", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        print("tidied", flush=True)

async def scenario():
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(work())
        await asyncio.sleep(0.1)
        print("begun", flush=True)

check.run = lambda _: asyncio.run(scenario())
cli.main(["check"])
"""


#: A server, which ends well once it is told to stop.
SERVER = """\
import asyncio, sys
from nonn import cli
from nonn.commands import check
from nonn.runtime.attached import told_to_stop

async def scenario():
    stopped = told_to_stop(False)
    print("begun", flush=True)
    await stopped.wait()
    print("told", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print("stopped", flush=True)

check.run = lambda _: asyncio.run(scenario())
cli.main(["check"])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("code", "tasks", "said", "ends_well"),
    [(OF_TASKS, 3, "tidied\n" * 3, False), (SERVER, 1, "stopped\n", True)],
    ids=["tasks", "server"],
)
def test_all_tasks_of_a_command_that_is_told_to_stop_tidy_up(number, code, tasks, said, ends_well):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with running([sys.executable, "-c", AS_IN_A_TERMINAL + code], **pipes, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert [process.stdout.readline() for _ in range(tasks)] == ["told\n"] * tasks
        process.send_signal(number)  # while the former is pending, it would be merged with it
        assert process.communicate(timeout=60) == (said, "")
    assert process.returncode == (0 if ends_well else 128 + number)
