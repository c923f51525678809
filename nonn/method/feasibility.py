"""Whether the devices can hold any student at all: asked before anything is trained, and answered with what works."""

from __future__ import annotations

from collections.abc import Iterator

from nonn.core.architecture import Architecture
from nonn.core.artifacts import DatasetInfo, GraphInfo, ImageSpec, TeacherInfo
from nonn.core.errors import UserError
from nonn.core.files import read_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.method.sizing import (
    apportion_filters,
    design_network,
    design_student,
    imbalance_warning,
    smallest_device,
    teacher_size_warning,
)


def check_budgets(params: Params, paths: Paths) -> list[str]:
    """Refuse budgets that hold no student; return lines on shares that are lopsided, and on what may yet be refused.

    As long as the stage `dataset` has not read the images, they are taken as grey and of two classes, and a bridge has
    one output: a budget that is refused then, never works. What is known by then of images and filters is used, if it
    is of these parameters. How many filters are live decides nothing before the stage `design`.
    """
    info, n_live = known_dataset(params, paths), known_filters(params, paths)
    images = ImageSpec.of(info) if info else None
    problems: list[str] = []
    warnings: list[str] = []
    for network in params.networks:
        where = f"networks.{network}: "
        broken = list(refused_devices(params, network, images or least_images(params)))
        try:
            warnings += [] if broken else [where + line for line in _check_network(params, network, images, n_live)]
        except UserError as error:
            broken.append(str(error))
        problems += [f"params.yaml: {where}{problem}" for problem in broken]
    if problems:
        raise UserError("\n".join(problems))
    return warnings


def known_dataset(params: Params, paths: Paths) -> DatasetInfo | None:
    """What ``dataset.json`` says of the images; None if it cannot be read, or is of another source or size."""
    try:
        info: DatasetInfo = read_json(paths.dataset_info, DatasetInfo)
    except UserError:  # who needs it says why
        return None
    source, size = params.dataset.source, params.image_sizes.students
    return info if info["size"] == size and info.get("source", source) == source else None


def known_filters(params: Params, paths: Paths) -> int | None:
    """How many live filters the graph has; None if that cannot be read, or is of another teacher."""
    try:
        info, graph = read_json(paths.teacher_info, TeacherInfo), read_json(paths.graph_info, GraphInfo)
    except UserError:  # who needs them says why
        return None
    teacher = params.teacher
    if teacher.is_foreign:
        is_current = info.get("source") == teacher.source
    else:
        is_current = (
            bool(info["architecture"]) and Architecture.model_validate(info["architecture"]) == teacher.own_architecture
        )
    return graph["n_live"] if is_current else None


def least_images(params: Params) -> ImageSpec:
    """Images that ask least of a student, as long as nothing but their size is known."""
    return ImageSpec(channels=1, size=params.image_sizes.students, n_classes=2)


def refused_devices(params: Params, network: str, images: ImageSpec) -> Iterator[str]:
    """A line for each kind of device that holds no student even with a bridge to one filter."""
    for budget in dict.fromkeys(params.budgets_of(network)):
        try:
            design_student(params.design, budget, images, 1)
        except UserError as error:
            yield str(error)


def _check_network(params: Params, network: str, known: ImageSpec | None, n_live: int | None) -> Iterator[str]:
    budgets, grid = params.budgets_of(network), params.design
    images = known or least_images(params)
    design_student(grid, smallest_device(grid, budgets, images), images, None)
    teacher = None if params.teacher.is_foreign else params.teacher.own_architecture
    if known is not None and n_live is not None:
        try:
            sizes, _ = design_network(grid, budgets, images, n_live)
        except UserError as error:  # perhaps the teacher is about to be trained again, so that it has more of them
            yield f"if the teacher keeps its {n_live} live filters, {error}"
            return
    else:
        # Of all filters that a teacher has, some are never active: there may be fewer, not more. How many a foreign one
        # has is known once it is loaded.
        sizes = apportion_filters(grid, budgets, images, teacher.n_features if teacher else len(budgets))
    largest = 0
    for budget, size in dict.fromkeys(zip(budgets, sizes, strict=True)):
        try:
            largest = max(largest, design_student(grid, budget, images, size)[1].params)
        except UserError as error:
            yield f"if all {sum(sizes)} filters of the teacher are live, {error}"
    if teacher and (warning := teacher_size_warning(largest, teacher, images)):
        yield warning
    if warning := imbalance_warning(sizes, budgets):
        yield warning
