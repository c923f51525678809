"""Networks travel to boards, one after another, and back again if one of them fails."""

import errno
import getpass
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from experiments import REPOSITORY
from ssh_server import ssh_server
from test_following import exports  # noqa: F401  # a fixture

from nonn.cli import main
from nonn.core.errors import UserError
from nonn.core.files import restored_on_error
from nonn.live import rollout
from nonn.live.rollout import Rollout, SshTarget, complete_certificates, only_one, placed_on
from nonn.runtime.certs import write_certificates
from nonn.runtime.cluster import load_cluster, local_cluster

BOARDS = ["pi@a", "b", "pi@c:2222"]


def rollout_of(export: Path, certificates: Path, folder: str = "nonn") -> Rollout:
    cluster = placed_on([SshTarget.of(text) for text in BOARDS], export, certificates, 7100, 100.0)
    return Rollout(export, cluster, folder, "nonn/.venv/bin/python", "now")


@pytest.mark.parametrize(
    ("text", "board"),
    [
        ("pi@host1", SshTarget("pi", "host1", None)),
        ("10.0.0.7:2222", SshTarget(None, "10.0.0.7", 2222)),
        ("pi@[fe80::1]:22", SshTarget("pi", "[fe80::1]", 22)),
    ],
)
def test_a_board_is_named_as_ssh_names_it(text, board):
    assert SshTarget.of(text) == board


@pytest.mark.parametrize(("port", "deadline_ms"), [(80, 100.0), (65535, 100.0), (7100, 0.0), (7100, 1e6)])
def test_ports_and_deadlines_that_cannot_be_are_refused_as_for_a_local_cluster(port, deadline_ms, network_folder):
    boards = [SshTarget.of(text) for text in BOARDS]
    with pytest.raises(UserError) as refused:
        placed_on(boards, network_folder, Path("certs"), port, deadline_ms)
    with pytest.raises(UserError) as local:
        local_cluster(network_folder, None, port, deadline_ms)
    assert str(refused.value) == str(local.value)


@pytest.mark.parametrize("text", ["", "a b", "-oProxyCommand=x@h;ls", "pi@", "host:port", "a'b"])
def test_what_is_no_board_is_refused(text):
    with pytest.raises(UserError, match="--to"):
        SshTarget.of(text)


def test_each_board_gets_its_student_and_no_other_secret(network_folder, certificates):
    todo = rollout_of(network_folder, certificates)
    with tarfile.open(fileobj=io.BytesIO(todo.archive_of(todo.cluster.nodes[1]))) as archive:
        modes = {entry.name: entry.mode for entry in archive}
        assert "1.onnx" in modes
        assert not {"0.onnx", "2.onnx", "ca.key", "coordinator.key"} & {*modes}
        assert modes["node.key"] == 0o600
        assert archive.extractfile("node.key").read() == (certificates / "node-1.key").read_bytes()
        script = archive.extractfile("node.sh").read().decode()
        assert 'exec "$HOME"/nonn/.venv/bin/python -m nonn node 1.onnx --address 0.0.0.0:7101' in script
        assert 'ExecStart="%h/nonn/node-1/current/node.sh"' in archive.extractfile("node.service").read().decode()


