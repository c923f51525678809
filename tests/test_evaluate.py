"""The tests and tables behind every claim, against exact enumeration and plain loops."""

import itertools
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from experiments import read_subset, tiny_params
from scipy import stats

from nonn.core.files import read_json
from nonn.core.params import STRATEGIES, Params
from nonn.data.tensors import read_tensors, write_tensors
from nonn.deploy.onnx_files import student_content
from nonn.method import scoring
from nonn.method.final_layer import logits_of
from nonn.method.joining import FeatureCache, assemble_network, features_of
from nonn.method.loading import load_baseline, load_network
from nonn.method.scoring import (
    Scores,
    missing_devices,
    missing_strategies,
    permutation_test,
    score_all,
    seed_test,
    summarise,
)
from nonn.runtime.session import run_onnx
from nonn.runtime.subsets import MAX_SUBSETS
from nonn.stages import evaluate as evaluate_stage
from nonn.teachers.loading import load_teacher
from nonn.training.networks import predict


def answers(n_seeds: int, n_images: int, share: float, seed: int = 0) -> np.ndarray:
    """Whether each seed's model is right on each image."""
    return np.random.default_rng(seed).random((n_seeds, n_images)) < share


# What is kept


def test_features_are_kept_for_the_pool_and_one_method_more(params, experiment, data, monkeypatch):
    """Not those of all students of the experiment at once."""
    alive = weakref.WeakSet()

    class Cache(FeatureCache):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)

    monkeypatch.setattr(scoring, "FeatureCache", Cache)
    students = [{id(s) for cache in alive for s, _ in cache._known} for _ in score_all(params, experiment, data)]
    pool = sum(len(seeds) for _, method, seeds in params.baselines() if method == "kd")
    assert max(map(len, students)) <= pool + 2
    assert len(set().union(*students)) > pool + 2


# Paired permutation test


def exact_p_value(a: np.ndarray, b: np.ndarray) -> Fraction:
    """Every flip of the signs, counted."""
    difference = [Fraction(int(x), len(a)) - Fraction(int(y), len(b)) for x, y in zip(a.sum(0), b.sum(0), strict=True)]
    observed = abs(sum(difference))
    flips = list(itertools.product([1, -1], repeat=len(difference)))
    extreme = sum(abs(sum(s * d for s, d in zip(signs, difference, strict=True))) >= observed for signs in flips)
    return Fraction(extreme, len(flips))


@pytest.mark.parametrize(("n_a", "n_b", "seed"), [(1, 1, 0), (3, 3, 1), (3, 2, 2), (2, 5, 3)])
def test_p_value_is_that_of_all_flips(n_a, n_b, seed):
    a, b = answers(n_a, 9, 0.9, seed), answers(n_b, 9, 0.4, seed + 10)
    expected = float(exact_p_value(a, b))
    assert 0.001 < expected < 0.9
    assert permutation_test(a, b, resamples=20_000, seed=0) == pytest.approx(expected, abs=0.015)


def test_eight_images_won_by_one_side():
    """Of 2⁸ flips only all plus and all minus are as extreme."""
    a, b = np.ones((1, 8), bool), np.zeros((1, 8), bool)
    assert exact_p_value(a, b) == Fraction(2, 256)
    assert permutation_test(a, b, resamples=20_000, seed=0) == pytest.approx(2 / 256, abs=0.003)


def test_p_value_of_identical_methods_is_1():
    a = answers(3, 50, 0.8)
    assert permutation_test(a, a, resamples=500, seed=0) == 1
    assert permutation_test(a, a[[2, 0, 1]], resamples=500, seed=0) == 1


def test_p_value_is_symmetric_repeatable_and_never_zero():
    a, b = answers(3, 400, 0.9), answers(2, 400, 0.5, seed=1)
    assert permutation_test(a, b, resamples=1500, seed=0) == permutation_test(b, a, resamples=1500, seed=0) == 1 / 1501
    b = answers(2, 400, 0.88, seed=1)
    p = permutation_test(a, b, resamples=1500, seed=0)
    assert p == permutation_test(a, b, resamples=1500, seed=0) == permutation_test(b, a, resamples=1500, seed=0)
    assert p != permutation_test(a, b, resamples=1500, seed=1)


