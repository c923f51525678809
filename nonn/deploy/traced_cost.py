"""What any network costs its device, counted by tracing it: parameters, multiply-accumulates, weights, activations.

`nonn.deploy.analytic_cost` gives the same for students, without building them.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from nonn.core.cost import Cost
from nonn.core.params import Precision
from nonn.deploy.analytic_cost import BYTES, CostStep, peak_values
from nonn.deploy.int8 import weight_bytes
from nonn.training.networks import ConvNet, count_parameters, deployed

#: Modules and functions that a deployed runtime fuses into the operation before, or that only rename.
IN_PLACE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.GELU, nn.Identity)
IN_PLACE_FUNCTIONS = (nn.functional.relu,)


def measure_cost(model: ConvNet, channels: int, size: int, precision: Precision = "float32") -> Cost:
    """Count the cost of one image of shape (channels, size, size) through a model deployed in `precision`.

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
        peak_activation_bytes=peak_values(_steps(traced.graph, modules)) * BYTES[precision],
    )


def _macs(node: fx.Node, modules: dict[str, nn.Module]) -> int:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.Conv2d):
        # Each output value is a sum over the kernel and the input channels of its group.
        return _values(node) * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    return 0


def _steps(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[CostStep]:
    """The operations of a network in the order of its graph."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    steps = []
    for node in graph.nodes:
        kind = modules.get(str(node.target)) if node.op == "call_module" else node.target
        is_in_place = isinstance(kind, IN_PLACE) or kind in IN_PLACE_FUNCTIONS
        reads = tuple(order[read] for read in node.all_input_nodes)
        steps.append(CostStep(_values(node), reads, order[node.args[0]] if is_in_place else None))
    return steps


def _values(node: fx.Node) -> int:
    meta = node.meta.get("tensor_meta")
    return meta.shape.numel() if meta is not None and hasattr(meta, "shape") else 0
