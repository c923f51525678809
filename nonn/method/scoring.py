"""Scores of every method on the test images, and how significant their differences are.

Nothing is chosen on test images. Each method and network gets its accuracy for each seed, the mean and the standard
deviation, and two tests against the network of networks on the same devices: a paired one over test images, and an
unpaired one over seeds. The accuracy of every network is also measured with devices missing, of NoNN with each strategy
of `nonn.method.missing`.

With ``final_layer: fitted``, baselines of several students get what a NoNN gets, a final layer that is fitted further
and a strategy for missing devices chosen on validation images, so that they differ in the students alone; and so do the
ensembles, as the method ``ensemble_fitted``. ``nonn_averaged``, the same students with their heads averaged, shows what
NoNN gains by it. Otherwise the heads of the students present are averaged.

If devices run int8, students of all methods are scored in int8. ``nonn_float32``, NoNN's students before they were
quantised, shows what that costs, and ``teacher_int8`` what quantising does to a teacher of our families.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from nonn.core.artifacts import NetworkInfo
from nonn.core.files import read_json
from nonn.core.params import STRATEGIES, EvaluateParams, Params
from nonn.core.paths import Paths
from nonn.core.progress import track
from nonn.data.dataset import Dataset, load_teacher_dataset
from nonn.method.final_layer import averaged_layer, logits_of
from nonn.method.joining import FeatureCache, NetworkOfNetworks, join_students
from nonn.method.loading import load_baseline, load_network
from nonn.runtime.final import FinalLayer
from nonn.runtime.subsets import subsets_missing
from nonn.teachers.loading import load_teacher
from nonn.training.hardware import pick_device
from nonn.training.networks import ConvNet, accuracy, predict

#: Logits (n_test, C) of a network when only these of its devices are present.
Answers = Callable[[Sequence[int]], Tensor]

#: Normal quantile of a two-sided 95 % interval.
Z95 = 1.959964


@dataclass(frozen=True)
class Scores:
    """Test results of one method on one network."""

    method: str
    network: str
    n_students: int
    correct: np.ndarray  # (n_seeds, n_test), bool
    answers: Sequence[Answers]  # of each seed; empty for a single model, and if missing devices are not scored
    #: Of NoNN: the same with each strategy for missing devices, whichever was chosen.
    strategies: Mapping[str, Sequence[Answers]] = field(default_factory=dict)
    chosen: Sequence[str] = ()  # of NoNN: the strategy that each seed's network takes
    temperatures: Sequence[Sequence[float]] = ()  # of NoNN: those of each seed's network

    @property
    def accuracies(self) -> list[float]:
        return self.correct.mean(1).tolist()


def permutation_test(a: np.ndarray, b: np.ndarray, resamples: int, seed: int) -> float:
    """Two-sided paired permutation test over test images, of two methods' right answers (n_seeds, n_test).

    The p-value is the share of sign flips of the images' differences (of the mean over seeds, whose numbers may differ)
    whose mean is at least as large as the observed one, the observed one included; exact where there are no more flips
    than `resamples`.
    """
    difference = a.sum(0) * len(b) - b.sum(0) * len(a)  # whole numbers, so equal sums compare as equal
    difference = difference[difference != 0]  # flipping a 0 changes nothing, and most images are 0
    if len(difference) < 2:  # scipy takes two or more; both flips of a single one are equally large
        return 1.0
    test = stats.permutation_test(
        (difference,),
        lambda flipped, axis: np.abs(flipped.sum(axis)),
        permutation_type="samples",
        n_resamples=resamples,
        batch=200,  # flips in memory at once
        alternative="greater",
        rng=seed,
    )
    return float(test.pvalue)


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean difference of two methods' right answers (n_seeds, n_test), and half of its 95 % interval.

    Paired by test image, right answers averaged over the seeds first; 1.96 standard errors of the mean over the images,
    so the interval says nothing of other seeds or teachers.
    """
    difference = a.mean(0) - b.mean(0)
    return float(difference.mean()), float(Z95 * difference.std(ddof=1) / np.sqrt(len(difference)))


