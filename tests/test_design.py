"""Sizes and architectures from budgets: exact shares, and the largest student that fits by trying all."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from experiments import REPOSITORY, tiny_params
from hypothesis import given
from hypothesis import strategies as st

from nonn.commands.use import merge_experiment
from nonn.core.architecture import MOST_CHANNELS, Architecture
from nonn.core.artifacts import ImageSpec
from nonn.core.budgets import Budget, combined_budget
from nonn.core.errors import UserError
from nonn.core.files import write_json
from nonn.core.params import DesignParams, Params
from nonn.deploy.traced_cost import measure_cost
from nonn.method.sizing import (
    apportion,
    apportion_filters,
    candidates_of_depth,
    design_network,
    design_student,
    imbalance_warning,
)
from nonn.training.loading import load_design
from nonn.training.networks import ConvNet

FAST = DesignParams(family="fast", depths=[1, 2], min_width=4, max_width=12, step=2, precision="float32")
MOBILENET = DesignParams(family="mobilenet", depths=[1, 2], min_width=4, max_width=20, step=1, precision="int8")
WRN = DesignParams(family="wrn", depths=[10, 16], min_width=1, max_width=2, step=1, precision="float32")
IMAGES = ImageSpec(channels=1, size=28, n_classes=3)
AMPLE = Budget(memory_kib=10_000, mmacs=1000)


def all_students(grid: DesignParams, n_filters: int | None) -> list:
    """Every candidate of a grid, with its cost."""
    architectures = [
        architecture for depth in grid.depths for architecture in candidates_of_depth(grid, depth, IMAGES.size)
    ]
    return [
        (a, measure_cost(ConvNet(a, IMAGES.channels, IMAGES.n_classes, n_filters), 1, 28, grid.precision))
        for a in architectures
    ]


def find_student(grid: DesignParams, device: Budget, n_filters: int | None):
    return design_student(grid, device, IMAGES, n_filters)


# Sizes


@pytest.mark.parametrize(
    ("total", "shares", "expected"),
    [
        (10, [1, 1, 2], [3, 2, 5]),  # exactly 2.5, 2.5 and 5
        (256, [320, 320], [128, 128]),
        (7, [1, 2, 4], [1, 2, 4]),
        (5, [1, 1, 98], [1, 1, 3]),  # a small device gets a filter, too
        (3, [1, 50, 1000], [1, 1, 1]),
    ],
)
def test_apportion_by_hand(total, shares, expected):
    assert apportion(total, shares) == expected


@given(shares=st.lists(st.floats(1, 1000), min_size=1, max_size=16), surplus=st.integers(0, 2000))
def test_apportion_shares_out_everything(shares, surplus):
    total = len(shares) + surplus
    sizes = apportion(total, shares)
    assert sum(sizes) == total
    assert min(sizes) >= 1
    exact = [total * share / sum(shares) for share in shares]
    if min(exact) < 1:
        return
    assert all(abs(size - e) < 1 + 1e-9 for size, e in zip(sizes, exact, strict=True))
    for (size, share), (other_size, other_share) in itertools.permutations(zip(sizes, shares, strict=True), 2):
        assert size >= other_size or share <= other_share, "a larger device gets no less"


# Architectures


@pytest.mark.parametrize("grid", [FAST, WRN, MOBILENET], ids=["fast", "wrn", "mobilenet"])
def test_the_largest_that_fits_is_found(grid):
    candidates = all_students(grid, n_filters=5)
    assert len({cost.params for _, cost in candidates}) == len(candidates)
    for _, budget in candidates[::2]:
        for change in (0, -1):  # exactly enough for this candidate, and one byte less
            device = Budget(memory_kib=(budget.memory_bytes + change) / 1024, mmacs=1000)
            fitting = [(a, c) for a, c in candidates if device.fits(c)]
            if fitting:
                assert find_student(grid, device, 5) == max(fitting, key=lambda found: found[1].params)
        device = Budget(memory_kib=10_000, mmacs=budget.macs / 1e6)
        fitting = [(a, c) for a, c in candidates if device.fits(c)]
        assert find_student(grid, device, 5) == max(fitting, key=lambda found: found[1].params)


def test_more_budget_never_gives_a_smaller_student():
    for budgets in (
        [Budget(memory_kib=kib, mmacs=1000) for kib in (40, 50, 60, 80, 120, 200)],
        [Budget(memory_kib=10_000, mmacs=mmacs) for mmacs in (0.5, 1, 2, 4, 8)],
    ):
        params = [find_student(FAST, device, 5)[1].params for device in budgets]
        assert params == sorted(params)
        assert params[0] < params[-1]


def test_with_ample_budget_the_grid_s_largest_is_taken():
    assert find_student(FAST, AMPLE, 5)[0] == Architecture(family="fast", widths=[12, 24, 48], depth=2)
    assert find_student(WRN, AMPLE, None)[0] == Architecture(family="wrn", depth=16, width=2)


def test_the_widths_of_the_stages_follow_their_proportion():
    balanced = FAST.model_copy(update={"widths": [1, 2, 2.25]})
    assert find_student(balanced, AMPLE, 5)[0] == Architecture(family="fast", widths=[12, 24, 27], depth=2)


def test_a_network_of_more_stages_has_as_many_widths():
    longer = FAST.model_copy(update={"widths": [1, 1.5, 2, 2.5]})
    assert find_student(longer, AMPLE, 5)[0] == Architecture(family="fast", widths=[12, 18, 24, 30], depth=2)


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        (28, [16, 32, 80]),
        (96, [16, 24, 40, 104]),  # in proportion to 24, 32, 64 and 160
        (128, [16, 24, 40, 104]),
        (160, [16, 24, 32, 64, 160]),  # those of the paper
        (224, [16, 24, 32, 64, 160]),
        (512, [16, 16, 24, 32, 64, 160]),
    ],
)
def test_students_of_larger_images_have_more_stages(size, widths):
    grid = MOBILENET.model_copy(update={"min_width": 16})
    assert candidates_of_depth(grid, 2, size)[0].widths == widths
    model = ConvNet(candidates_of_depth(grid, 1, size)[0], 1, 3).eval()
    last = model.stage_maps(torch.zeros(1, 1, size, size, dtype=torch.uint8))[-1]
    assert 4 <= last.shape[-1] <= 8


@pytest.mark.parametrize("size", [28, 96, 224])
def test_a_wider_mobilenet_costs_more(size):
    """What the search by bisection relies on; the largest map may stay as it is, since widths are multiples of 8."""
    for depth in (1, 3):
        students = candidates_of_depth(MOBILENET.model_copy(update={"max_width": 28}), depth, size)
        assert len({tuple(student.widths) for student in students}) == len(students) > 8
        costs = [measure_cost(ConvNet(a, 3, 10, 64), 3, size, "int8") for a in students[:6]]
        for narrow, wide in itertools.pairwise(costs):
            assert wide.params > narrow.params
            assert wide.macs > narrow.macs
            assert wide.memory_bytes > narrow.memory_bytes
            assert wide.weight_bytes > narrow.weight_bytes
            assert wide.peak_activation_bytes >= narrow.peak_activation_bytes


def test_a_microcontroller_holds_a_mobilenet_for_96_pixels():
    device = Budget(memory_kib=320, mmacs=20)
    grid = MOBILENET.model_copy(update={"max_width": 64})
    architecture, cost = design_student(grid, device, ImageSpec(3, 96, 10), 48)
    assert len(architecture.widths) == 4
    assert device.fits(cost)
    assert cost.macs > 5e6, "not the smallest"


def test_lower_precision_leaves_room_for_a_larger_student():
    device = Budget(memory_kib=60, mmacs=1000)
    quarter = FAST.model_copy(update={"precision": "int8"})
    assert find_student(quarter, device, 5)[1].params > find_student(FAST, device, 5)[1].params


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget(memory_kib=3, mmacs=20), r"memory_kib is 3 KiB, \d\d KiB less than the \d\d needed"),
        (Budget(memory_kib=320, mmacs=0.01), r"mmacs is 0\.01 million, 0\.\d+ million less than the 0\.\d+ needed"),
        (Budget(memory_kib=320, mmacs=0.004), r"mmacs is 0\.004 million, 0\.\d+ million less than the 0\.\d+ needed"),
        (Budget(flash_kib=3, ram_kib=300), r"flash_kib is 3 KiB, \d+ KiB less"),
        (Budget(flash_kib=300, ram_kib=3), r"ram_kib is 3 KiB, \d+ KiB less"),
        (Budget(memory_kib=900, latency_ms=0.5, mmacs_per_s=10), r"latency_ms is 0\.5 ms, [\d.]+ ms less"),
        (Budget(memory_kib=3, mmacs=0.01), r"memory_kib is .*; mmacs is"),
    ],
)
def test_a_budget_for_nothing_is_refused_with_what_works(budget, said):
    named = replace(budget, name="tiny")
    with pytest.raises(UserError, match=rf"no student of `design` fits device 'tiny': {said}") as refusal:
        find_student(FAST, named, 5)
    nearest = dict(re.findall(r"(\w+): ([\d.]+)", str(refusal.value).split(" needs ")[1]))
    enough = {key: float(value) for key, value in nearest.items()}
    find_student(FAST, replace(named, **enough), 5)
    for key, value in enough.items():
        less = replace(named, **enough | {key: value - (1 if key.endswith("kib") else 0.01)})
        with pytest.raises(UserError, match=f"{key} is"):
            find_student(FAST, less, 5)


def test_flash_and_ram_limit_a_student_apart():
    (_, small), *_, (_, large) = all_students(FAST.model_copy(update={"depths": [1]}), 5)
    weights = Budget(flash_kib=small.weight_bytes / 1024, ram_kib=10_000)
    activations = Budget(flash_kib=10_000, ram_kib=small.peak_activation_bytes / 1024)
    shallow = FAST.model_copy(update={"depths": [1]})
    for budget in (weights, activations):
        assert find_student(shallow, budget, 5)[1] == small
    both = Budget(flash_kib=large.weight_bytes / 1024, ram_kib=large.peak_activation_bytes / 1024)
    assert find_student(shallow, both, 5)[1] == large


def test_a_target_limits_a_student_by_the_speed_of_its_device():
    candidates = all_students(FAST, 5)
    for _, cost in candidates:
        budget = Budget(memory_kib=10_000, latency_ms=cost.macs / 50 / 1e3, mmacs_per_s=50)
        within = [c for _, c in candidates if c.macs <= cost.macs]
        assert find_student(FAST, budget, 5)[1] == max(within, key=lambda c: c.params)
        assert budget.compute_ms(cost) == pytest.approx(budget.latency_ms)


# Networks


def test_devices_that_differ_get_filters_in_proportion_to_what_they_can_hold():
    devices = [Budget(memory_kib=40, mmacs=20), Budget(memory_kib=120, mmacs=20)]
    sizes, designs = design_network(FAST, devices, IMAGES, n_live=40)
    capacities = [find_student(FAST, device, 1)[0].n_features for device in devices]
    assert sizes == apportion(40, capacities)
    assert sizes[0] < sizes[1]
    for position, (device, n_filters) in enumerate(zip(devices, sizes, strict=True)):
        architecture, cost = find_student(FAST, device, n_filters)
        assert designs[str(position)] == [
            {"architecture": architecture.model_dump(), "n_filters": n_filters, "cost": vars(cost)}
        ]
    assert designs["1"][0]["cost"]["params"] > designs["0"][0]["cost"]["params"]


def test_widths_that_no_student_may_have_are_refused():
    for grid, most in ((FAST, MOST_CHANNELS), (WRN, 256)):  # the last stage of FAST is four times as wide as the first
        wide = grid.model_copy(update={"min_width": 5000, "max_width": 6000})
        with pytest.raises(UserError, match=rf"design\.min_width: 5000 .* the widest are of {most}"):
            design_student(wide, Budget(memory_kib=10**6), IMAGES, 8)


WIDE = DesignParams(family="fast", depths=[2], min_width=4, max_width=128, step=1, precision="float32")


@pytest.mark.parametrize(
    ("grid", "budgets", "n_live"),
    [
        (WIDE, [Budget(memory_kib=128), Budget(memory_kib=320), Budget(memory_kib=100_000)], 64),
        (WIDE.model_copy(update={"max_width": 64}), [Budget(memory_kib=1e9), Budget(memory_kib=320)], 63),
    ],
)
def test_memory_that_no_student_can_use_earns_no_filters(grid, budgets, n_live):
    sizes = apportion_filters(grid, budgets, IMAGES, n_live)
    assert sum(sizes) == n_live
    assert min(sizes) >= 4
    assert max(sizes) < 0.9 * n_live
    assert "lopsided: " in imbalance_warning(sizes, budgets)
    ample = [replace(budget, memory_kib=10 * budget.total_kib) for budget in budgets if budget.total_kib > 50_000]
    assert apportion_filters(grid, [*ample, *ample], IMAGES, 64) == [32, 32] * len(ample)


def test_a_student_of_one_filter_is_the_last_resort():
    budgets = [Budget(memory_kib=60, mmacs=20), *[AMPLE] * 3]
    assert min(apportion_filters(WIDE, budgets, IMAGES, 8)) == 2
    assert sorted(apportion_filters(WIDE, budgets, IMAGES, 7)) == [1, 2, 2, 2]


@given(n_live=st.integers(8, 300), n_devices=st.integers(2, 8))
def test_equal_devices_share_equally(n_live, n_devices):
    sizes = apportion_filters(FAST, [AMPLE] * n_devices, IMAGES, n_live)
    assert sizes == apportion(n_live, [1] * n_devices)
    assert imbalance_warning(sizes, [AMPLE] * n_devices) is None


def test_a_limit_on_compute_counts_as_much_as_memory():
    slow, small = Budget(memory_kib=10_000, mmacs=1), Budget(memory_kib=60, mmacs=1000)
    sizes = apportion_filters(WIDE, [slow, small, AMPLE], IMAGES, 64)
    assert sizes[2] > max(sizes[:2])


def test_every_baseline_has_its_budget():
    devices = [Budget(memory_kib=60, mmacs=20), Budget(memory_kib=40, mmacs=20)]
    sizes, designs = design_network(FAST, devices, IMAGES, n_live=40)
    students = [designs["0"][0], designs["1"][0]]
    for method in ("random", "contiguous", "classwise"):
        assert designs[method] == students
    smallest, cost = find_student(FAST, devices[1], None)
    for method in ("labels", "kd", "at_kd"):
        assert designs[method] == [{"architecture": smallest.model_dump(), "n_filters": None, "cost": vars(cost)}]
    (total,) = designs["total"]
    assert total["architecture"] == find_student(FAST, Budget(memory_kib=100, mmacs=40), None)[0].model_dump()
    assert [student["n_filters"] for student in designs["full"]] == [40, 40]
    assert [student["cost"] for student in designs["full"]] == [vars(find_student(FAST, d, 40)[1]) for d in devices]
    assert sizes[0] >= sizes[1]
    assert sum(sizes) == 40


def test_a_baseline_that_does_not_fit_does_not_keep_others_from_it(tmp_path):
    smallest = ConvNet(candidates_of_depth(FAST, 1, IMAGES.size)[0], IMAGES.channels, IMAGES.n_classes, 5)
    needed = measure_cost(smallest, IMAGES.channels, IMAGES.size)
    devices = [Budget(memory_kib=needed.memory_bytes / 1024, mmacs=20)] * 8
    sizes, designs = design_network(FAST, devices, IMAGES, n_live=40)
    assert sizes == [5] * 8
    assert designs["0"]
    assert designs["full"] == []
    write_json(tmp_path / "full.json", designs["full"])
    with pytest.raises(UserError, match=r"full\.json: the devices of `networks` fit no students of this baseline"):
        load_design(tmp_path / "full.json")


def test_combined_budget_is_the_sum():
    devices = [Budget(memory_kib=60, mmacs=20), Budget(memory_kib=40, mmacs=5)]
    assert combined_budget(devices) == Budget(memory_kib=100, mmacs=25)


def test_more_devices_than_filters_are_refused():
    with pytest.raises(UserError, match="3 devices share 2 live filters; take fewer devices or a wider teacher"):
        design_network(FAST, [AMPLE] * 3, IMAGES, n_live=2)


# The grid


@pytest.mark.parametrize("name", ["mnist5k", "cifar10"])
def test_the_shipped_grid_is_monotone(name, monkeypatch):
    """The search halves the widths of a depth again and again, so a wider student must cost more in every respect."""
    monkeypatch.chdir(REPOSITORY)
    grid = Params.model_validate(merge_experiment(name)).design.model_copy(update={"max_width": 20})
    for depth in grid.depths:
        costs = [measure_cost(ConvNet(a, 1, 10, 64), 1, 28) for a in candidates_of_depth(grid, depth, 28)]
        for narrow, wide in itertools.pairwise(costs):
            assert wide.params > narrow.params
            assert wide.macs > narrow.macs
            assert wide.memory_bytes > narrow.memory_bytes


@pytest.mark.parametrize("changes", [{"max_width": 16_384}, {"widths": [1, 64, 64], "max_width": 300}])
def test_students_wider_than_any_network_are_left_out(changes):
    grid = DesignParams.model_validate(tiny_params({"design": changes})["design"])
    found = candidates_of_depth(grid, 1, 28)
    assert found
    assert max(max(architecture.widths) for architecture in found) <= MOST_CHANNELS