def test_the_unit_is_one_that_systemd_takes(network_folder, certificates, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze")
    todo = rollout_of(network_folder, certificates, str(tmp_path))
    with tarfile.open(fileobj=io.BytesIO(todo.archive_of(todo.cluster.nodes[0]))) as archive:
        archive.extractall(tmp_path / "node-0/current", filter="data")
    unit = shutil.copy(tmp_path / "node-0/current/node.service", tmp_path / "nonn-node-0.service")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert "nonn-node-0" not in done.stderr, done.stderr


def test_ansible_can_wait_so_long(network_folder, certificates, tmp_path):
    boards = [SshTarget.of(text) for text in BOARDS]
    pause = rollout_of(network_folder, certificates).inventory(boards, tmp_path)["boards"]["vars"]["pause"]
    assert isinstance(pause, int)  # wait_for takes no other


@pytest.mark.slow
def test_the_script_switches_to_a_release_and_back(tmp_path):
    """With a shell in place of a node, where there is no systemd of this user."""
    systemd = subprocess.run(["sh", "-c", "systemctl --user show-environment"], capture_output=True, check=False)
    if not systemd.returncode:
        pytest.skip("would start units of this user")
    if not shutil.which("start-stop-daemon"):
        pytest.skip("there is no start-stop-daemon")
    node = tmp_path / "node-0"

    def switch(*words: str) -> None:
        subprocess.run(["sh", node / words[-1] / "switch.sh", *words], check=True)

    def served() -> str:
        return (node / "current").readlink().name

    for release in ("one", "two", "three"):
        (node / release).mkdir(parents=True)
        shutil.copy(rollout.PARTS / "switch.sh", node / release)
        (node / release / "node.sh").write_text("#!/bin/sh\nexec sleep 100\n")
        (node / release / "node.sh").chmod(0o700)
        switch(release)
        assert served() == release
    assert not (node / "one").exists()
    switch("--back", "two")  # is not the one that is served
    assert served() == "three"
    switch("--back", "three")
    assert served() == "two"
    (node / "two/former").unlink()
    pid = int((node / "pid").read_text())
    assert Path(f"/proc/{pid}").exists()
    switch("--back", "two")
    assert not (node / "current").is_symlink()
    assert not Path(f"/proc/{pid}").exists()


def test_certificates_that_are_there_stay(network_folder, tmp_path):
    todo = rollout_of(network_folder, tmp_path / "certs")
    complete_certificates(todo.cluster)
    before = (tmp_path / "certs/node-0.pem").read_bytes()
    (tmp_path / "certs/node-1.pem").unlink()
    complete_certificates(todo.cluster)
    assert (tmp_path / "certs/node-0.pem").read_bytes() == before
    assert (tmp_path / "certs/node-1.pem").exists()


def test_a_cluster_file_is_put_back(tmp_path):
    path = tmp_path / "cluster.yaml"

    def fail() -> None:
        with restored_on_error(path):
            path.write_text("new")
            raise UserError

    for before in (None, "former"):
        if before:
            path.write_text(before)
        with pytest.raises(UserError):
            fail()
        assert (path.read_text() if path.exists() else None) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "a", "b"], "2 boards for the 3 students"),
        (["--to", *BOARDS, "--port", "80"], "--port"),
        (["--to", *BOARDS[1:], "pi:99999"], "no port has the number 99999"),
        (["--to", *BOARDS, "--folder", ""], "--folder: '' is no folder"),
        (["--to", *BOARDS, "--folder", "/"], "--folder: '/' is no folder"),
    ],
)
def test_what_cannot_be_deployed_is_refused(network_folder, folder, words, said):
    with pytest.raises(SystemExit) as error:
        main(["deploy", str(network_folder), *words])
    assert said in str(error.value)
    assert not list(folder.iterdir())


