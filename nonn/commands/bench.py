"""Measurements that the design rests on, for whoever wants to see them: ``nonn bench WHAT``."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nonn.core.params import Architecture, Distill, Signals, load_params
from nonn.core.system import describe_system
from nonn.data.dataset import Dataset, measure_channels
from nonn.deploy.cost import measure_cost
from nonn.method.filter_graph import activation_hub_graph, naive_activation_hub_graph
from nonn.teachers.signals import compute_signals, signals_of
from nonn.training.checkpoint import Checkpoint
from nonn.training.hardware import keep_freed_memory, pick_device
from nonn.training.lessons import Classroom, Lesson, distill_student
from nonn.training.networks import ConvNet

REPEATS = 3

#: Of `bench_distill`: a student of about 190,000 parameters and 20 million multiply-accumulates that imitates
#: as many filters as a device of two would, and the teachers: ours for CIFAR-10, and the paper's.
STUDENT = Lesson(
    Architecture(family="fast", widths=[32, 64, 80], depth=2),
    filters=list(range(192)),
    kd_weight=0.9,
    transfer_weight=10.0,
)
TEACHERS = {
    "fast teacher, airbench [128, 384, 384]": Architecture(family="airbench", widths=[128, 384, 384], depth=2),
    "WRN-40-4": Architecture(family="wrn", depth=40, width=4),
}
#: Batches of the bench, and how often a student sees them from cached signals: a second or two of work.
BATCHES, CACHED_EPOCHS = 4, 8


def best_time(
    work: Callable[[], object], repeats: int = REPEATS, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Least seconds of several runs: what the work needs when nothing disturbs it."""
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def bench_graph() -> None:
    """Time the graph of 256 and of 2,048 filters over 5,000 images, and the double loop it replaces."""

    def activity(n_images: int, n_filters: int) -> Tensor:
        return torch.rand(n_images, n_filters, generator=torch.Generator().manual_seed(0))

    few = activity(20, 256)
    naive = best_time(lambda: naive_activation_hub_graph(few)) / len(few) * 5000
    print(f"double loop, 256 filters, 5,000 images: {naive:.1f} s (measured on {len(few)} images, scaled)")
    for n_filters in (256, 2048):
        dense = activity(5000, n_filters)
        seconds = best_time(lambda dense=dense: activation_hub_graph(dense))
        line = f"vectorised, {n_filters} filters, 5,000 images: {seconds:.2f} s, {torch.get_num_threads()} threads"
        print(line + (f", {naive / seconds:.0f} times faster" if n_filters == 256 else ""))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process: {peak:.0f} MiB")


class TaughtLive(Classroom):
    """A classroom in which the teacher looks at every batch itself, as in the authors' code; nothing is cached."""

    def __init__(self, data: Dataset, teacher: ConvNet, params: Signals):
        super().__init__(data, {}, params)
        self.teacher = teacher

    def batch(self, index: Tensor, epoch: int) -> tuple[Tensor, Callable[[str], Tensor]]:
        images, _ = super().batch(index, epoch)
        return images, signals_of(self.teacher, images, attention=False).__getitem__


@dataclass(frozen=True)
class DistillTimes:
    """Seconds for one image: of a student's training step, by where the signals come from, and of its signals.

    Attributes
    ----------
    cached, live : float
        Of one step, with cached signals and with the teacher inside.
    signals : float
        Of computing the signals of one view.
    """

    cached: float
    live: float
    signals: float

    @property
    def ratio(self) -> float:
        return self.live / self.cached

    def epochs_to_pay(self, views: int) -> float:
        """Epochs of a student after which the signals of `views` views have taken less time than they saved."""
        return views * self.signals / (self.live - self.cached)


def random_images(n_train: int, n_validation: int, size: int = 32, n_classes: int = 10) -> Dataset:
    """Colour images of noise, the last of them for validation."""
    generator, n_images = torch.Generator().manual_seed(0), n_train + n_validation
    images = torch.randint(256, (n_images, 3, size, size), generator=generator, dtype=torch.uint8)
    train, validation = torch.arange(n_images).split([n_train, n_validation])
    statistics = measure_channels(images[train])
    classes = tuple(str(label) for label in range(n_classes))
    return Dataset(images, torch.arange(n_images) % n_classes, train, validation, train[:0], *statistics, classes)


def time_distill(
    teacher: ConvNet, lesson: Lesson, data: Dataset, schedule: Distill, signals: Signals, repeats: int = REPEATS
) -> DistillTimes:
    """Time the stage's own training of one student, with cached signals and with the teacher inside.

    On a processor, its time is counted: with one thread, that is the time on a core of one's own.
    """
    clock = time.perf_counter if pick_device().type == "cuda" else time.process_time
    one_view, n_images = signals.model_copy(update={"views": 1, "attention": False}), len(data.train)
    cache: dict[str, Tensor] = {}

    def seconds(classroom: Classroom, epochs: int, label: str) -> float:
        section = schedule.model_copy(update={"epochs": epochs})

        def work() -> None:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = Checkpoint(Path(folder) / "checkpoint.safetensors")
                distill_student(classroom, lesson, section, seed=0, checkpoint=checkpoint, label=label)

        return best_time(work, repeats, clock) / (epochs * n_images)

    return DistillTimes(
        signals=best_time(lambda: cache.update(compute_signals(teacher, data, one_view)), repeats, clock) / n_images,
        cached=seconds(Classroom(data, cache, one_view), CACHED_EPOCHS, "cached signals"),
        live=seconds(TaughtLive(data, teacher, one_view), 1, "teacher inside"),
    )


def bench_distill() -> None:
    """Train a student with the teacher inside each step and with cached signals, one thread each."""
    params = load_params()
    schedule, views = params.distill, params.signals.views
    torch.set_num_threads(1)
    keep_freed_memory()
    data = random_images(BATCHES * schedule.batch_size, n_validation=schedule.batch_size)
    cost = measure_cost(
        ConvNet(STUDENT.architecture, data.channels, data.n_classes, len(STUDENT.filters)), data.channels, data.size
    )
    system = describe_system()
    print(
        f"student of {cost.params / 1e3:.0f} k parameters and {cost.macs / 1e6:.1f} million multiply-accumulates, "
        f"batches of {schedule.batch_size}\n{system['cpu']}, 1 thread, torch {system['torch']}"
    )
    for name, architecture in TEACHERS.items():
        torch.manual_seed(0)
        teacher = ConvNet(architecture, data.channels, data.n_classes, mean=data.mean, std=data.std)
        times = time_distill(teacher, STUDENT, data, schedule, params.signals)
        epochs = times.epochs_to_pay(views)
        print(
            f"{name}: {1 / times.cached:.0f} images/s with cached signals, {1 / times.live:.0f} with the teacher "
            f"inside, {times.ratio:.1f} times fewer\n"
            f"  signals of {views} views: {views * times.signals * 1e3:.1f} ms an image, once, paid back after "
            f"{epochs:.1f} epochs, {epochs / schedule.epochs:.1f} students of {schedule.epochs} epochs"
        )


BENCHES = {"graph": bench_graph, "distill": bench_distill}
