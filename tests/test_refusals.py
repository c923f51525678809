"""What the operating system refuses and what files hold that they should not: one line, never a traceback."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from concurrent.futures.thread import BrokenThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from experiments import REPOSITORY

from nonn import cli
from nonn.core import files
from nonn.core.errors import REMEDIES, UserError, one_line, refusal
from nonn.core.files import read_json, regular, write_json, write_text
from nonn.data.dataset import load_dataset
from nonn.data.tensors import read_tensors, write_tensors
from nonn.method.filter_graph import load_graph
from nonn.method.loading import load_baseline, load_network, load_students
from nonn.runtime.session import open_session
from nonn.stages import baseline, benchmark, design, distill, figures, graph, partition
from nonn.teachers.loading import load_teacher
from nonn.testbed.distributed import TrialBed
from nonn.training.loading import load_signals

# The operating system


@pytest.mark.parametrize("number", REMEDIES, ids=errno.errorcode.get)
def test_a_command_says_what_the_system_refuses_in_one_line(number, monkeypatch, capsys):
    def refuse(_):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("nonn.commands.check.run", refuse)
    with pytest.raises(SystemExit) as end:
        cli.main(["check"])
    assert str(end.value) == f"nonn check: some/file: {os.strerror(number).lower()}. {REMEDIES[number]}"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "fault", [OSError("no number"), OSError(errno.EBADF, "bad"), KeyError("x"), BrokenThreadPool("y")]
)
def test_faults_of_the_program_stay_tracebacks(fault, monkeypatch):
    def fail(_):
        raise fault

    monkeypatch.setattr("nonn.commands.check.run", fail)
    with pytest.raises(type(fault)):
        cli.main(["check"])


SHORTAGES = (
    (MemoryError(), "this machine has too little memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "this machine has too little memory"),
    (BrokenProcessPool("A process in the process pool was terminated abruptly"), "a process of it ended by itself"),
)


@pytest.mark.parametrize(("error", "said"), SHORTAGES)
def test_too_little_memory_is_one_line(error, said, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr("nonn.commands.check.run", fail)
    with pytest.raises(SystemExit, match=rf"^nonn check: {said}.*Close other programs"):
        cli.main(["check"])


def test_a_full_folder_for_temporary_files_is_one_line(monkeypatch):
    def fail(_):
        raise OSError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr("nonn.commands.check.run", fail)
    with pytest.raises(
        SystemExit, match=r"^nonn check: no folder for temporary files can be written\. Free some space"
    ):
        cli.main(["check"])


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(("words", "status"), [(["devices"], 128 + signal.SIGPIPE), (["--help"], 0)])
def test_a_reader_that_goes_away_ends_the_command_quietly(words, status, buffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "" if buffered else "1")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nonn", *words]
    with os.fdopen(writer) as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (status, "")


def test_an_error_is_said_although_nobody_reads_what_was_printed(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)

    def fail(_):
        print("something")
        raise UserError("wrong")

    monkeypatch.setattr("nonn.commands.check.run", fail)
    with os.fdopen(writer, "w") as nobody:
        monkeypatch.setattr("sys.stdout", nobody)
        with pytest.raises(SystemExit, match=r"^nonn check: wrong$"):
            cli.main(["check"])


def test_names_are_shown_on_one_line():
    told = refusal(OSError(errno.ENOSPC, "", b"a\nb\x1b[2J\xff"))
    assert str(told).splitlines() == [str(told)]
    assert "\x1b" not in str(told)


@pytest.fixture
def small_files():
    """No file may become larger than a kilobyte, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("write", [write_text, lambda path, _: write_tensors(path, {"a": torch.zeros(10_000)})])
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing_behind(write, folder):
    with pytest.raises(UserError, match=r"^results/x: file too large\. Raise the limit"):
        write(Path("results/x"), "x" * 100_000)
    assert [path for path in folder.rglob("*") if path.is_file()] == []


