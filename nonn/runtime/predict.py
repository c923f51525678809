"""Classify one image, on this machine or by the nodes of a cluster, and show what each student contributed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nonn.core.errors import UserError
from nonn.core.images import read_image
from nonn.core.options import add_settings, load_settings
from nonn.core.paths import Paths
from nonn.runtime.exported import read_manifest
from nonn.runtime.final import FinalLayer, Prediction, read_out
from nonn.runtime.session import run_onnx


def classify(folder: Path, image: np.ndarray) -> Prediction:
    """Run a network's students, then its final layer, on an image, uint8 of shape (channels, size, size)."""
    manifest = read_manifest(folder)
    features = {i: run_onnx(folder / student.file, image[None])[0] for i, student in enumerate(manifest.students)}
    return read_out(manifest.classes, list(FinalLayer.load(folder, manifest).contributions(features).values()))


def add_arguments(parser) -> None:
    parser.add_argument("image", type=Path, help="a picture of any size")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--network", help="a network of params.yaml (default: the first)")
    source.add_argument("--cluster", type=Path, metavar="FILE", help="ask the nodes of this cluster.yaml instead")
    add_settings(parser)
    parser.epilog = "example: nonn predict digit.png --cluster cluster.yaml"


def run(options) -> None:
    """Print class, probability and each student's share."""
    path = options.image
    if options.cluster:
        if options.set:
            raise UserError("--set: has no effect with --cluster, whose file names the network; leave one of them out")
        from nonn.runtime import coordinator  # takes a quarter of the start, which the other way can do without

        coordinator.run(path, options.cluster)
        return
    params = load_settings(options)
    network = options.network or next(iter(params.networks))
    if network not in params.networks:
        raise UserError(f"params.yaml: networks: no {network!r}; choose one of {', '.join(params.networks)}.")
    folder = Paths(params.experiment).export(network)
    shape = read_manifest(folder).image
    prediction = classify(folder, read_image(path, shape.channels, shape.size))
    print(f"{prediction.label}  {prediction.probability:.1%}  ({network}, {path})")
    for student, (device, share) in enumerate(zip(params.networks[network].devices, prediction.shares, strict=True)):
        print(f"  student {student} on {device}: {share:6.1%} of the lead")
