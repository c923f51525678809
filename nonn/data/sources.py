"""Reading the images of a source: a package, a torchvision dataset, a folder or an archive.

Every source ends as `nonn.data.raw.RawImages`. Which images serve for training and validation is decided in
`nonn.data.dataset`.
"""

from __future__ import annotations

from pathlib import Path

from nonn.data.folders import load_files
from nonn.data.packaged import load_mnist5k, load_torchvision
from nonn.data.raw import RawImages, check_sha256


def load_images(source: str, size: int, sha256: str | None = None) -> RawImages:
    """Read all images of a source, as squares of `size` pixels.

    An image of another shape is cropped to the square at its centre, then resized (bilinear,
    antialiased). Photographs are turned upright first, transparency is dropped. A source that is unknown, unreachable,
    damaged or laid out otherwise is a UserError.

    Parameters
    ----------
    source : str
        ``mnist5k``; ``torchvision:NAME``; or the path of a folder, zip or tar that holds ``<class>/<image>``, or
        ``train/<class>/<image>`` and ``test/<class>/<image>`` or ``val/<class>/<image>`` or both, at the top or inside
        one further folder. Hidden files, ``__MACOSX`` and files outside the class folders are left out.
    sha256 : str, optional
        Pins the content. For an archive it is the sum of the file; for a folder that of the lines ``<sum>  <name>``
        which ``sha256sum`` prints for its images, sorted by name; for the other sources that of labels and pixels.
    """
    kind, _, name = source.partition(":")
    if source == "mnist5k":
        raw = load_mnist5k(size)
    elif kind == "torchvision":
        raw = load_torchvision(name, size)
    else:
        return load_files(Path(source), size, sha256)
    check_sha256(source, raw.sha256, sha256)
    return raw
