"""The command ``nonn deploy``: an exported network onto boards, by SSH and Ansible, one board after another.

Each board gets a folder with its student, its certificate and what starts the node: a release. A link says which
release is served, so that the one before is there to go back to. Once a board's node does not answer as the new export,
all boards serve again what they served before.

References
----------
.. [1] https://docs.ansible.com/ansible-core/devel/
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import io
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nonn.core.errors import UserError
from nonn.core.files import restored_on_error, scratch_folder, write_json
from nonn.core.interrupts import stoppable, undisturbed
from nonn.core.options import amount
from nonn.core.params import load_params
from nonn.core.paths import Paths
from nonn.core.progress import log
from nonn.live.following import FILE_POLL_S
from nonn.runtime.certs import write_certificates
from nonn.runtime.cluster import CLUSTER_FILE, Cluster, Node, Tls, check_deadline, check_ports, write_cluster
from nonn.runtime.coordinator import MAX_PAUSE_S
from nonn.runtime.exported import read_manifest, read_student_file
from nonn.runtime.tls import CA, CERTIFICATE

#: Files of the package for boards: playbooks, a script and a unit of systemd.
PARTS = Path(__file__).parent / "boards"
#: Where nodes and the package are on a board, from the home of its user.
FOLDER, PYTHON = "nonn", "nonn/.venv/bin/python"
#: Seconds that a board has until its node answers, and from then on until the next board is looked at: a coordinator
#: has then found the node.
WAIT, PAUSE = 60.0, math.ceil(MAX_PAUSE_S + FILE_POLL_S)  # Ansible waits whole seconds only
#: Seconds that Ansible has to end by itself once Ctrl-C has also interrupted it.
GRACE = 10.0
#: Of a board: a user, if not that of this machine; a host; the port of its SSH server, if not 22.
TARGET = re.compile(r"(?:([A-Za-z0-9_.-]+)@)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(?::([0-9]{1,5}))?")
NODE_SCRIPT = """\
#!/bin/sh
cd "$(dirname "$0")" && exec {command}
"""


@dataclass(frozen=True)
class SshTarget:
    """A machine that is reached by SSH."""

    user: str | None
    host: str
    port: int | None

    @classmethod
    def of(cls, text: str) -> SshTarget:
        """The board of ``user@host:port``, or a `UserError`."""
        if not (found := TARGET.fullmatch(text)):
            raise UserError(f"--to: {text!r} is no board. Write host, user@host or user@host:port.")
        user, host, port = found.groups()
        if port and not 0 < int(port) < 65536:
            raise UserError(f"--to: {text!r}: no port has the number {port}. Give the one of its SSH server.")
        return cls(user, host, int(port) if port else None)

    def variables(self) -> dict[str, str | int]:
        """The board's variables in an inventory of Ansible."""
        variables = {"ansible_host": self.host.strip("[]"), "ansible_user": self.user, "ansible_port": self.port}
        return {name: value for name, value in variables.items() if value is not None}


@dataclass(frozen=True)
class Rollout:
    """The settings of a deployment that are the same for all boards."""

    export: Path
    cluster: Cluster
    folder: str  # of nodes on boards; if it is relative, from the user's home
    python: str  # that has the package there, likewise
    release: str  # name of the folders that this rollout makes

    def archive_of(self, node: Node) -> bytes:
        """The release of a node, as a tar file: all that it needs besides the package."""
        manifest = read_manifest(self.export)
        student = next(student for student in manifest.students if student.model == node.model)
        identity = self.cluster.identity(node.name)
        assert identity, "a rollout has certificates"
        assert self.cluster.tls
        identity.for_server()  # refuses what cannot be used before anything is copied
        listening = f"{'[::]' if node.address.startswith('[') else '0.0.0.0'}:{node.address.rpartition(':')[2]}"
        words = ["node", student.file, "--address", listening]
        words += ["--cert", "node.pem", "--key", "node.key", "--ca", CA, "--allow", self.cluster.tls.coordinator]
        command = f"{from_home(self.python)} -m nonn {shlex.join(words)}"
        unit = (PARTS / "node.service").read_text(encoding="utf-8")
        folder = self.folder.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')  # as systemd reads it
        place = folder if folder.startswith("/") else f"%h/{folder}"
        files = {
            student.file: (read_student_file(self.export, manifest, student), 0o600),
            "manifest.json": ((self.export / "manifest.json").read_bytes(), 0o600),
            "node.pem": (identity.certificate.read_bytes(), 0o600),
            "node.key": (identity.key.read_bytes(), 0o600),
            CA: (identity.ca.read_bytes(), 0o600),
            "node.sh": (NODE_SCRIPT.format(command=command).encode(), 0o700),
            "node.service": (unit.format(folder=f"{place}/{node.name}").encode(), 0o600),
            "switch.sh": ((PARTS / "switch.sh").read_bytes(), 0o700),
        }
        return packed(files)

    def inventory(self, boards: Sequence[SshTarget], archives: Path) -> dict:
        """Ansible's inventory of the boards; their archives are written into a folder."""
        hosts = {}
        for board, node in zip(boards, self.cluster.nodes, strict=True):
            archive = archives / f"{node.name}.tar"
            archive.write_bytes(self.archive_of(node))
            place = {"archive": str(archive), "folder": f"{self.folder}/{node.name}"}
            hosts[node.name] = {**board.variables(), **place, "ansible_python_interpreter": self.python}
        common = {"release": self.release, "here": sys.executable, "pause": PAUSE}
        return {"boards": {"hosts": hosts, "vars": common}}


