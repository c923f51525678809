"""The teacher's signals: what a student would get by running the teacher on the very same pixels."""

import pytest
import torch
from experiments import read_subset

from nonn.core.architecture import Architecture
from nonn.data.tensors import read_tensors
from nonn.stages import signals as signals_stage
from nonn.teachers import signals
from nonn.teachers.signals import compute_signals
from nonn.training.augment import apply_view, draw_view
from nonn.training.hardware import mixed_precision
from nonn.training.losses import attention_map
from nonn.training.networks import ConvNet


@pytest.fixture(scope="module")
def model(data) -> ConvNet:
    torch.manual_seed(0)
    architecture = Architecture(family="fast", widths=[4, 8, 12], depth=1)
    return ConvNet(architecture, data.channels, data.n_classes, mean=data.mean, std=data.std).eval()


@pytest.fixture(scope="module")
def section(params):
    augment = params.signals.augment.model_copy(update={"pad": 2, "flip": True})
    return params.signals.model_copy(update={"views": 3, "augment": augment})


def test_shapes(model, data, section):
    shapes = {name: tuple(tensor.shape) for name, tensor in compute_signals(model, data, section).items()}
    assert shapes == {
        "logits": (3, 60, 3),
        "pooled": (3, 60, 12),
        "attention.0": (3, 60, 14 * 14),
        "attention.1": (3, 60, 7 * 7),
        "attention.2": (3, 60, 3 * 3),
        "validation_logits": (30, 3),
        "validation_pooled": (30, 12),
    }


def test_attention_is_left_out_where_it_is_off(model, data, section):
    without = compute_signals(model, data, section.model_copy(update={"attention": False}))
    everything = compute_signals(model, data, section)
    assert set(without) == {name for name in everything if "attention" not in name}
    assert all(torch.equal(without[name], everything[name]) for name in without)


@torch.inference_mode()
def run_teacher(model, images) -> dict[str, torch.Tensor]:
    with mixed_precision(torch.device("cpu")):
        maps = model.stage_maps(images)
        pooled, logits = model.read_out(maps[-1])
    outputs = {"logits": logits, "pooled": pooled}
    outputs |= {f"attention.{stage}": attention_map(m.float()) for stage, m in enumerate(maps)}
    return {name: tensor.half() for name, tensor in outputs.items()}


def test_signals_are_the_teacher_s_answers_on_the_view(model, data, section):
    computed = compute_signals(model, data, section)
    images, _ = read_subset(data, "train")
    for number in range(section.views):
        view = draw_view(len(images), number, section.augment, section.seed)
        expected = run_teacher(model, apply_view(images, view, torch.arange(len(images)), section.augment))
        for name, tensor in expected.items():
            assert torch.equal(computed[name][number], tensor), name
    expected = run_teacher(model, read_subset(data, "validation")[0])
    assert torch.equal(computed["validation_logits"], expected["logits"])
    assert torch.equal(computed["validation_pooled"], expected["pooled"])


def test_batches_are_joined_in_order(model, data, section, monkeypatch):
    whole = compute_signals(model, data, section)
    monkeypatch.setattr(signals, "BATCH_SIZE", 7)
    for name, tensor in compute_signals(model, data, section).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0.02, atol=0.02)


def test_pooled_activations_are_those_of_full_precision(model, data, section):
    computed = compute_signals(model, data, section)
    with torch.inference_mode():
        features, logits = model(read_subset(data, "validation")[0])
    torch.testing.assert_close(computed["validation_pooled"].float(), features, rtol=0.03, atol=0.03)
    torch.testing.assert_close(computed["validation_logits"].float(), logits, rtol=0.03, atol=0.03)
    assert computed["validation_pooled"].min() >= 0


def test_the_stage_writes_the_same_bytes_again(params, experiment):
    before = experiment.signals.read_bytes()
    assert read_tensors(experiment.signals)["pooled"].shape == (2, 60, 32)
    experiment.signals.unlink()
    signals_stage.run(params, experiment)
    assert experiment.signals.read_bytes() == before
