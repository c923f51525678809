"""Splitting an exported network over devices that exchange activations: by channels or by rows.

channels
    Each device computes its share of every convolution's output channels, for which it needs all
    input channels: an all-gather before each convolution but the first. Weights are shared out.
rows
    Each device computes its share of every map's rows, for which it needs a few rows of its
    neighbours before each convolution wider than one pixel: the halo exchange of MoDNN [1]_ and
    CoEdge [2]_. Every device holds all weights.

Either way batch norm, ReLU, pooling and additions work on what a device has, before anything is
sent; the features (of its channels, or sums over its rows) go to the coordinator, who applies the
last linear layer. Both are one algorithm along another axis of the maps: a map that a wider
operation reads is *cut*, each device owning an even share of it; backwards from the shares follows
which interval of each map a device has to compute, and which parts of it others own.

Of an int8 network integer maps are exchanged, and every device runs integer operations: each map that it computes is
that of the unsplit network, bit for bit. What comes after the last integer map, the spatial mean and the last layer, is
float32 there, too. Its sums are added up in another order, so logits agree up to the rounding of float32.

References
----------
.. [1] Mao et al., MoDNN: Local distributed mobile computing system for Deep Neural Network, DATE 2017.
.. [2] Zeng et al., CoEdge: Cooperative DNN inference with adaptive workload partitioning over
   heterogeneous edge devices, IEEE/ACM Transactions on Networking 29(2), 2021.
.. [3] Zhao et al., DeepThings: Distributed adaptive deep learning inference on resource-constrained
   IoT edge clusters, IEEE TCAD 37(11), 2018.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from nonn.core.errors import UserError, one_line
from nonn.core.params import MOST_DEVICES
from nonn.core.progress import log
from nonn.runtime.exported import ImageFormat
from nonn.split.cuts import CHANNELS, ROWS, Cuts
from nonn.split.geometry import EMPTY, Interval, Window, common
from nonn.split.graph import WINDOWED, OnnxGraph, attributes_of, read_network
from nonn.split.plan import FEATURES, IMAGE, Message, Part, Segment, SplitMethod, SplitPlan

AXES = {"channels": CHANNELS, "rows": ROWS}


@dataclass
class Draft:
    """A segment that is being written."""

    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shapes by name
    made: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of what it computes, likewise
    params: int = 0
    weight_bytes: int = 0
    macs: int = 0

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def add(self, operation: str, inputs: list[str], output: str, **attributes) -> str:
        self.nodes.append(helper.make_node(operation, inputs, [output], **attributes))
        return output

    def sliced(self, name: str, axis: int, interval: Interval) -> str:
        """An interval of a named tensor, counted from the tensor's start."""
        output = f"{name}[{interval[0]}:{interval[1]}]"
        if not any(output in node.output for node in self.nodes):
            ends = [self.constant(f"{output}.{i}", np.array([value])) for i, value in enumerate((*interval, axis))]
            self.add("Slice", [name, *ends], output)
        return output

    def finish(self, outputs: list[str], network: OnnxGraph) -> tuple[Segment, bytes]:
        def describe(name: str, shape: tuple[int, ...]):
            dtype = network.dtypes.get(name.partition("@")[0], "float32")  # features have no type of their own
            kind = TensorProto.UINT8 if dtype == "uint8" else TensorProto.FLOAT
            return helper.make_tensor_value_info(name, kind, shape)

        graph = helper.make_graph(
            self.nodes,
            "segment",
            [describe(*item) for item in self.inputs.items()],
            [describe(name, self.made[name]) for name in outputs],
            [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in self.constants.items()],
        )
        opset = helper.make_opsetid("", network.opset)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=network.ir_version)
        onnx.checker.check_model(model)
        content = model.SerializeToString(deterministic=True)
        sha256 = hashlib.sha256(content).hexdigest()
        segment = Segment(
            inputs=list(self.inputs),
            outputs=outputs,
            params=self.params,
            weight_bytes=self.weight_bytes,
            macs=self.macs,
            sha256=sha256,
        )
        return segment, content


