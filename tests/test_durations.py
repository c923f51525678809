"""What jobs may take before any has run: in proportion to what they took in a run whose times are committed."""

import contextlib
import csv
from collections import defaultdict

import pytest
from committed import git
from experiments import REPOSITORY

from nonn.commands.use import merge_experiment
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.method.durations import guess_seconds

pytestmark = pytest.mark.usefixtures("folder")  # in which nothing has run


def params_of(name: str) -> Params:
    with contextlib.chdir(REPOSITORY):
        return Params.model_validate(merge_experiment(name))


def test_guesses_of_the_default_experiment_are_in_proportion_to_its_times():
    params, took = params_of("mnist5k"), defaultdict(list)
    for row in csv.DictReader(git("show", ":results/mnist5k/timeline.csv").splitlines()):
        took[row["stage"]].append(float(row["end_s"]) - float(row["start_s"]))
    mean = {stage: sum(seconds) / len(seconds) for stage, seconds in took.items()}
    guessed = {
        stage: guess_seconds(params, Paths("mnist5k"), address)
        for stage, address in (
            ("teacher", "teacher"),
            ("signals", "signals"),
            ("distill", "distill@seed0/4s/0"),
            ("baseline", "baseline@seed0/2s/kd"),
            ("assemble", "assemble@seed0/4s"),
            ("evaluate", "evaluate"),
        )
    }
    # Nothing else is promised: processors differ, and DEFAULT_TRAIN_IMAGES are 2.8 times those of this data set.
    shares = [seconds / mean[stage] for stage, seconds in guessed.items()]
    assert max(shares) < 3 * min(shares)
    assert guessed["teacher"] > 2 * guessed["distill"] > 2 * guessed["assemble"]


def test_trainings_of_many_epochs_outweigh_all_else():
    params = params_of("cifar10_paper")
    paths = Paths("cifar10_paper")
    student = guess_seconds(params, paths, "distill@seed2/4s/3")
    assert student > 100 * guess_seconds(params, paths, "benchmark@4s")
    assert guess_seconds(params, paths, "teacher") > student


def test_a_baseline_with_the_budget_of_all_devices_takes_longer_than_one_for_a_device():
    params, paths = params_of("cifar10"), Paths("cifar10")
    one, total, four = (guess_seconds(params, paths, f"baseline@seed0/4s/{name}") for name in ("kd", "total", "random"))
    assert 3 * one < total < 5 * one
    assert 3 * one < four < 4 * one


def test_a_teacher_that_is_imported_takes_no_training():
    params, paths = params_of("cifar10_resnet20"), Paths("cifar10_resnet20")
    assert guess_seconds(params, paths, "teacher") < guess_seconds(params, paths, "signals")


def test_asking_students_takes_less_than_training_them_and_is_not_for_nothing():
    params, paths = params_of("imagenet"), Paths("imagenet")
    jobs = ("distill@seed0/4s/0", "assemble@seed0/4s", "evaluate", "design@4s")
    student, joined, scored, other = (guess_seconds(params, paths, job) for job in jobs)
    assert student > joined > 2 * other
    assert scored > joined
