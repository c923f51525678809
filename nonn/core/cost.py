"""What a model costs the device that it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
        return memory_bytes(vars(self))


def memory_bytes(cost: Mapping[str, int]) -> int:
    """What must fit a device of one memory: weights and the largest set of activations alive at once.

    `cost` has the fields of a `Cost`, as artifacts hold it.
    """
    return cost["weight_bytes"] + cost["peak_activation_bytes"]
