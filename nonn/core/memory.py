"""What a model takes of a device of one memory."""

from __future__ import annotations

from collections.abc import Mapping


def memory_bytes(cost: Mapping[str, int]) -> int:
    """Weights and the largest set of activations alive at once, of a cost as artifacts hold it."""
    return cost["weight_bytes"] + cost["peak_activation_bytes"]