def test_without_ansible_it_says_what_to_install(network_folder, folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as error:
        main(["deploy", str(network_folder), "--to", *BOARDS])
    assert "ansible-core" in str(error.value)
    assert not (folder / "cluster.yaml").exists()


def test_only_one_rollout_at_a_time(network_folder, folder, monkeypatch):
    write_certificates(Path("certs"), ["coordinator"])
    monkeypatch.setattr(rollout, "play", lambda *_: pytest.fail("plays"))
    monkeypatch.setattr(rollout, "find_ansible", lambda: "ansible-playbook")
    with only_one(Path("certs")), pytest.raises(SystemExit) as error:
        main(["deploy", str(network_folder), "--to", *BOARDS])
    assert "certs: another rollout with these certificates is under way" in str(error.value)
    assert not (folder / "cluster.yaml").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_rollout_that_is_told_to_stop_goes_back(network_folder, folder, monkeypatch, number):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what runs in its background ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and `nohup` this one
    (folder / "cluster.yaml").write_text("former")
    played = []

    def play(name, inventory, *_):
        played.append((name, inventory))
        if name == "replace.yaml":
            assert (folder / "cluster.yaml").read_text() != "former"
            signal.raise_signal(number)
        return True

    monkeypatch.setattr(rollout, "play", play)
    monkeypatch.setattr(rollout, "find_ansible", lambda: "ansible-playbook")
    try:
        with pytest.raises(SystemExit) as error:
            main(["deploy", str(network_folder), "--to", *BOARDS])
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert error.value.code == 128 + number
    assert [name for name, _ in played] == ["replace.yaml", "restore.yaml"]
    assert (folder / "cluster.yaml").read_text() == "former"
    assert not played[0][1].parent.exists(), "keys of boards are left behind"


INTERRUPTED = """\
import signal, sys, time
from pathlib import Path
if "restore.yaml" in sys.argv[-1]:
    Path("restored").write_text(f"{Path('ended').exists()} {signal.getsignal(signal.SIGINT) == signal.SIG_IGN}")
    sys.exit(1)
try:
    Path("begun").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    Path("ended").touch()
"""


@pytest.mark.parametrize(
    ("number", "handler"),
    [
        (signal.SIGTERM, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_IGN),  # of a script, in its background
        (signal.SIGINT, signal.default_int_handler),
    ],
)
def test_boards_go_back_once_ansible_has_ended_and_it_is_said_if_they_cannot(network_folder, folder, number, handler):
    (folder / "ansible.py").write_text(INTERRUPTED)
    code = "import sys; from nonn import cli; from nonn.live import rollout; "
    code += "rollout.find_ansible = lambda: 'ansible-playbook'; cli.main(sys.argv[1:])"
    program = folder / "ansible-playbook"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} ansible.py "$@"\n')
    program.chmod(0o700)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "deploy", str(network_folder), "--to", *BOARDS],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
        start_new_session=True,
    )
    try:
        while process.poll() is None and not (folder / "begun").exists():
            time.sleep(0.05)
        if number == signal.SIGINT:  # which a terminal sends to Ansible, too
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (folder / "restored").read_text() == "True True"
    assert "Not all boards could be put back." in said
    assert process.returncode == 128 + number
    assert not (folder / "cluster.yaml").exists()


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.usefixtures("folder")
def test_a_file_system_without_locks_is_one_line(monkeypatch, number):
    write_certificates(Path("certs"), ["coordinator"])

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rollout.fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"^certs/ca\.pem: cannot be locked \("), only_one(Path("certs")):
        pytest.fail("locked")
    write_certificates(Path("certs"), ["node-0"])


@pytest.mark.slow
def test_boards_serve_an_export_and_the_former_one_again_if_one_fails(exports, folder, capsys):  # noqa: F811
    if not (Path(sys.executable).parent / "ansible-playbook").exists():
        pytest.skip("the extra boards is not installed")
    python = folder / "python"  # on boards, nonn is installed; here it is this copy
    python.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} "$@"\n')
    python.chmod(0o700)
    former, new = exports

    def health() -> str:
        main(["health"])
        return capsys.readouterr().out

    with ssh_server(folder / "ssh") as port, socket.socket() as taken:
        boards = [f"{getpass.getuser()}@127.0.0.1:{port}"] * 3
        common = ["--to", *boards, "--folder", str(folder / "nonn"), "--python", str(python), "--deadline-ms", "5000"]
        common += ["--ssh-args", f"-F {folder / 'ssh/client'}"]
        first = 21000 + port % 1000 * 8
        try:
            for export in exports:
                main(["deploy", str(export), *common, "--port", str(first)])
                assert load_cluster().export.resolve() == export.resolve()
                assert health().count("serves") == 3
            taken.bind(("0.0.0.0", first + 6))
            taken.listen()
            with pytest.raises(SystemExit) as error:
                main(["deploy", str(former), *common, "--port", str(first + 4), "--wait", "4"])
            assert "All boards that can be reached serve again" in str(error.value)
            assert load_cluster().export.resolve() == new.resolve()
            main(["health", "--wait", "30"])
            assert [len(list((folder / f"nonn/node-{i}").glob("2*"))) for i in range(3)] == [1, 1, 1]
        finally:
            for pid in (folder / "nonn").glob("node-*/pid"):
                subprocess.run(["start-stop-daemon", "--stop", "--oknodo", "--pidfile", pid], check=False)
