"""A project: a folder outside of any clone, with parameters and results of its own.

All else is the installed package's. ``dvc.yaml`` is a copy of the clone's, and the link ``nonn`` leads to the code that
it lists: so DVC compares the same paths and contents as in a clone, an update of the package runs those stages again
whose code has changed, and trainings travel between clones and projects.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nonn
from nonn import project
from nonn.core.errors import UserError
from nonn.core.files import remove, write_text

#: Made once, as the profiles are, for users to edit.
SNAKEFILE = Path("workflow/Snakefile")
INCLUDE = """\
from nonn.commands.project import prepare


# The workflow of the installed package nonn. Rules of your own may follow.
include: prepare()


rule project:
    default_target: True
    input:
        rules.all.input,
"""
#: Link to the package's folder. Git ignores it, since it differs from machine to machine.
LINK = Path("nonn")
#: Copies of files of the package, renewed when the package has changed.
COPIES = {
    Path("dvc.yaml"): project.STAGES,
    Path("workflow/params.schema.json"): project.WORKFLOW / "params.schema.json",
}


@contextlib.contextmanager
def created(folder: Path) -> Iterator[None]:
    """Make the folder of a project, without parameters yet; if that or the block fails, all is as it was.

    Raises
    ------
    UserError
        Something is there already, or the operating system refuses.
    """
    was_there = os.path.lexists(folder)
    if was_there and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already. Choose another name, or an empty folder.")

    try:
        create(folder)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            for path in folder.iterdir() if was_there else [folder]:
                remove(path)
        raise


def create(folder: Path) -> None:
    for name, source in project.SETTINGS.items():
        more = f"/{LINK}\n" if name == ".gitignore" else ""
        write_text(folder / name, source.read_text(encoding="utf-8") + more)
    write_text(folder / ".dvc/.gitignore", "/config.local\n/tmp\n/cache\n")  # as `dvc init` does
    for source in (project.WORKFLOW / "profiles").rglob("*.yaml"):
        write_text(folder / "workflow" / source.relative_to(project.WORKFLOW), source.read_text(encoding="utf-8"))
    (folder / SNAKEFILE.parent / "experiments").mkdir()
    write_text(folder / SNAKEFILE, INCLUDE)
    refresh(folder)
    keep_versions(folder)


def keep_versions(folder: Path) -> None:
    """Make a git repository, unless the folder lies in one; without git, DVC has to be told so."""
    if shutil.which("git") is None:
        write_text(folder / ".dvc/config.local", "[core]\n    no_scm = true\n")
    elif subprocess.run(["git", "rev-parse"], cwd=folder, capture_output=True, check=False).returncode:
        made = subprocess.run(["git", "init", "--quiet"], cwd=folder, capture_output=True, text=True, check=False)
        if made.returncode:
            raise UserError(
                f"{folder}: git cannot make a repository there ({made.stderr.strip()}). Choose another place."
            )


def is_project(folder: Path = Path()) -> bool:
    """Whether a folder is a project; a clone, which has the code itself, is not."""
    snakefile = folder / SNAKEFILE
    return snakefile.is_file() and prepare.__module__.encode() in snakefile.read_bytes()


def refresh(folder: Path = Path()) -> None:
    """Point the link of a project to the running package, and renew its copies; does nothing in a clone."""
    if not is_project(folder):
        return
    link, package = folder / LINK, Path(nonn.__file__).resolve().parent
    if link.exists() and not link.is_symlink():
        raise UserError(f"{link}: has to be a link to the package. Move what is there away.")
    if link.resolve() != package:
        remove(link)
        link.symlink_to(package)
    for copy, source in COPIES.items():
        content, file = source.read_text(encoding="utf-8"), folder / copy
        if not file.is_file() or file.read_bytes() != content.encode():
            if file.exists():
                print(f"{copy}: written anew, as of nonn {nonn.__version__}", file=sys.stderr)
            write_text(file, content)


def prepare() -> str:
    """Refresh the project in the working directory, for its Snakefile; return the path of the package's."""
    refresh()
    return str(project.WORKFLOW / "Snakefile")
