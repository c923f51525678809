"""The cost of a network, against counts by hand."""

from typing import get_args

import pytest
import torch

from nonn.core.architecture import Architecture
from nonn.core.budgets import Budget
from nonn.core.cost import Cost
from nonn.core.params import DesignParams
from nonn.deploy.analytic_cost import COUNTED_FAMILIES, count_cost
from nonn.deploy.traced_cost import measure_cost
from nonn.training.networks import ConvNet


def test_fast_network_by_hand():
    """An image of 1×8×8, a stem of 4 channels, three stages of 8, a bridge of 5; the head stays behind."""
    model = ConvNet(Architecture(family="fast", widths=[8, 8, 8], depth=1), 1, 3, n_filters=5)
    # Each output of a convolution is a sum over kernel and input channels; pooling follows it.
    stem = (4 * 8 * 8) * (1 * 9)
    stages = (8 * 8 * 8) * (4 * 9) + (8 * 4 * 4) * (8 * 9) + (8 * 2 * 2) * (8 * 9)
    bridge = (5 * 1 * 1) * 8
    params = (4 * 9 + 2 * 4) + (8 * 4 * 9 + 2 * 8) + 2 * (8 * 8 * 9 + 2 * 8) + (5 * 8 + 2 * 5)
    # Most is alive in the first convolution of the stages: its input 4×8×8 and its output 8×8×8.
    peak = 4 * 8 * 8 + 8 * 8 * 8
    assert measure_cost(model, channels=1, size=8) == Cost(params, stem + stages + bridge, 4 * params, 4 * peak)


def test_airbench_network_by_hand():
    """An image of 1×8×8, whitened to 8 channels; all its parameters are counted, trained or not."""
    model = ConvNet(Architecture(family="airbench", widths=[8, 8, 8], depth=1), 1, 3)
    whitening = (8 * 8 * 8) * (1 * 4)
    stages = sum((8 * side * side) * (8 * 9) for side in (8, 4, 2))
    params = 8 * 4 + 3 * (8 * 8 * 9 + 2 * 8) + (8 * 3 + 3)
    peak = 2 * 8 * 8 * 8  # input and output of the first convolution of the stages
    assert measure_cost(model, channels=1, size=8) == Cost(params, whitening + stages + 8 * 3, 4 * params, 4 * peak)


def test_strided_network_by_hand():
    """The same, where the first stage computes every second pixel only: a quarter of its operations."""
    model = ConvNet(Architecture(family="airbench", widths=[8, 8, 8], depth=1, strided=True), 1, 3)
    whitening = (8 * 8 * 8) * (1 * 4)
    stages = sum((8 * side * side) * (8 * 9) for side in (4, 4, 2))
    params = 8 * 4 + 3 * (8 * 8 * 9 + 2 * 8) + (8 * 3 + 3)
    peak = 8 * 8 * 8 + 8 * 4 * 4  # input and output of the first convolution of the stages
    assert measure_cost(model, channels=1, size=8) == Cost(params, whitening + stages + 8 * 3, 4 * params, 4 * peak)


def test_the_mirror_image_takes_the_operations_again_but_no_weights():
    plain = Architecture(family="fast", widths=[8, 8, 8], depth=1)
    mirror = plain.model_copy(update={"mirror": True})
    once, both = (measure_cost(ConvNet(a, 1, 3, n_filters=5), channels=1, size=8) for a in (plain, mirror))
    # The image has to be kept for the second pass, so it is alive throughout the first.
    assert both == Cost(once.params, 2 * once.macs, once.weight_bytes, once.peak_activation_bytes + 4 * 8 * 8)


def test_residual_network_by_hand():
    """ResNet-8 on 1×4×4; while a block computes, its input stays alive for the shortcut."""
    model = ConvNet(Architecture(family="resnet", depth=8), 1, 3)
    macs = (
        (16 * 16) * 9
        + 2 * (16 * 16) * (16 * 9)
        + (32 * 4) * (16 * 9)
        + (32 * 4) * (32 * 9)
        + (64 * 1) * (32 * 9)
        + (64 * 1) * (64 * 9)
        + 64 * 3
    )
    convolutions = 16 * 9 + 2 * 16 * 16 * 9 + 16 * 32 * 9 + 32 * 32 * 9 + 32 * 64 * 9 + 64 * 64 * 9
    norms = 2 * (3 * 16 + 2 * 32 + 2 * 64)
    # Second convolution of the first block: the block's input, the convolution's input and its output.
    peak = 3 * (16 * 4 * 4)
    cost = measure_cost(model, channels=1, size=4)
    assert cost.params == convolutions + norms + (64 * 3 + 3)
    assert cost.macs == macs
    assert cost.peak_activation_bytes == 4 * peak


def test_a_shortcut_convolution_counts():
    """WRN-10-1 on 1×4×4: strided blocks have a 1×1 convolution in their shortcut, all have biases."""
    cost = measure_cost(ConvNet(Architecture(family="wrn", depth=10, width=1), 1, 3), channels=1, size=4)
    assert cost.macs == (
        (16 * 16) * 9
        + 2 * (16 * 16) * (16 * 9)
        + (32 * 4) * (16 * 9 + 32 * 9 + 16)
        + (64 * 1) * (32 * 9 + 64 * 9 + 32)
        + 64 * 3
    )


