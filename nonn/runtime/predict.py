"""Classify one image, on this machine or by the nodes of a cluster, and show what each student contributed."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nonn import demo
from nonn.core.errors import UserError, printable
from nonn.core.images import read_image
from nonn.core.options import add_settings, load_settings, refuse_unknown_networks
from nonn.core.params import PARAMS_FILE
from nonn.core.paths import Paths
from nonn.core.progress import log
from nonn.runtime.exported import INPUT, OUTPUT, ImageFormat, read_manifest
from nonn.runtime.final import FinalLayer, Prediction, predict
from nonn.runtime.inversion import describe_inversion, looks_inverted
from nonn.runtime.students import open_student


def classify(folder: Path, image: np.ndarray) -> Prediction:
    """Run an exported network on an image, uint8 of shape (channels, size, size).

    Raises
    ------
    UserError
        A file is missing, or not the one of the manifest.
    """
    manifest = read_manifest(folder)
    layer = FinalLayer.load(folder, manifest)
    features = {}
    for position, student in enumerate(manifest.students):
        session = open_student(folder, manifest, student)
        features[position] = session.run([OUTPUT], {INPUT: image[None]})[0][0]
    return predict(manifest, layer, features)


def describe(prediction: Prediction, source: str, names: Sequence[str], absent: Mapping[str, str] | None = None) -> str:
    """Class and probability, the share of each student, and why others are absent, a line each."""
    lines = [f"{printable(prediction.label)}  {prediction.probability:.1%}  ({printable(source)})"]
    lines += [f"  {name}: {share:6.1%} of the lead" for name, share in zip(names, prediction.shares, strict=True)]
    lines += [f"  {name}: absent, {reason}" for name, reason in (absent or {}).items()]
    return "\n".join(lines)


def load_pixels(path: Path, image: ImageFormat, invert: bool = False) -> np.ndarray:
    """A picture file as the network takes it; a hint is printed if it looks inverted."""
    pixels = read_image(path, image.channels, image.size, image.white)
    pixels = 255 - pixels if invert else pixels
    if looks_inverted(pixels, image):
        remedy = "Leave out --invert." if invert else "Try --invert."
        log(f"{printable(path)}: {describe_inversion(image)}. {remedy}")
    return pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="PICTURE", help="of any size")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--network", help="a network of params.yaml (default: the first)")
    source.add_argument("--export", type=Path, metavar="FOLDER", help="an exported network; needs no params.yaml")
    source.add_argument("--cluster", type=Path, metavar="FILE", help="ask the nodes of this cluster.yaml instead")
    add_settings(parser)
    parser.add_argument("--invert", action="store_true", help="classify the negative of the picture")
    parser.description = (parser.description or "") + (
        " The probability is calibrated on validation images. The lead is how far the class is ahead of the mean "
        "class, in logits. A student's share of it is negative if the student speaks against the class."
    )
    parser.epilog = "example: nonn predict nonn/demo/pictures/3/test-image-350.png --export nonn/demo/digits"


def run(options: argparse.Namespace) -> None:
    """Print class, probability and each student's share."""
    if options.set and (options.cluster or options.export):
        raise UserError("--set: has an effect only where params.yaml names the network; leave it out")
    if options.cluster:
        print(ask_cluster(options.image, options.cluster, options.invert))
        return
    if options.export:
        folder, name = options.export, str(options.export)
        students = [f"student {student.model}" for student in read_manifest(folder).students]
    else:
        if not PARAMS_FILE.exists():
            raise UserError(
                f"{PARAMS_FILE}: no such file here. Name the folder of an exported network, for example that of "
                f"`nonn demo`: --export {demo.NETWORK}"
            )
        params = load_settings(options)
        name = options.network or next(iter(params.networks))
        refuse_unknown_networks(params, [name])
        folder = Paths(params.experiment).export(name)
        students = [f"student {i} on {device}" for i, device in enumerate(params.networks[name].devices)]
    pixels = load_pixels(options.image, read_manifest(folder).image, options.invert)
    print(describe(classify(folder, pixels), f"{name}, {options.image}", students))


def ask_cluster(path: Path, cluster_path: Path, invert: bool) -> str:
    """What the nodes of a cluster say of a picture, and which of them are absent."""
    from nonn.runtime.cluster import load_cluster  # these take a quarter of the start,
    from nonn.runtime.coordinator import classify_once  # which the other way can do without
    from nonn.runtime.logs import relayed_stderr

    cluster = load_cluster(cluster_path)
    pixels = load_pixels(path, cluster.placed()[0].image, invert)
    with relayed_stderr():
        answer = asyncio.run(classify_once(cluster, pixels))
    return describe(answer.prediction, f"{cluster_path}, {path}", answer.present, answer.absent)
