"""`nonn map`: which trainings a plan asks for, what it compares, and that nothing is trained twice."""

import contextlib
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from experiments import tiny_params
from ruamel.yaml import YAML
from torch.testing import assert_close

from nonn.cli import main
from nonn.commands import map as map_command
from nonn.commands.map import COLUMNS, DEFAULT_PLAN, MapConfig, make_map
from nonn.commands.tables import write_rows
from nonn.core.budgets import Budget
from nonn.core.errors import UserError
from nonn.core.files import STATE
from nonn.core.schema import load_yaml
from nonn.report.map_plots import draw_map
from nonn.studies import factor_map
from nonn.studies.factor_map import Point, Training, points_of, rows_of, spec_of, transfer_set_of
from nonn.training.distillation import StudentSpec

FACTORS = {"epochs": [1, 2], "images": [0.5], "classes": [0.67]}
CONFIG = MapConfig(networks=["2s"], seeds=1, factors=FACTORS)


@pytest.fixture
def short(params):
    """The tiny experiment with one epoch."""
    return params.model_copy(update={"distill": params.distill.model_copy(update={"epochs": 1})})


def test_points_stand_around_the_centre(short):
    factors = {"epochs": [0.25, 2], "budget": [0.5], "images": [0.05, 0.5, 1], "classes": [0.5]}
    assert points_of(factors, 10, short) == [
        Point("centre", 1.0, 1),
        Point("epochs", 0.25, 1),
        Point("epochs", 2, 2),
        Point("budget", 0.5, 1, budget=0.5),
        Point("images", 0.05, 10, images=0.05),  # no more than `most_repeats` times the epochs
        Point("images", 0.5, 2, images=0.5),
        Point("images", 1, 1),
        Point("classes", 0.5, 2, classes=0.5),
    ]


WRONG_PLANS = {
    "networks: []\nseeds: 1\nfactors: {}": "networks",
    "networks: [2s]\nseeds: 0\nfactors: {}": "seeds",
    "networks: [2s]\nseeds: 1\nfactors:": "factors",
    "networks: [2s]\nseeds: 1\nfactors: {epochs: [-1]}": r"factors\.epochs\.0",
    "networks: [2s]\nseeds: 1\nfactors: {budget: [.nan]}": r"factors\.budget\.0",
    "networks: [2s]\nseeds: 1\nfactors: {images: [5]}": r"factors\.images\.0",
    "networks: [2s]\nseeds: 1\nfactors: {classes: [1.5]}": r"factors\.classes\.0",
    "networks: [2s]\nseeds: 1\nfactors: {width: [1]}": r"factors\.width",
    "[]": "holds no keys",
}


@pytest.mark.parametrize(("text", "named"), WRONG_PLANS.items())
def test_a_plan_that_cannot_be_followed_is_refused(text, named, tmp_path):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"map\.yaml: {named}"):
        load_yaml(tmp_path / "map.yaml", MapConfig, "")


def test_a_plan_of_the_package_is_named_and_can_be_copied(folder):
    YAML().dump(tiny_params({"networks": {"9s": {"devices": ["small", "small"], "seeds": 1}}}), folder / "params.yaml")
    with pytest.raises(SystemExit, match=f"{DEFAULT_PLAN}: networks: .*; copy the file to workflow/map.yaml and take"):
        main(["map"])


@pytest.mark.usefixtures("experiment")
def test_a_share_of_the_images_has_every_class_and_its_own_signals(params):
    whole, half = transfer_set_of(params), transfer_set_of(params, images=0.5)
    assert len(half.labels) == len(whole.labels) // 2
    assert sorted(set(half.labels.tolist())) == sorted(set(whole.labels.tolist()))
    assert (half.data.test == whole.data.test).all()
    assert_seen_alike(half, whole)


@pytest.mark.usefixtures("experiment")
def test_a_share_of_the_classes_has_their_images_and_the_teacher_s_logits_for_them(params):
    whole, part = transfer_set_of(params), transfer_set_of(params, classes=0.67)
    assert len(part.data.classes) == 2 < len(whole.data.classes)
    own = [whole.data.classes.index(name) for name in part.data.classes]
    for name in ("train", "validation", "test"):
        indices, all_of_them = getattr(part.data, name), getattr(whole.data, name)
        assert indices.tolist() == [i for i in all_of_them.tolist() if whole.data.labels[i] in own]
        assert [own[label] for label in part.data.labels[indices]] == whole.data.labels[indices].tolist()
    assert_seen_alike(part, whole, own)


