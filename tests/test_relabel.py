"""New labels for trained students: which images get them, how the layer is fitted, and the command."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nonn.cli import main
from nonn.commands.relabel import COLUMNS, read_groups
from nonn.core.errors import UserError
from nonn.method.joining import FeatureCache
from nonn.method.loading import load_students
from nonn.studies.relabelling import draw, fit_few, new_labels

GROUPS = {"stripes": ["across", "down"], "squares": ["chequered"]}


def test_images_of_no_group_are_left_out(data):
    labelled, names = new_labels(data, {"first": ["across"], "second": ["chequered"]})
    assert names == ("first", "second")
    assert set(labelled.labels[labelled.train].tolist()) == {0, 1}
    assert len(labelled.train) == 40
    assert (data.labels[labelled.test] != 1).all()


@pytest.mark.parametrize(("own", "given"), [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")])
def test_names_of_classes_match_however_their_accents_are_encoded(own, given, data):
    named = replace(data, classes=(own, "down", "chequered"))
    labelled, _ = new_labels(named, {"first": [given], "second": ["down"]})
    assert set(labelled.labels[labelled.train].tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["across"], "b": ["upwards"]}, "b: no class 'upwards'"),
        ({"a": ["across"], "b": ["across"]}, "b: class 'across' is in two groups"),
        ({"a": ["across", "down"]}, "one group leaves nothing"),
    ],
)
def test_groups_that_say_nothing_are_refused(groups, message, data):
    with pytest.raises(UserError, match=message):
        new_labels(data, groups)


def test_draws_are_of_each_class_and_fewer_are_the_first_of_more(data):
    labelled, names = new_labels(data, GROUPS)
    cut, positions = draw(labelled, len(names), 8, 3, 10)
    assert positions.shape == (3, 2, 8)
    assert len(cut.test) == 10
    chosen = cut.train[positions]
    for label in range(2):
        assert (labelled.labels[chosen[:, label]] == label).all()
    assert all(len(set(row.tolist())) == 8 for row in chosen.flatten(0, 1))
    assert (chosen[0] != chosen[1]).any()
    with pytest.raises(UserError, match="a label has 20 training images"):
        draw(labelled, len(names), 30, 1, 10)


def test_weight_decay_is_chosen_where_features_are_noise():
    """Two informative features among many of noise: the strongest decay is taken, and most answers are right."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat_interleave(12)
    features = torch.randn(1, 24, 60, generator=generator)
    features[..., :2] += 4 * (2 * labels[:, None] - 1)
    fitted, best = fit_few(features, 2, 12)
    test = torch.randn(400, 60, generator=generator)
    answers = torch.arange(400) % 2
    test[:, :2] += 4 * (2 * answers[:, None] - 1)
    assert best.tolist() == [0]
    assert fitted[best[0]].right(test, answers).mean() > 0.85


def test_the_command_compares_what_devices_send(experiment, folder_of_labels):
    main(["relabel", "2s", "--labels", str(folder_of_labels), "--per-class", "2,6", "--draws", "2", "--teacher"])
    with (experiment / "relabel_kinds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    methods = ["nonn", "random", "ensemble", "ensemble_logits", "kd", "teacher"]
    assert [row["method"] for row in rows] == [method for method in methods for _ in range(2)]
    by_method = {row["method"]: row for row in rows}
    assert int(by_method["nonn"]["values"]) == 32  # all filters of the teacher
    assert (by_method["ensemble_logits"]["values"], by_method["ensemble_logits"]["bytes_sent"]) == ("6", "12")
    assert float(by_method["teacher"]["accuracy_mean"]) > 0.8  # three easy classes


def test_int8_devices_stay_calibrated_on_the_images_that_they_learned_from(experiment, params, data):
    student = load_students(params, experiment, data, "2s", 0)[0][0]
    features = FeatureCache(replace(data, train=data.train[:2]), "int8", training_data=data)
    (found,), _ = features([student], "test")
    (own,), _ = FeatureCache(data, "int8")([student], "test")
    assert torch.equal(found, own)
    assert not torch.equal(found, FeatureCache(features.data, "int8")([student], "test")[0][0])


@pytest.fixture
def folder_of_labels(experiment) -> Path:
    file = experiment.root.parent / "kinds.yaml"
    file.write_text("stripes: [across, down]\nsquares: [chequered]\n")
    return file


def test_what_cannot_be_labelled_is_said(folder_of_labels):
    with pytest.raises(SystemExit, match=r"give --labels"):
        main(["relabel", "2s"])
    with pytest.raises(SystemExit, match=r"results/other/dataset\.safetensors: is not there"):
        main(["relabel", "2s", "--images", "other"])
    with pytest.raises(SystemExit, match=r"--per-class 1: one image of a label leaves none"):
        main(["relabel", "2s", "--labels", str(folder_of_labels), "--per-class", "1"])
    with pytest.raises(SystemExit, match=r"--teacher: it sees images of 56 pixels a side, devices of 28; leave it out"):
        main(
            [
                "relabel",
                "2s",
                "--labels",
                str(folder_of_labels),
                "--per-class",
                "2",
                "--teacher",
                "--set",
                "teacher.size=56",
            ]
        )
    folder_of_labels.write_text("stripes: [across]\nsquares: []\n")
    with pytest.raises(SystemExit, match=r"kinds\.yaml: squares: lists no class\. Name one, or remove this label"):
        main(["relabel", "2s", "--labels", str(folder_of_labels)])
    with pytest.raises(SystemExit, match=r"^nonn relabel: nowhere\.yaml: no such file"):
        main(["relabel", "2s", "--labels", "nowhere.yaml"])
    folder_of_labels.write_text("stripes: across\n")
    with pytest.raises(SystemExit, match="has to map each new label to a list"):
        main(["relabel", "2s", "--labels", str(folder_of_labels)])


@pytest.mark.usefixtures("folder")
def test_a_project_without_labels_takes_those_of_the_package():
    assert list(read_groups(Path("workflow/labels/parity.yaml"))) == ["even", "odd"]
    with pytest.raises(UserError, match=r"mine/parity\.yaml"):
        read_groups(Path("mine/parity.yaml"))
