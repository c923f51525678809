"""The command ``nonn new``: write and check an experiment for the user's own images, teacher and devices.

It is a file of ``workflow/experiments/`` like the shipped ones, and becomes the active experiment. Outside of a clone,
where there is no such folder, it gets a project of its own: see `nonn.commands.project`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from nonn.commands import project
from nonn.commands.experiment_text import IMPORTED, PLAIN, TEMPLATE, TRAINED
from nonn.commands.use import (
    DEFAULT,
    EXPERIMENTS,
    WHOLE,
    experiments,
    merge,
    merge_experiment,
    write_params,
    yaml_with_comments,
)
from nonn.core.boards import all_boards
from nonn.core.chips import CHIPS
from nonn.core.errors import UserError, printable
from nonn.core.files import restored_on_error, write_text
from nonn.core.jobs import JOBS_FILE, check_named_files
from nonn.core.options import add_settings
from nonn.core.params import PARAMS_FILE, DesignParams, Params, load_params
from nonn.core.progress import log
from nonn.core.schema import get_key, parse_changes, set_key
from nonn.core.system import usable_cores
from nonn.core.teacher_source import WHOLE_FILES

if TYPE_CHECKING:
    from nonn.data.folders import FolderLayout

#: Pixels a side of the students' images, if a foreign teacher sees `TEACHER_SIZE`.
SIZE, TEACHER_SIZE = 96, 224
#: Least size of images for students of family mobilenet, whose strides leave too little of smaller ones. Firmware has
#: no kernels for it.
MOBILENET_FROM = 64
#: Sources that are never paths, even if a file has such a name.
ELSEWHERE = ("torchvision:", "timm:", "module:")
#: Prefixes before a path.
BEFORE_PATH = ("hf", *WHOLE_FILES)
#: Width of a trained teacher, in units of the narrowest student.
TEACHER_WIDTH = 32


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    name: str
    images: str
    devices: list[str]  # one for each student
    teacher: str | None
    weights: str | None
    size: int
    precision: str


def known_devices() -> dict[str, dict[str, Any]]:
    """Budgets of the devices in all experiments that can be read."""
    budgets: dict[str, dict[str, Any]] = {}
    for experiment in experiments():
        with contextlib.suppress(UserError):  # somebody is still writing it
            devices = merge_experiment(experiment)["devices"]
            budgets |= devices if isinstance(devices, dict) else {}
    return budgets


def budgets_of(devices: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Budget of each kind of device: that of another experiment, else the board of this name in the catalogue."""
    known = known_devices()
    return {name: dict(known.get(name, {"board": name})) for name in dict.fromkeys(devices)}


def list_images(source: str) -> FolderLayout | None:
    """Layout of a folder or archive by the names of its files; None if they do not reveal it."""
    if source == "mnist5k" or source.startswith(("torchvision:", "hf:")):
        return None
    from nonn.data.folders import find_images
    from nonn.data.idx import find_idx

    if find_idx(Path(source)):
        return None
    return find_images(Path(source))


def render(request: Request) -> str:
    """The experiment's file."""
    from nonn.method.sizing import proportions

    budgets = budgets_of(request.devices)
    is_firmware = any(budget.get("board") in CHIPS for budget in budgets.values())
    family = "mobilenet" if request.size >= MOBILENET_FROM and not is_firmware else "fast"
    grids: dict[str, dict[str, Any]] = {
        "mobilenet": {"depths": [1, 2, 3], "min_width": 8, "max_width": 64},
        "fast": {"depths": [1, 2], "min_width": 4, "max_width": 128},
    }
    grid = grids[family]
    shipped = DesignParams.model_validate({**merge_experiment(DEFAULT)["design"], "family": family})
    widths = [round(TEACHER_WIDTH * factor) for factor in proportions(shipped, request.size)]
    common = {"augment": "{pad: 4, flip: true}", "threads": usable_cores(), "family": family}
    is_foreign = request.teacher not in (None, "train")
    if is_foreign:
        size = f"\n  size: {TEACHER_SIZE}                   # pixels a side of what the teacher sees"
        source = {"source": _quoted(request.teacher), "weights": _quoted(request.weights)}
        teacher = IMPORTED.format(**common, **source, size=size)
    else:
        teacher = TRAINED.format(**common, widths=widths)
        grid["max_width"] = TEACHER_WIDTH // 2  # students that are no smaller than the teacher gain nothing
    largest = max(TEACHER_SIZE, request.size) if is_foreign else request.size
    return TEMPLATE.format(
        **common,
        **grid,
        name=request.name,
        devices=json.dumps(budgets),
        network=f"{len(request.devices)}s",
        members=json.dumps(request.devices),
        n_devices=len(request.devices),
        source=_quoted(request.images),
        size=largest,
        size_comment="                    # images are resized to this many pixels a side",
        teacher=teacher,
        precision=request.precision,
        design=f"  input: {request.size}                   # what students see\n" if is_foreign else "",
    )


