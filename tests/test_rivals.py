"""SplitNet and the pruned teacher: groups of classes, shared weights, budgets, and the command."""

import csv

import pytest
import torch
from experiments import read_subset

from nonn.cli import main
from nonn.commands.rivals import COLUMNS
from nonn.core.architecture import Architecture
from nonn.core.budgets import Budget
from nonn.core.errors import UserError
from nonn.deploy.traced_cost import measure_cost
from nonn.studies import rivals
from nonn.studies.pruning import prune, prune_to_budget
from nonn.studies.splitnet import build, group_classes, join_logits
from nonn.training.networks import ConvNet

SHORT = ["--set", "distill.epochs=1"]


def test_classes_that_activate_the_same_filters_share_a_group():
    """Of six classes, 0, 3 and 4 activate the first filters and the others the last ones, each a few of its own too."""
    labels = torch.arange(60) % 6
    pooled = torch.rand(60, 12, generator=torch.Generator().manual_seed(0))
    pooled[torch.isin(labels, torch.tensor([0, 3, 4])), :6] += 3
    pooled[torch.isin(labels, torch.tensor([1, 2, 5])), 6:] += 3
    pooled[torch.arange(60), labels] += 1
    assert sorted(map(sorted, group_classes(pooled, labels, 6, 2))) == [[0, 3, 4], [1, 2, 5]]


def test_groups_are_of_about_one_size():
    pooled = torch.rand(90, 8, generator=torch.Generator().manual_seed(0))
    groups = group_classes(pooled, torch.arange(90) % 5, 5, 3)
    assert sorted(map(len, groups)) == [1, 2, 2]
    assert sorted(class_ for group in groups for class_ in group) == list(range(5))


def test_devices_answer_as_the_network_that_was_trained(params, data):
    groups = [[2, 0], [1]]
    model, parts = build(params, "2s", data, groups)
    images, labels = read_subset(data, "test")
    model(images)[1].sum().backward()  # through the weights of all parts
    assert parts[0].stem[0].weight is parts[1].stem[0].weight
    assert parts[0].stages[1][0].weight is not parts[1].stages[1][0].weight
    model.eval()
    with torch.no_grad():
        terms = [part.eval()(images)[1] for part in parts]
        joined = join_logits(terms, groups)
        assert torch.allclose(joined, model(images)[1], atol=1e-5)
        without = join_logits(terms, groups, missing=1)
    assert (without.argmax(1) != 1).all()
    assert without[:, 1].isinf().all()
    smallest = params.budgets_of("2s")[0]
    assert all(smallest.fits(measure_cost(part, data.channels, data.size)) for part in parts)
    assert len(labels) == len(joined)


def test_the_pruned_teacher_fits_and_hardly_less_would_have_done(data):
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    teacher = ConvNet(Architecture(family="fast", widths=[16, 32, 40], depth=1), data.channels, 3)
    with torch.no_grad():
        teacher.stages[2][0].weight[::2] *= 1e-3  # half of the last filters are all but nothing
    budget = Budget(memory_kib=30, mmacs=5, name="small")
    model, share = prune_to_budget(teacher, budget, data, "float32")
    cost = measure_cost(model, data.channels, data.size)
    assert budget.fits(cost)
    assert 0.5 < share < 0.8
    assert cost.memory_bytes > 0.85 * 30 * 1024
    assert model.n_features == model.head.in_features == len(model.stages[2][0].weight) < 20
    assert model.stages[2][0].weight.flatten(1).norm(dim=1).min() > 0.1  # the strong filters are those that stay
    assert model(data.images[:2])[1].shape == (2, 3)
    with pytest.raises(UserError, match="not even a teacher with 1 of 8 filters"):
        prune_to_budget(teacher, Budget(memory_kib=1, mmacs=5, name="small"), data, "float32")


def test_the_first_layer_that_whitens_is_not_pruned(data):
    pytest.importorskip("torch_pruning")
    teacher = ConvNet(Architecture(family="airbench", widths=[8, 16, 16], depth=3), data.channels, 3)
    model = prune(teacher, 0.5, data)
    assert len(model.stem[1].weight) == len(teacher.stem[1].weight)
    assert model(data.images[:2])[0].shape == (2, 8)


def test_the_command_scores_both_against_nonn(experiment, monkeypatch):
    pytest.importorskip("torch_pruning")
    main(["rivals", *SHORT])
    with (experiment / "rivals.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["method"] for row in rows] == ["nonn", "splitnet", "pruned"]
    for row in rows[1:]:
        assert 0 < float(row["p_vs_nonn"]) <= 1
        assert float(row["memory_kib"]) <= 40  # of the smaller device
    assert rows[1]["bytes_sent"] == "8"  # two of three classes
    assert float(rows[1]["one_missing"]) < 0.7
    assert rows[2]["one_missing"] == ""
    monkeypatch.setattr(rivals, "distill", lambda *_: pytest.fail("trained again"))
    main(["rivals", *SHORT])


@pytest.mark.usefixtures("experiment")
def test_what_is_no_rival_is_refused():
    with pytest.raises(SystemExit, match=r"--methods magic: no such rival; choose of splitnet, pruned"):
        main(["rivals", "--methods", "magic"])
    with pytest.raises(SystemExit, match=r"params\.yaml: networks: no '9s'"):
        main(["rivals", "9s"])
