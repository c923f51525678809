"""The convolutional networks: one class for teachers and students, five families of them.

A network takes raw ``uint8`` images and normalises them itself, so that no device, stage or exported file can normalise
them differently. It returns its *feature vector* (the spatial mean of its last rectified convolution) and its logits:

    image -> stem -> stages -> [bridge] -> spatial mean -> head

The **bridge** of a student is a 1×1 convolution to one channel for each filter of the teacher that it is to imitate;
its feature vector is all that leaves the device. A teacher has no bridge.

Outside of training, a network with ``mirror`` sees each image and its mirror image, and answers with the mean: more
accurate, at twice the operations and without further weights.

Families
--------
fast
    Three to six stages of 3×3 convolutions, each pooled right after its first convolution, after
    https://github.com/KellerJordan/cifar10-airbench.
airbench
    The same with what makes short trainings accurate: a first layer that whitens, filters that begin as identities,
    GELU, batch norm without scales. From depth 3 on, a shortcut skips all but the first convolution of a stage, as in
    airbench96. With ``strided``, the first stage skips every second pixel instead of pooling, so that the largest map
    of the network is never made.
wrn
    Wide ResNets WRN-d-k (https://arxiv.org/abs/1605.07146), the paper's teachers and students.
resnet
    The CIFAR ResNets (https://arxiv.org/abs/1512.03385, section 4.2), for importing teachers.
mobilenet
    MobileNetV2 (https://arxiv.org/abs/1801.04381) for photographs and small devices, whose compilers know all of its
    operations: inverted residuals with ReLU6, then a 1×1 convolution to four times the last stage's width. Every
    stage halves the maps, so three to six of them suit images of 28 to 512 pixels. The first one is a single block
    without expansion, whose stride stands in the stem, and the paper's network for 224 pixels has the widths 16, 24,
    32, 64 to 96, and 160 to 320.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonn.core.architecture import Architecture
from nonn.core.families import EXPANSION, WHITENED
from nonn.data.image_store import Images, spaced

#: Pixels a side of the images that batch sizes outside of schedules are meant for.
REFERENCE_SIZE = 32
#: Added to the variances of patches before they are divided by: directions without any are noise.
WHITENING_EPSILON = 5e-4


class Normalize(nn.Module):
    """``(x - mean) / std`` by channel; `mean` and `std` in units of the raw pixel values, 0 to 255."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.float().reshape(1, -1, 1, 1))
        self.register_buffer("std", std.float().reshape(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, pool: bool = False) -> list[nn.Module]:
    """Convolution, optional 2×2 max pooling, batch norm, ReLU: pooling first makes the rest cheaper."""
    pooling = [nn.MaxPool2d(2)] if pool else []
    return [convolution(inputs, outputs, kernel), *pooling, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def fast_body(channels: int, architecture: Architecture) -> tuple[nn.Module, list[nn.Sequential], int]:
    width = max(4, architecture.widths[0] // 2)
    stem = nn.Sequential(*conv_bn_relu(channels, width))
    stages: list[nn.Sequential] = []
    for outputs in architecture.widths:
        layers = conv_bn_relu(width, outputs, pool=True)
        for _ in range(architecture.depth - 1):
            layers += conv_bn_relu(outputs, outputs)
        stages.append(nn.Sequential(*layers))
        width = outputs
    return stem, stages, width


def identity_convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A convolution whose first filters begin as the identity, and the others at random."""
    layer = convolution(inputs, outputs, stride=stride)
    nn.init.dirac_(layer.weight[: min(inputs, outputs)])
    return layer


def unscaled_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with a bias and without a scale, whose statistics follow a short training closely."""
    norm = nn.BatchNorm2d(channels, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class Shortcut(nn.Sequential):
    """Layers whose input is added to their output."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def airbench_body(channels: int, architecture: Architecture) -> tuple[nn.Module, list[nn.Sequential], int]:
    width = 2 * channels * WHITENED**2  # each direction of a patch and its opposite
    # Padded, where airbench's output is a pixel smaller: the stages are as large as a student's.
    padding, whitening = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, width, WHITENED, bias=False)
    stages: list[nn.Sequential] = []
    whitening.weight.requires_grad_(False)
    for outputs in architecture.widths:
        if architecture.strided and not stages:
            shrinking: list[nn.Module] = [identity_convolution(width, outputs, stride=2)]
        else:
            shrinking = [identity_convolution(width, outputs), nn.MaxPool2d(2)]
        layers, rest = [*shrinking, unscaled_norm(outputs), nn.GELU()], []
        for _ in range(architecture.depth - 1):
            rest += [identity_convolution(outputs, outputs), unscaled_norm(outputs), nn.GELU()]
        layers += rest if architecture.depth < 3 else [Shortcut(*rest[:-1]), rest[-1]]
        stages.append(nn.Sequential(*layers))
        width = outputs
    stages[-1][-1] = nn.ReLU(inplace=True)  # the features that students imitate are rectified
    return nn.Sequential(padding, whitening, nn.GELU()), stages, width


class WideBlock(nn.Module):
    """Pre-activation residual block of a Wide ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = convolution(inputs, outputs, stride=stride, bias=True)
        self.conv2 = convolution(outputs, outputs, bias=True)
        self.shortcut = None
        if inputs != outputs or stride != 1:
            self.shortcut = convolution(inputs, outputs, kernel=1, stride=stride, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        skipped = x if self.shortcut is None else self.shortcut(active)
        return skipped + self.conv2(F.relu(self.norm2(self.conv1(active))))


def wrn_body(channels: int, architecture: Architecture) -> tuple[nn.Module, list[nn.Sequential], int]:
    blocks, width = (architecture.depth - 4) // 6, 16
    stem, stages = convolution(channels, width, bias=True), []
    for stride, outputs in ((1, 16), (2, 32), (2, 64)):
        outputs *= architecture.width
        stage = [WideBlock(width, outputs, stride)]
        stage += [WideBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
        stages.append(nn.Sequential(*stage))
        width = outputs
    stages[-1].extend([nn.BatchNorm2d(width), nn.ReLU(inplace=True)])
    return stem, stages, width


class ResidualBlock(nn.Module):
    """Block of a CIFAR ResNet, with the parameter-free shortcut (option A of the paper)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = convolution(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.added:
            half = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half))
        return F.relu(x + y)


def resnet_body(channels: int, architecture: Architecture) -> tuple[nn.Module, list[nn.Sequential], int]:
    blocks, width = (architecture.depth - 2) // 6, 16 * architecture.width
    stem, stages = nn.Sequential(*conv_bn_relu(channels, width)), []
    for stride, factor in ((1, 1), (2, 2), (2, 4)):
        outputs = 16 * architecture.width * factor
        stage = [ResidualBlock(width, outputs, stride)]
        stage += [ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
        stages.append(nn.Sequential(*stage))
        width = outputs
    return stem, stages, width


def relu6_convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, ...]:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return layer, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True)


class InvertedResidual(nn.Module):
    """Block of a MobileNetV2: widen by a 1×1 convolution, filter each channel alone, narrow without ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        inside = inputs * expansion
        wider = relu6_convolution(inputs, inside) if expansion > 1 else ()
        filtered = relu6_convolution(inside, inside, kernel=3, stride=stride, groups=inside)
        self.layers = nn.Sequential(*wider, *filtered, convolution(inside, outputs, kernel=1), nn.BatchNorm2d(outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


def mobilenet_body(channels: int, architecture: Architecture) -> tuple[nn.Module, list[nn.Sequential], int]:
    width = 2 * architecture.widths[0]
    stem = nn.Sequential(*relu6_convolution(channels, width, kernel=3, stride=2))
    stages: list[nn.Sequential] = []
    for outputs in architecture.widths:
        if stages:
            blocks = [InvertedResidual(width, outputs, 2, EXPANSION)]
            blocks += [InvertedResidual(outputs, outputs, 1, EXPANSION) for _ in range(architecture.depth - 1)]
        else:
            blocks = [InvertedResidual(width, outputs, 1, expansion=1)]
        stages.append(nn.Sequential(*blocks))
        width = outputs
    stages[-1].extend(relu6_convolution(width, architecture.n_features))  # the features are rectified
    return stem, stages, architecture.n_features


BODIES = {
    "fast": fast_body,
    "airbench": airbench_body,
    "wrn": wrn_body,
    "resnet": resnet_body,
    "mobilenet": mobilenet_body,
}


class ConvNet(nn.Module):
    """A teacher, a student or a baseline, of C classes.

    `n_filters` are the outputs of the bridge, |P_i| of the paper; None for no bridge. `mean` and `std` (channels,) of
    the training images' raw values are needed except when a state dict is loaded.
    """

    def __init__(
        self,
        architecture: Architecture,
        channels: int,
        n_classes: int,
        n_filters: int | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ):
        super().__init__()
        self.normalize = Normalize(
            torch.zeros(channels) if mean is None else mean, torch.ones(channels) if std is None else std
        )
        self.family, self.mirrors = architecture.family, architecture.mirror
        self.stem, stages, width = BODIES[architecture.family](channels, architecture)
        self.stages = nn.ModuleList(stages)
        self.bridge = nn.Sequential(*conv_bn_relu(width, n_filters, kernel=1)) if n_filters else nn.Identity()
        self.n_features = n_filters or width
        self.head = nn.Linear(self.n_features, n_classes)

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Output of each stage, (B, width, height, width) each; `images` uint8 of shape (B, channels, H, W)."""
        x = self.stem(self.normalize(images))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def read_out(self, last_map: Tensor) -> tuple[Tensor, Tensor]:
        """Feature vector (B, n_features) and logits (B, C) from the last stage's output."""
        features = self.bridge(last_map).mean((2, 3))
        return features, self.head(features)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.read_out(self.stage_maps(images)[-1])
        if self.mirrors and not self.training:
            # One after the other, not as a batch: what is alive at once stays as small as for one image.
            mirrored = self.read_out(self.stage_maps(images.flip(-1))[-1])
            features, logits = (features + mirrored[0]) / 2, (logits + mirrored[1]) / 2
        return features, logits


@torch.no_grad()
def whiten(model: ConvNet, images: Tensor | Images, n_images: int = 5000) -> None:
    """Set the first layer of a network of family airbench in place; other networks stay as they are.

    Its filters are the eigenvectors of the covariance of patches of training images, uint8 of shape (N, channels, H,
    W), divided by the standard deviation in their direction, and their opposites: the outputs have no correlation and
    about one variance. At most `n_images` images are used, fewer of large ones: see `scaled_batch_size`.
    """
    if model.family != "airbench":
        return
    pixels = model.normalize(images[spaced(len(images), scaled_batch_size(n_images, images.shape[-1]))])
    patches = F.unfold(pixels, WHITENED).transpose(1, 2).flatten(0, 1)  # (patches, channels · 2 · 2)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (directions / (variances + WHITENING_EPSILON).sqrt()).T
    weight = model.stem[1].weight  # type: ignore[index]
    weight.copy_(torch.cat([filters, -filters]).view_as(weight))


def deployed(model: ConvNet) -> ConvNet:
    """A copy as a device runs it: a student with a bridge has no training head there."""
    model = copy.deepcopy(model)
    if not isinstance(model.bridge, nn.Identity):
        model.head = nn.Identity()  # type: ignore[assignment]
    return model


def single_pass(model: ConvNet) -> ConvNet:
    """A copy that sees each image once, as it is."""
    model = copy.deepcopy(model)
    model.mirrors = False
    return model


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def scaled_batch_size(batch_size: int, size: int) -> int:
    """The number of images of `size` pixels a side that take the memory of `batch_size` images of `REFERENCE_SIZE`.

    It is at least 1 and at most `batch_size`.
    """
    return max(1, min(batch_size, batch_size * REFERENCE_SIZE**2 // size**2))


def _lies_on(model: nn.Module, device: torch.device) -> bool:
    """Whether a model is on a device, its filters with channels last, so that `Module.to` has nothing to do.

    `Module.to` copies tensors of shape (1, 1, 1, 1) all the same, which a step that was recorded on a GPU would read
    where they were before.
    """

    def lies(tensor: Tensor) -> bool:
        if tensor.dim() != 4:
            return tensor.device == device
        wanted = torch.empty_like(tensor, device="meta", memory_format=torch.channels_last)
        return tensor.device == device and tensor.stride() == wanted.stride()

    return all(map(lies, (*model.parameters(), *model.buffers())))


@torch.no_grad()
def predict(
    model: nn.Module, images: Tensor | Images, device: torch.device | str = "cpu", batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Feature vectors (N, n_features) and logits (N, C) of uint8 images (N, channels, H, W), in float32.

    The model is a `ConvNet`, or a teacher that is called like one.
    """
    if not _lies_on(model, torch.empty(0, device=device).device):
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.eval()
    batches = images.split(scaled_batch_size(batch_size, images.shape[-1]))
    outputs = (dict(zip(("features", "logits"), model(batch.to(device)), strict=True)) for batch in batches)
    whole = concatenated(outputs, len(images))
    return whole["features"].float().cpu(), whole["logits"].float().cpu()


def concatenated(batches: Iterable[Mapping[str, Tensor]], count: int) -> dict[str, Tensor]:
    """The tensors of all batches, of `count` images together, each as one.

    They are written in place. Small tensors that are kept between large ones that are freed would fragment the memory,
    by a megabyte for each batch.
    """
    whole: dict[str, Tensor] = {}
    end = 0
    for batch in batches:
        whole = whole or {name: tensor.new_empty(count, *tensor.shape[1:]) for name, tensor in batch.items()}
        begin, end = end, end + len(next(iter(batch.values())))
        for name, tensor in batch.items():
            whole[name][begin:end] = tensor
    assert end == count, "the batches do not have all images"
    return whole


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is their label, 0 to 1."""
    return (logits.argmax(1) == labels).double().mean().item()
