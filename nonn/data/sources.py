"""Reading the images of a source: a package, a torchvision dataset, the Hugging Face Hub, a folder or an archive.

Every source ends as `nonn.data.decoding.SourceInfo`. `nonn.data.dataset` decides which images serve for training
and validation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nonn.core.params import DatasetParams
from nonn.data.decoding import Decoder, SourceInfo, check_sha256
from nonn.data.folders import load_files
from nonn.data.hub import load_hub
from nonn.data.idx import find_idx, load_idx
from nonn.data.packaged import load_mnist5k, load_torchvision


def load_images(section: DatasetParams, decoder: Decoder) -> tuple[SourceInfo, np.ndarray]:
    """Read all images of a source into the files of the decoder's writers.

    An image of another shape is cropped to the square at its centre, then resized (bilinear, antialiased). Photographs
    are turned upright first, transparent parts are white. A source that is unknown, unreachable, damaged or laid out
    otherwise is a UserError. Returns what is known of the images that can be read, and their indices in the files,
    ascending: all of them, unless broken ones are skipped.

    ``section.source`` is ``mnist5k``; ``torchvision:NAME``; ``hf:NAME`` (see `nonn.data.hub`); a folder of idx files;
    or the path of a folder, zip or tar that holds ``<class>/<image>``, or ``train/<class>/<image>`` and
    ``test/<class>/<image>`` or ``val/<class>/<image>`` or both, at the top or inside one further folder, or one of the
    layouts of `nonn.data.known`. Left out are hidden files, ``__MACOSX``, what is known to be no picture by its name,
    and files outside the class folders.

    ``section.sha256`` pins the content. For an archive it is the sum of the file; for a folder that of the lines
    ``<sum>  <name>`` which ``sha256sum`` prints for its images, sorted by name; for the other sources that of labels
    and pixels.
    """
    kind, _, name = section.source.partition(":")
    if section.source == "mnist5k":
        info = load_mnist5k(decoder)
    elif kind == "torchvision":
        info = load_torchvision(name, decoder)
    elif kind == "hf":
        info = load_hub(name, decoder, section.image_column, section.label_column)
    elif find_idx(Path(section.source)):
        info = load_idx(Path(section.source), decoder)
    else:
        info = load_files(Path(section.source), decoder, section.sha256)
    check_sha256(section.source, info.sha256, section.sha256)
    decoder.check(skip=section.broken == "skip")
    kept = np.setdiff1d(np.arange(len(info.labels)), [index for index, _ in decoder.broken])
    return info.only(kept) if decoder.broken else info, kept
