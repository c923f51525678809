"""Results as the documentation shows them, whatever a run on this machine has written since."""

import subprocess
from pathlib import Path

from experiments import REPOSITORY

from nonn.commands.docs import RESULTS


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout


def summaries() -> dict[str, str]:
    """``summary.md`` of each experiment in git: as committed, or as it lies there if the page of results is edited."""
    is_edited = bool(git("status", "--porcelain", str(RESULTS)))
    return {
        Path(name).parent.name: (REPOSITORY / name).read_text() if is_edited else git("show", f":{name}")
        for name in git("ls-files", "results/*/summary.md").split()
    }
