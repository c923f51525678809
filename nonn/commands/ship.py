"""The command ``nonn ship``: put a trained network into the package, for `nonn demo`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from PIL import Image

from nonn import demo
from nonn.core.errors import UserError
from nonn.core.files import replacing_all
from nonn.core.options import add_network, refuse_unknown_networks
from nonn.core.params import load_params
from nonn.core.paths import Paths
from nonn.live.pictures import dataset_pictures
from nonn.runtime.exported import read_manifest, read_verified


def ship(export: Path, dataset: Path, network: Path, pictures: Path) -> None:
    """Copy an exported network, verified, to the folder `network`, and test images to the folder `pictures`.

    The images are the first of each class in a fixed random order, whatever the network says of them.

    Raises
    ------
    UserError
        Export or dataset are missing, damaged, or do not belong together.
    """
    manifest = read_manifest(export)
    files = {student.file: student.sha256 for student in manifest.students}
    files |= {manifest.final.blocks: manifest.final.blocks_sha256, manifest.final.file: manifest.final.sha256}
    found = {picture.truth: picture for picture in reversed(dataset_pictures(dataset, manifest))}
    if absent := [name for name in manifest.classes if name not in found]:
        raise UserError(f"{dataset}: has no test image of class {absent[0]!r}. Ship another network.")
    if odd := [name for name in manifest.classes if not is_folder_name(name)]:
        raise UserError(f"{export}: class {odd[0]!r} cannot be the name of a folder of pictures. Rename it.")
    with replacing_all(network, pictures) as (new_network, folder):
        new_network.mkdir(parents=True)
        for name, sha256 in files.items():
            (new_network / name).write_bytes(read_verified(export / name, sha256))
        shutil.copyfile(export / "manifest.json", new_network / "manifest.json")
        for name in manifest.classes:
            pixels = found[name].read()
            (folder / name).mkdir(parents=True)
            image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
            image.save(folder / name / f"{found[name].name.replace(' ', '-')}.png")


def is_folder_name(name: str) -> bool:
    """Whether this is the name of a folder, and no path that leads elsewhere."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0") and len(name.encode()) < 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network(parser, help="as named in params.yaml; exported")
    parser.epilog = "example: nonn ship 4s"


def run(options: argparse.Namespace) -> None:
    params = load_params()
    refuse_unknown_networks(params, [options.network])
    paths = Paths(params.experiment)
    ship(paths.export(options.network), paths.dataset, demo.NETWORK, demo.PICTURES)
    print(f"{demo.NETWORK}: {options.network} of {params.experiment}, shown by `nonn demo`; commit it")