class Writer:
    """Writes the segments of one device."""

    def __init__(self, cuts: Cuts, position: int):
        self.cuts, self.network, self.position = cuts, cuts.network, position
        self.computed, self.needed = cuts.intervals(position)
        self.drafts = [Draft() for _ in range(cuts.levels[cuts.network.last] + 1)]

    def write(self) -> None:
        for node in self.network.nodes:
            if self.computed[node.output[0]] != EMPTY:
                self._write_node(node, self.drafts[self.cuts.levels[node.output[0]]])
        last = self.network.last
        if self.computed[last] == EMPTY:
            return
        draft = self.drafts[-1]
        axes = draft.constant("axes", np.array([2, 3]))
        operation = "ReduceMean" if self.cuts.axis == CHANNELS else "ReduceSum"
        draft.add(operation, [self._take(draft, last, self.computed[last]), axes], FEATURES, keepdims=0)
        channels = self.cuts.shape(last, self.computed[last])[CHANNELS]
        draft.made[FEATURES] = (1, channels)

    def _write_node(self, node: NodeProto, draft: Draft) -> None:
        output, outputs = node.output[0], self.computed[node.output[0]]
        names = []
        for name in node.input:
            if name in self.network.shapes:
                names.append(self._take(draft, name, self.cuts.needed_by(node, name, outputs)))
            else:
                names.append(self._put(draft, node, name, outputs))
        if node.op_type in ("Conv", "BatchNormalization"):
            # Of a batch norm, scale and bias are trained; mean and variance are not.
            stored = [self._constant(node, self.network.stored(name), outputs) for name in node.input[1:3]]
            draft.params += sum(value.size for value in stored)
            draft.weight_bytes += self._weight_bytes(node, stored)
        settings = attributes_of(node)
        if node.op_type in WINDOWED and self.cuts.axis == ROWS:
            settings["pads"] = self._pads(node, outputs)
        draft.add(node.op_type, names, output, **settings)
        draft.made[output] = self.cuts.shape(output, outputs)
        if node.op_type == "Conv":
            draft.macs += math.prod(draft.made[output]) * self.network.stored(node.input[1])[0].size

    def _put(self, draft: Draft, node: NodeProto, name: str, outputs: Interval) -> str:
        """Name in a segment of the part of a constant that belongs to an interval of a node's output."""
        # An exporter may give equal constants to different nodes, which need different slices of them.
        own = f"{node.output[0]}.{name}"
        if name not in self.network.unpacked:
            return draft.constant(own, self._constant(node, self.network.constants[name], outputs))
        maker = self.network.unpacked[name]
        parts = [
            draft.constant(f"{own}.{part}", self._constant(node, self.network.constants[part], outputs))
            for part in maker.input
        ]
        return draft.add(maker.op_type, parts, own, **attributes_of(maker))

    def _weight_bytes(self, node: NodeProto, stored: list[np.ndarray]) -> int:
        """Bytes of trained constants; of quantised filters as `nonn.deploy.int8.weight_bytes` counts them."""
        if node.input[1] in self.network.unpacked:
            return stored[0].nbytes + 8 * len(stored[0])  # and for each a 32-bit bias and a 32-bit scale
        return sum(value.nbytes for value in stored)

    def _constant(self, node: NodeProto, value: np.ndarray, outputs: Interval) -> np.ndarray:
        """A constant as far as it belongs to an interval of the output: of channels, its slice."""
        if self.cuts.axis == ROWS or not value.ndim:
            return value
        if node.op_type in ("Conv", "BatchNormalization"):
            return value[slice(*outputs)]
        return value[:, slice(*outputs)] if value.ndim == 4 and value.shape[CHANNELS] > 1 else value

    def _pads(self, node: NodeProto, outputs: Interval) -> list[int]:
        """Padding of a device's rows: only at the borders of the whole map."""
        start, stop = Window.of(node).inputs(outputs)
        size = self.cuts.size(node.input[0])
        _, left, _, right = attributes_of(node).get("pads", [0, 0, 0, 0])
        return [max(0, -start), left, max(0, stop - size), right]

    def _take(self, draft: Draft, name: str, interval: Interval) -> str:
        """Name of an interval of a map in a segment, sliced and put together from parts where needed."""
        if name in self.cuts.exchanged:
            whole, available = self._gathered(draft, name), self.needed[name]
        elif name == IMAGE:
            whole, available = self._local(draft, name, self.network.shapes[IMAGE]), (0, self.cuts.size(IMAGE))
        else:
            available = self.computed[name]
            whole = self._local(draft, name, self.cuts.shape(name, available))
        if interval == available:
            return whole
        return draft.sliced(whole, self.cuts.axis, (interval[0] - available[0], interval[1] - available[0]))

    def _local(self, draft: Draft, name: str, shape: tuple[int, ...]) -> str:
        if name not in draft.made:
            draft.inputs[name] = shape
        return name

    def _gathered(self, draft: Draft, name: str) -> str:
        """All that the device needs of an exchanged map: its own part and those of others, in order."""
        gathered = f"{name}.gathered"
        if any(gathered in node.output for node in draft.nodes):
            return gathered
        parts = []
        for owner, interval in self.parts_of(name):
            own = self.computed[name]
            if owner != self.position:
                parts.append(self._local(draft, f"{name}@{owner}", self.cuts.shape(name, interval)))
            elif interval == own:
                parts.append(self._local(draft, name, self.cuts.shape(name, own)))
            else:
                self._local(draft, name, self.cuts.shape(name, own))
                parts.append(draft.sliced(name, self.cuts.axis, (interval[0] - own[0], interval[1] - own[0])))
        return draft.add("Concat", parts, gathered, axis=self.cuts.axis)

    def parts_of(self, name: str) -> Iterator[tuple[int, Interval]]:
        """The intervals of an exchanged map that the device needs, with their owners."""
        for owner in range(self.cuts.n_devices):
            interval = common(self.needed[name], self.cuts.share(name, owner))
            if interval != EMPTY:
                yield owner, interval

    def received(self) -> Iterator[Message]:
        """The messages that others send the device."""
        for name in sorted(self.cuts.exchanged, key=lambda name: self.cuts.levels[name]):
            for owner, (start, stop) in self.parts_of(name):
                if owner == self.position:
                    continue
                owned = self.cuts.share(name, owner)
                rows = (start - owned[0], stop - owned[0])
                yield Message(
                    round=self.cuts.levels[name],
                    sender=owner,
                    receiver=self.position,
                    source=name,
                    name=f"{name}@{owner}",
                    rows=None if (start, stop) == owned else rows,
                    shape=self.cuts.shape(name, (start, stop)),  # type: ignore[arg-type]  # of four dimensions
                    dtype=self.network.dtypes[name],
                )

    def finish(self, messages: list[Message]) -> tuple[Part, list[bytes | None]]:
        """The device's part; `messages` are those of all devices."""
        segments, models = [], []
        for level, draft in enumerate(self.drafts):
            wanted = {name for later in self.drafts[level + 1 :] for name in later.inputs} | {FEATURES}
            wanted |= {m.source for m in messages if m.sender == self.position}
            outputs = [name for name in draft.made if name in wanted]
            segment, model = draft.finish(outputs, self.network) if outputs else (None, None)
            segments.append(segment)
            models.append(model)
        image, last = self.network.shapes[IMAGE], self.network.last
        columns = self.computed[last] if self.cuts.axis == CHANNELS else (0, self.network.shapes[last][CHANNELS])
        part = Part(
            position=self.position,
            n_devices=self.cuts.n_devices,
            image=ImageFormat(channels=image[CHANNELS], size=image[ROWS], dtype="uint8"),
            columns=EMPTY if self.computed[last] == EMPTY else columns,
            segments=segments,
            messages=[m for m in messages if self.position in (m.sender, m.receiver)],
        )
        return part, models


