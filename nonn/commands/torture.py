"""The command ``nonn torture``: kill stages, fill the disk and damage files at random, and compare what comes of it.

In a scratch copy of the repository, with the parameters that are active. After each disturbance the pipeline is run
again, and what it then has written must be, byte for byte, what an undisturbed run has written. Measured times are left
out of the comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nonn.commands.scratch import ScratchRepository, copy_repository
from nonn.core.errors import UserError
from nonn.core.files import STATE, TEMPORARY, remove, scratch_folder
from nonn.core.options import amount, natural, seed_number
from nonn.core.params import load_params
from nonn.core.paths import TIMED, TIMED_SUMMARIES
from nonn.core.progress import log, track

#: Stages that have checkpoints.
TRAINED = ("teacher", "distill", "baseline")
#: Commands that make all artifacts, in this order.
JOBS, REPRO = [sys.executable, "-m", "nonn", "jobs"], ["dvc", "repro", "-q"]
#: A repeated run counts as hanging after so many times the time of the undisturbed run, plus a minute.
SLOWER, MINUTE = 10.0, 60.0


@dataclass(frozen=True)
class Outcome:
    """Result of a disturbed command and of the run after it."""

    kind: str
    job: str
    undone: bool  # whether the disturbance hit before the command had finished
    problem: str  # empty: the same bytes


@dataclass
class DisturbedRepository(ScratchRepository):
    """A repository whose experiment has run undisturbed and may now be disturbed."""

    expected: dict[str, str] = field(default_factory=dict)
    generator: random.Random = field(default_factory=lambda: random.Random(0))

    def digests(self) -> dict[str, str]:
        """SHA-256 of every artifact that holds no times."""
        roots = sorted((self.folder / "results").iterdir())
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for root in roots
            for path in sorted(root.rglob("*"))
            if path.is_file() and not is_timed(path.relative_to(root))
        }

    def differences(self) -> str:
        """The differences from an undisturbed run; empty if there are none."""
        found = self.digests()
        names = sorted(n for n in {*found, *self.expected} if found.get(n) != self.expected.get(n))
        found_left = (path for path in self.folder.rglob(f"{TEMPORARY}*") if self.temporary not in path.parents)
        left = [str(path.relative_to(self.folder)) for path in found_left]
        return ", ".join([*(f"{name} differs" for name in names[:3]), *(f"{name} is left" for name in left[:3])])

    def again(self, command: Sequence[str]) -> str:
        """Run a command to its end; return what failed or differs."""
        remove(self.temporary)  # left by killed processes
        code, output = self.call(command)
        return f"exit {code}: {output[-500:]}" if code else self.differences()


def is_timed(path: Path) -> bool:
    """Whether an artifact, named from its experiment's folder, holds measured times or is no result at all."""
    summary = path.parts[0] == "figures" or len(path.parts) == 1
    is_measured = path.parts[0] in TIMED or (summary and path.stem in TIMED_SUMMARIES)
    return is_measured or path.name == ".snakemake_timestamp"


def kill(
    repository: DisturbedRepository, job: str, disturbed: Sequence[str], undisturbed: Sequence[str], within: float
) -> Outcome:
    """Kill a command and all that it has started, at a random moment; then run the other one to its end."""
    process = repository.start(disturbed)
    try:
        time.sleep(repository.generator.uniform(0, within))
    finally:
        undone = process.poll() is None
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            undone = False
    process.communicate()
    return Outcome("kill", job, undone, repository.again(undisturbed))


def fill(
    repository: DisturbedRepository, job: str, disturbed: Sequence[str], undisturbed: Sequence[str], largest: int
) -> Outcome:
    """Limit files to a random size, as a full disk would; the command must report that in one line."""
    limit = repository.generator.randrange(largest)
    code, output = repository.call(disturbed, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    if "Traceback" in output:
        return Outcome("full disk", job, bool(code), f"a traceback at {limit} bytes: {output[-300:]}")
    return Outcome("full disk", job, bool(code), repository.again(undisturbed))


def flip(repository: DisturbedRepository, path: Path) -> None:
    """Change one byte of a file, even if it is read-only."""
    content = bytearray(path.read_bytes())
    content[repository.generator.randrange(len(content))] ^= 1 << repository.generator.randrange(8)
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)


def damage_artifact(repository: DisturbedRepository, undisturbed: Sequence[str]) -> Outcome:
    """Damage one of the artifacts."""
    root = next((repository.folder / "results").iterdir())
    path = root / repository.generator.choice(sorted(repository.expected))
    flip(repository, path)
    return Outcome("damaged artifact", str(path.relative_to(root)), True, repository.again(undisturbed))


