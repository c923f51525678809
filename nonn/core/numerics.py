"""Where a computation gives the same bytes: on every x86-64 processor with AVX2, or on one type of processor.

``portable`` calculates in float32 on the processor, with kernels of AVX2 alone, a fixed number of threads, and the code
path of MKL that does not ask who made the processor. ``fast`` takes what the machine offers: a GPU, bfloat16, AVX-512.
Libraries read these limits from the environment when they are loaded, so `set_numerics` comes before their import.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Literal

Numerics = Literal["portable", "fast"]

_CHOICE = "NONN_NUMERICS"
#: Settings of the libraries that have kernels for several instruction sets. MKL_CBWR=AVX2 would not suffice, since MKL
#: takes another code path on AMD than on Intel. Even so, its square roots differ: see
#: `nonn.method.final_layer.fit_by_epoch`.
#: https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
_LIMITS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Haswell",
    "OPENBLAS_NUM_THREADS": "1",  # otherwise as many as there are cores, and sums differ by their number
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}


def set_numerics(numerics: Numerics) -> None:
    """Set the numerics of this process and its children, before the libraries are imported."""
    os.environ[_CHOICE] = numerics
    if numerics == "portable" and has_avx2():
        os.environ.update(_LIMITS)


def is_portable() -> bool:
    return os.environ.get(_CHOICE) == "portable"


def has_avx2() -> bool:
    """Whether this is an x86-64 processor with AVX2. On others, portable bytes hold for one type of processor."""
    info = Path("/proc/cpuinfo")
    is_known = platform.machine() in ("x86_64", "AMD64") and info.is_file()
    return is_known and " avx2 " in info.read_text(encoding="utf-8", errors="replace")
