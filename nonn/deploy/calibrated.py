"""Quantising the ONNX file of a float32 student, for users without its training folder.

The stage `export` quantises the trained student itself, see `nonn.deploy.int8`. Here ONNX Runtime folds the batch
norms, so those behind a pooling stay, and become tables in firmware.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from nonn.core.errors import UserError
from nonn.core.files import replacing
from nonn.data.image_store import spaced
from nonn.deploy.int8 import CALIBRATION_IMAGES, check_close, quantise
from nonn.runtime.session import open_session, run_onnx

#: Images on which the features of both are compared.
COMPARED_IMAGES = 32


def write_int8(source: Path, load: Callable[[tuple[int, ...]], np.ndarray], target: Path) -> None:
    """Write a float32 student in int8.

    Parameters
    ----------
    load
        Called with (channels, H, W); returns training images, uint8 (N, channels, H, W), of which evenly spaced ones
        serve for the calibration.

    Raises
    ------
    UserError
        It is in int8 already, or its features in int8 have little to do with those in float32.
    """
    session = open_session(source)
    if any(node.op_type == "QuantizeLinear" for node in onnx.load(source).graph.node):
        raise UserError(f"{source}: is in int8 already. Leave out --calibrate.")
    images = load(tuple(session.get_inputs()[0].shape[1:]))
    images = np.ascontiguousarray(images[spaced(len(images), CALIBRATION_IMAGES)])
    some = images[:COMPARED_IMAGES]
    with replacing(target) as temporary:
        _fold_norms(source, temporary)
        quantise(temporary, images)
        trained = torch.from_numpy(run_onnx(source, some))
        remedy = "Calibrate on images like those that it was trained on, or run it in float32"
        check_close(str(source), run_onnx(temporary, some), trained, remedy)


def _fold_norms(source: Path, target: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