def damage_cache(repository: DisturbedRepository, undisturbed: Sequence[str]) -> Outcome:
    """Damage an object of DVC's cache and delete the results."""
    objects = sorted(
        p for p in (repository.folder / ".dvc/cache/files/md5").rglob("*") if p.is_file() and p.stat().st_size
    )
    path = repository.generator.choice(objects)
    flip(repository, path)
    for root in (repository.folder / "results").iterdir():
        remove(root)
    return Outcome("damaged cache", path.name[:8], True, repository.again(undisturbed))


def damage_checkpoint(
    repository: DisturbedRepository, job: str, disturbed: Sequence[str], undisturbed: Sequence[str]
) -> Outcome:
    """Kill a training after its first checkpoint, damage the checkpoint, and resume."""
    process = repository.start(disturbed)
    found: list[Path] = []
    try:
        while process.poll() is None and not found:
            checkpoints = sorted((repository.folder / STATE / "checkpoints").glob("*.safetensors"))
            found = [path for path in checkpoints if not path.name.startswith(TEMPORARY)]
            time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    found = [path for path in found if path.exists()]
    for path in found:
        flip(repository, path)
    return Outcome("damaged checkpoint", job, bool(found), repository.again(undisturbed))


def trials(repository: DisturbedRepository, addresses: Sequence[str], tries: int) -> Iterator[Outcome]:
    """Outcomes of so many kills of each stage, and so many damaged artifacts and objects."""
    usual_way = ["sh", "-c", f"{shlex.join(JOBS)} && {shlex.join(REPRO)}"]
    largest = max(path.stat().st_size for path in (repository.folder / "results").rglob("*") if path.is_file())
    for address in addresses:
        forced = [*REPRO, "--force", "--single-item", address]
        start = time.monotonic()
        if problem := repository.again(forced):
            yield Outcome("run again", address, False, problem)
        usual = time.monotonic() - start
        for _ in range(tries):
            yield kill(repository, address, forced, usual_way, usual)
        yield fill(repository, address, forced, usual_way, largest)
        if address.startswith(TRAINED):
            yield damage_checkpoint(repository, address, forced, usual_way)
    for _ in range(tries):
        yield damage_artifact(repository, usual_way)
        yield damage_cache(repository, usual_way)


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts by kind, and a line for each outcome that is wrong."""
    lines = [f"{'disturbance':<20}{'tries':>6}{'hit':>6}{'same bytes':>12}"]
    counts = Counter(o.kind for o in outcomes)
    for kind, tries in counts.items():
        hits = sum(o.undone for o in outcomes if o.kind == kind)
        same = sum(not o.problem for o in outcomes if o.kind == kind)
        lines.append(f"{kind:<20}{tries:>6}{hits:>6}{same:>12}")
    lines += [f"{o.kind}, {o.job}: {o.problem}" for o in outcomes if o.problem]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tries", type=natural, default=20, metavar="N", help="kills a stage (default: %(default)s)")
    parser.add_argument("--seconds", type=amount, default=float("inf"), help="begin nothing new after (default: none)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of what is random (default: %(default)s)")
    parser.epilog = "example: nonn torture --tries 2"


def run(options: argparse.Namespace) -> None:
    """Disturb every stage, print the table, and end with 1 if a byte differs."""
    load_params()
    begun = time.monotonic()
    with scratch_folder() as folder:
        copy_repository(folder)
        repository = DisturbedRepository(folder, generator=random.Random(options.seed))
        log("an undisturbed run first, as long as the pipeline takes; its bytes are what others are compared with")
        for command in (JOBS, REPRO):
            code, output = repository.call(command)
            if code:
                raise UserError(f"the undisturbed run failed, so there is nothing to compare with: {output[-500:]}")
        repository.longest = MINUTE + SLOWER * (time.monotonic() - begun)
        repository.expected = repository.digests()
        listing = ["dvc", "stage", "list", "--name-only"]
        listed = subprocess.check_output(listing, cwd=folder, env=repository.environment, text=True)
        first: dict[str, str] = {}
        for address in listed.split():
            first.setdefault(address.partition("@")[0], address)
        trained = sum(address.startswith(TRAINED) for address in first.values())
        total = len(first) * (options.tries + 1) + trained + 2 * options.tries
        outcomes: list[Outcome] = []
        for outcome in track(trials(repository, [*first.values()], options.tries), "disturbances", total=total):
            outcomes.append(outcome)
            log(f"{outcome.kind}, {outcome.job}: {outcome.problem or 'the same bytes'}")
            if time.monotonic() - begun > options.seconds:
                break
    print(table(outcomes))
    if wrong := sum(bool(outcome.problem) for outcome in outcomes):
        raise UserError(f"{wrong} of {len(outcomes)} disturbances changed what the pipeline writes.")
