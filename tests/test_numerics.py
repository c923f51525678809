"""The same bytes on every processor: a small training against the hashes of other processors."""

import os
import shutil
import subprocess
import sys

import pytest
from experiments import REPOSITORY

from nonn.core import numerics
from nonn.training.hardware import mixed_precision, pick_device

#: What tests/small_training.py prints on an AMD EPYC with AVX2 and, emulated, on Intel Haswell and AMD EPYC Rome.
HASHES = {
    "teacher.safetensors": "255db997caf39c75",
    "signals.safetensors": "45f4efa6b5e11027",
    "graph.safetensors": "19affe54ee0e9944",
    "2s.safetensors": "f7df49c5083c1691",
}

needs_avx2 = pytest.mark.skipif(not numerics.has_avx2(), reason="needs an x86-64 processor with AVX2")


def train(folder, *emulator):
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    command = [*emulator, sys.executable, REPOSITORY / "tests/small_training.py", "portable"]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


@needs_avx2
def test_a_small_training_gives_the_bytes_of_other_processors(tmp_path):
    assert train(tmp_path) == HASHES


@needs_avx2
@pytest.mark.slow
@pytest.mark.parametrize("processor", ["Haswell", "EPYC-Rome"])
def test_emulated_processors_of_two_makers_give_the_same_bytes(processor, tmp_path):
    emulator = shutil.which("qemu-x86_64")
    if not emulator:
        pytest.skip("needs qemu-x86_64 (Debian: apt-get install qemu-user)")
    assert train(tmp_path, emulator, "-cpu", processor) == HASHES


def test_portable_takes_neither_bfloat16_nor_a_gpu(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    numerics.set_numerics("portable")
    assert pick_device().type == "cpu"
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: True)
    assert not mixed_precision(pick_device())._enabled
    numerics.set_numerics("fast")
    assert pick_device().type == "cuda"


def test_limits_are_not_set_where_the_processor_has_no_avx2(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(numerics, "has_avx2", lambda: False)
    numerics.set_numerics("portable")
    assert "ATEN_CPU_CAPABILITY" not in os.environ, "it would end with an illegal instruction"
