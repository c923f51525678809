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

    Parameters
    ----------
    weights : sequence of tensors of shape (C, F_i)
    biases : sequence of tensors of shape (C,)
        Shares of the bias, one a block.
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

    unless the subset has a layer of its own, which then takes the place of all this. The fills c_j
    are spread evenly over the students present, so that each has its share of the logits.

    Parameters
    ----------
    weights : sequence of N tensors of shape (C, F_i)
    biases : sequence of N tensors of shape (C,)
    scales : Tensor of shape (N,), float64, optional
        s_1 … s_N; N/|S| by default, which averages the students present if it averages all.
    fills : Tensor of shape (N, C), optional
        c_0 … c_{N−1}, what stands in for each student that is missing; nothing by default.
    layers : mapping of subsets to LinearBlocks, optional
        Of the subsets with a layer of their own.
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
        """The layer of a state dict.

        Raises
        ------
        KeyError
        """
        names = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
        layers = {subset_of(name): LinearBlocks(*_blocks(tensors, f"layers.{name}.")) for name in sorted(names)}
        return cls(*_blocks(tensors), tensors["scales"], tensors["fills"], layers)

    @property
    def whole(self) -> LinearBlocks:
        """The blocks that answer when all students are present."""
        name = subset_name(range(len(self.weights)))
        return dict(self.layers.items()).get(name, self)

    def contributions(self, features: Sequence[Tensor], present: Sequence[int] | None = None) -> Tensor:
        """What each student present adds to the logits, (|S|, B, C).

        Parameters
        ----------
        features : sequence of N tensors of shape (B, F_i)
            Of all students; those of missing ones are not looked at.
        present : sequence of int, optional
            All by default.
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