def seed_test(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided Welch test over seeds; None where a method has one seed or neither varies."""
    if min(len(a), len(b)) < 2 or np.var(a) + np.var(b) == 0:
        return None
    with warnings.catch_warnings():  # scipy warns where one of the two does not vary, which is sound
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


@torch.inference_mode()
def missing_devices(answers: Sequence[Answers], n_devices: int, labels: Tensor, seed: int) -> list[dict]:
    """Accuracy with 0, 1, … N−1 of N devices missing, given the answers of each seed.

    Each row has ``missing``, ``n_subsets`` and, over the subsets of devices present, ``mean`` and ``worst`` accuracy,
    averaged over the seeds, each with its standard deviation over the seeds. `seed` draws the subsets where there are
    too many: see `nonn.runtime.subsets`.
    """
    rows = []
    for missing in range(n_devices):
        subsets = subsets_missing(n_devices, missing, seed)
        scores = np.array([[accuracy(answer(subset), labels) for subset in subsets] for answer in answers])
        row: dict[str, float | None] = {"missing": missing, "n_subsets": len(subsets)}
        for name, over_subsets in (("mean", scores.mean(1)), ("worst", scores.min(1))):
            row |= {name: float(over_subsets.mean()), f"{name}_sd": sd(over_subsets)}
        rows.append(row)
    return rows


def missing_strategies(scores: Scores, labels: Tensor, seed: int) -> list[dict]:
    """The rows of `missing_devices` for each strategy of a NoNN.

    Each with ``network``, ``strategy``, ``n_seeds`` and ``chosen``, for how many of the seeds validation data chose the
    strategy.
    """
    rows = []
    for strategy, answers in scores.strategies.items():
        own = {"network": scores.network, "strategy": strategy, "n_seeds": len(answers)}
        own["chosen"] = list(scores.chosen).count(strategy)
        rows += [own | row for row in missing_devices(answers, scores.n_students, labels, seed)]
    return rows


def summarise(scores: Sequence[Scores], params: EvaluateParams) -> list[dict]:
    """One row a method and network: accuracies, mean, standard deviation, tests against NoNN."""
    references = {s.network: s for s in scores if s.method == "nonn"}
    rows = []
    for s in scores:
        reference = references.get(s.network) if s.method != "nonn" else None
        row = {"method": s.method, "network": s.network, "n_students": s.n_students, "n_seeds": len(s.correct)}
        row |= {"accuracies": s.accuracies, "accuracy_mean": float(np.mean(s.accuracies))}
        row |= {"accuracy_sd": sd(s.accuracies), "p_value_vs_nonn": None, "p_value_vs_nonn_seeds": None}
        if reference:
            paired = permutation_test(reference.correct, s.correct, params.resamples, params.seed)
            by_seed = seed_test(reference.accuracies, s.accuracies)
            row |= {"p_value_vs_nonn": paired, "p_value_vs_nonn_seeds": by_seed}
        rows.append(row)
    return rows


def sd(values: Sequence[float] | np.ndarray) -> float | None:
    """Standard deviation of a sample; None of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _add(terms: Tensor, present: Sequence[int]) -> Tensor:
    return terms[list(present)].sum(0)


def _scores(method: str, network: str, terms: list[Tensor], labels: Tensor) -> Scores:
    """Scores of a method whose devices' contributions, (n_devices, n_test, C) for each seed, are added up."""
    correct = np.stack([(t.sum(0).argmax(1) == labels).numpy() for t in terms])
    answers = [partial(_add, t) for t in terms] if len(terms[0]) > 1 else []
    return Scores(method, network, len(terms[0]), correct, answers)


@torch.no_grad()
def _joined_scores(
    method: str, network: str, joined: Sequence[tuple[Sequence[ConvNet], FinalLayer]], features: FeatureCache
) -> Scores:
    """Scores of students joined by a final layer, given both of each seed."""
    _, labels = features.data.subset("test")
    answers = [partial(logits_of, layer, features(students, "test")[0]) for students, layer in joined]
    n = len(joined[0][0])
    correct = np.stack([(answer(range(n)).argmax(1) == labels).numpy() for answer in answers])
    return Scores(method, network, n, correct, answers if n > 1 else [])


def _nonn_scores(
    network: str, models: Sequence[NetworkOfNetworks], chosen: Sequence[str], features: FeatureCache
) -> Scores:
    """Scores of a NoNN, given the network and the strategy chosen of each seed."""
    students = [list(model.students) for model in models]
    layers = [{own: model.final, **model.others} for model, own in zip(models, chosen, strict=True)]
    by_strategy = {
        name: _joined_scores("nonn", network, [(s, of[name]) for s, of in zip(students, layers, strict=True)], features)
        for name in STRATEGIES
        if name in layers[0]
    }
    scores = _joined_scores("nonn", network, [(s, m.final) for s, m in zip(students, models, strict=True)], features)
    strategies = {name: s.answers for name, s in by_strategy.items()}
    return replace(scores, temperatures=[m.temperatures for m in models], strategies=strategies, chosen=chosen)


def score_all(params: Params, paths: Paths, data: Dataset) -> Iterator[Scores]:
    """Score teacher, networks, baselines and ensembles on the test images."""
    # Ensembles of all sizes are formed of the same students; features of others go with their method.
    features = FeatureCache(data, params.design.precision)
    pools: dict[tuple[str, str], list[ConvNet]] = {}
    steps: list[Callable[[], Iterator[Scores]]] = [
        partial(_score_teacher, params, paths),
        *(partial(_score_network, params, paths, network, data) for network in params.networks),
        *(partial(_score_baseline, params, paths, *baseline, features, pools) for baseline in params.baselines()),
        *(partial(_score_ensembles, params, network, features, pools) for network in params.networks),
    ]
    for step in track(steps, "evaluate"):
        yield from step()


def _score_teacher(params: Params, paths: Paths) -> Iterator[Scores]:
    teacher_data = load_teacher_dataset(paths)
    images, labels = teacher_data.subset("test")
    teacher = load_teacher(paths)
    with torch.inference_mode():
        _, logits = predict(teacher, images, pick_device())
    teacher.cpu()
    yield _scores("teacher", "", [logits[None]], labels)
    if params.design.precision == "int8" and isinstance(teacher, ConvNet):
        head = averaged_layer([teacher.head])
        yield _joined_scores("teacher_int8", "", [([teacher], head)], FeatureCache(teacher_data, "int8"))


def _score_network(params: Params, paths: Paths, network: str, data: Dataset) -> Iterator[Scores]:
    features = FeatureCache(data, params.design.precision)
    files = [paths.network(network, seed) for seed in range(params.networks[network].seeds)]
    chosen = [read_json(path.with_suffix(".json"), NetworkInfo)["missing"]["chosen"] for path in files]
    models = [load_network(path, data) for path in files]
    yield _nonn_scores(network, models, chosen, features)
    # Missing devices are scored for NoNN alone.
    if params.evaluate.final_layer == "fitted":
        averaged = [averaged_layer([student.head for student in model.students]) for model in models]
        joined = [(list(model.students), layer) for model, layer in zip(models, averaged, strict=True)]
        yield replace(_joined_scores("nonn_averaged", network, joined, features), answers=[])
    if params.design.precision == "int8":
        joined = [(list(model.students), model.final) for model in models]
        in_float32 = FeatureCache(data, "float32")
        yield replace(_joined_scores("nonn_float32", network, joined, in_float32), answers=[])


def _score_baseline(
    params: Params,
    paths: Paths,
    network: str,
    method: str,
    seeds: range,
    features: FeatureCache,
    pools: dict[tuple[str, str], list[ConvNet]],
) -> Iterator[Scores]:
    """Scores of a baseline; `pools` gets its students if ensembles can be formed of them."""
    if method != "kd":
        features = FeatureCache(features.data, features.precision)
    students = [load_baseline(paths.baseline(network, method, seed), features.data) for seed in seeds]
    layers = [_baseline_layer(params, s, features, seed) for s, seed in zip(students, seeds, strict=True)]
    yield _joined_scores(method, network, list(zip(students, layers, strict=True)), features)
    if method == "kd":
        pools[network, method] = [student for (student,) in students]


def _baseline_layer(params: Params, students: Sequence[ConvNet], features: FeatureCache, seed: int) -> FinalLayer:
    """Final layer of a baseline; a single student needs none but its head."""
    if len(students) > 1 and params.evaluate.final_layer == "fitted":
        layers, summary = join_students(students, features, params.assemble, seed)
        return layers[summary["missing"]["chosen"]]
    return averaged_layer([student.head for student in students])


def _terms(students: Sequence[ConvNet], features: FeatureCache) -> Tensor:
    """Logits of students for the test images, each by its own head, (N, n_test, C)."""
    outputs, _ = features(students, "test")
    return torch.stack([student.head(output) for student, output in zip(students, outputs, strict=True)])


def _score_ensembles(
    params: Params, network: str, features: FeatureCache, pools: Mapping[tuple[str, str], Sequence[ConvNet]]
) -> Iterator[Scores]:
    """Scores of ensembles of as many independent students as the network has devices; nothing without any."""
    n, source = len(params.networks[network].devices), params.pool_of(network)
    pool = pools[source] if source else []
    groups = [pool[start : start + n] for start in range(0, len(pool) - n + 1, n)]
    _, labels = features.data.subset("test")
    if not groups:
        return
    with torch.inference_mode():
        # Probabilities are averaged, not logits: that is what users of ensembles do.
        terms = [_terms(group, features).softmax(2) for group in groups]
    yield _scores("ensemble", network, terms, labels)
    if params.evaluate.final_layer == "fitted":
        layers = [_baseline_layer(params, group, features, seed) for seed, group in enumerate(groups)]
        yield _joined_scores("ensemble_fitted", network, list(zip(groups, layers, strict=True)), features)