def check_all(params: Params, classes: tuple[str, ...] | None) -> Iterator[str]:
    """A line for each problem of the experiment. `classes` are those of the images, None if unknown."""
    try:
        check_named_files(params)
        if params.teacher.is_foreign and classes:
            check_teacher(params, classes)
    except UserError as error:
        yield str(error)
    from nonn.method.feasibility import least_images, refused_devices

    images = least_images(params)._replace(channels=3)
    images = images._replace(n_classes=len(classes)) if classes else images
    refused = (line for network in params.networks for line in refused_devices(params, network, images))
    yield from (f"params.yaml: {line}" for line in dict.fromkeys(refused))


def check_teacher(params: Params, classes: tuple[str, ...]) -> None:
    """Load a foreign teacher, test it on noise and export it; a UserError says why it is unsuitable."""
    import torch

    from nonn.data.dataset import Dataset
    from nonn.deploy.teacher_files import write_teacher
    from nonn.method.exporting import check_outputs
    from nonn.runtime.session import run_onnx
    from nonn.teachers.foreign import PROBE_IMAGES, ForeignTeacher, import_foreign
    from nonn.training.networks import predict

    def examine(channels: int) -> tuple[ForeignTeacher, Dataset]:
        shape = PROBE_IMAGES, channels, *2 * [params.image_sizes.teacher]
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        index, middle = torch.arange(PROBE_IMAGES), torch.full((channels,), 128.0)
        data = Dataset(noise, index % len(classes), index, index, index, middle, middle, classes)
        return import_foreign(data, params.teacher)[0], data

    try:
        model, data = examine(channels=3)
    except UserError as error:
        try:
            model, data = examine(channels=1)  # pictures are not opened, and may be grey
        except UserError:
            raise error from None
    params.check_filters(model.n_features)
    log("exporting the teacher to ONNX, since the stage that does so comes after all trainings")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "teacher.onnx")
        write_teacher(model, data, path)
        logits = run_onnx(path, data.images.numpy())
        check_outputs(path, logits, predict(model, data.images)[1], "float32", model.body.tolerance)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the experiment: letters, digits, - and _")
    parser.add_argument("--images", metavar="PATH", help="folder or archive of <class>/<image> (default: mnist5k)")
    parser.add_argument("--devices", metavar="N×NAME", help="of the students, such as 2×rp2350 + 1×pi_zero2w")
    parser.add_argument("--teacher", metavar="SOURCE", help="as teacher.source (default: one is trained)")
    parser.add_argument("--weights", metavar="FILE", help="of the teacher")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels a side that students see (default: %(default)s)")
    parser.add_argument("--precision", choices=("float32", "int8"), default="int8", help="(default: %(default)s)")
    add_settings(parser, "write another value than the one filled in; repeatable")
    parser.epilog = "example: nonn new flowers --images photos/ --teacher timm:resnet18 --devices 4×stm32h743"


def run(options: argparse.Namespace) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", options.name):
        raise UserError(f"{options.name}: is no name of an experiment; take letters, digits, - and _")
    if not isinstance(YAML(typ="safe").load(options.name), str):
        raise UserError(f"{options.name}: is a number, a date or no text at all for YAML; take another name")
    for key in ("images", "teacher", "weights"):
        check_text(f"--{key}", getattr(options, key))
    if EXPERIMENTS.is_dir() and Path("dvc.yaml").is_file():
        write_experiment(options)
        return
    if (options.teacher or "").startswith("module:") and not is_installed(options.teacher.split(":")[1]):
        raise UserError(
            f"--teacher: {options.teacher} is looked for in the project, which is not there yet. Run `nonn new "
            f"{options.name}` alone, put your code into the folder {options.name}, and name it there, in teacher.source"
        )
    folder = Path(options.name)
    for key in ("images", "teacher", "weights"):
        setattr(options, key, anchored(getattr(options, key)))
    with project.created(folder), contextlib.chdir(folder):
        write_experiment(options)
    print(f"{folder}: a project of its own. Run there what you would run in a clone: cd {folder}")


def is_installed(module: str) -> bool:
    """Whether a module is found from any folder."""
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec(module)
        return bool(found and found.origin and Path.cwd() not in Path(found.origin).parents)
    return False


