"""Final layers while they are made: from the students' heads, and fitted by torch to their features.

What a layer answers is up to `nonn.runtime.final`, here as on the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonn.runtime.final import Blocks, FinalLayer
from nonn.training.loop import epoch_order
from nonn.training.optim import Adam

BATCH_SIZE = 500


def averaged_layer(heads: Sequence[nn.Linear]) -> FinalLayer:
    """The final layer that averages the logits of N heads, or of those whose students are present."""
    n = len(heads)
    parts = [((h.weight.detach() / n).numpy(), (h.bias.detach() / n).numpy()) for h in heads]
    return FinalLayer(dict(enumerate(parts)))


def logits_of(layer: FinalLayer, features: Sequence[Tensor], present: Iterable[int] | None = None) -> Tensor:
    """Logits (B, C), float64, of the students `present`, all by default, from feature vectors (B, F_i) of all."""
    subset = range(len(features)) if present is None else present
    return torch.from_numpy(layer.logits({i: features[i].numpy() for i in subset}))


def layer_tensors(layer: FinalLayer) -> dict[str, Tensor]:
    """What is stored of a layer, by name."""
    return {name: torch.from_numpy(array) for name, array in layer.tensors().items()}


def as_tensors(blocks: Blocks) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of blocks, copied, in float32."""
    weights, biases = zip(*blocks.values(), strict=True)
    return [torch.tensor(w, dtype=torch.float32) for w in weights], [
        torch.tensor(b, dtype=torch.float32) for b in biases
    ]


def steps_of(n_images: int, epoch: int, seed: int) -> Sequence[Tensor]:
    """Indices of the images of each step of an epoch."""
    return epoch_order(n_images, epoch, seed).split(BATCH_SIZE)


def fit_by_epoch(
    start: FinalLayer,
    features: Sequence[Tensor],
    labels: Tensor,
    epochs: Iterable[Iterable[Tensor]],
    lr: float,
    combine: Callable[[Tensor], Tensor] = lambda terms: terms.sum(0),
) -> Iterator[FinalLayer]:
    """Fit a layer's blocks by cross-entropy, with Adam, in float32; yield the layer as it is after each epoch.

    `epochs` hold the indices of the images of each step, by epoch, of the N features (M, F_i); `combine` makes logits
    (B, C) of the blocks' terms (N, B, C). The start stays as it is.
    """
    weights, biases = as_tensors(start.blocks)
    # Fused, its square roots are exact; those of MKL differ by the maker of the processor.
    optimizer = Adam([p.requires_grad_() for p in (*weights, *biases)], lr=lr, fused=True)
    for steps in epochs:
        for index in steps:
            terms = [F.linear(f[index], w, b) for f, w, b in zip(features, weights, biases, strict=True)]
            loss = F.cross_entropy(combine(torch.stack(terms)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        pairs = zip(weights, biases, strict=True)
        yield FinalLayer({i: (w.detach().numpy(), b.detach().numpy()) for i, (w, b) in enumerate(pairs)})
