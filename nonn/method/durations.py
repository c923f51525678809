"""Estimates of how long jobs take that have never run, from their multiply-accumulates.

Only the proportions matter, since `nonn.commands.job` scales the estimates by how long finished jobs took. If an
experiment has run before, its own times are better (``workflow/rules/plan.smk``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nonn.core.artifacts import ImageSpec
from nonn.core.budgets import Budget, combined_budget
from nonn.core.params import SINGLE_METHODS, Params
from nonn.core.paths import Paths
from nonn.deploy.analytic_cost import COUNTED_FAMILIES, count_cost
from nonn.method.feasibility import known_dataset, least_images
from nonn.method.sizing import design_student, smallest_device

#: Multiply-accumulates, measured in the default experiment on an AMD EPYC without AVX-512, alike for its teacher and
#: its students. A processor with AVX-512 does about twice as many (results/mnist5k/timeline.csv).
MACS_PER_S_PER_THREAD = 3e10
#: Cost of a training step in forward passes: one forward and two backward products.
FORWARD_PASSES_PER_STEP = 3
#: Training images of a data set that has not been read yet.
DEFAULT_TRAIN_IMAGES = 10_000
#: Multiply-accumulates of a teacher that is not of our families: those of ResNet-18, 1.8e9 for 224 × 224 pixels
#: (https://arxiv.org/abs/1512.03385, table 1).
FOREIGN_MACS_PER_PIXEL = 36_000
#: Seconds that a job takes beside its training.
OVERHEAD_S = 8.0


def guess_seconds(params: Params, paths: Paths, address: str) -> float:
    """Seconds of a job, given by its address in ``dvc.yaml``; `check_budgets` has to have accepted the parameters."""
    stage, _, item = address.partition("@")
    info = known_dataset(params, paths)
    images = ImageSpec.of(info) if info else least_images(params)
    n_images = info.get("counts", {}).get("train", DEFAULT_TRAIN_IMAGES) if info else DEFAULT_TRAIN_IMAGES
    macs = {
        "teacher": _of_teacher,
        "signals": _of_signals,
        "distill": _of_student,
        "baseline": _of_baseline,
        "assemble": _of_network,
        "evaluate": _of_all,
    }
    counted = macs[stage](params, images, item) if stage in macs else 0.0
    return OVERHEAD_S + n_images * counted / MACS_PER_S_PER_THREAD


def _of_teacher(params: Params, images: ImageSpec, _: str) -> float:
    """Multiply-accumulates of one thread for each training image, over all epochs."""
    teacher = params.teacher
    if not teacher.is_trained:
        return 0.0
    return (
        FORWARD_PASSES_PER_STEP
        * teacher.epochs
        * _answer(params, images)
        / _passes(teacher.own_architecture.mirror)
        / teacher.threads
    )


def _of_signals(params: Params, images: ImageSpec, _: str) -> float:
    """The teacher looks at each view once, whether or not it mirrors."""
    architecture = params.teacher.architecture
    passes = _passes(architecture.mirror) if architecture and not params.teacher.is_foreign else 1
    return params.signals.views * _answer(params, images) / passes / params.signals.threads


def _answer(params: Params, images: ImageSpec) -> float:
    """Multiply-accumulates of an answer of the teacher."""
    size, architecture = params.image_sizes.teacher, params.teacher.architecture
    if architecture is None or architecture.family not in COUNTED_FAMILIES:
        return FOREIGN_MACS_PER_PIXEL * size**2
    return count_cost(architecture, images.channels, size, images.n_classes, None).macs


def _passes(mirror: bool) -> int:
    """Passes for an answer, including that of the mirror image; a training step has one."""
    return 2 if mirror else 1


def _of_student(params: Params, images: ImageSpec, item: str) -> float:
    _, network, student = item.split("/")
    return _learning(params, images, params.budgets_of(network)[int(student)])


def _of_baseline(params: Params, images: ImageSpec, item: str) -> float:
    _, network, method = item.split("/")
    return sum(_learning(params, images, budget) for budget in _budgets(params, images, network, method))


def _budgets(params: Params, images: ImageSpec, network: str, method: str) -> Sequence[Budget]:
    """Of each student of a baseline."""
    budgets = params.budgets_of(network)
    if method == "total":
        return [combined_budget(budgets)]
    if method in SINGLE_METHODS:
        return [smallest_device(params.design, budgets, images)]
    return budgets


def _of_network(params: Params, images: ImageSpec, item: str) -> float:
    """Of the students of a network, each of which is asked once."""
    _, network = item.split("/")
    return _asking(params, images, params.budgets_of(network))


def _of_all(params: Params, images: ImageSpec, _: str) -> float:
    """Of all students that are scored, by thread: at most, for what is not fitted answers test images alone."""
    networks = [(params.budgets_of(name), network.seeds) for name, network in params.networks.items()]
    baselines = [(_budgets(params, images, name, method), len(seeds)) for name, method, seeds in params.baselines()]
    asked = sum(count * _asking(params, images, budgets) for budgets, count in networks + baselines)
    return asked / params.evaluate.threads


def _learning(params: Params, images: ImageSpec, budget: Budget) -> float:
    """Multiply-accumulates for each training image of the largest student that a budget holds, over all epochs."""
    passes = FORWARD_PASSES_PER_STEP * params.distill.epochs / _passes(params.design.mirror)
    return passes * _asking(params, images, [budget])


def _asking(params: Params, images: ImageSpec, budgets: Iterable[Budget]) -> float:
    """Multiply-accumulates for an image that the largest student of each budget answers."""
    return float(sum(design_student(params.design, budget, images, 1)[1].macs for budget in budgets))