@pytest.mark.usefixtures("experiment")
def test_shares_of_both_are_images_of_some_classes(params):
    whole, part = transfer_set_of(params), transfer_set_of(params, images=0.5, classes=0.67)
    assert len(part.labels) == len(transfer_set_of(params, classes=0.67).labels) // 2
    assert_seen_alike(part, whole, [whole.data.classes.index(name) for name in part.data.classes])


def assert_seen_alike(part, whole, classes=slice(None)):
    """In every view, an image of a part has the pixels and the signals that it has among all images."""
    spec = StudentSpec(None, filters=[0, 1, 2], kd_weight=0.5, transfer_weight=1.0)
    kept = np.flatnonzero(np.isin(whole.data.train, part.data.train))
    for epoch in range(whole.params.views):
        seen = part.batch(torch.arange(len(kept)), epoch, list(part.signals_for(spec).values()))
        images, labels, logits, pooled = whole.batch(
            torch.from_numpy(kept), epoch, list(whole.signals_for(spec).values())
        )
        assert_close(seen[0], images, rtol=0, atol=0)
        assert part.data.classes[seen[1][0]] == whole.data.classes[labels[0]]
        assert_close(seen[2], logits[..., classes], rtol=0, atol=0)
        assert_close(seen[3], pooled, rtol=0, atol=0)


@pytest.mark.usefixtures("experiment")
def test_one_class_is_nothing_to_tell_apart(params):
    with pytest.raises(UserError, match=r"factors\.classes: 0\.4 of 3 classes is 1; give a larger part"):
        spec_of(params, Training(Point("classes", 0.4, 1, classes=0.4), "2s", 0, 0))


@pytest.mark.usefixtures("experiment")
def test_a_budget_decides_the_architecture_and_not_the_filters(params):
    large = spec_of(params, Training(Point("", 0, 1), "2s", 1, 0))
    small = spec_of(params, Training(Point("", 0, 1, budget=0.7), "2s", 1, 0))
    assert small.filters == large.filters
    assert small.architecture.widths < large.architecture.widths
    by_chance = spec_of(params, Training(Point("", 0, 1), "2s", 1, 0, random=True))
    assert len(by_chance.filters) == len(large.filters)
    assert by_chance.filters != large.filters


@pytest.mark.usefixtures("experiment")
def test_every_device_of_a_network_holds_the_students_that_it_is_compared_with(params):
    large = params.devices["small"].model_copy(update={"memory_kib": 2 * params.devices["small"].memory_kib})
    unlike = params.networks["2s"].model_copy(update={"devices": ["large", "small"]})
    params = params.model_copy(
        update={
            "devices": params.devices | {"large": large},
            "networks": {"first": params.networks["2s"].model_copy(update={"devices": ["large"] * 2}), "2s": unlike},
        }
    )
    pool = factor_map.kd_trainings(params, Point("centre", 1.0, 1), "2s", 1, 4)
    assert [(kd.seed, kd.device) for kd in pool] == [(4 + i, params.budgets_of("2s")[1]) for i in range(2)]
    half = factor_map._scaled(Budget(memory_kib=64, latency_ms=10, mmacs_per_s=5), 0.5)
    assert (half.memory_kib, half.most_mmacs) == (32, 0.025)