def packed(files: dict[str, tuple[bytes, int]]) -> bytes:
    """A tar file of files with their contents and modes."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, (data, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            archive.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def from_home(path: str) -> str:
    """A path for a shell: a relative one from the user's home."""
    return shlex.quote(path) if path.startswith("/") else f'"$HOME"/{shlex.quote(path)}'


def placed_on(boards: Sequence[SshTarget], export: Path, certificates: Path, port: int, deadline_ms: float) -> Cluster:
    """The cluster of an export whose students are on these boards, in their order, on consecutive ports."""
    students = read_manifest(export).students
    if len(boards) != len(students):
        raise UserError(f"--to: {len(boards)} boards for the {len(students)} students of {export}.")
    check_ports(port, len(students))
    check_deadline(deadline_ms)
    nodes = [
        Node(name=f"node-{student.model}", address=f"{board.host}:{port + i}", model=student.model)
        for i, (board, student) in enumerate(zip(boards, students, strict=True))
    ]
    return Cluster(export=export, deadline_ms=deadline_ms, tls=Tls(folder=certificates), nodes=nodes)


def complete_certificates(cluster: Cluster) -> None:
    """Make the certificates that are missing."""
    assert cluster.tls, "a rollout has certificates"
    names = [cluster.tls.coordinator, *(node.name for node in cluster.nodes)]
    if missing := [name for name in names if not (cluster.tls.folder / CERTIFICATE.format(name)).exists()]:
        write_certificates(cluster.tls.folder, missing)
        log(f"{cluster.tls.folder}: certificates for {', '.join(missing)}")


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[int]:
    """A lock on a folder of certificates, held on the authority's file, since `nonn certs` locks the folder itself.

    Yields its file descriptor, for child processes that have to hold it if this one is killed.

    Raises
    ------
    UserError
        Another process holds it.
    """
    is_ours = os.access(folder / CA, os.W_OK)
    lock = os.open(folder / CA, os.O_RDWR if is_ours else os.O_RDONLY)  # NFS locks only writable files
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another rollout with these certificates is under way. Wait until it ends."
            ) from None
        except OSError as error:
            reason = os.strerror(error.errno or 0).lower()
            raise UserError(f"{folder / CA}: cannot be locked ({reason}). Keep it on a disk of this machine.") from None
        yield lock
    finally:
        os.close(lock)


def find_ansible() -> str:
    """The program that runs playbooks; a UserError if it is not installed."""
    beside = Path(sys.executable).parent / "ansible-playbook"
    program = str(beside) if beside.exists() else shutil.which("ansible-playbook")
    if program is None:
        raise UserError("ansible-playbook: not found. Install ansible-core, or nonn with the extra `boards`.")
    return program


def play(name: str, inventory: Path, settings: dict, ssh_arguments: str, lock: int) -> bool:
    """Run one of the playbooks, and return whether it succeeded; Ansible writes on standard error what it does."""
    command = [
        find_ansible(),
        "--inventory",
        str(inventory),
        *([f"--ssh-common-args={ssh_arguments}"] if ssh_arguments else []),  # their value begins with a dash
    ]
    for key, value in settings.items():
        command += ["--extra-vars", f"{key}={shlex.quote(str(value))}"]
    quiet = {"ANSIBLE_NOCOWS": "1", "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "0", "ANSIBLE_LOCALHOST_WARNING": "0"}
    environment = {**quiet, "ANSIBLE_PIPELINING": "1", **os.environ}
    stderr = 2
    command.append(str(PARTS / name))
    with stoppable():
        process = subprocess.Popen(command, stdout=stderr, env=environment, pass_fds=[lock])
    with process:
        try:
            return not process.wait()
        except BaseException as error:
            with undisturbed():
                log("waiting until Ansible has ended")
                # A terminal sends Ctrl-C to Ansible, too; a second one would interrupt its ending.
                if isinstance(error, KeyboardInterrupt) and not error.args:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE)
                process.send_signal(signal.SIGINT)  # on which Ansible ends its work on boards
                process.wait()
            raise