# Welch's test over seeds


def test_seed_test_is_welch_s():
    a, b = [0.91, 0.93, 0.92], [0.90, 0.88, 0.89, 0.91]
    na, nb = len(a), len(b)
    va, vb = np.var(a, ddof=1) / na, np.var(b, ddof=1) / nb
    t = (np.mean(a) - np.mean(b)) / np.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / (na - 1) + vb**2 / (nb - 1))
    assert seed_test(a, b) == pytest.approx(2 * stats.t.sf(abs(t), freedom))


@pytest.mark.parametrize(("a", "b"), [([0.9], [0.8, 0.7]), ([0.9, 0.8], [0.7]), ([0.9, 0.9], [0.8, 0.8])])
def test_seed_test_needs_variation(a, b):
    assert seed_test(a, b) is None


# Missing devices


def adding(terms: torch.Tensor):
    """A network whose devices' contributions (N, n_images, C) are added up."""
    return lambda present: terms[list(present)].sum(0)


def test_missing_devices_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    contributions = [torch.randn(4, 30, 3, generator=generator) for _ in range(3)]
    labels = torch.randint(3, (30,), generator=generator)
    rows = missing_devices([adding(terms) for terms in contributions], 4, labels, seed=0)
    assert [row["missing"] for row in rows] == [0, 1, 2, 3]
    assert [row["n_subsets"] for row in rows] == [1, 4, 6, 4]
    for row in rows:
        means, worsts = [], []
        for terms in contributions:
            accuracies = []
            for absent in itertools.combinations(range(4), row["missing"]):
                logits = sum(terms[d] for d in range(4) if d not in absent)
                accuracies.append(np.mean([int(logits[i].argmax()) == int(labels[i]) for i in range(30)]))
            means.append(np.mean(accuracies))
            worsts.append(min(accuracies))
        assert row["mean"] == pytest.approx(np.mean(means))
        assert row["worst"] == pytest.approx(np.mean(worsts))
        assert row["mean_sd"] == pytest.approx(np.std(means, ddof=1))
        assert row["worst_sd"] == pytest.approx(np.std(worsts, ddof=1))


def test_many_devices_are_sampled():
    answers = [adding(torch.randn(12, 3, 2, generator=torch.Generator().manual_seed(0)))]
    rows = missing_devices(answers, 12, torch.tensor([0, 1, 0]), seed=0)
    assert [row["n_subsets"] for row in rows] == [1, 12, 66, 220, *[MAX_SUBSETS] * 5, 220, 66, 12]
    assert rows == missing_devices(answers, 12, torch.tensor([0, 1, 0]), seed=0)
    assert all(row["mean_sd"] is None for row in rows), "one seed has no deviation"


def test_strategies_by_hand():
    """Of two images of class 0, a strategy is right on as many as it says, whoever is present."""

    def right_on(count):
        return lambda _present: torch.eye(2)[[0] * count + [1] * (2 - count)]

    strategies = {"rescale": [right_on(1), right_on(2)], "fail_out": [right_on(2), right_on(2)]}
    scores = Scores("nonn", "2s", 2, np.ones((2, 2), bool), [], strategies, ["fail_out", "fail_out"])
    rows = missing_strategies(scores, torch.tensor([0, 0]), seed=0)
    assert [(row["strategy"], row["missing"], row["n_subsets"]) for row in rows] == [
        ("rescale", 0, 1),
        ("rescale", 1, 2),
        ("fail_out", 0, 1),
        ("fail_out", 1, 2),
    ]
    assert [(row["mean"], row["worst"], row["chosen"], row["n_seeds"]) for row in rows[1::2]] == [
        (3 / 4, 3 / 4, 0, 2),
        (1, 1, 2, 2),
    ]
    assert rows[1]["mean_sd"] == pytest.approx((1 - 1 / 2) / 2**0.5)


# The table


