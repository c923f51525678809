"""How the final layer answers when students are missing: five strategies, and the choice of one.

rescale
    The terms of the students present, times N/|S|: the mean of their logits, if the layer is a mean.
zero_fill
    As if missing students had sent zeros: their terms shrink to their share of the bias.
mean_fill
    As if they had sent the mean of their features over the training images.
fail_out
    One layer for all subsets, fitted with students dropped at random. Terms are scaled by N/|S|, as
    in inverted dropout.
subset_layers
    One layer for each subset, fitted on that subset, where this gains on validation images.

With all students present, every strategy answers by the network's final layer, so the choice of one costs no accuracy
while none is missing.

`fail_out` and `subset_layers` start from the average of the students' own heads, even if the final layer was fitted: an
average of heads suits every subset, whereas a layer fitted to all students depends on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nonn.core.params import MAX_SUBSET_STUDENTS, STRATEGIES, AssembleParams
from nonn.method.final_layer import as_tensors, fit_by_epoch, logits_of, steps_of
from nonn.runtime.final import Blocks, FinalLayer
from nonn.runtime.subsets import Subset, proper_subsets
from nonn.training.optim import Adam

#: Steps of fitting, at most. The layers are near their best when they start; 600 steps are 6 epochs of
#: 45,000 images, and take about 20 s on one core for 8 students of 32 features.
MAX_STEPS = 600

FeaturesByStudent = Sequence[Tensor]  # N tensors of shape (M, F_i)


def zero_fill(layer: FinalLayer) -> FinalLayer:
    """Missing students count as if they had sent zeros."""
    return FinalLayer(layer.blocks, np.ones(len(layer.blocks)), np.stack([bias for _, bias in layer.blocks.values()]))


def mean_fill(layer: FinalLayer, means: Sequence[Tensor]) -> FinalLayer:
    """Missing students count as if they had sent the means of their features, N tensors of shape (F_i,)."""
    fills = torch.cat([F.linear(m[None], w, b) for m, w, b in zip(means, *as_tensors(layer.blocks), strict=True)])
    return FinalLayer(layer.blocks, np.ones(len(fills)), fills.numpy())


def fit_fail_out(
    start: FinalLayer, features: FeaturesByStudent, labels: Tensor, params: AssembleParams, seed: int
) -> FinalLayer:
    """Fit one layer while each image misses students at random, every proper subset being as likely.

    The layer of the last step is returned; none is chosen on the way.
    """
    n, generator = len(features), torch.Generator().manual_seed(seed)

    def without_some(terms: Tensor) -> Tensor:
        masks = torch.randint(1, 2**n - 1, terms.shape[1:2], generator=generator)  # of bits, neither none nor all
        present = (masks >> torch.arange(n)[:, None] & 1).float()  # (N, B)
        return (terms * present[..., None]).sum(0) * (n / present.sum(0))[:, None]

    steps = batches(len(labels), params.epochs, seed)
    (fitted,) = fit_by_epoch(start, features, labels, [steps], params.lr, without_some)
    return fitted


def fit_subset_layers(
    start: FinalLayer,
    features: FeaturesByStudent,
    labels: Tensor,
    subsets: Sequence[Subset],
    params: AssembleParams,
    seed: int,
) -> list[Blocks]:
    """Fit a layer for each subset of students, all at once; return those of the last step.

    The layers stand side by side in one linear layer over all features, whose weights are masked to each subset's own;
    their losses are added up, and Adam scales each weight's step by itself. So each layer comes out as if it had been
    fitted alone, but for one matrix product instead of many.

    Each starts from its blocks of the students present, times N/|S|. The features are those of the training images as
    they are.
    """
    n, (starts, shares) = len(features), as_tensors(start.blocks)
    present = torch.zeros(len(subsets), n)
    for row, subset in zip(present, subsets, strict=True):
        row[list(subset)] = 1
    scales = n / present.sum(1)  # (S,)
    lengths = [f.shape[1] for f in features]
    mask = present.repeat_interleave(torch.tensor(lengths), dim=1)[:, None]  # (S, 1, F)
    joint = torch.cat(list(features), dim=1)  # (M, F)
    blocks = torch.cat(starts, dim=1)  # (C, F)
    weights = (scales[:, None, None] * mask * blocks).requires_grad_()  # (S, C, F)
    before = (scales[:, None] * present) @ torch.stack(shares)
    biases = before.clone().requires_grad_()  # (S, C)
    optimizer = Adam([weights, biases], lr=params.lr, fused=True)  # see `nonn.method.final_layer.fit_by_epoch`
    for index in batches(len(labels), params.epochs, seed):
        logits = torch.addmm(biases.flatten(), joint[index], (weights * mask).flatten(0, 1).T)
        logits = logits.view(len(index), len(subsets), -1)
        right = logits.gather(2, labels[index, None, None].expand(-1, len(subsets), 1))[..., 0]
        loss = (logits.logsumexp(2) - right).mean(0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layers = []
    for s, subset in enumerate(subsets):
        parts = weights[s].detach().split(lengths, dim=1)
        gain = (biases[s] - before[s]).detach() / len(subset)
        layers.append({i: (parts[i].numpy(), (scales[s] * shares[i] + gain).numpy()) for i in subset})
    return layers


def batches(n_images: int, epochs: int, seed: int) -> list[Tensor]:
    """Indices of the images of each step, for `MAX_STEPS` at most."""
    steps: list[Tensor] = []
    for epoch in range(epochs):
        steps += steps_of(n_images, epoch, seed)
        if len(steps) >= MAX_STEPS:
            break
    return steps[:MAX_STEPS]


@torch.inference_mode()
def right_answers(layer: FinalLayer, features: FeaturesByStudent, labels: Tensor, subsets: Sequence[Subset]) -> Tensor:
    """Whether a layer is right on each image with each subset of students, bool of shape (S, M)."""
    return torch.stack([logits_of(layer, features, subset).argmax(1) == labels for subset in subsets])


def cross_scored(start: Tensor, fitted: Tensor) -> Tensor:
    """Right answers of the layers that would be kept, of images that had no part in keeping them.

    The fitted layer of a subset is kept if it is right on more images than the start. On the same images it could only
    gain, if by luck alone, so the decision made on each half of the images is scored on the other.
    All tensors are bool of shape (S, M): whether each subset's layer is right on each validation image.
    """
    scored = start.clone()
    for half in (0, 1):
        keep = fitted[:, 1 - half :: 2].sum(1) > start[:, 1 - half :: 2].sum(1)
        scored[keep, half::2] = fitted[keep, half::2]
    return scored


def tabulate(right: Tensor, subsets: Sequence[Subset], n_students: int) -> list[dict]:
    """Rows ``missing``, ``n_subsets``, ``mean`` and ``worst`` accuracy over the subsets, for each number missing."""
    rows = []
    for missing in range(1, n_students):
        of_size = [s for s, subset in enumerate(subsets) if len(subset) == n_students - missing]
        accuracies = right[of_size].double().mean(1)
        row = {"mean": accuracies.mean().item(), "worst": accuracies.min().item()}
        rows.append({"missing": missing, "n_subsets": len(of_size)} | row)
    return rows


def mean_accuracy(rows: Sequence[Mapping], n_students: int) -> float:
    """Mean accuracy over all proper subsets, also where only some of a size were scored."""
    counts = [math.comb(n_students, row["missing"]) for row in rows]
    total = sum(count * row["mean"] for count, row in zip(counts, rows, strict=True))
    return round(total / sum(counts), 9)  # sums of equals in another order are equal


def choose_strategy(means: Mapping[str, float], wanted: str) -> str:
    """The strategy wanted; for ``auto`` that of the best mean, the simplest of equals (see `STRATEGIES`)."""
    if wanted != "auto":
        return wanted
    return max((strategy for strategy in STRATEGIES if strategy in means), key=lambda strategy: means[strategy])


def fit_strategies(
    final: FinalLayer,
    averaged: FinalLayer,
    train: tuple[FeaturesByStudent, Tensor],
    validation: tuple[FeaturesByStudent, Tensor],
    params: AssembleParams,
    seed: int,
) -> tuple[dict[str, FinalLayer], dict]:
    """All strategies for the same students; `train` and `validation` are features and labels.

    `final` answers when all students are present, and is rescaled and filled when some are missing; the layers that are
    fitted start from `averaged`, the average of the students' heads.

    Returns the layers by strategy, the simplest first (`subset_layers` for up to `MAX_SUBSET_STUDENTS` only), and a
    summary: ``chosen`` and ``not_chosen`` strategies; ``mean`` validation accuracy over all proper subsets and the rows
    ``by_missing`` of each, for `subset_layers` as in `cross_scored`; and how many subset layers were ``kept``.
    """
    n = len(final.blocks)
    everyone, subsets = tuple(range(n)), proper_subsets(n)
    fail_out = fit_fail_out(averaged, *train, params, seed)
    layers = {
        "rescale": FinalLayer(final.blocks),
        "zero_fill": zero_fill(final),
        "mean_fill": mean_fill(final, [f.mean(0) for f in train[0]]),
        "fail_out": FinalLayer(fail_out.blocks, layers={everyone: final.whole}),
    }
    right = {name: right_answers(layer, *validation, subsets) for name, layer in layers.items()}
    kept = {}
    if n <= MAX_SUBSET_STUDENTS:
        fitted = dict(zip(subsets, fit_subset_layers(averaged, *train, subsets, params, seed), strict=True))
        start = right_answers(averaged, *validation, subsets)
        trial = right_answers(FinalLayer(averaged.blocks, layers=fitted), *validation, subsets)
        better = trial.sum(1) > start.sum(1)
        kept = {subset: fitted[subset] for subset, gained in zip(subsets, better.tolist(), strict=True) if gained}
        layers["subset_layers"] = FinalLayer(averaged.blocks, layers=kept | {everyone: final.whole})
        right["subset_layers"] = cross_scored(start, trial)
    by_missing = {name: tabulate(table, subsets, n) for name, table in right.items()}
    means = {name: mean_accuracy(rows, n) for name, rows in by_missing.items()}
    chosen = choose_strategy(means, params.missing)
    others = [name for name in layers if name != chosen]
    summary = {"chosen": chosen, "not_chosen": others, "mean": means, "by_missing": by_missing, "kept": len(kept)}
    return layers, summary
