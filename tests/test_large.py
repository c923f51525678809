"""Twenty thousand photographs: what stages take of memory does not grow with the data set. Minutes: pytest -m slow."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from experiments import REPOSITORY
from PIL import Image

N_PICTURES, SIDE, GIB = 20_000, 256, 2**30

#: Runs a stage and prints the largest memory of the process in bytes.
MEASURE = """
import resource, sys
from pathlib import Path
from pictures import make_params
from nonn.core.files import write_json
from nonn.core.architecture import Architecture
from nonn.core.paths import Paths
from nonn.data.dataset import load_dataset
from nonn.data.tensors import write_tensors
from nonn.stages import dataset, signals
from nonn.training.networks import ConvNet

params, paths = make_params("tree", size=int(sys.argv[2])), Paths("large")
if sys.argv[1] == "dataset":
    dataset.run(params, paths)
else:
    tiny = Architecture(family="fast", widths=[4, 8, 8], depth=1)
    data = load_dataset(paths)
    write_tensors(paths.teacher, ConvNet(tiny, 3, data.n_classes, mean=data.mean, std=data.std).state_dict())
    write_json(paths.teacher_info, {"architecture": tiny.model_dump()})
    section = params.signals.model_copy(update={"views": 1})
    signals.run(params.model_copy(update={"signals": section}), paths)
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_photographs(root: Path, count: int, side: int) -> None:
    generator = np.random.default_rng(0)
    for i in range(count):
        smooth = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = smooth.resize((side, side), Image.Resampling.BICUBIC)
        folder = root / f"class{i % 20:02}"
        folder.mkdir(parents=True, exist_ok=True)
        smooth.save(folder / f"{i}.jpg", quality=88)


def rate_of_pillow(root: Path, count: int) -> float:
    """Pictures a second of a plain loop in one thread, which decodes and does no more."""
    files = sorted(root.rglob("*.jpg"))[:count]
    start = time.perf_counter()
    for file in files:
        np.asarray(Image.open(file))
    return count / (time.perf_counter() - start)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    write_photographs(tmp_path / "tree", N_PICTURES, SIDE)
    print(f"a loop over Pillow: {rate_of_pillow(tmp_path / 'tree', 2000):.0f} pictures a second")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))}
    for stage in ("dataset", "signals"):
        command = [sys.executable, "-c", MEASURE, stage, str(SIDE)]
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 2 * GIB, stage
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"{stage}: at most {int(done.stdout) / GIB:.2f} GiB; {N_PICTURES / (time.perf_counter() - start):.0f} "
            f"pictures a second, {N_PICTURES / spent:.0f} for each second of a core"
        )
    assert (tmp_path / "results/large/dataset.safetensors").stat().st_size > 3 * GIB
