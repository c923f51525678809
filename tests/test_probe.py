"""Linear probes of sets of filters: what they find in planted features, and the command."""

import csv

import numpy as np
import pytest
import torch

from nonn.cli import main
from nonn.commands.probe import COLUMNS
from nonn.studies.probing import fit_linear, probe_partition

N_CLASSES = 4


@pytest.fixture
def images():
    """Pooled activations of 8 filters, each active on images of one of 4 classes, and labels."""
    labels = torch.arange(200) % N_CLASSES
    noise = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
    return noise + 5 * (labels[:, None] == torch.arange(8) // 2), labels


def test_problems_side_by_side_are_fitted_as_each_alone(images):
    features, labels = images
    both = torch.stack([features[:, :4], features[:, 4:]])
    together = fit_linear(both, labels, N_CLASSES, 0.1)
    for number, own in enumerate(both):
        alone = fit_linear(own[None], labels, N_CLASSES, 0.1)
        assert torch.allclose(together.weight[number], alone.weight[0], atol=2e-3)
        assert torch.allclose(together.bias[number], alone.bias[0], atol=5e-3)


def test_a_feature_of_one_value_gets_no_weight(images):
    features, labels = images
    probes = fit_linear(torch.cat([features, torch.zeros(200, 1)], 1)[None], labels, N_CLASSES)
    assert (probes.weight[0, -1] == 0).all()
    assert probes.right(torch.cat([features, torch.ones(200, 1)], 1), labels).all()


def test_a_set_of_one_class_knows_that_class_alone_and_all_sets_know_all(images):
    alone, joined = probe_partition([[0, 1], [2, 3], [4, 5], [6, 7]], images, images, N_CLASSES)
    assert alone.shape == (4, 200)
    assert (alone.mean(1) < 0.8).all()
    assert joined.mean() > 0.8  # a set of two filters has little direction
    alone, joined = probe_partition([[0, 2, 4, 6], [1, 3, 5, 7]], images, images, N_CLASSES)
    assert alone.all()
    assert joined.all()


@pytest.mark.parametrize("on", ["validation", "test"])
def test_the_command_writes_a_row_for_each_size_and_method(on, experiment):
    main(["probe", "--sets", "1,3", "--images", "40", "--on", on])
    name = "probes" if on == "validation" else "probes_test"
    assert (experiment / f"figures/{name}.png").is_file()
    with (experiment / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    methods = ["random", "communities", "classwise", "contiguous"]
    assert [(row["sets"], row["method"]) for row in rows] == [("1", "random"), *(("3", method) for method in methods)]
    assert {(row["judged_on"], row["images"], row["training_images"]) for row in rows} == {(on, "30", "40")}
    for row in rows:
        assert 0 <= float(row["alone_worst"]) <= float(row["alone_mean"]) <= 1
        assert (row["joined_p"] == "") == (row["method"] == "random")
    assert np.isclose(float(rows[0]["filters"]), 3 * float(rows[1]["filters"]), atol=0.2)


def test_what_cannot_be_probed_is_said(experiment):
    with pytest.raises(SystemExit, match=r"--sets 1000: the teacher has \d+ live filters"):
        main(["probe", "--sets", "2,1000"])
    experiment.graph.unlink()
    with pytest.raises(SystemExit, match=r"graph\.safetensors: is not there\. Run `dvc repro graph` first"):
        main(["probe"])