@pytest.mark.usefixtures("small_files")
def test_what_is_written_for_a_while_names_its_place_too(tmp_path):
    def write():
        with files.scratch_folder() as folder:
            (folder / "x").write_bytes(bytes(100_000))

    with pytest.raises(UserError, match=r"/nonn-\w+: file too large\. Raise the limit"):
        write()
    bed = TrialBed(tmp_path, None, (3, 100, 100))
    with pytest.raises(OSError, match="File too large") as refused:
        bed.sensor(SimpleNamespace(is_split=True))
    assert refusal(refused.value)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no second file system")
def test_results_may_lie_on_another_file_system(folder):
    if Path("/dev/shm").stat().st_dev == folder.stat().st_dev:
        pytest.skip("there is no second file system")
    other = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        Path("results").symlink_to(other)
        for _ in range(2):
            write_text(Path("results/a.txt"), "text")
            with files.replacing(Path("results/folder")) as temporary:
                write_text(temporary / "b.txt", "text")
        found = sorted(str(path.relative_to(other)) for path in other.rglob("*"))
        assert found == ["a.txt", "folder", "folder/b.txt"]
    finally:
        shutil.rmtree(other)


def test_only_regular_files_are_opened(folder):
    os.mkfifo("pipe")
    Path("dangling").symlink_to("nowhere")
    Path("circle").symlink_to("circle")
    for name, reason in {
        "pipe": "a named pipe",
        "/dev/zero": "a device",
        ".": "a folder",
        "dangling": "a link",
    }.items():
        with pytest.raises(UserError, match=f"is {reason}"):
            regular(Path(name))
        with pytest.raises(UserError, match=reason):
            read_json(Path(name))
    with pytest.raises(UserError, match="symbolic link"):
        read_json(folder / "circle")


# Artifacts

JUNK = (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'"text"')


def all_readers(params, paths) -> dict:
    """Every artifact of the tiny experiment that stages read: who reads it."""
    data = load_dataset(paths)
    return {
        paths.dataset: lambda: load_dataset(paths),
        paths.dataset_info: lambda: load_dataset(paths),
        paths.teacher: lambda: load_teacher(paths),
        paths.teacher_info: lambda: load_teacher(paths),
        paths.signals: lambda: load_signals(paths, data),
        paths.graph: lambda: load_graph(paths),
        paths.graph_info: lambda: design.run(params, paths, "2s"),
        paths.filter_counts("2s"): lambda: partition.run(params, paths, "2s"),
        paths.design("2s", 0): lambda: distill.run(params, paths, "2s", 0, 0),
        paths.partition("2s", 0): lambda: distill.run(params, paths, "2s", 0, 0),
        paths.partition("2s", "random"): lambda: baseline.run(params, paths, "2s", "random", 0),
        paths.student("2s", 0, 0): lambda: load_students(params, paths, data, "2s", 0),
        paths.network("2s", 0): lambda: load_network(paths.network("2s", 0), data),
        paths.network("2s", 0).with_suffix(".json"): lambda: load_network(paths.network("2s", 0), data),
        paths.baseline("2s", "kd", 0): lambda: load_baseline(paths.baseline("2s", "kd", 0), data),
        paths.baseline("2s", "kd", 0).with_suffix(".json"): lambda: load_baseline(paths.baseline("2s", "kd", 0), data),
        paths.export("2s") / "manifest.json": lambda: benchmark.run(params, paths, "2s"),
    }


