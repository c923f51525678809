"""Classify one image with an exported network, and show what each student contributed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from nonn.errors import UserError
from nonn.params import Params
from nonn.paths import Paths
from nonn.runtime.exported import read_manifest
from nonn.runtime.final import FinalLayer, Prediction, read_out
from nonn.runtime.session import run_onnx
from nonn.sources import fit_image


def read_image(path: Path, channels: int, size: int) -> np.ndarray:
    """An image file as the network takes it: uint8 of shape (channels, size, size).

    Raises
    ------
    UserError
        The file is missing, is not an image, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            pixels = fit_image(image, size)
            if len(pixels) > channels:
                pixels = fit_image(image.convert("L"), size)
            return np.ascontiguousarray(np.broadcast_to(pixels, (channels, size, size)))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give the path of an image.") from None
    except Exception as error:  # on damaged data, Pillow's decoders raise almost anything
        raise UserError(f"{path}: not a readable image ({error}). Give a PNG, JPEG or the like.") from None


def classify(folder: Path, image: np.ndarray) -> Prediction:
    """Run every student of an exported network, then its final layer.

    Parameters
    ----------
    folder : Path
        As the stage `export` wrote it.
    image : ndarray of shape (channels, size, size), uint8
    """
    manifest = read_manifest(folder)
    features = [run_onnx(folder / student.file, image[None]) for student in manifest.students]
    logits = run_onnx(folder / manifest.final.file, np.concatenate(features, axis=1))[0]
    terms = FinalLayer.load(folder, manifest).contributions({i: f[0] for i, f in enumerate(features)})
    return read_out(manifest.classes, logits, list(terms.values()))


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
