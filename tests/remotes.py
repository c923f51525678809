"""What a DVC remote has to do: one clone trains and pushes, others at other paths fetch and train nothing."""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from test_pipeline import BIN, Clone

TRAINED = "results/tiny/teacher.safetensors"
SNAKEMAKE, REPRO = [BIN / "snakemake", "--cores", "2", TRAINED], [BIN / "dvc", "repro", "teacher"]


def check_that_trainings_travel(folder: Path, configure: Callable[[Clone], None], secrets: Collection[str]) -> None:
    """Train in one clone, and fetch from a remote in two others: by the run cache alone, and by ``dvc.lock``."""
    here = Clone(folder / "here")
    others = here.copied(folder / "unlike"), here.copied(folder / "alike")
    for clone in (here, *others):
        configure(clone)
        kept = (clone.folder / ".dvc/config").read_text()
        assert not [secret for secret in secrets if secret in kept]
    assert "teacher" in here.stages_of(SNAKEMAKE)
    here.call([BIN / "dvc", "push", "--run-cache"])
    unlike, alike = others
    assert unlike.stages_of([*REPRO, "--pull"]) == []  # has a dvc.lock of its own
    shutil.copy(here.folder / "dvc.lock", alike.folder)  # as git brings it
    alike.call([BIN / "dvc", "pull", "dataset", "teacher"])
    for clone in others:
        ran = clone.stages_of(SNAKEMAKE) + clone.stages_of(REPRO)
        assert not ran, f"{clone.folder.name}: ran {ran}"
        assert (clone.folder / TRAINED).read_bytes() == (here.folder / TRAINED).read_bytes()
