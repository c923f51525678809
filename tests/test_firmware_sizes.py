"""Flash and RAM of firmware: what `design` foresees against what the linker says."""

import json
import shutil

import numpy as np
import pytest
from experiments import REPOSITORY

from nonn.commands.use import merge_experiment
from nonn.core.architecture import Architecture
from nonn.core.artifacts import ImageSpec
from nonn.core.errors import UserError
from nonn.core.params import DesignParams, DeviceParams, Params
from nonn.firmware.build import COMPILER, compile_sources, copy_sources, link
from nonn.firmware.footprint import blank_program, predict_footprint
from nonn.firmware.source import write_source
from nonn.firmware.targets import find_target
from nonn.method.sizing import design_network, design_student

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs arm-none-eabi-gcc (make system-deps)")
#: Device, architecture, channels and pixels a side of an image, filters.
STUDENTS = [
    ("stm32h743", Architecture(family="fast", widths=[12, 24, 48], depth=1), 1, 28, 10),
    ("nrf52840", Architecture(family="fast", widths=[9, 18, 36], depth=3), 3, 32, 7),
    ("cortex_m7", Architecture(family="fast", widths=[8, 12, 24, 24, 24], depth=2), 3, 96, 12),
    ("stm32f4", Architecture(family="airbench", widths=[16, 32, 33], depth=1), 3, 28, 24),
    ("stm32h743", Architecture(family="airbench", widths=[24, 32, 48], depth=2, mirror=True, strided=True), 3, 32, 32),
]
#: That of the experiment cifar10_512k, and its filters.
LARGE = Architecture(family="airbench", widths=[64, 112, 104], depth=2, mirror=True, strided=True)
LARGE_FILTERS = 96
GRID = DesignParams(family="airbench", depths=[1, 2], min_width=4, max_width=64, step=1, precision="int8", mirror=True)
IMAGES = ImageSpec(channels=3, size=32, n_classes=10)


def linked(student, target, folder):
    """The firmware of an untrained student whose values are random; equal arrays stay equal."""
    rng, known = np.random.default_rng(0), {}
    for step in student.steps:
        for name in ("tables", "weights", "bias", "scale", "table"):
            if (array := getattr(step, name, None)) is not None:
                known.setdefault(id(array), (array, rng.integers(-100, 100, array.shape).astype(array.dtype)))
                setattr(step, name, known[id(array)][1])
    write_source(student, folder)
    copy_sources(folder)
    return link(compile_sources(folder, target), target, folder / "0.elf")


@needs_compiler
@pytest.mark.parametrize(("device", "architecture", "channels", "size", "n_filters"), STUDENTS)
def test_what_is_foreseen_is_what_the_linker_says(device, architecture, channels, size, n_filters, tmp_path):
    foreseen = predict_footprint(architecture.model_dump_json(), channels, size, n_filters)
    student = blank_program(architecture, channels, size, n_filters)
    image = linked(student, find_target(device), tmp_path)
    assert foreseen.ram_bytes == image.ram_bytes
    assert foreseen.flash_bytes == pytest.approx(image.flash_bytes, rel=0.02)


@pytest.fixture
def large_params(monkeypatch) -> Params:
    monkeypatch.chdir(REPOSITORY)
    return Params.model_validate(merge_experiment("cifar10_512k"))


def test_four_microcontrollers_of_512_kib_hold_students_for_cifar10(large_params):
    budgets = large_params.budgets_of("4s")
    assert [budget.flash_kib + budget.ram_kib for budget in budgets] == [512] * 4
    sizes, designs = design_network(large_params.design, budgets, IMAGES, n_live=4 * LARGE_FILTERS)
    assert sizes == [LARGE_FILTERS] * 4
    (found,) = designs["0"]
    assert Architecture.model_validate(found["architecture"]) == LARGE
    assert 0.97 * 464 * 1024 < found["firmware"]["flash_bytes"] <= 464 * 1024
    assert 0.9 * 48 * 1024 < found["firmware"]["ram_bytes"] <= 48 * 1024