def test_inverted_residuals_by_hand():
    """A mobilenet on 1×32×32: a filter of a depthwise convolution reads one channel, and the widened maps count."""
    cost = measure_cost(ConvNet(Architecture(family="mobilenet", widths=[2, 3, 4], depth=2), 1, 3), channels=1, size=32)
    stem = (4 * 16 * 16) * 9
    first = (4 * 16 * 16) * 9 + (2 * 16 * 16) * 4
    second = (12 * 16 * 16) * 2 + (12 * 8 * 8) * 9 + (3 * 8 * 8) * 12
    second += (18 * 8 * 8) * 3 + (18 * 8 * 8) * 9 + (3 * 8 * 8) * 18
    third = (18 * 8 * 8) * 3 + (18 * 4 * 4) * 9 + (4 * 4 * 4) * 18
    third += (24 * 4 * 4) * 4 + (24 * 4 * 4) * 9 + (4 * 4 * 4) * 24
    last = (16 * 4 * 4) * 4
    assert cost.macs == stem + first + second + third + last + 16 * 3
    convolutions = 4 * 9 + (4 * 9 + 4 * 2) + (2 * 12 + 12 * 9 + 12 * 3) + (3 * 18 + 18 * 9 + 18 * 3)
    convolutions += (3 * 18 + 18 * 9 + 18 * 4) + (4 * 24 + 24 * 9 + 24 * 4) + 4 * 16
    norms = 2 * (4 + 4 + 2 + 12 + 12 + 3 + 18 + 18 + 3 + 18 + 18 + 4 + 24 + 24 + 4 + 16)
    assert cost.params == convolutions + norms + (16 * 3 + 3)
    # The widened map of the second stage at 16×16, and what it is filtered to at 8×8.
    assert cost.peak_activation_bytes == 4 * (12 * 16 * 16 + 12 * 8 * 8)


@pytest.mark.parametrize("n_filters", [None, 5])
def test_measuring_leaves_the_model_alone(n_filters):
    model = ConvNet(Architecture(family="fast", widths=[4, 8, 12], depth=1), 1, 3, n_filters).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_cost(model, channels=1, size=28)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].device.type == "cpu" and torch.equal(after[name], t) for name, t in before.items())
    assert model.training


@pytest.mark.parametrize(
    "family",
    [
        {"family": "fast", "widths": [4, 8, 12], "depth": 2},
        {"family": "wrn", "depth": 10},
        {"family": "mobilenet", "widths": [8, 16, 32], "depth": 2},
    ],
)
def test_bytes_follow_the_precision_and_nothing_else_does(family):
    model = ConvNet(Architecture(**family), 3, 10, n_filters=7)
    one, four = (measure_cost(model, 3, 32, precision) for precision in ("int8", "float32"))
    assert (four.params, four.macs) == (one.params, one.macs)
    assert four.weight_bytes == 4 * one.params
    assert one.params < one.weight_bytes < 2 * one.params  # scales and biases of filters are no bytes
    assert four.peak_activation_bytes == 4 * one.peak_activation_bytes
    assert one.memory_bytes == one.weight_bytes + one.peak_activation_bytes


def test_fits_up_to_the_budget_and_no_further():
    cost = Cost(params=256, macs=2_000_000, weight_bytes=1024, peak_activation_bytes=1024)
    assert Budget(memory_kib=2, mmacs=2).fits(cost)
    assert not Budget(memory_kib=1.999, mmacs=2).fits(cost)
    assert not Budget(memory_kib=2, mmacs=1.999).fits(cost)


def test_flash_and_ram_are_two_budgets():
    cost = Cost(params=512, macs=0, weight_bytes=2048, peak_activation_bytes=1024)
    assert Budget(flash_kib=2, ram_kib=1).fits(cost)
    assert not Budget(flash_kib=1.999, ram_kib=100).fits(cost), "activations cannot live in the flash's place"
    assert not Budget(flash_kib=100, ram_kib=0.999).fits(cost)


#: Of every family that is counted without a network: layers of one, odd sides, shortcuts, mirrors, strides.
DRAWN = [
    {"family": "fast", "widths": [7, 9, 12], "depth": 2},
    {"family": "fast", "widths": [4, 4, 4], "depth": 1, "mirror": True},
    {"family": "airbench", "widths": [8, 8, 16], "depth": 2, "strided": True},
    {"family": "airbench", "widths": [8, 9, 10], "depth": 4, "mirror": True},
    {"family": "airbench", "widths": [8, 9, 10], "depth": 1},
    {"family": "wrn", "depth": 10, "width": 1, "mirror": True},
    {"family": "wrn", "depth": 16, "width": 2},
    {"family": "fast", "widths": [4, 6, 8, 9], "depth": 2},
    {"family": "mobilenet", "widths": [8, 8, 16], "depth": 1, "mirror": True},
    {"family": "mobilenet", "widths": [8, 16, 24, 24], "depth": 3},
]


@pytest.mark.parametrize("architecture", DRAWN, ids=lambda a: f"{a['family']}-{a['depth']}")
def test_what_is_counted_without_a_network_is_what_the_network_measures(architecture):
    architecture = Architecture(**architecture)
    for n_filters, channels, size, precision in ((None, 3, 28, "int8"), (5, 1, 33, "float32"), (300, 3, 29, "int8")):
        measured = measure_cost(ConvNet(architecture, channels, 7, n_filters), channels, size, precision)
        assert count_cost(architecture, channels, size, 7, n_filters, precision) == measured


def test_every_family_of_students_is_counted_or_measured():
    families = {architecture["family"] for architecture in DRAWN}
    assert families == set(COUNTED_FAMILIES)
    assert families <= set(get_args(DesignParams.model_fields["family"].annotation))
