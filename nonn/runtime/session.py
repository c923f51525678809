"""Running exported models in ONNX Runtime, the way a small device would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime


def open_session(model: Path | bytes) -> onnxruntime.InferenceSession:
    """A session of a file or of its content, with one thread, no memory arena and no spinning.

    Raises
    ------
    onnxruntime.capi.onnxruntime_pybind11_state.Fail
        The file is not a valid model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_onnx(model: Path | bytes, inputs: np.ndarray) -> np.ndarray:
    """Outputs of an exported model for a batch of inputs, one at a time."""
    session = open_session(model)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: row[None]})[0] for row in inputs])
