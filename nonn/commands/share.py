"""The command ``nonn share``: write the trained teacher to one small file, for others to import."""

from __future__ import annotations

from pathlib import Path

from nonn.core.errors import UserError
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.tensors import read_tensors, write_tensors


def run(params: Params, paths: Paths, target: Path) -> None:
    """Write the teacher's weights in float16, which is half the bytes; ``teacher.weights`` reads them.

    Raises
    ------
    UserError
        There is no teacher yet, or the file would not be readable by its name.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: the weights are written as safetensors; give the file that suffix.")
    weights = read_tensors(paths.teacher)
    write_tensors(target, {name: t.half() if t.is_floating_point() else t for name, t in weights.items()})
    architecture = params.teacher.architecture.model_dump(exclude_defaults=True)
    print(f"In another experiment, set teacher.weights to {target} and teacher.architecture to {architecture}.")