def test_rows_by_hand(params):
    def scores(method, network, *rows):
        return Scores(method, network, 2, np.array(rows, dtype=bool), [])

    nonn, kd = scores("nonn", "2s", [1, 1, 1, 0], [1, 1, 1, 1]), scores("kd", "2s", [1, 0, 0, 0], [1, 1, 0, 0])
    teacher, other = scores("teacher", "", [1, 1, 1, 1]), scores("kd", "4s", [1, 1, 0, 0])
    rows = summarise([teacher, nonn, kd, other], params.evaluate)
    assert [(row["method"], row["network"]) for row in rows] == [
        ("teacher", ""),
        ("nonn", "2s"),
        ("kd", "2s"),
        ("kd", "4s"),
    ]
    reference, compared = rows[1], rows[2]
    assert reference["accuracies"] == [3 / 4, 1]
    assert reference["accuracy_mean"] == 7 / 8
    assert reference["accuracy_sd"] == pytest.approx(abs(1 - 3 / 4) / 2**0.5)
    assert (reference["n_seeds"], reference["n_students"]) == (2, 2)
    resamples, seed = params.evaluate.resamples, params.evaluate.seed
    assert compared["p_value_vs_nonn"] == permutation_test(nonn.correct, kd.correct, resamples, seed)
    assert compared["p_value_vs_nonn_seeds"] == seed_test([3 / 4, 1], [1 / 4, 2 / 4])
    for row in (rows[0], rows[1], rows[3]):  # on other devices, or NoNN itself
        assert row["p_value_vs_nonn"] is None
        assert row["p_value_vs_nonn_seeds"] is None
    assert rows[0]["accuracy_sd"] is None


# The stage


def test_the_stage_scores_everything_once(params, data, experiment):
    evaluate_stage.run(params, experiment)
    result = read_json(experiment.evaluation)
    assert result["n_test"] == 30
    rows = {(row["method"], row["network"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"])
    assert {key: (row["n_students"], row["n_seeds"]) for key, row in rows.items()} == {
        ("teacher", ""): (1, 1),
        ("nonn", "2s"): (2, 1),
        ("labels", "2s"): (1, 1),
        ("kd", "2s"): (1, 2),
        ("at_kd", "2s"): (1, 1),
        ("random", "2s"): (2, 1),
        ("ensemble", "2s"): (2, 1),
    }
    images, labels = read_subset(data, "test")
    right = (predict(load_teacher(experiment), images)[1].argmax(1) == labels).double().mean()
    assert rows["teacher", ""]["accuracies"] == [right]
    missing = {(row["method"], row["missing"]): row for row in result["missing"]}
    assert set(missing) == set(itertools.product(["nonn", "random", "ensemble"], [0, 1]))
    for method in ("nonn", "random", "ensemble"):
        assert missing[method, 0]["mean"] == pytest.approx(rows[method, "2s"]["accuracy_mean"])
    strategies = {(row["strategy"], row["missing"]): row for row in result["missing_strategies"]}
    assert set(strategies) == set(itertools.product(STRATEGIES, [0, 1]))
    chosen = read_json(experiment.network("2s", 0).with_suffix(".json"))["missing"]["chosen"]
    for (strategy, number), row in strategies.items():
        assert row["chosen"] == (strategy == chosen)
        if strategy == chosen or number == 0:
            assert row["mean"] == missing["nonn", number]["mean"]


def test_networks_without_an_ensemble_are_named():
    networks = {
        name: {"devices": ["small"] * n, "seeds": 1, "baselines": {"kd": n_kd}, "latency_ms": 100 * n}
        for name, n, n_kd in (("2s", 2, 2), ("4s", 4, 1))
    }
    devices = {"small": {"memory_kib": 60, "mmacs": 5, "mmacs_per_s": 100}}
    params = Params.model_validate(tiny_params({"networks": networks, "devices": devices}))
    (line,) = evaluate_stage.missing_ensembles(params)
    assert line.startswith("note: networks.4s: 1 KD students for its devices are too few for an ensemble of 4; set")


def test_ensembles_average_probabilities(params, data, experiment):
    """Of all images, one member says (0, 0.6, 0.4) and the other (0.9, 0, 0.1); the mean of their logits favours 2."""
    for seed, logits in enumerate([[-20, 0.4, 0], [2.2, -30, 0]]):
        path = experiment.baseline("2s", "kd", seed)
        tensors = read_tensors(path)
        head = {"0.head.weight": torch.zeros_like(tensors["0.head.weight"]), "0.head.bias": torch.tensor(logits)}
        write_tensors(path, tensors | head)
    scores = {score.method: score for score in score_all(params, experiment, data)}
    assert scores["ensemble"].correct.tolist() == [(read_subset(data, "test")[1] == 0).tolist()]


def test_a_fitted_final_layer_is_fitted_for_baselines_and_ensembles_alike(params, data, experiment):
    """Of methods with several students only; each such layer is the one that a NoNN of these students would get."""
    fitted = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"final_layer": "fitted"})})
    before = {(s.method, s.network): s for s in score_all(params, experiment, data)}
    after = {(s.method, s.network): s for s in score_all(fitted, experiment, data)}
    assert set(after) - set(before) == {("ensemble_fitted", "2s"), ("nonn_averaged", "2s")}
    images, labels = read_subset(data, "test")
    nonn = load_network(experiment.network("2s", 0), data)
    with torch.inference_mode():
        logits = torch.stack([student(images)[1] for student in nonn.students]).mean(0)
    assert after["nonn_averaged", "2s"].correct[0].tolist() == (logits.argmax(1) == labels).tolist()
    members = [load_baseline(experiment.baseline("2s", "kd", seed), data)[0] for seed in (0, 1)]
    for method, students in {
        "random": load_baseline(experiment.baseline("2s", "random", 0), data),
        "ensemble_fitted": members,
    }.items():
        network, _ = assemble_network(students, FeatureCache(data, "float32"), params.assemble, seed=0)
        with torch.inference_mode():
            right = network(images).argmax(1) == labels
            left = logits_of(network.final, features_of(students, images), [1]).argmax(1)
        assert after[method, "2s"].correct[0].tolist() == right.tolist()
        (answer,) = after[method, "2s"].answers
        assert answer([1]).argmax(1).tolist() == left.tolist(), "the strategy for missing students is NoNN's, too"
    for key in set(before) - {("random", "2s")}:
        assert after[key].correct.tolist() == before[key].correct.tolist(), key


