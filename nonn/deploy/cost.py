"""What a network costs its device: parameters, multiply-accumulates, weights and peak activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from nonn.core.params import Precision
from nonn.deploy.int8 import weight_bytes
from nonn.training.networks import ConvNet, count_parameters, deployed

#: Modules and functions that a deployed runtime fuses into the operation before, or that only rename.
BYTES = {"float32": 4, "int8": 1}  # of a value
IN_PLACE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.GELU, nn.Identity)
IN_PLACE_FUNCTIONS = (nn.functional.relu,)


@dataclass(frozen=True)
class Cost:
    """Cost of one image through one network.

    Activations of int8 models count as in a runtime that has integer kernels for all of the model; ONNX Runtime holds
    more, since it calculates GELU in float32.
    """

    params: int  # trained or not, of what the device runs: a student's training head is left behind
    macs: int  # multiply-accumulates of convolutions and linear layers
    weight_bytes: int  # this and the next at the deployed precision
    peak_activation_bytes: int

    @property
    def memory_bytes(self) -> int:
        """What must fit the device: weights and the largest set of activations alive at once."""
        return self.weight_bytes + self.peak_activation_bytes

    def fits(self, memory_kib: float, mmacs: float) -> bool:
        return self.memory_bytes <= memory_kib * 1024 and self.macs <= mmacs * 1e6


def measure_cost(model: ConvNet, channels: int, size: int, precision: Precision = "float32") -> Cost:
    """Count the cost of one image of shape (channels, size, size), in float32 or, with 1 byte a value, in int8.

    Activations are counted by liveness: a tensor occupies memory from the operation that makes it to the last one that
    reads it. Batch norm and ReLU are fused into the convolution before them. The model stays as it is.
    """
    traced = fx.symbolic_trace(deployed(model).eval())
    with torch.no_grad():
        ShapeProp(traced).propagate(torch.zeros(1, channels, size, size))
    modules = dict(traced.named_modules())
    params = count_parameters(traced)
    return Cost(
        params=params,
        macs=sum(_macs(node, modules) for node in traced.graph.nodes),
        weight_bytes=params * 4 if precision == "float32" else weight_bytes(deployed(model)),
        peak_activation_bytes=_peak_values(traced.graph, modules) * BYTES[precision],
    )


def _macs(node: fx.Node, modules: dict[str, nn.Module]) -> int:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.Conv2d):
        # Each output value is a sum over the kernel and the input channels of its group.
        return _values(node) * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    return 0


def _peak_values(graph: fx.Graph, modules: dict[str, nn.Module]) -> int:
    """Largest number of activation values alive at once, operations in the order of the graph."""
    storage: dict[fx.Node, fx.Node] = {}  # a node and the node whose memory it shares
    for node in graph.nodes:
        shares = modules.get(str(node.target)) if node.op == "call_module" else node.target
        if isinstance(shares, IN_PLACE) or shares in IN_PLACE_FUNCTIONS:
            storage[node] = storage[node.args[0]]
        else:
            storage[node] = node
    order = {node: step for step, node in enumerate(graph.nodes)}
    last_use = {owner: order[owner] for owner in storage.values()}
    for node, owner in storage.items():
        last_use[owner] = max([last_use[owner], *(order[user] for user in node.users)])
    return max(
        sum(_values(owner) for owner, end in last_use.items() if order[owner] <= step <= end) for step in order.values()
    )


def _values(node: fx.Node) -> int:
    meta = node.meta.get("tensor_meta")
    return meta.shape.numel() if meta is not None and hasattr(meta, "shape") else 0
