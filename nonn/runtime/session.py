"""Running exported models in ONNX Runtime, the way a small device would."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from nonn.core.errors import UserError, one_line
from nonn.core.files import regular

#: What ONNX Runtime raises of a file that is no model, is damaged, or asks for what it cannot do.
REFUSALS = (
    *(state.EPFail, state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoModel),
    *(state.NoSuchFile, state.NotFound, state.NotImplemented, state.RuntimeException),
)


def open_session(model: Path | bytes, name: Path | str = "the model") -> onnxruntime.InferenceSession:
    """A session of a file or of its content, with one thread, no memory arena and no spinning.

    `name` is what messages call a content.

    Raises
    ------
    UserError
        It is not a valid model.
    """
    if isinstance(model, Path):
        regular(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except REFUSALS as error:
        name = model if isinstance(model, Path) else name
        raise UserError(f"{name}: not a model that ONNX Runtime runs ({one_line(error)}). Export it again.") from None


def run_onnx(model: Path | bytes, inputs: Iterable[np.ndarray]) -> np.ndarray:
    """Outputs of an exported model for a batch of inputs, one at a time."""
    session = open_session(model)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: row[None]})[0] for row in inputs])