def test_the_stage_writes_the_same_bytes_again(params, experiment):
    evaluate_stage.run(params, experiment)
    before = experiment.evaluation.read_bytes()
    evaluate_stage.run(params, experiment)
    assert experiment.evaluation.read_bytes() == before


def test_int8_students_are_scored_as_devices_run_them(params, data, experiment):
    """Each by the file that would be exported, whatever the method; the float32 ones are a row of their own."""
    int8 = params.model_copy(update={"design": params.design.model_copy(update={"precision": "int8"})})
    scores = {(s.method, s.network): s for s in score_all(int8, experiment, data)}
    plain = {(s.method, s.network): s for s in score_all(params, experiment, data)}
    assert set(scores) - set(plain) == {("teacher_int8", ""), ("nonn_float32", "2s")}
    assert scores["teacher", ""].correct.tolist() == plain["teacher", ""].correct.tolist()
    assert scores["nonn_float32", "2s"].correct.tolist() == plain["nonn", "2s"].correct.tolist()
    images, labels = read_subset(data, "test")

    def features(student):
        return torch.from_numpy(run_onnx(student_content(student, data, "int8"), images.numpy()))

    nonn = load_network(experiment.network("2s", 0), data)
    member = load_baseline(experiment.baseline("2s", "kd", 0), data)[0]
    with torch.inference_mode():
        joint = logits_of(nonn.final, [features(student) for student in nonn.students])
        alone = member.head(features(member))
    assert scores["nonn", "2s"].correct[0].tolist() == (joint.argmax(1) == labels).tolist()
    assert scores["kd", "2s"].correct[0].tolist() == (alone.argmax(1) == labels).tolist()