@pytest.mark.usefixtures("experiment")
def test_every_method_is_compared_with_the_fitted_ensemble(short, tmp_path):
    rows = list(make_map(short, CONFIG, FACTORS, 1))
    methods = ["nonn", "nonn_averaged", "ensemble", "ensemble_fitted", "random", "kd"]
    assert [row["method"] for row in rows if row["factor"] == "centre"] == methods
    assert {row["factor"] for row in rows} == {"centre", *FACTORS}
    for row in rows:
        assert ("p" in row) == (row["method"] != "ensemble_fitted")
        assert row["n_seeds"] == (2 if row["method"] == "kd" else 1)
    # The centre and the first point of `epochs` are the same trainings.
    found = {row["factor"]: row["accuracy_mean"] for row in reversed(rows) if row["method"] == "nonn"}
    assert found["centre"] == found["epochs"]
    draw_map(rows)  # which raises where a row is not as it expects
    write_rows(tmp_path / "map.csv", COLUMNS, rows)
    assert (tmp_path / "map.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


@pytest.mark.parametrize("why", [KeyboardInterrupt, UserError])
def test_an_interrupted_map_trains_nothing_more(why, tmp_path):
    with contextlib.suppress(why), map_command._workers(1) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() is signal.SIG_IGN
        pool.submit(time.sleep, 20)
        for number in range(5):
            pool.submit((tmp_path / str(number)).touch)
        raise why
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("experiment")
def test_what_is_trained_is_not_trained_again(params, monkeypatch):
    device = params.budgets_of("2s")[0]
    training = Training(Point("epochs", 1, 1), None, 0, 0, device=device)
    file = factor_map.train(params, training)
    monkeypatch.setattr(factor_map, "distill_student", lambda *_, **__: pytest.fail("trained again"))
    assert factor_map.train(params, Training(Point("centre", 1.0, 1), None, 0, 0, device=device)) == file
    assert file.parent == STATE / "map"


@pytest.mark.usefixtures("experiment")
@pytest.mark.parametrize(
    ("network", "student", "random", "trained_by"),
    [
        ("2s", 1, False, "distill@seed0/2s/1"),
        ("2s", 1, True, "baseline@seed0/2s/random"),
        (None, 0, False, "baseline@seed0/2s/kd"),
    ],
)
def test_what_the_pipeline_has_trained_is_the_same_student(network, student, random, trained_by, params, monkeypatch):
    device = None if network else params.budgets_of("2s")[0]
    training = Training(Point("", 0, params.distill.epochs), network, student, 0, random, device)
    stage, weights = factor_map.of_pipeline(params, training)
    assert stage == trained_by
    trained = factor_map.train(params, training).read_bytes()
    shutil.rmtree(STATE / "map")
    monkeypatch.setattr(factor_map, "distill_student", lambda *_, **__: pytest.fail("trained again"))
    assert factor_map.train(params, training, weights).read_bytes() == trained


@pytest.mark.usefixtures("experiment")
@pytest.mark.parametrize("change", [{"seed": 90}, {"point": Point("budget", 0.7, 2, budget=0.7)}])
def test_what_the_pipeline_has_not_trained_is_not_taken_from_it(change, params):
    centre = Training(Point("", 0, params.distill.epochs), "2s", 0, 0)
    assert factor_map.of_pipeline(params, centre)
    assert not factor_map.of_pipeline(params, replace(centre, **change))


def test_students_of_changed_stages_are_not_taken(experiment, params, monkeypatch):
    centre = [Training(Point("", 0, params.distill.epochs), "2s", i, 0) for i in range(2)]
    assert not map_command._finished(params, centre)  # there is no repository of DVC
    repo = Mock(**{"status.return_value": {"distill@seed0/2s/1": ["changed deps"]}})
    monkeypatch.setattr("dvc.repo.Repo", lambda _: repo)
    assert map_command._finished(params, centre) == {centre[0]: experiment.student("2s", 0, 0)}


def test_differences_are_paired_by_image():
    right = {"nonn": np.array([1, 1, 1, 0] * 50, bool), "ensemble_fitted": np.array([1, 0, 1, 0] * 50, bool)}
    right["kd.0"] = right["ensemble_fitted"]

    settings = SimpleNamespace(evaluate=SimpleNamespace(resamples=200, seed=0))
    nonn, _, kd = rows_of(settings, Point("centre", 1.0, 1), "2s", [right])
    assert nonn["difference_vs_fitted_ensemble"] == 0.25
    assert nonn["ci_low"] == pytest.approx(0.25 - 1.96 * np.std([0, 1, 0, 0] * 50, ddof=1) / 200**0.5, abs=1e-4)
    assert nonn["p"] < 0.01
    assert (kd["difference_vs_fitted_ensemble"], kd["p"]) == (0, 1.0)