@needs_compiler
def test_the_linker_agrees_that_they_fit(large_params, tmp_path):
    budget = large_params.budgets_of("4s")[0]
    target = find_target(budget.board, int(budget.flash_kib), int(budget.ram_kib))
    image = linked(blank_program(LARGE, 3, 32, LARGE_FILTERS), target, tmp_path)
    foreseen = predict_footprint(LARGE.model_dump_json(), 3, 32, LARGE_FILTERS)
    assert image.ram_bytes == foreseen.ram_bytes
    assert image.flash_bytes == pytest.approx(foreseen.flash_bytes, rel=0.001)


def test_a_trained_student_takes_what_was_foreseen():
    """The figures of the linker stand in the results."""
    trained = Architecture(family="airbench", widths=[64, 128, 144], depth=2, mirror=True, strided=True)
    foreseen = predict_footprint(trained.model_dump_json(), 3, 32, 96)
    for entry in json.loads((REPOSITORY / "results/cifar10_int8/firmware.json").read_text()):
        assert foreseen.ram_bytes == entry["ram_bytes"]
        assert foreseen.flash_bytes == pytest.approx(entry["flash_bytes"], rel=0.02)


@needs_compiler
@pytest.mark.parametrize("memory", ["flash_kib", "ram_kib"])
def test_one_kib_too_few_fails_at_design(memory, tmp_path):
    smallest = GRID.model_copy(update={"max_width": 4, "depths": [1]})

    def design(**memory):
        budget = DeviceParams(board="stm32h743", **memory).budget("mine", "int8")
        return design_student(smallest, budget, IMAGES, 8)

    with pytest.raises(UserError) as refusal:
        design(**{memory: 1})
    enough = int(str(refusal.value).split(f"{memory}: ")[1].split(";")[0])
    architecture, _ = design(**{memory: enough})
    target = find_target("stm32h743", **{memory: enough})
    linked(blank_program(architecture, 3, 32, 8), target, tmp_path)
    with pytest.raises(UserError, match=rf"fits device 'mine': {memory} is {enough - 1} KiB, 1 KiB less than the"):
        design(**{memory: enough - 1})
    with pytest.raises(UserError, match="does not fit stm32h743: it exceeds"):
        linked(blank_program(architecture, 3, 32, 8), find_target("stm32h743", **{memory: enough - 1}), tmp_path)


def test_a_microcontroller_gets_the_largest_student_whose_firmware_fits():
    budget = DeviceParams(board="stm32h743", flash_kib=256).budget("mine", "int8")
    sizes, designs = design_network(GRID, [budget, budget], IMAGES, n_live=64)
    assert sizes == [32, 32]
    (found,) = designs["0"]
    architecture = Architecture.model_validate(found["architecture"])
    assert found["firmware"] == vars(predict_footprint(architecture.model_dump_json(), 3, 32, 32))
    assert 240 * 1024 < found["firmware"]["flash_bytes"] <= 256 * 1024
    assert found["cost"]["weight_bytes"] < found["firmware"]["flash_bytes"]
    first = architecture.widths[0] + 1
    wider = architecture.model_copy(update={"widths": [first, 2 * first, 4 * first]})
    assert predict_footprint(wider.model_dump_json(), 3, 32, 32).flash_bytes > 256 * 1024
    assert "firmware" not in designs["kd"][0]


def test_ram_counts_as_far_as_its_largest_block_goes():
    """An arena of 600 KiB would go into the memory of an stm32h743, but not into one block of it."""
    grid = GRID.model_copy(
        update={"min_width": 96, "max_width": 96, "mirror": False, "depths": [1], "widths": [1, 1, 1]}
    )
    budget = DeviceParams(board="stm32h743").budget("mine", "int8")
    with pytest.raises(
        UserError, match=r"ram_kib is 512 KiB, [\d,]+ KiB less .*no block of RAM beyond 512 KiB: choose another"
    ):
        design_student(grid, budget, IMAGES._replace(size=128), 8)


def test_other_devices_and_precisions_count_as_before():
    for budget, precision in (
        (DeviceParams(memory_kib=300, mmacs=100).budget("mine", "int8"), "int8"),
        (DeviceParams(board="esp32s3").budget("mine", "int8"), "int8"),
        (DeviceParams(board="stm32h743").budget("mine", "float32"), "float32"),
    ):
        _, designs = design_network(GRID.model_copy(update={"precision": precision}), [budget] * 2, IMAGES, n_live=64)
        assert "firmware" not in designs["0"][0]
