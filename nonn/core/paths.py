"""Where every artifact of an experiment lies. The same paths stand in ``dvc.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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

    def sizes(self, network: str) -> Path:
        """Number of filters for each student, decided from the devices' budgets."""
        return self / f"sizes/{network}.json"

    def design(self, network: str, name: str | int = "") -> Path:
        """Architecture of one student (0, 1, …), those of a baseline (its method); or their folder."""
        return self / f"design/{network}" / (f"{name}.json" if name != "" else "")

    def partition(self, network: str, name: str | int = "") -> Path:
        """Filters of one student (0, 1, …), those of a baseline (its method); or their folder."""
        return self / f"partition/{network}" / (f"{name}.json" if name != "" else "")

    def partition_info(self, network: str) -> Path:
        return self / f"partition/{network}/partition.json"

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

    def log(self, artifact: Path) -> Path:
        """Training log beside a weights file."""
        return artifact.with_suffix(".csv")
