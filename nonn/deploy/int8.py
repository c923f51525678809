"""int8 students: what a device of 8-bit precision runs, quantised after training by ONNX Runtime.

Convolutions and poolings work on 8-bit integers, with a scale for each filter's weights and one for each
map of activations, the latter calibrated on training images. ONNX Runtime has no integer kernel for GELU, and
calculates it in float32, from and to integers; the spatial mean and a head stay float32.

The same images and weights give the same bytes, and the same file gives the same answers on every processor, up to
the rounding of float32. Activations are unsigned, so that ONNX Runtime multiplies them with dot products of 8-bit
integers. x86 processors with AVX2 or AVX-512 but no VNNI instructions add two products in 16 bits there, and
saturate. So weights have 7 bits, −64 to 64: the largest sum, 2 · 255 · 64 = 32,640, stays below 2¹⁵. See
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#when-and-why-do-i-need-to-try-u8u8.
``results/cifar10/attempts.md`` says what other schemes give and cost.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nonn.core.errors import UserError
from nonn.core.files import replacing
from nonn.data.dataset import Dataset
from nonn.data.image_store import spaced
from nonn.training.networks import ConvNet

#: Training images that activations are calibrated on, evenly spaced: a source may list its images class by class.
CALIBRATION_IMAGES = 256
#: Largest mean difference of a feature vector from that of the float32 student, relative to its length. Students
#: of CIFAR-10 differ by 0.04 to 0.05 and are as accurate as before; at 0.25 something went wrong.
TOLERANCE = 0.25
#: Operations that work on integers. Between the operations of a GELU, integers would cost accuracy and save no time.
QUANTISED = ("Conv", "MaxPool")

Net = TypeVar("Net", bound=nn.Module)


def fold_norms(model: ConvNet) -> ConvNet:
    """A copy for inference, in which each batch norm is folded into the convolution before it, if there is one.

    A max pooling may lie between the two if all scales are positive, for the largest value then stays the largest.
    """
    return _folded(copy.deepcopy(model).eval())


def _folded(module: Net) -> Net:
    if isinstance(module, nn.Sequential):
        layers: list[nn.Module] = []
        for layer in module:
            if isinstance(layer, nn.BatchNorm2d) and (position := _folds_into(layers, layer)) is not None:
                layers[position] = fuse_conv_bn_eval(layers[position], layer)  # type: ignore[type-var]  # a convolution
            else:
                layers.append(layer)
        for position in reversed(range(len(layers), len(module))):
            del module[position]
        for position, layer in enumerate(layers):
            module[position] = layer
    for name, child in module.named_children():
        setattr(module, name, _folded(child))
    return module


def _folds_into(layers: list[nn.Module], norm: nn.BatchNorm2d) -> int | None:
    """Position of the convolution that a batch norm after these layers can be folded into."""
    kinds = [type(layer) for layer in layers]
    if kinds[-1:] == [nn.Conv2d]:
        return len(layers) - 1
    if kinds[-2:] == [nn.Conv2d, nn.MaxPool2d] and bool((norm.weight > 0).all()):
        return len(layers) - 2
    return None


def calibration_images(data: Dataset) -> np.ndarray:
    """The training images to calibrate on, uint8 of shape (≤ `CALIBRATION_IMAGES`, channels, H, W)."""
    images, _ = data.subset("train")
    return images[spaced(len(images), CALIBRATION_IMAGES)].numpy()


def quantise(path: Path, images: np.ndarray) -> None:
    """Replace a float32 ONNX file of one input by an int8 one, calibrated on uint8 (N, channels, H, W)."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    name = onnx.load(path, load_external_data=False).graph.input[0].name

    class Images(CalibrationDataReader):
        def __init__(self):
            self.rows = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return None if (row := next(self.rows, None)) is None else {name: row[None]}

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises folding batch norms, which has been done
    try:
        with replacing(path) as quantised:
            quantize_static(
                path,
                quantised,
                Images(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTISED),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
    finally:
        root.setLevel(level)


def check_close(
    name: str,
    quantised: np.ndarray,
    original: Tensor,
    remedy: str = "Set design.precision to float32 in params.yaml",
) -> None:
    """Refuse an int8 student whose feature vectors (B, F) differ from those of the trained one by over `TOLERANCE`."""
    trained = original.numpy()
    lengths = np.linalg.norm(trained, axis=1)
    difference = (np.linalg.norm(quantised - trained, axis=1) / np.maximum(lengths, 1e-9)).mean()
    if not difference <= TOLERANCE:
        raise UserError(
            f"{name}: in int8 its outputs differ by {difference:.0%} from those of the trained model, more than "
            f"{TOLERANCE:.0%}. {remedy}."
        )


def weight_bytes(model: ConvNet) -> int:
    """Bytes of an int8 model's weights.

    A weight of a convolution takes a byte, a filter also a 32-bit bias and a 32-bit scale, and any other value 32 bits.
    """
    folded = fold_norms(model)
    convolutions = [module for module in folded.modules() if isinstance(module, nn.Conv2d)]
    weights = sum(module.weight.numel() for module in convolutions)
    filters = sum(module.out_channels for module in convolutions)
    biases = sum(module.out_channels for module in convolutions if module.bias is not None)
    others = sum(parameter.numel() for parameter in folded.parameters()) - weights - biases
    return weights + 8 * filters + 4 * others
