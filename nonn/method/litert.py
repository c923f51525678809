"""Students as int8 files of LiteRT, which TensorFlow Lite Micro runs; with the extra packages of docs/firmware.md.

A file takes one normalised image, 8-bit integers of shape (1, rows, columns, channels), and gives the features of a
single pass. Normalisation stays outside, where it is a table of 256 entries a channel: inside it would take operations
of its own. A student that also looks at the mirrored image is run twice.

TensorFlow Lite Micro has no kernel for GELU. Students of family airbench get x · σ(1.702 x) in its place, which is at
most 0.021 away (https://arxiv.org/abs/1606.08415, section 2) and takes a LOGISTIC and a MUL. The factor goes into the
weights of the convolutions before and behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nonn.core.errors import UserError
from nonn.core.files import replacing, scratch_folder, sha256_of
from nonn.data.dataset import Dataset
from nonn.deploy.int8 import calibration_images, check_close, fold_norms
from nonn.method.litert_integers import Quantised, convolutions_of, with_integers
from nonn.training.networks import ConvNet, Shortcut, single_pass

#: Of students that are a chain of layers, or whose shortcuts begin and end at rectified maps.
FAMILIES = ("fast", "airbench", "mobilenet", "wrn")
#: Of these, the ones that are a chain of convolutions, with ReLU or GELU.
CHAINS = ("fast", "airbench")
#: GELU(x) is about x · σ(1.702 x).
GELU_SLOPE = 1.702
#: Lines of its allocation recorder: all of the arena, and what is free again after an inference.
ARENA = re.compile(r"Arena allocation total.*?(\d+) bytes")


def write_litert(student: ConvNet, data: Dataset, path: Path, exported: Path) -> None:
    """Write an int8 file of a student.

    One of `CHAINS` has the integers of its `exported` ONNX file; others are calibrated on training images.

    Raises
    ------
    UserError
        It is of a family that cannot be written, or its ONNX file is of another student.
    """
    if student.family not in FAMILIES or any(isinstance(module, Shortcut) for module in student.modules()):
        raise UserError(
            f"{path.name}: students with the shortcuts of family {student.family} cannot be written. "
            f"Give students of design.family {', '.join(FAMILIES)}, airbench of depth 2 or less."
        )
    import litert_torch
    from ai_edge_quantizer import calibrator, quantizer, recipe, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    images = _passes(student, calibration_images(data))
    model = PlainFeatures(without_gelu(fold_norms(single_pass(student)))).eval()
    with scratch_folder() as folder:
        whole, quantised = folder / "float32.tflite", folder / "int8.tflite"
        litert_torch.convert(model, (torch.from_numpy(images[:1]),)).export(str(whole))
        rules, manager = recipe.static_wi8_ai8(), recipe_manager.RecipeManager()
        manager.load_quantization_recipe(rules)
        # By default ranges are moving averages, which cut off the largest features.
        calibrating = calibrator.Calibrator(whole.read_bytes(), qsv_update_func=qsv_utils.min_max_update)
        name, inputs = _signature(whole)
        calibrating.calibrate({name: [{inputs[0]: image[None]} for image in images]}, manager)
        quantising = quantizer.Quantizer(str(whole), rules)
        quantising.quantize(calibrating.get_model_qsvs()).export_model(str(quantised), overwrite=True)
        content = _in_one_piece(quantised.read_bytes())
    if student.family in CHAINS:
        try:
            content = with_integers(content, convolutions_of(exported), GELU_SLOPE)
        except ValueError as error:
            raise UserError(f"{exported}: is not of this student ({error}). Run the stage export again.") from None
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _in_one_piece(content: bytes) -> bytes:
    """The same file with all constants inside its tables.

    The quantiser puts large ones behind them, where TensorFlow Lite Micro does not look: it takes zeros in their place.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for buffer in model.buffers:
        if buffer.offset > 1:
            buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class PlainFeatures(nn.Module):
    """A student for normalised images (B, H, W, channels): channels last throughout, so that nothing is transposed."""

    def __init__(self, student: ConvNet):
        super().__init__()
        self.layers = nn.Sequential(student.stem, *student.stages, student.bridge)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).mean((1, 2))