def test_damaged_and_foreign_artifacts_are_named_with_the_remedy(experiment, params):
    for path, read in all_readers(params, experiment).items():
        sound = path.read_bytes() if path.exists() else b'{"students": []}'
        foreign = [b'{"a": 1}'] if path.suffix == ".json" else [save({}), save({"x": torch.zeros(3)})]
        path.parent.mkdir(parents=True, exist_ok=True)
        for content in (*JUNK, sound[: len(sound) // 2], *foreign):
            path.write_bytes(content)
            with pytest.raises(UserError) as refused:
                read()
            said = str(refused.value)
            assert said.startswith(f"{path}: "), said
            assert "Delete it and run the pipeline again." in said or "fit no students" in said, said
            assert len(said.splitlines()) == 1
        path.write_bytes(sound)


def test_an_evaluation_of_a_former_version_is_refused(experiment, params):
    write_json(experiment.evaluation, {"n_test": 30, "rows": [], "missing": [], "missing_strategies": []})
    with pytest.raises(UserError, match=r"evaluation\.json: damaged \(calibration: Field required\)"):
        figures.run(params, experiment)


def save(tensors) -> bytes:
    from safetensors.torch import save

    return save(tensors)


def test_numbers_out_of_range_are_refused(experiment, params):
    data = load_dataset(experiment)
    write_json(experiment.partition("2s", 0), {"filters": [0, 99]})
    with pytest.raises(UserError, match=r"students/0\.json: damaged \(filter 99 of a teacher that has 32\)"):
        distill.run(params, experiment, "2s", 0, 0)
    write_json(experiment.filter_counts("2s"), {"sizes": [1, 2]})
    with pytest.raises(UserError, match=r"sizes\.json: damaged \(it shares out 3 filters"):
        partition.run(params, experiment, "2s")
    tensors = read_tensors(experiment.dataset)
    for name, value in (("labels", data.n_classes), ("train", len(data.images)), ("test", -1)):
        broken = tensors[name].clone()
        broken[0] = value
        write_tensors(experiment.dataset, {**{n: t.clone() for n, t in tensors.items()}, name: broken})
        with pytest.raises(UserError, match=rf"dataset\.safetensors: damaged \({name} has a number that is not from 0"):
            load_dataset(experiment)
    with pytest.raises(UserError, match=r"dataset\.safetensors: damaged"):
        graph.run(params, experiment)


@pytest.mark.parametrize("content", [b"", b"no model", bytes(100)])
def test_what_is_no_onnx_model_is_refused(content, folder):
    path = folder / "0.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"0\.onnx: not a model that ONNX Runtime runs"):
        open_session(path)
    with pytest.raises(UserError, match=r"^the model: not a model"):
        open_session(content)


# Clones and paths


def test_what_is_hashed_has_the_same_bytes_where_git_turns_the_ends_of_lines(tmp_path):
    """Of files that code, parameters and results are compared by."""
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "core.autocrlf=true"]
    here, there = tmp_path / "here", tmp_path / "there"
    subprocess.run([*git, "init", "--quiet", str(here)], check=True)
    contents = {"code.py": b"a\nb\n", "dvc.lock": b"a\n", "x.safetensors": b"a\r\nb\n\0", "x.png": b"\x89PNG\r\n\x1a\n"}
    for name, content in contents.items():
        (here / name).write_bytes(content)
    shutil.copy(REPOSITORY / ".gitattributes", here)
    subprocess.run([*git, "add", "--all"], cwd=here, check=True, capture_output=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "all"], cwd=here, check=True)
    subprocess.run([*git, "clone", "--quiet", str(here), str(there)], check=True)
    assert {name: (there / name).read_bytes() for name in contents} == contents


@pytest.mark.parametrize("name", ["with space", "Übung", "it's", 'quo"te', "{braces}", "$HOME `id`", "a;b&c"])
def test_commands_of_the_workflow_bear_any_path(name, tmp_path):
    from snakemake.shell import shell

    source = (REPOSITORY / "workflow/rules/common.smk").read_text()
    start = source.index("shell.prefix(")
    line = source[start : source.index("\n)\n", start) + 3]
    folder = tmp_path / name
    folder.mkdir()

    class FakeSystem:
        executable = str(folder / "python")

    try:
        exec(line, {"shell": shell, "sys": FakeSystem, "Path": Path, "shlex": __import__("shlex")})
        assert shell('printf "%s" "${{PATH%%:*}}"', read=True) == str(folder)
    finally:
        shell.prefix("")


def test_what_an_error_says_is_one_line_and_cut_only_where_a_limit_is_asked_for():
    error = ValueError("a\n b" + "c" * 300)
    assert one_line(error).endswith("c …")
    assert one_line(error, limit=None) == "a b" + "c" * 300
    assert one_line(ValueError()) == "ValueError"