def go_back(inventory: Path, ssh_arguments: str, lock: int) -> str:
    """Have boards serve their former release, despite signals; returns a sentence about the outcome."""
    log("going back to what was served before")
    with undisturbed():
        is_restored = play("restore.yaml", inventory, {}, ssh_arguments, lock)
    if is_restored:
        return "All boards that can be reached serve again what they served before."
    return "Not all boards could be put back."


def roll_out(
    rollout: Rollout, boards: Sequence[SshTarget], cluster_file: Path, wait: float, ssh_arguments: str
) -> None:
    """Serve an export on boards, and describe them in a cluster file; if one fails, all go back to the former state.

    Raises
    ------
    UserError
        A board cannot be reached, its node does not answer as the new export, or another rollout is under way.
    """
    assert rollout.cluster.tls, "a rollout has certificates"
    with (
        only_one(rollout.cluster.tls.folder) as lock,
        scratch_folder() as folder,
        restored_on_error(cluster_file),
    ):
        inventory = folder / "inventory.json"
        write_json(inventory, rollout.inventory(boards, folder))
        write_cluster(cluster_file, rollout.cluster)  # from here on, a coordinator that follows it knows both exports
        settings = {"cluster": cluster_file.resolve(), "wait": wait}
        try:
            is_done = play("replace.yaml", inventory, settings, ssh_arguments, lock)
        except BaseException:
            log(go_back(inventory, ssh_arguments, lock))
            raise
        if not is_done:
            then = go_back(inventory, ssh_arguments, lock)
            raise UserError(f"{rollout.export}: not deployed, for the reason that Ansible gives above. {then}")


def export_of(name: str) -> Path:
    """The folder of an export, or of an exported network of params.yaml."""
    if (Path(name) / "manifest.json").is_file():
        return Path(name)
    params = load_params()
    if name not in params.networks:
        raise UserError(f"{name!r} is no folder of an export, and params.yaml has only {', '.join(params.networks)}.")
    return Paths(params.experiment).export(name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", metavar="NETWORK", help="an exported network of params.yaml, or its folder")
    parser.add_argument("--to", nargs="+", required=True, metavar="BOARD", help="user@host:port, one for each student")
    parser.add_argument(
        "--cluster",
        type=Path,
        default=CLUSTER_FILE,
        metavar="FILE",
        help="cluster file to write (default: %(default)s)",
    )
    parser.add_argument(
        "--certs", type=Path, default=Path("certs"), help="folder of `nonn certs` (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=7100, help="of the first node (default: %(default)s)")
    parser.add_argument("--deadline-ms", type=amount, default=100.0, help="time for one image (default: %(default)s)")
    parser.add_argument("--folder", default=FOLDER, help="on boards, from the home (default: %(default)s)")
    parser.add_argument("--python", default=PYTHON, help="that has nonn there, from the home (default: %(default)s)")
    parser.add_argument(
        "--wait", type=amount, default=WAIT, metavar="S", help="for a node to answer (default: %(default)s)"
    )
    parser.add_argument("--ssh-args", default="", metavar="ARGS", help="for ssh, such as '-F FILE'")
    parser.epilog = "example: nonn deploy 2s --to pi@kitchen.local pi@hall.local"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn deploy``."""
    boards, export = [SshTarget.of(text) for text in options.to], export_of(options.export)
    if not (folder := options.folder.rstrip("/")):
        raise UserError(f"--folder: {options.folder!r} is no folder of nodes alone. Name one, such as {FOLDER}.")
    cluster = placed_on(boards, export, options.certs, options.port, options.deadline_ms)
    find_ansible()
    complete_certificates(cluster)
    release = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}"
    rollout = Rollout(export, cluster, folder, options.python, release)
    roll_out(rollout, boards, options.cluster, options.wait, options.ssh_args)
    log(f"{options.cluster}: {len(boards)} boards serve {export}")
    log(f"then: nonn coordinate --follow --cluster {options.cluster}")
