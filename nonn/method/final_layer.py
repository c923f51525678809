"""The final layer: linear over the students' feature vectors, and defined for every subset of them.

`nonn.runtime.final` does the same with the same tensors where a network runs, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonn.runtime.subsets import Subset, subset_name, subset_of


class LinearBlocks(nn.Module):
    """One linear layer over concatenated feature vectors, in blocks: Σ_i (W_i f_i + b_i).

    The weights are of shape (C, F_i), the biases (C,), shares of the bias, one a block.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor]):
        super().__init__()
        self.weights = nn.ParameterList([w.detach().clone() for w in weights])
        self.biases = nn.ParameterList([b.detach().clone() for b in biases])

    def contributions(self, features: Sequence[Tensor]) -> Tensor:
        """What each block adds to the logits, (N, B, C), from its feature vectors (B, F_i)."""
        blocks = zip(features, self.weights, self.biases, strict=True)
        return torch.stack([F.linear(f, weight, bias) for f, weight, bias in blocks])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, C)."""
        return self.contributions(features).sum(0)


class FinalLayer(LinearBlocks):
    """The final layer of N students, of which any may be missing.

    The logits of the students in the subset S are

        s_|S| · Σ_{i in S} (W_i f_i + b_i) + Σ_{j not in S} c_j

    unless the subset has a layer of its own among `layers`, which then takes the place of all this. The fills c_j, (N,
    C) and nothing by default, are what stands in for missing students; they are spread evenly over the students
    present, so that each has its share of the logits. The scales s_1 … s_N, float64, are N/|S| by default, which
    averages the students present if it averages all.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        scales: Tensor | None = None,
        fills: Tensor | None = None,
        layers: Mapping[Subset, LinearBlocks] | None = None,
    ):
        super().__init__(weights, biases)
        n = len(self.weights)
        if scales is None:
            scales = n / torch.arange(1, n + 1, dtype=torch.float64)
        self.register_buffer("scales", scales)
        self.register_buffer("fills", torch.zeros(n, len(self.biases[0])) if fills is None else fills)
        copies = {subset_name(subset): LinearBlocks(b.weights, b.biases) for subset, b in (layers or {}).items()}
        self.layers = nn.ModuleDict(copies)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> FinalLayer:
        """The layer of a state dict; a KeyError if it is none."""
        names = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
        layers = {subset_of(name): LinearBlocks(*_blocks(tensors, f"layers.{name}.")) for name in sorted(names)}
        return cls(*_blocks(tensors), tensors["scales"], tensors["fills"], layers)

    @property
    def whole(self) -> LinearBlocks:
        """The blocks that answer when all students are present."""
        name = subset_name(range(len(self.weights)))
        return dict(self.layers.items()).get(name, self)

    def contributions(self, features: Sequence[Tensor], present: Sequence[int] | None = None) -> Tensor:
        """What each student present adds to the logits, (|S|, B, C); all are present by default.

        `features` (B, F_i) are those of all N students; those of missing ones are not looked at.
        """
        n = len(self.weights)
        subset = tuple(range(n)) if present is None else tuple(sorted(present))
        if (name := subset_name(subset)) in self.layers:
            return self.layers[name].contributions([features[i] for i in subset])
        terms = torch.stack([F.linear(features[i], self.weights[i], self.biases[i]) for i in subset])
        fill = self.fills[[j for j in range(n) if j not in subset]].sum(0)
        return self.scales[len(subset) - 1] * terms + fill / len(subset)

    def forward(self, features: Sequence[Tensor], present: Sequence[int] | None = None) -> Tensor:
        """Logits (B, C) of the students `present`, all by default."""
        return self.contributions(features, present).sum(0)


def _blocks(tensors: Mapping[str, Tensor], prefix: str = "") -> tuple[list[Tensor], list[Tensor]]:
    positions = range(sum(name.startswith(f"{prefix}biases.") for name in tensors))
    return [tensors[f"{prefix}weights.{i}"] for i in positions], [tensors[f"{prefix}biases.{i}"] for i in positions]


def averaged_layer(heads: Sequence[nn.Linear]) -> FinalLayer:
    """The final layer that averages the logits of N heads, or of those whose students are present."""
    n = len(heads)
    return FinalLayer([head.weight.detach() / n for head in heads], [head.bias.detach() / n for head in heads])
