"""Stage `evaluate`: score everything on the test images, once, for the tables.

Nothing is chosen here. Each method and network gets its accuracy for each seed, the mean and the
standard deviation, and two paired tests against the network of networks on the same devices. The
accuracy of every network is also measured with devices missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from nonn.assemble import FinalLayer, averaged_layer, load_network
from nonn.baseline import load_baseline
from nonn.dataset import Dataset, load_dataset
from nonn.files import write_json
from nonn.models import Network, predict
from nonn.params import Evaluate, Params
from nonn.paths import Paths
from nonn.progress import track
from nonn.teacher import load_teacher

#: Subsets of missing devices scored for each number of them; all of them up to 10 devices.
MAX_SUBSETS = 252


@dataclass(frozen=True)
class Scores:
    """Test results of one method on one network.

    Attributes
    ----------
    correct : ndarray of shape (n_seeds, n_test), bool
    contributions : list of Tensor of shape (n_devices, n_test, C)
        For each seed, what each device adds to the logits; empty for a single model.
    """

    method: str
    network: str
    n_students: int
    correct: np.ndarray
    contributions: list[Tensor]

    @property
    def accuracies(self) -> list[float]:
        return self.correct.mean(1).tolist()


def permutation_test(a: np.ndarray, b: np.ndarray, resamples: int, seed: int) -> float:
    """Two-sided paired permutation test over test images.

    Parameters
    ----------
    a, b : ndarray of shape (n_seeds, n_test), bool
        Whether each seed's model of two methods is right; the numbers of seeds may differ.
    resamples : int
    seed : int

    Returns
    -------
    float
        Share of sign flips of the images' differences (of the mean over seeds) whose mean is at
        least as large as the observed one, the observed one included.
    """
    difference = a.mean(0) - b.mean(0)
    observed = abs(difference.sum())
    generator = np.random.default_rng(seed)
    extreme, left = 1, resamples
    while left:
        n = min(left, 1000)
        signs = generator.integers(0, 2, (n, len(difference)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ difference) >= observed - 1e-9).sum())
        left -= n
    return extreme / (resamples + 1)


def seed_test(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided Welch test over seeds; None where a method has one seed or neither varies."""
    if min(len(a), len(b)) < 2 or np.var(a) + np.var(b) == 0:
        return None
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def missing_devices(contributions: Sequence[Tensor], labels: Tensor, seed: int) -> list[dict]:
    """Accuracy with 0, 1, … N−1 of N devices missing.

    Parameters
    ----------
    contributions : sequence of Tensor of shape (N, n_test, C)
        One for each seed.
    labels : Tensor of shape (n_test,)
    seed : int
        Draws the subsets where there are more than `MAX_SUBSETS`.

    Returns
    -------
    list of dict
        ``missing``, ``n_subsets``; over the subsets of devices present, ``mean`` and ``worst``
        accuracy, averaged over the seeds, each with its standard deviation over the seeds.
    """
    n_devices, rows = len(contributions[0]), []
    for missing in range(n_devices):
        subsets = list(itertools.combinations(range(n_devices), n_devices - missing))
        if len(subsets) > MAX_SUBSETS:
            picked = np.random.default_rng(seed).choice(len(subsets), MAX_SUBSETS, replace=False)
            subsets = [subsets[i] for i in sorted(picked)]
        scores = np.array(
            [
                [(terms[list(subset)].sum(0).argmax(1) == labels).double().mean().item() for subset in subsets]
                for terms in contributions
            ]
        )
        row = {"missing": missing, "n_subsets": len(subsets)}
        for name, over_subsets in (("mean", scores.mean(1)), ("worst", scores.min(1))):
            row |= {name: float(over_subsets.mean()), f"{name}_sd": _sd(over_subsets)}
        rows.append(row)
    return rows


def summarise(scores: Sequence[Scores], params: Evaluate) -> list[dict]:
    """One row a method and network: accuracies, mean, standard deviation, tests against NoNN."""
    references = {s.network: s for s in scores if s.method == "nonn"}
    rows = []
    for s in scores:
        reference = references.get(s.network) if s.method != "nonn" else None
        rows.append(
            {
                "method": s.method,
                "network": s.network,
                "n_students": s.n_students,
                "n_seeds": len(s.correct),
                "accuracies": s.accuracies,
                "accuracy_mean": float(np.mean(s.accuracies)),
                "accuracy_sd": _sd(s.accuracies),
                "p_value_vs_nonn": reference
                and permutation_test(reference.correct, s.correct, params.resamples, params.seed),
                "p_value_vs_nonn_seeds": reference and seed_test(reference.accuracies, s.accuracies),
            }
        )
    return rows


def _sd(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _scores(method: str, network: str, terms: list[Tensor], labels: Tensor) -> Scores:
    correct = np.stack([(t.sum(0).argmax(1) == labels).numpy() for t in terms])
    return Scores(method, network, len(terms[0]), correct, terms if len(terms[0]) > 1 else [])


@torch.inference_mode()
def _terms(students: Sequence[Network], layer: FinalLayer, images: Tensor) -> Tensor:
    """What each student adds to the logits of each image, (N, n_test, C)."""
    return layer.contributions([predict(student, images)[0] for student in students])


def score_all(params: Params, paths: Paths, data: Dataset) -> Iterator[Scores]:
    """Score teacher, networks, baselines and ensembles on the test images."""
    images, labels = data.split("test")
    with torch.inference_mode():
        _, logits = predict(load_teacher(paths, data), images)
    yield _scores("teacher", "", [logits[None]], labels)
    for network in params.networks:
        models = [load_network(paths.network(network, seed), data) for seed in params.seeds]
        yield _scores("nonn", network, [_terms(m.students, m.final, images) for m in models], labels)
    pool = []
    for network, method, seeds in params.baseline_jobs():
        terms = []
        for seed in seeds:
            students = load_baseline(paths.baseline(network, method, seed), data)
            terms.append(_terms(students, averaged_layer([s.head for s in students]), images))
        if f"{network}/{method}" == params.ensemble.pool:
            pool = [t[0] for t in terms]
        yield _scores(method, network, terms, labels)
    for network, devices in params.networks.items():
        n = len(devices)
        # Probabilities are averaged, not logits: that is what users of ensembles do.
        groups = [torch.stack(pool[start : start + n]).softmax(2) for start in range(0, len(pool) - n + 1, n)]
        if groups:
            yield _scores("ensemble", network, groups, labels)


def run(params: Params, paths: Paths) -> None:
    torch.set_num_threads(1)
    data = load_dataset(paths)
    _, labels = data.split("test")
    n_models = 1 + 2 * len(params.networks) + len(params.baselines)
    scores = list(track(score_all(params, paths, data), "evaluate", total=n_models))
    write_json(
        paths.evaluation,
        {
            "n_test": len(labels),
            "rows": summarise(scores, params.evaluate),
            "missing": [
                {"method": s.method, "network": s.network, **row}
                for s in scores
                if s.contributions
                for row in missing_devices(s.contributions, labels, params.evaluate.seed)
            ],
        },
    )