def plan_split(path: Path, n_devices: int, method: SplitMethod, recomputed: int = 0) -> SplitPlan:
    """Split a classifier, an ONNX file of the export ``solo``, over devices.

    Of so many leading convolutions as `recomputed` says each device computes all that it needs from the image,
    instead of exchanging their outputs: fewer rounds for more work, as the fused layers of DeepThings [3]_.

    Raises
    ------
    UserError
        The file cannot be split, or not over so many devices.
    """
    if not 1 <= n_devices <= MOST_DEVICES:
        raise UserError(f"-n: {n_devices} devices are not possible; give 1 to {MOST_DEVICES}")
    if recomputed < 0:
        raise UserError(f"--recomputed: {recomputed} convolutions are not possible; give 0 or more")
    try:
        return _plan(read_network(path), n_devices, method, recomputed)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # a damaged file may pass ONNX's own checks
        raise UserError(
            f"{path}: cannot be split: its graph does not fit together ({one_line(error)}). Export it again."
        ) from None


def _plan(network: OnnxGraph, n_devices: int, method: SplitMethod, recomputed: int) -> SplitPlan:
    cuts = Cuts.of(network, AXES[method], n_devices, recomputed)
    writers = [Writer(cuts, position) for position in range(n_devices)]
    for writer in writers:
        writer.write()
    messages = [message for writer in writers for message in writer.received()]
    messages.sort(key=lambda m: (m.round, m.sender, m.receiver))
    parts, models = zip(*(writer.finish(messages) for writer in writers), strict=True)
    pixels = math.prod(network.shapes[network.last][2:])
    scale = 1.0 if method == "channels" else 1 / pixels
    layer = network.weight, network.bias
    return SplitPlan.of(method, parts, models, *layer, scale, network.precision)


def describe(plan: SplitPlan) -> str:
    """What each device holds, computes and sends for one image."""
    lines = [
        f"split over {plan.n_devices} by {plan.method} in {plan.precision}; for one image rounds: {plan.rounds}, "
        f"messages: {len(plan.messages)}, bytes between devices: {plan.payload_bytes():,}",
        "{:<10} {:>10} {:>12} {:>9} {:>12} {:>9}".format("device", "params", "MACs", "messages", "sent", "features"),
    ]
    for part in plan.parts:
        sent = plan.payload_bytes(sender=part.position)
        count = sum(m.sender == part.position for m in part.messages)
        row = (part.name, f"{part.params:,}", f"{part.macs:,}", count, f"{sent:,}", part.n_features)
        lines.append("{:<10} {:>10} {:>12} {:>9} {:>12} {:>9}".format(*row))
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="a model for one device, from the export `solo`")
    parser.add_argument("-n", "--devices", type=int, required=True, help="number of devices")
    parser.add_argument(
        "--method", choices=list(AXES), required=True, help="split each map by its channels or by its rows"
    )
    parser.add_argument(
        "--recomputed", type=int, default=0, metavar="K", help="first convolutions, which every device computes whole"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder for the plan, with a folder for each device"
    )
    parser.epilog = "example: nonn split results/mnist5k/export/solo/teacher.onnx -n 4 --method rows --output plan"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn split``."""
    plan = plan_split(options.model, options.devices, options.method, options.recomputed)
    print(describe(plan))
    if options.output:
        plan.save(options.output)
        log(f"{options.output}: a plan for {plan.n_devices} devices; run each with `nonn split-node`")
