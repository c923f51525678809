"""The command ``nonn share``: write the trained teacher to one small file, for others to import."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nonn.core.errors import UserError
from nonn.core.options import add_settings, load_settings
from nonn.core.paths import Paths
from nonn.data.tensors import read_tensors, write_tensors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.safetensors", help="file to write")
    add_settings(parser)
    parser.epilog = "example: nonn share teacher.safetensors"


def run(options: argparse.Namespace) -> None:
    """Write the teacher's weights in float16, which is half the bytes; ``teacher.weights`` reads them."""
    params, target = load_settings(options), options.file
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: the weights are written as safetensors; give the file that suffix.")
    if params.teacher.is_foreign:
        raise UserError(
            f"params.yaml: teacher.source: {params.teacher.source} is not trained here. Name the same source and "
            "weights in the other experiment."
        )
    trained = Paths(params.experiment).teacher
    if target.resolve() == trained.resolve():
        raise UserError(f"{target}: is the teacher itself, of full precision. Name another file.")
    if os.path.lexists(target):
        raise UserError(f"{target}: is there already. Remove it, or name another file.")
    weights = read_tensors(trained)
    write_tensors(target, {name: t.half() if t.is_floating_point() else t for name, t in weights.items()})
    architecture = params.teacher.own_architecture.model_dump(exclude_defaults=True)
    print(f"In another experiment, set teacher.weights to {target} and teacher.architecture to {architecture}.")
