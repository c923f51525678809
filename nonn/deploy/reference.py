"""A well-known architecture with random weights, as an ONNX file: to compute it costs what a trained one costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from nonn.core.architecture import Architecture
from nonn.core.artifacts import DatasetInfo
from nonn.core.params import Precision
from nonn.deploy.int8 import fold_norms, quantise
from nonn.deploy.onnx_files import Logits, export_onnx
from nonn.training.networks import ConvNet


def export_reference(architecture: Architecture, dataset: DatasetInfo, precision: Precision, path: Path) -> None:
    """Write a classifier of the dataset's images; its integers are calibrated on images of no meaning."""
    torch.manual_seed(0)
    model = ConvNet(architecture, dataset["channels"], len(dataset["classes"]))
    shape = dataset["channels"], dataset["size"], dataset["size"]
    is_int8 = precision == "int8"
    example = torch.zeros(1, *shape, dtype=torch.uint8)
    export_onnx(Logits(fold_norms(model) if is_int8 else model), example, path, "image", "logits")
    if is_int8:
        quantise(path, np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8))