def check_text(option: str, value: str | None) -> None:
    """Refuse text that a YAML file cannot hold."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise UserError(f"{option} {printable(value or '')}: is not text in UTF-8. Rename it.") from None
    if value == "":
        raise UserError(f"{option}: is empty. Give a value, or leave the option out.")


def anchored(source: str | None) -> str | None:
    """A source with its path made absolute, so that it means the same from another folder."""
    if source in (None, "mnist5k") or source.startswith(ELSEWHERE):
        return source
    if source and Path(source).exists():
        return str(Path(source).resolve())
    kind, colon, name = source.partition(":")
    is_path = kind in BEFORE_PATH and name and Path(name).exists()
    return f"{kind}{colon}{Path(name).resolve()}" if is_path else source


def write_experiment(options: argparse.Namespace) -> None:
    """Write the experiment that is asked for, check it and make it the active one."""
    path = EXPERIMENTS / f"{options.name}.yaml"
    if path.exists():
        raise UserError(f"{path}: is there already. Choose another name, or remove it.")
    if options.name in experiments():
        raise UserError(f"{options.name}: comes with the package; take another name")
    if options.weights and options.teacher in (None, "train"):
        raise UserError("--weights: belongs to a --teacher that is not trained here; give one, such as timm:resnet18")
    changes, layout, problems = parse_changes(options.set), None, []
    if not options.images and not options.devices:
        if options.teacher:
            raise UserError("--teacher: belongs to --images and --devices; give both")
        text = PLAIN.format(name=options.name)
    elif not options.images or not options.devices:
        given, missing = ("--images", "--devices") if options.images else ("--devices", "--images")
        raise UserError(f"{given}: belongs to {missing}; give both, or none for the default experiment")
    else:
        request = make_request(options)
        try:
            layout = list_images(request.images)
        except UserError as error:
            problems.append(str(error))
        text = render(request)
    classes = layout.classes if layout else None
    refused = write_checked(options.name, text, changes, classes, bool(problems))
    # Images that were refused above are refused there again, in other words.
    problems += [line for line in refused if not (problems and "dataset.source" in line)]
    if problems:
        raise UserError("\n".join(problems))
    from nonn.core.paths import Paths
    from nonn.method.feasibility import check_budgets
    from nonn.method.planning import deployment_warnings

    params = load_params()
    boards = [device.board for device in params.devices.values()]
    warnings = deployment_warnings(boards, params.design.family)
    for warning in (*warnings, *check_budgets(params, Paths(params.experiment))):
        print(warning)
    if layout:
        print(f"{options.images}: {len(layout.names):,} images of {len(layout.classes)} classes")
    print(f"{path}: written and active; `snakemake --cores all` or `dvc repro` runs it")
    if options.devices:
        print(
            f"Network {', '.join(params.networks)}: `nonn plan --devices '{options.devices}'` says what it would run."
        )


def make_request(options: argparse.Namespace) -> Request:
    from nonn.method.planning import parse_devices

    devices = parse_devices(options.devices, [*known_devices(), *all_boards()])
    return Request(
        options.name, options.images, devices, options.teacher, options.weights, options.size, options.precision
    )


def write_checked(
    name: str, text: str, changes: dict[str, Any], classes: tuple[str, ...] | None, is_refused: bool
) -> list[str]:
    """Write an experiment and make it the active one, unless it has problems; return a line for each."""
    path = EXPERIMENTS / f"{name}.yaml"
    write_text(path, with_changes(text, changes))
    try:
        with restored_on_error(PARAMS_FILE, JOBS_FILE):
            write_params(name)
            problems = list(check_all(load_params(), classes))
            if problems or is_refused:
                raise UserError("\n".join(problems))
    except BaseException as error:
        path.unlink()
        if isinstance(error, UserError):
            return str(error).splitlines()
        raise
    return []


def with_changes(text: str, changes: dict[str, Any]) -> str:
    """Text of an experiment with values changed by dotted key; comments are kept."""
    if not changes:
        return text
    yaml, written = yaml_with_comments(), StringIO()
    content = yaml.load(text)
    complete = merge(merge_experiment(DEFAULT), yaml.load(text))
    for key, value in changes.items():
        set_key(complete, key, value)
        parts = key.split(".")
        depth = next((depth for depth, part in enumerate(parts, start=1) if part in WHOLE), len(parts))
        # Mappings of `WHOLE` are complete or absent.
        whole = ".".join(parts[:depth])
        set_key(content, whole, get_key(complete, whole))
    yaml.dump(content, written)
    return written.getvalue()


def _quoted(text: str | None) -> str:
    return json.dumps(text, ensure_ascii=False)
