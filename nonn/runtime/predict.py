"""Classify one image with an exported network, and show what each student contributed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nonn.core.errors import UserError
from nonn.core.images import read_image
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.runtime.exported import read_manifest
from nonn.runtime.final import FinalLayer, Prediction, read_out
from nonn.runtime.session import run_onnx


def classify(folder: Path, image: np.ndarray) -> Prediction:
    """Run a network's students, then its final layer, on an image, uint8 of shape (channels, size, size)."""
    manifest = read_manifest(folder)
    features = {i: run_onnx(folder / student.file, image[None])[0] for i, student in enumerate(manifest.students)}
    return read_out(manifest.classes, list(FinalLayer.load(folder, manifest).contributions(features).values()))


def run(params: Params, path: Path, network: str | None) -> None:
    """Print class, probability and each student's share."""
    network = network or next(iter(params.networks))
    if network not in params.networks:
        raise UserError(f"params.yaml: networks: no {network!r}; choose one of {', '.join(params.networks)}.")
    folder = Paths(params.experiment).export(network)
    shape = read_manifest(folder).image
    prediction = classify(folder, read_image(path, shape.channels, shape.size))
    print(f"{prediction.label}  {prediction.probability:.1%}  ({network}, {path})")
    for student, (device, share) in enumerate(zip(params.networks[network], prediction.shares, strict=True)):
        print(f"  student {student} on {device}: {share:6.1%} of the lead")
