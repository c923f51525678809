"""Where every artifact of an experiment lies. The same paths stand in ``dvc.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nonn.core.files import STATE, TEMPORARY, remove, remove_orphans
from nonn.core.jobs import list_jobs
from nonn.core.params import SOLO, Params

#: What DVC has run, with the hashes of what was read and written.
DVC_LOCK = Path("dvc.lock")
#: Stages that measure times, which differ from run to run, and the folders that they write into.
TIMED = ("benchmark", "distributed")
#: Names of the summaries and figures that hold such times, or numbers derived from them.
TIMED_SUMMARIES = ("summary", "metrics", "claims", "distributed", "ratios", "communication", "latency", "scaling")


@dataclass(frozen=True)
class Paths:
    """Paths of one experiment, relative to the repository."""

    experiment: str

    @property
    def root(self) -> Path:
        return Path("results", self.experiment)

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @property
    def dataset(self) -> Path:
        return self / "dataset.safetensors"

    @property
    def dataset_info(self) -> Path:
        return self / "dataset.json"

    @property
    def teacher_images(self) -> Path:
        """The images at the teacher's size; empty if the students have the same size."""
        return self / "teacher_images.safetensors"

    @property
    def teacher(self) -> Path:
        return self / "teacher.safetensors"

    @property
    def teacher_info(self) -> Path:
        return self / "teacher.json"

    @property
    def signals(self) -> Path:
        return self / "signals.safetensors"

    @property
    def graph(self) -> Path:
        return self / "graph.safetensors"

    @property
    def graph_info(self) -> Path:
        return self / "graph.json"

    def filter_counts(self, network: str) -> Path:
        """Number of filters for each student, decided from the devices' budgets."""
        return self / f"design/{network}/sizes.json"

    def candidates(self, network: str) -> Path:
        """Cost of some of the students that the design chose from."""
        return self / f"design/{network}/candidates.json"

    def design(self, network: str, name: str | int) -> Path:
        """Architecture of a student (0, 1, …), or those of a baseline's students (its method)."""
        return self / f"design/{network}" / _file_of(name)

    def partition(self, network: str, name: str | int) -> Path:
        """Filters of a student (0, 1, …), or those of a baseline's students (its method)."""
        return self / f"partition/{network}" / _file_of(name)

    def partition_info(self, network: str) -> Path:
        return self / f"partition/{network}/summary.json"

    def student(self, network: str, student: int | str, seed: int) -> Path:
        return self / f"students/seed{seed}/{network}/{student}.safetensors"

    def baseline(self, network: str, method: str, seed: int) -> Path:
        return self / f"baselines/seed{seed}/{network}/{method}.safetensors"

    def network(self, network: str, seed: int) -> Path:
        """An assembled network: all students and the final layer."""
        return self / f"networks/seed{seed}/{network}.safetensors"

    @property
    def evaluation(self) -> Path:
        return self / "evaluation.json"

    def export(self, name: str) -> Path:
        """Folder of ONNX files of a network, or of the ``solo`` models."""
        return self / f"export/{name}"

    def benchmark(self, name: str) -> Path:
        return self / f"benchmark/{name}.json"

    def cluster(self, network: str) -> Path:
        """The ``cluster.yaml`` of a network's nodes on this machine."""
        return self / f"cluster/{network}.yaml"

    def distributed(self, name: str) -> Path:
        return self / f"distributed/{name}.json"

    @property
    def firmware(self) -> Path:
        """Figures of the students of microcontrollers."""
        return self / "firmware.json"

    def log(self, artifact: Path) -> Path:
        """Training log beside a weights file."""
        return artifact.with_suffix(".csv")


def _file_of(name: str | int) -> str:
    return f"students/{name}.json" if str(name).isdigit() else f"baselines/{name}.json"


def remove_unfinished(paths: Paths) -> None:
    """Delete unfinished files of killed processes in all folders that commands write into."""
    remove_orphans(paths.root)
    workflow = Path("workflow")
    kept = (Path(), paths.root.parent, workflow, workflow / "experiments", STATE, *STATE.glob("*/"))
    remove_orphans(*kept, below=False)


def remove_leftovers(params: Params, paths: Paths) -> list[Path]:
    """Delete artifacts of networks, students, baselines and seeds that the parameters no longer name, and list them.

    Unfinished files of killed stages go, too: such a stage need not run again, since DVC may bring its outputs back
    from its cache.

    DVC forgets a stage that has gone, but leaves its outputs, and a stage that reads a whole folder (all baselines, all
    networks) would take them for inputs.
    """
    remove_unfinished(paths)
    jobs = list_jobs(params)
    named = [*jobs["networks"], SOLO]
    kept = dict.fromkeys(("design", "partition", "export", "cluster", "benchmark", "distributed"), named)
    trained = {"students": "students", "baselines": "baselines", "networks": "assembled"}
    kept |= {folder: list(jobs[name]) for folder, name in trained.items()}
    leftovers = []
    for folder, names in kept.items():
        depth = "/".join(["*"] * (1 + names[0].count("/"))) if names else "*"
        for path in sorted((paths / folder).glob(depth)):
            if path.name.startswith(TEMPORARY):  # of a job that runs beside this one; the dead are swept
                continue
            if str(path.relative_to(paths / folder)).partition(".")[0] not in names:
                leftovers.append(path)
                remove(path)
    return leftovers
