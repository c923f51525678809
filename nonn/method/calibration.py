"""Calibrated confidence: of the answers given with 90 %, 9 of 10 should be right.

A temperature divides the logits [1]_, which changes no answer. There is one for each number of students present,
fitted on validation images after everything else, over all subsets of that number. A single temperature would not do:
where missing students are filled in, logits shrink, and a network of four that has lost three is right on most images
but hardly sure of any. A temperature for each subset would be fitted to a handful of errors.

References
----------
.. [1] Guo et al. 2017, On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import Tensor

from nonn.method.final_layer import logits_of
from nonn.runtime.final import FinalLayer
from nonn.runtime.subsets import subsets_missing

#: The temperatures that are searched.
LOWEST, HIGHEST = 0.01, 100.0
#: Bins of equal width in which confidence is compared with accuracy.
BINS = 15


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of the least cross-entropy of logits (M, C) or, of S subsets, (S, M, C), from labels (M,).

    One image of unknown class, spread evenly over the M, is counted in. Without it a network that is right on all
    validation images would be calibrated to be certain of everything.
    """
    values = logits.double().numpy()
    unknown = 1 / (len(labels) + 1)
    right = values[..., np.arange(len(labels)), labels.numpy()]
    wanted = right * (1 - unknown) + values.mean(-1) * unknown

    def cross_entropy(logarithm: float) -> float:
        scale = math.exp(-logarithm)
        return float(np.mean(logsumexp(scale * values, axis=-1) - scale * wanted))

    # In 1/T the cross-entropy is convex, so in log T it has one minimum too.
    found = minimize_scalar(cross_entropy, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded")
    return round(math.exp(found.x), 4)  # the last digits differ from one processor to the next


def fit_temperatures(layer: FinalLayer, features: Sequence[Tensor], labels: Tensor) -> list[float]:
    """Temperatures for 1 to N students present, from their features (M, F_i) of validation images."""
    n = len(features)
    return [
        fit_temperature(torch.stack([logits_of(layer, features, s) for s in subsets_missing(n, n - present)]), labels)
        for present in range(1, n + 1)
    ]


def calibration_error(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Expected calibration error [1]_ of logits (M, C) at a temperature.

    The mean distance of confidence from accuracy over `BINS` bins of confidence, weighted by their images.
    """
    confidences, answers = (logits.double() / temperature).softmax(1).max(1)
    right = (answers == labels).double().numpy()
    confidence = confidences.numpy()
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))


@torch.inference_mode()
def measure_calibration(
    answers: Sequence[Callable[[Sequence[int]], Tensor]],
    temperatures: Sequence[Sequence[float]],
    n_devices: int,
    labels: Tensor,
    seed: int,
) -> list[dict]:
    """Calibration error with 0, 1, … N−1 of N devices missing: a mean over seeds and over the subsets present.

    `answers` and `temperatures` are those of each seed's network. Each row has ``missing``, ``n_subsets``, and the
    error ``calibrated`` and ``uncalibrated``, which is that of temperature 1. `seed` draws the subsets where there are
    too many: see `nonn.runtime.subsets`.
    """
    rows = []
    for missing in range(n_devices):
        subsets = subsets_missing(n_devices, missing, seed)
        errors = []
        for answer, by_present in zip(answers, temperatures, strict=True):
            fitted = by_present[n_devices - missing - 1]
            for logits in map(answer, subsets):
                errors.append([calibration_error(logits, labels), calibration_error(logits, labels, fitted)])
        uncalibrated, calibrated = np.mean(errors, axis=0).tolist()
        row = {"missing": missing, "n_subsets": len(subsets)}
        rows.append(row | {"uncalibrated": uncalibrated, "calibrated": calibrated})
    return rows
