"""What nonn needs of a machine, and what to type where something is missing.

Nothing here is imported from elsewhere than the standard library: it speaks when the rest cannot be imported.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from nonn.core.errors import UserError

#: What every installation has, and what only the extra ``pipeline`` brings, by the names they are imported by.
BASE = (
    *("aiohttp", "argcomplete", "cryptography", "google", "grpc", "grpc_health", "numpy", "onnxruntime", "PIL"),
    *("prometheus_client", "pydantic", "ruamel", "safetensors", "tqdm", "tritonclient"),
)
PIPELINE = (
    *("dvc", "jinja2", "matplotlib", "mlxtend", "networkx", "onnx", "onnxscript", "pandas", "scipy"),
    *("torch", "torchvision"),
)
#: What only ``nonn partitions`` needs, for the comparison.
PARTITIONS = ("igraph", "sklearn")
#: What only ``nonn rivals`` needs, to prune the teacher.
RIVALS = ("torch_pruning",)
#: What only ``nonn litert`` needs, for files of LiteRT and their interpreters.
LITERT = ("ai_edge_litert", "ai_edge_quantizer", "litert_torch", "tflite_micro")


def require_64_bit(largest: int = sys.maxsize, machine: str | None = None) -> None:
    """Refuse a 32-bit Python, even on a 64-bit processor; `largest` is its ``sys.maxsize``."""
    if largest < 2**32:
        raise UserError(
            f"this Python is a 32-bit program ({machine or platform.machine()}), for which there is no ONNX Runtime: "
            "install a 64-bit system, on a Raspberry Pi the 64-bit Raspberry Pi OS."
        )


def how_to_install(module: str | None) -> str | None:
    """One line on how to install a module that is missing; None if it belongs to no dependency of nonn."""
    package = str(module).partition(".")[0]
    if package in PARTITIONS:
        return (
            f"{package} is not installed: this command compares with its methods. {_command('[pipeline,partitions]')}"
        )
    if package in RIVALS:
        return f"{package} is not installed: this command prunes with it. {_command('[pipeline,rivals]')}"
    if package in LITERT:
        return (
            f"{package} is not installed: this command needs the extra litert, which takes a step more than others: "
            "see docs/firmware.md."
        )
    if package not in BASE + PIPELINE:
        return None
    extra, whose = ("[pipeline]", "the pipeline") if package in PIPELINE else ("", "nonn")
    return f"{package} is not installed: this command needs the packages of {whose}. {_command(extra)}"


def _command(extra: str) -> str:
    """The command to type, in the running environment or in a new one: elsewhere, systems refuse pip (PEP 668)."""
    clone = Path(__file__).resolve().parents[2]
    is_clone, has_environment = (clone / "pyproject.toml").is_file(), sys.prefix != sys.base_prefix
    if is_clone and has_environment:
        return f"Run: {sys.executable} -m pip install -e '{clone}{extra}'"
    if not is_clone and has_environment and (wheel := installed_wheel()):
        return f"Run: {sys.executable} -m pip install '{wheel}{extra}'"
    folder = clone if is_clone else "a clone of the repository"
    return f"In {folder}, run: python3 -m venv .venv && .venv/bin/pip install -e '.{extra}'. Then call .venv/bin/nonn."


def installed_wheel() -> str | None:
    """The file that this package was installed from, as pip has recorded it (PEP 610)."""
    try:
        noted = distribution("nonn").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    address = urlsplit(json.loads(noted)["url"] if noted else "")
    is_wheel = address.scheme == "file" and address.path.endswith(".whl")
    return url2pathname(address.path) if is_wheel else None
