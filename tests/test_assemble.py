"""The final layer: an average of the students to begin with, and better than that or unchanged."""

import numpy as np
import pytest
import torch
from experiments import read_subset
from torch import nn

from nonn.core.architecture import Architecture
from nonn.core.files import read_json
from nonn.core.params import AssembleParams
from nonn.data.dataset import load_dataset
from nonn.data.tensors import read_tensors
from nonn.method import joining
from nonn.method.exporting import as_linear
from nonn.method.final_layer import averaged_layer, logits_of
from nonn.method.joining import FeatureCache, NetworkOfNetworks, features_of, fit_layer
from nonn.method.loading import load_network
from nonn.runtime.final import FinalLayer
from nonn.stages import assemble as assemble_stage
from nonn.training.networks import ConvNet, predict

LENGTHS = [3, 5, 2]


@pytest.fixture
def heads() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(length, 4) for length in LENGTHS]


@pytest.fixture
def features() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(20, length, generator=generator) for length in LENGTHS]


# The layer


@torch.no_grad()
def test_it_starts_as_the_mean_of_the_students_logits(heads, features):
    logits = torch.stack([head(f) for head, f in zip(heads, features, strict=True)]).double()
    torch.testing.assert_close(logits_of(averaged_layer(heads), features), logits.mean(0), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("present", [[0, 1, 2], [0, 2], [1], [2, 0]])
def test_with_students_missing_it_is_the_mean_of_those_present(heads, features, present):
    logits = torch.stack([heads[i](features[i]) for i in present]).double()
    torch.testing.assert_close(logits_of(averaged_layer(heads), features, present), logits.mean(0), rtol=0, atol=1e-6)


@torch.no_grad()
def test_contributions_add_up_to_the_logits(heads, features):
    layer = averaged_layer(heads)
    terms = layer.contributions({i: f.numpy() for i, f in enumerate(features)})
    np.testing.assert_allclose(sum(terms.values()), logits_of(layer, features))
    for i, term in terms.items():
        assert term.shape == (20, 4)
        np.testing.assert_allclose(term, heads[i](features[i]) / 3, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_one_linear_layer_over_concatenated_features_is_the_same(heads, features):
    layer = averaged_layer(heads)
    linear = as_linear(layer.blocks)
    assert linear.weight.shape == (4, sum(LENGTHS))
    torch.testing.assert_close(linear(torch.cat(features, dim=1)), logits_of(layer, features).float())


# What it is fitted to


def test_features_are_calculated_where_models_are_trained_and_students_come_back(data, monkeypatch):
    student = ConvNet(Architecture(family="fast", widths=[4, 8, 12], depth=1), data.channels, 3, n_filters=2)
    asked = []

    def predict_on(_, images, device, *__):
        asked.append(device)
        return torch.zeros(len(images), 2), None

    monkeypatch.setattr(joining, "pick_device", lambda: "the GPU")
    monkeypatch.setattr(joining, "predict", predict_on)
    monkeypatch.setattr(student, "cpu", lambda: asked.append("cpu"))
    FeatureCache(data, "float32")([student], "validation")
    assert asked == ["the GPU", "cpu"]


# Fitting it


def classes_by_sign(n_images: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Features of two students; the first one's says which of two classes an image has."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n_images, 1, generator=generator)
    return [features, torch.randn(n_images, 1, generator=generator)], (features[:, 0] > 0).long()


def layer_of(direction: float) -> FinalLayer:
    """A layer that takes the sign of the first feature, or its opposite."""
    weight = direction * np.array([[-1.0], [1.0]])
    return FinalLayer({0: (weight, np.zeros(2)), 1: (np.zeros((2, 1)), np.zeros(2))})


def test_a_layer_that_cannot_be_improved_is_kept():
    train, validation = classes_by_sign(100, 0), classes_by_sign(50, 1)
    start = layer_of(+1.0)
    layer, accuracies = fit_layer(start, *train, validation, AssembleParams(epochs=5, lr=0.001), seed=0)
    assert accuracies == [1] * 6, "as good after every epoch"
    assert layer is start


def test_a_layer_that_is_improved_is_replaced_by_the_best_epoch():
    train, validation = classes_by_sign(100, 0), classes_by_sign(50, 1)
    start = layer_of(-0.1)
    layer, accuracies = fit_layer(start, *train, validation, AssembleParams(epochs=30, lr=0.02), seed=0)
    best = accuracies.index(max(accuracies))
    assert 0 < best < 30
    then, _ = fit_layer(start, *train, validation, AssembleParams(epochs=best, lr=0.02), seed=0)
    assert all(np.array_equal(array, then.tensors()[name]) for name, array in layer.tensors().items())
    assert accuracies[0] == 0
    right = (logits_of(layer, validation[0]).argmax(1) == validation[1]).double().mean().item()
    assert right == max(accuracies) > 0.9
    assert np.array_equal(start.blocks[0][0], layer_of(-0.1).blocks[0][0]), "the start is left alone"


def test_a_layer_that_gets_worse_on_validation_is_not_taken():
    """Training labels are turned round: each step leads away from what validation rewards."""
    features, labels = classes_by_sign(100, 0)
    start = layer_of(+0.1)
    layer, accuracies = fit_layer(
        start, features, 1 - labels, classes_by_sign(50, 1), AssembleParams(epochs=20, lr=0.1), seed=0
    )
    assert layer is start
    assert accuracies[-1] < 0.1 < accuracies[0]


# The network


@torch.no_grad()
def test_the_network_is_its_students_and_a_linear_layer(data, experiment):
    images, _ = read_subset(data, "test")
    network = load_network(experiment.network("2s", 0), data)
    concatenated = torch.cat([predict(student, images)[0] for student in network.students], dim=1)
    logits = logits_of(network.final, features_of(network.students, images))
    torch.testing.assert_close(as_linear(network.final.whole)(concatenated).double(), logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(network(images), logits)


@torch.no_grad()
def test_students_do_not_depend_on_each_other(data):
    torch.manual_seed(0)
    shape = (Architecture(family="fast", widths=[4, 8, 12], depth=1), 1, 3)
    students = [ConvNet(*shape, n_filters=n).eval() for n in LENGTHS]
    network = NetworkOfNetworks(students, averaged_layer([student.head for student in students]))
    images = data.images[:5]
    logits = torch.stack([student(images)[1] for student in students])
    torch.testing.assert_close(network(images).float(), logits.mean(0))


def test_the_stage_joins_the_trained_students(data, experiment):
    info = read_json(experiment.network("2s", 0).with_suffix(".json"))
    network = load_network(experiment.network("2s", 0), data)
    images, labels = read_subset(data, "validation")
    with torch.no_grad():
        right = (network(images).argmax(1) == labels).double().mean().item()
    assert right == info["validation_accuracy"] == max(info["validation_accuracy_by_epoch"]) > 0.6
    assert info["final_layer"] in ("averaged", "fitted")
    for position, student in enumerate(network.students):
        assert [info["students"][position]] == read_json(experiment.design("2s", position))
        trained = read_tensors(experiment.student("2s", position, 0))
        assert all(torch.equal(tensor, trained[name]) for name, tensor in student.state_dict().items())


def test_the_stage_writes_the_same_bytes_again(params, experiment):
    weights = experiment.network("2s", 0)
    before = {path: path.read_bytes() for path in (weights, weights.with_suffix(".json"))}
    for path in before:
        path.unlink()
    assemble_stage.run(params, experiment, "2s", 0)
    assert {path: path.read_bytes() for path in before} == before


def test_without_epochs_the_average_is_taken(params, experiment):
    section = params.assemble.model_copy(update={"epochs": 0})
    assemble_stage.run(params.model_copy(update={"assemble": section}), experiment, "2s", 0)
    data = load_dataset(experiment)
    network = load_network(experiment.network("2s", 0), data)
    assert read_json(experiment.network("2s", 0).with_suffix(".json"))["final_layer"] == "averaged"
    with torch.no_grad():
        logits = torch.stack([student(data.images)[1] for student in network.students])
        torch.testing.assert_close(network(data.images).float(), logits.mean(0), rtol=1e-5, atol=1e-5)
