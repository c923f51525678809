"""Where a network is cut: which maps devices exchange, and what each computes and needs of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnx import NodeProto

from nonn.split.geometry import EMPTY, Interval, Window, common, hull, share
from nonn.split.graph import WINDOWED, OnnxGraph
from nonn.split.plan import IMAGE

#: Axes of a map.
CHANNELS, ROWS = 1, 2


@dataclass(frozen=True)
class Cuts:
    """Where a network is cut along one axis, the same for all devices."""

    network: OnnxGraph
    axis: int
    n_devices: int
    levels: dict[str, int]  # the segment that computes each map
    exchanged: set[str]  # the maps of which devices send each other slices

    @classmethod
    def of(cls, network: OnnxGraph, axis: int, n_devices: int, recomputed: int) -> Cuts:
        known = {IMAGE}  # what a device can make from the image, which is whole on every device
        exchanged, levels, convolutions = set(), {IMAGE: 0}, 0
        # An integer map is exchanged as it is: who reads it makes float32 of it.
        integers = {node.output[0]: node.input[0] for node in network.nodes if node.op_type == "DequantizeLinear"}
        for node in network.nodes:
            convolutions += node.op_type == "Conv"
            if set(network.maps(node)) <= known and (node.op_type != "Conv" or convolutions <= recomputed):
                known.add(node.output[0])
            if _is_wide(node, axis) and n_devices > 1:
                exchanged |= {integers.get(name, name) for name in network.maps(node)} - known
        for node in network.nodes:
            sources = [integers.get(name, name) for name in network.maps(node)]
            levels[node.output[0]] = max(levels[name] + (name in exchanged) for name in sources)
        return cls(_unshared(network, axis, levels), axis, n_devices, levels, exchanged)

    def size(self, name: str) -> int:
        return self.network.shapes[name][self.axis]

    def share(self, name: str, position: int) -> Interval:
        return share(self.size(name), position, self.n_devices)

    def needed_by(self, node: NodeProto, name: str, outputs: Interval) -> Interval:
        """The interval of a map that a node needs to compute an interval of its output."""
        if outputs == EMPTY:
            return EMPTY
        if self.axis == CHANNELS:
            return (0, self.size(name)) if node.op_type == "Conv" else outputs
        return common(Window.of(node).inputs(outputs), (0, self.size(name))) if node.op_type in WINDOWED else outputs

    def intervals(self, position: int) -> tuple[dict[str, Interval], dict[str, Interval]]:
        """What a device computes of each map, and what it needs of it: they differ where maps are exchanged."""
        needed = dict.fromkeys(self.levels, EMPTY)
        needed[self.network.last] = self.share(self.network.last, position)
        computed = {}
        for node in reversed(self.network.nodes):
            name = node.output[0]
            computed[name] = self.share(name, position) if name in self.exchanged else needed[name]
            for read in self.network.maps(node):
                needed[read] = hull(needed[read], self.needed_by(node, read, computed[name]))
        return computed, needed

    def shape(self, name: str, interval: Interval) -> tuple[int, ...]:
        whole = self.network.shapes[name]
        return (*whole[: self.axis], interval[1] - interval[0], *whole[self.axis + 1 :])


def _is_wide(node: NodeProto, axis: int) -> bool:
    """Whether a device needs more of an operation's input than its share of the output covers."""
    if axis == CHANNELS:
        return node.op_type == "Conv"
    return node.op_type in WINDOWED and Window.of(node).overlaps


def _unshared(network: OnnxGraph, axis: int, levels: dict[str, int]) -> OnnxGraph:
    """The network with a ``DequantizeLinear`` for each segment that reads an integer map, beside who reads it.

    One more is for operations that need all of the map, which are then fused as in the unsplit network. `levels` gets
    those of the new ones.
    """
    makers = {node.output[0]: node for node in network.nodes if node.op_type == "DequantizeLinear"}
    copies: dict[tuple[str, int, bool], str] = {}
    nodes: list[NodeProto] = []
    shapes, dtypes = dict(network.shapes), dict(network.dtypes)
    for node in network.nodes:
        if node.output[0] in makers:
            if node.output[0] == network.last:
                nodes.append(node)
            continue
        reader = NodeProto()
        reader.CopyFrom(node)
        for position, name in enumerate(node.input):
            if name not in makers:
                continue
            key = (name, levels[node.output[0]], _is_wide(node, axis))
            if key not in copies:
                copies[key] = copy = f"{name}#{len(copies)}"
                maker = NodeProto()
                maker.CopyFrom(makers[name])
                maker.output[0], levels[copy] = copy, levels[node.output[0]]
                shapes[copy], dtypes[copy] = shapes[name], dtypes[name]
                nodes.append(maker)
            reader.input[position] = copies[key]
        nodes.append(reader)
    return replace(network, nodes=nodes, shapes=shapes, dtypes=dtypes)
