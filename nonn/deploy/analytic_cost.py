"""What a student costs its device, counted from its architecture alone: without PyTorch, in less than a millisecond.

`nonn.deploy.traced_cost` counts the same from the network itself, whatever it is made of, and takes a thousand times as
long. A design looks at hundreds of candidates, and ``nonn plan`` at thousands, so the student families are described a
second time, layer by layer; a test compares the two. Other families are traced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from nonn.core.architecture import Architecture
from nonn.core.cost import Cost
from nonn.core.families import EXPANSION, WHITENED
from nonn.core.params import Precision

#: Bytes of an activation.
BYTES = {"float32": 4, "int8": 1}


class CostStep(NamedTuple):
    """One operation of a network, in the order in which they run."""

    values: int  # that it makes
    reads: tuple[int, ...] = ()  # the steps whose values it reads
    shares: int | None = None  # the step whose memory it writes to, if it needs none of its own


def peak_values(steps: list[CostStep]) -> int:
    """Largest number of values alive at once: from the step that makes them to the last that reads them."""
    owner: list[int] = []
    for number, step in enumerate(steps):
        owner.append(number if step.shares is None else owner[step.shares])
    last_use = list(owner)
    for number, step in enumerate(steps):
        last_use[owner[number]] = max(last_use[owner[number]], number)
        for read in step.reads:
            last_use[owner[read]] = max(last_use[owner[read]], number)
    released: list[list[int]] = [[] for _ in steps]
    for number, end in enumerate(last_use):
        if owner[number] == number:
            released[end].append(steps[number].values)
    alive = peak = 0
    for number, step in enumerate(steps):
        alive += step.values if owner[number] == number else 0
        peak = max(peak, alive)
        alive -= sum(released[number])
    return peak


class Map(NamedTuple):
    """Output of a step: `channels` maps of `side` by `side` values."""

    step: int
    channels: int
    side: int


@dataclass
class LayerCounter:
    """Counts a network layer by layer, its weights in the first pass alone."""

    steps: list[CostStep] = field(default_factory=list)
    macs: int = 0
    weights: int = 0  # of convolutions
    filters: int = 0
    biases: int = 0  # of convolutions
    folded: int = 0  # parameters of batch norms that int8 models fold into the convolution before them
    others: int = 0
    counts_weights: bool = True

    @property
    def params(self) -> int:
        return self.weights + self.biases + self.folded + self.others

    def weight_bytes(self, precision: Precision) -> int:
        """As `nonn.deploy.int8.weight_bytes`: in int8 each filter has a 32-bit bias and a 32-bit scale."""
        return 4 * self.params if precision == "float32" else self.weights + 8 * self.filters + 4 * self.others

    def add(self, values: int, *reads: int, shares: int | None = None) -> int:
        self.steps.append(CostStep(values, reads, shares))
        return len(self.steps) - 1

    def new(self, channels: int, side: int, *reads: int) -> Map:
        return Map(self.add(channels * side * side, *reads), channels, side)

    def in_place(self, x: Map) -> Map:
        return x._replace(step=self.add(0, x.step, shares=x.step))

    def convolve(
        self,
        x: Map,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        bias: bool = False,
        padding: int | None = None,
        groups: int = 1,
    ) -> Map:
        margin = kernel // 2 if padding is None else padding
        side = (x.side + 2 * margin - kernel) // stride + 1
        weights = x.channels // groups * kernel * kernel * outputs
        self.macs += weights * side * side
        if self.counts_weights:
            self.weights += weights
            self.filters += outputs
            self.biases += outputs * bias
        return self.new(outputs, side, x.step)

    def normalise(self, x: Map, is_folded: bool = True) -> Map:
        """Batch norm of two parameters a channel, of which one may be fixed."""
        if self.counts_weights and is_folded:
            self.folded += 2 * x.channels
        elif self.counts_weights:
            self.others += 2 * x.channels
        return self.in_place(x)

    def pool(self, x: Map) -> Map:
        return self.new(x.channels, x.side // 2, x.step)

    def conv_bn_relu(
        self, x: Map, outputs: int, kernel: int = 3, pool: bool = False, stride: int = 1, groups: int = 1
    ) -> Map:
        x = self.convolve(x, outputs, kernel, stride, groups=groups)
        return self.in_place(self.normalise(self.pool(x) if pool else x))


def _fast(counter: LayerCounter, x: Map, architecture: Architecture) -> Map:
    x = counter.conv_bn_relu(x, max(4, architecture.widths[0] // 2))
    for outputs in architecture.widths:
        x = counter.conv_bn_relu(x, outputs, pool=True)
        for _ in range(architecture.depth - 1):
            x = counter.conv_bn_relu(x, outputs)
    return x


def _airbench(counter: LayerCounter, x: Map, architecture: Architecture) -> Map:
    padded = counter.new(x.channels, x.side + 1, x.step)
    x = counter.in_place(counter.convolve(padded, 2 * x.channels * WHITENED**2, WHITENED, padding=0))
    for stage, outputs in enumerate(architecture.widths):
        if architecture.strided and stage == 0:
            x = counter.convolve(x, outputs, stride=2)
        else:
            x = counter.pool(counter.convolve(x, outputs))
        x = entry = counter.in_place(counter.normalise(x))
        for layer in range(architecture.depth - 1):
            x = counter.normalise(counter.convolve(x, outputs))
            # The last activation of a stage with a shortcut comes after its sum.
            if architecture.depth < 3 or layer < architecture.depth - 2:
                x = counter.in_place(x)
        if architecture.depth >= 3:
            x = counter.in_place(counter.new(outputs, x.side, entry.step, x.step))
    return x


def _wrn(counter: LayerCounter, x: Map, architecture: Architecture) -> Map:
    x = counter.convolve(x, 16, bias=True)
    for first_stride, outputs in ((1, 16), (2, 32), (2, 64)):
        outputs *= architecture.width
        for block in range((architecture.depth - 4) // 6):
            stride = first_stride if block == 0 else 1
            active = counter.in_place(counter.normalise(x, is_folded=False))
            skipped = x
            if x.channels != outputs or stride != 1:
                skipped = counter.convolve(active, outputs, kernel=1, stride=stride, bias=True)
            y = counter.convolve(active, outputs, stride=stride, bias=True)
            y = counter.in_place(counter.normalise(y, is_folded=False))
            y = counter.convolve(y, outputs, bias=True)
            x = counter.new(outputs, y.side, skipped.step, y.step)
    return counter.in_place(counter.normalise(x, is_folded=False))


def _mobilenet(counter: LayerCounter, x: Map, architecture: Architecture) -> Map:
    x = counter.conv_bn_relu(x, 2 * architecture.widths[0], stride=2)
    for stage, outputs in enumerate(architecture.widths):
        for block in range(architecture.depth if stage else 1):
            inside, stride = x.channels * (EXPANSION if stage else 1), 2 if stage and block == 0 else 1
            y = counter.conv_bn_relu(x, inside, kernel=1) if stage else x
            y = counter.conv_bn_relu(y, inside, stride=stride, groups=inside)
            y = counter.normalise(counter.convolve(y, outputs, kernel=1))
            x = counter.new(outputs, y.side, x.step, y.step) if stride == 1 and x.channels == outputs else y
    return counter.conv_bn_relu(x, architecture.n_features, kernel=1)


#: The families that are described here.
COUNTED_FAMILIES: dict[str, Callable[[LayerCounter, Map, Architecture], Map]] = {
    "fast": _fast,
    "airbench": _airbench,
    "wrn": _wrn,
    "mobilenet": _mobilenet,
}


def count_cost(
    architecture: Architecture,
    channels: int,
    size: int,
    n_classes: int,
    n_filters: int | None,
    precision: Precision = "float32",
) -> Cost:
    """Count the cost of one image of shape (channels, size, size) through a student of a family in `COUNTED_FAMILIES`.

    `n_filters` are the outputs of the bridge; with one the head stays behind, and without it answers `n_classes`.
    """
    counter = LayerCounter()
    image = counter.new(channels, size)
    features, logits = _pass(counter, image, architecture, n_classes, n_filters)
    if architecture.mirror:
        counter.counts_weights = False
        flipped = counter.new(channels, size, image.step)
        again = _pass(counter, flipped, architecture, n_classes, n_filters)
        features, logits = (_mean(counter, *pair) for pair in zip((features, logits), again, strict=True))
    counter.add(0, features, logits)
    return Cost(
        params=counter.params,
        macs=counter.macs,
        weight_bytes=counter.weight_bytes(precision),
        peak_activation_bytes=BYTES[precision] * peak_values(counter.steps),
    )


def _pass(
    counter: LayerCounter, image: Map, architecture: Architecture, n_classes: int, n_filters: int | None
) -> tuple[int, int]:
    """Count one pass of the network; return the steps of its features and of its logits."""
    pixels = counter.new(image.channels, image.side, image.step)
    for _ in ("mean", "std"):
        statistic = counter.add(image.channels)
        pixels = counter.new(image.channels, image.side, pixels.step, statistic)
    last = COUNTED_FAMILIES[architecture.family](counter, pixels, architecture)
    last = counter.conv_bn_relu(last, n_filters, kernel=1) if n_filters else counter.in_place(last)
    features = counter.add(last.channels, last.step)
    if n_filters:
        return features, counter.add(0, features, shares=features)
    counter.macs += last.channels * n_classes
    if counter.counts_weights:
        counter.others += (last.channels + 1) * n_classes
    return features, counter.add(n_classes, features)


def _mean(counter: LayerCounter, one: int, other: int) -> int:
    values = counter.steps[one].values or counter.steps[counter.steps[one].shares or 0].values
    return counter.add(values, counter.add(values, one, other))
