"""The file of one student, opened where it runs."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from nonn.core.errors import UserError
from nonn.runtime.exported import INPUT, OUTPUT, Manifest, StudentFile, read_student_file
from nonn.runtime.session import open_session


def open_student(folder: Path, manifest: Manifest, student: StudentFile) -> onnxruntime.InferenceSession:
    """A session of a student of the exported network in a folder.

    Raises
    ------
    UserError
        The file is another one, no valid model, or takes something else.
    """
    path, shape = folder / student.file, manifest.image.shape
    session = open_session(read_student_file(folder, manifest, student), path)
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    takes = [(value.name, value.type, tuple(value.shape[1:])) for value in inputs]
    if takes != [(INPUT, "tensor(uint8)", shape)] or OUTPUT not in outputs:
        size = "×".join(map(str, shape))
        raise UserError(f"{path}: no student for the images of its manifest ({size}). Copy the whole folder again.")
    return session