@torch.no_grad()
def without_gelu(model: ConvNet) -> ConvNet:
    """Put x · σ(x) in the place of GELU, for inputs that are 1.702 times as large, in place."""
    layers = [layer for part in (model.stem, *model.stages, model.bridge) for layer in _leaves(part)]
    for position, layer in enumerate(layers):
        if isinstance(layer, nn.GELU):
            before = next(layer for layer in reversed(layers[:position]) if isinstance(layer, nn.Conv2d))
            behind = next(layer for layer in layers[position:] if isinstance(layer, nn.Conv2d))
            before.weight.mul_(GELU_SLOPE)
            if before.bias is not None:
                before.bias.mul_(GELU_SLOPE)
            behind.weight.div_(GELU_SLOPE)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GELU):
                setattr(module, name, nn.SiLU())
    return model


def _leaves(module: nn.Module) -> list[nn.Module]:
    """Layers in their order, those of containers one by one."""
    children = list(module.children())
    return [leaf for child in children for leaf in _leaves(child)] if children else [module]


def normalised(student: ConvNet, images: np.ndarray) -> np.ndarray:
    """What a file takes before it is quantised: uint8 (N, channels, H, W) as float32 (N, H, W, channels)."""
    with torch.no_grad():
        pixels: Tensor = student.normalize(torch.from_numpy(images))
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())


def _passes(student: ConvNet, images: np.ndarray) -> np.ndarray:
    """Normalised images, and after them the mirrored ones where the student sees these, too."""
    passes = [images, images[..., ::-1]] if student.mirrors else [images]
    return normalised(student, np.concatenate(passes))


class MicroInterpreter:
    """A file in the interpreter of TensorFlow Lite Micro."""

    def __init__(self, path: Path):
        from tflite_micro.python.tflite_micro import runtime

        self.interpreter = runtime.Interpreter.from_bytes(path.read_bytes())
        self.input, self.output = (
            Quantised(float(details["quantization_parameters"]["scales"][0]), int(zero))
            for details in (self.interpreter.get_input_details(0), self.interpreter.get_output_details(0))
            for zero in details["quantization_parameters"]["zero_points"][:1]
        )

    def run(self, images: np.ndarray) -> np.ndarray:
        """Features float32 (N, F) of normalised images (N, H, W, channels)."""
        features = []
        for image in self.input.encode(images):
            self.interpreter.set_input(image[None], 0)
            self.interpreter.invoke()
            features.append(self.output.decode(self.interpreter.get_output(0)[0]))
        return np.stack(features)

    def arena_bytes(self) -> int:
        """Of RAM that the interpreter has allotted, by its own recorder."""
        with _captured() as said:
            self.interpreter.print_allocations()
        if not (found := ARENA.search("".join(said))):
            raise UserError("TensorFlow Lite Micro: its recorder says nothing of the arena. Install another version.")
        return int(found[1])


def check_litert(
    student: ConvNet, path: Path, images: np.ndarray, expected: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """Compare a file with the features (N, F) of the student's ONNX file for images, uint8 (N, channels, H, W).

    Returns what was found, and the features (N, F) of the file.

    Raises
    ------
    UserError
        They have little to do with each other.
    """
    micro = MicroInterpreter(path)
    found = micro.run(_passes(student, images)).reshape(-1, *expected.shape).mean(axis=0)
    check_close(path.name, found, torch.from_numpy(expected))
    steps = np.abs(found - expected) / micro.output.scale
    entry = {
        "file": path.name,
        "sha256": sha256_of(path),
        "file_bytes": path.stat().st_size,
        "arena_bytes": micro.arena_bytes(),
        "operators": operators(path),
        "output_scale": micro.output.scale,
        "images_checked": len(images),
        "within_one_step": round(float((steps <= 1).mean()), 4),
        "largest_steps": round(float(steps.max()), 2),
    }
    return entry, found


def operators(path: Path) -> list[str]:
    """Names of the operators that a firmware has to register, sorted."""
    from ai_edge_litert.interpreter import Interpreter

    return sorted({details["op_name"] for details in Interpreter(str(path))._get_ops_details()} - {"DELEGATE"})


def _signature(path: Path) -> tuple[str, Sequence[str]]:
    from ai_edge_litert.interpreter import Interpreter

    ((name, ends),) = Interpreter(str(path)).get_signature_list().items()
    return name, ends["inputs"]


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """What is written to standard output and error meanwhile, past Python too; in the list after the block."""
    said: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield said
        finally:
            for number, own in zip((1, 2), kept, strict=True):
                os.dup2(own, number)
                os.close(own)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
