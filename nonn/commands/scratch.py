"""Scratch copies of the repository, for campaigns that run the pipeline itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nonn.core.errors import UserError
from nonn.core.files import STATE
from nonn.core.paths import DVC_LOCK


@dataclass
class ScratchRepository:
    """A copy of the repository; commands in it run its code, and keep their temporary files in it."""

    folder: Path
    longest: float | None = None  # seconds that a command may take; None: for ever

    @property
    def temporary(self) -> Path:
        return self.folder / STATE / "tmp"

    @property
    def environment(self) -> dict[str, str]:
        self.temporary.mkdir(parents=True, exist_ok=True)  # programs ignore a missing TMPDIR
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        variables = {"PATH": path, "PYTHONPATH": str(self.folder), "TMPDIR": str(self.temporary)}
        return {**os.environ, **variables, "PYTHONDONTWRITEBYTECODE": "1"}

    def start(self, command: Sequence[str], prepare: Callable[[], None] | None = None) -> subprocess.Popen:
        """Start a command in a session of its own, so that it can be stopped with all its processes."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=prepare,
        )

    def call(self, command: Sequence[str], prepare: Callable[[], None] | None = None) -> tuple[int, str]:
        """Exit code and output of a command; the code is −1 if it takes too long."""
        process = self.start(command, prepare)
        try:
            output, _ = process.communicate(timeout=self.longest)
        except BaseException as error:  # the folder will be deleted
            end_all([process], signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return -1, f"it did not end within {self.longest:.0f} s"
            raise
        return process.returncode, output


def end_all(processes: Sequence[subprocess.Popen], number: int, seconds: float | None = None) -> None:
    """Send a signal to processes and all that they have started, and wait for them at most so long."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def copy_repository(folder: Path, source: Path = Path()) -> None:
    """Copy the files that git knows in a clone, without results, into a new repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError("git ls-files: failed. Run this from the top folder of a clone.")
    for name in filter(None, done.stdout.split("\0")):
        is_there = (source / name).is_file() or (source / name).is_symlink()
        if is_there and not name.startswith(("results/", str(DVC_LOCK))):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, folder / name, follow_symlinks=False)
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
