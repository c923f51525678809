"""Firmware: the bits of ONNX Runtime on the host and on emulated processors, within the memory of the device."""

import copy
import ctypes
import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from experiments import REPOSITORY
from firmwares import needs_toolchain, noise, write_conv
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nonn import cli
from nonn.core.chips import CHIPS
from nonn.core.errors import UserError
from nonn.core.files import TEMPORARY
from nonn.firmware import emulate
from nonn.firmware.arena import ALIGNMENT, Buffer, plan_arena
from nonn.firmware.build import COMPILER, EMULATOR, compile_sources, copy_sources, link
from nonn.firmware.build_and_run import build, run_and_compare
from nonn.firmware.emulate import run_firmware
from nonn.firmware.graph import read_student
from nonn.firmware.source import buffers_of, packed_weights, write_source
from nonn.firmware.steps import Conv
from nonn.firmware.targets import find_target
from nonn.runtime.session import run_onnx

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
SHIPPED = REPOSITORY / "results/cifar10_int8/shipped/4s/0.onnx"


def on_host(path, images, folder):
    """Features of a student, by its C compiled for this machine."""
    student = read_student(path)
    write_source(student, folder)
    copy_sources(folder)
    (folder / "done.c").write_text("void nonn_step_done(int step) { (void)step; }\n")
    sources = [folder / name for name in ("student.c", "kernels.c", "done.c")]
    library = folder / "student.so"
    command = ["cc", "-std=c11", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, *sources, "-o", library, "-lm"], check=True)
    code = ctypes.CDLL(str(library))
    offsets, size = plan_arena(buffers_of(student))
    arena = np.ctypeslib.as_array((ctypes.c_uint8 * size).in_dll(code, "nonn_arena"))
    features = []
    for image in images:
        start, end = offsets[student.image], offsets[student.features]
        arena[start : start + image.size] = image.ravel()
        code.nonn_infer()
        features.append(arena[end : end + 4 * student.n_features].view(np.float32).copy())
    return np.stack(features)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_conv(tmp_path_factory.mktemp("student") / "0.onnx", channels=3, filters=8, side=14, pool=2, step=0.1)


@pytest.fixture(scope="module")
def firmware(student, tmp_path_factory):
    return build(student, find_target("stm32h743"), tmp_path_factory.mktemp("firmware"))


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_buffers_in_use_together_do_not_overlap(rows):
    buffers = {str(i): Buffer(size, min(a, b), max(a, b)) for i, (size, a, b) in enumerate(rows)}
    offsets, size = plan_arena(buffers)
    assert size <= sum(buffer.size + ALIGNMENT for buffer in buffers.values())
    for name, one in buffers.items():
        assert offsets[name] % ALIGNMENT == 0
        assert offsets[name] + one.size <= size
        for other, two in buffers.items():
            if name < other and one.first <= two.last and two.first <= one.last:
                assert offsets[name] + one.size <= offsets[other] or offsets[other] + two.size <= offsets[name]


def test_a_chain_of_maps_needs_the_two_largest_neighbours():
    sizes = [64, 256, 128, 32, 8]
    buffers = {str(step): Buffer(size, step, step + 1) for step, size in enumerate(sizes)}
    assert plan_arena(buffers)[1] == 256 + 128


def test_weights_lie_by_four_of_two_filters_in_turn():
    weights = np.arange(2 * 5, dtype=np.int8).reshape(2, 1, 1, 5)
    assert packed_weights(weights).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 4, 0, 0, 0, 9, 0, 0, 0]


CONVOLUTIONS = [
    {},
    {"kernel": 1, "channels": 8, "pads": (0, 0, 0, 0)},
    {"kernel": 1, "channels": 3, "pads": (0, 0, 0, 0), "scale": 8},
    {"kernel": 2, "channels": 3, "pads": (0, 0, 1, 1)},
    {"stride": 2, "side": 8},
    {"pads": (0, 2, 1, 0), "pool": 2, "side": 9},
    {"channels": 4, "pool": 3, "side": 11},
    {"side": 5, "step": 0.1},
    {"side": 8, "step": 0.3},
    {"side": 3, "step": 0.7, "pool": 2},
    {"filters": 5},
    {"filters": 1, "kernel": 1, "pads": (0, 0, 0, 0), "before": 3},
    {"filters": 4, "before": 5, "pool": 2},
]


@needs_compiler
@pytest.mark.parametrize("form", CONVOLUTIONS, ids=str)
def test_a_convolution_has_the_bits_of_onnx_runtime(form, tmp_path):
    path = write_conv(tmp_path / "conv.onnx", **form)
    images = noise((form.get("channels", 5), form.get("side", 7), form.get("side", 7)))
    expected = run_onnx(path, images)
    assert len(np.unique(expected)) > 1
    assert on_host(path, images, tmp_path).tobytes() == expected.tobytes()


@needs_compiler
def test_a_student_has_the_bits_of_onnx_runtime(tmp_path):
    """One of family fast, with GELU, that also looks at the mirrored image."""
    images = noise((3, 32, 32), 2)
    assert on_host(SHIPPED, images, tmp_path).tobytes() == run_onnx(SHIPPED, images).tobytes()


def symbols_of(elf):
    """Names that a program defines or calls."""
    told = subprocess.run(["arm-none-eabi-nm", elf], check=True, capture_output=True, text=True)
    return {line.split()[-1] for line in told.stdout.splitlines()}


@needs_toolchain
@pytest.mark.parametrize("device", ["stm32h743", "stm32f4"])
def test_emulated_processors_have_the_bits_of_onnx_runtime(device, student, tmp_path):
    built = build(student, find_target(device), tmp_path)
    run, identical = run_and_compare(built, noise((3, 14, 14), 30))
    assert identical == 30
    assert 0 < run.stack_used_bytes < 1024
    assert not [name for name in symbols_of(built.linked.elf) if "alloc" in name or "sbrk" in name]


@needs_toolchain
def test_what_a_killed_build_has_left_is_not_compiled(student, tmp_path):
    (tmp_path / f"{TEMPORARY}host-1-2.c").write_text("half a line")
    build(student, find_target("stm32h743"), tmp_path)


@needs_toolchain
def test_what_the_compiler_says_is_one_line(student, tmp_path, monkeypatch):
    monkeypatch.setattr("nonn.firmware.build.FLAGS", ("-include", "missing.h"))
    with pytest.raises(UserError, match=r"^arm-none-eabi-gcc: .*missing\.h: No such file.*make system-deps") as told:
        build(student, find_target("stm32h743"), tmp_path)
    assert len(str(told.value).splitlines()) == 1


@needs_toolchain
def test_two_runs_count_the_same_instructions(firmware):
    shape = firmware.student.image_shape
    images = noise((shape.channels, shape.rows, shape.columns), 1)
    runs = [run_firmware(firmware.emulated.elf, "cortex-m7", images, firmware.student.n_features) for _ in range(2)]
    assert runs[0].step_instructions == runs[1].step_instructions
    assert runs[0].instructions == runs[1].instructions
    assert sum(runs[0].step_instructions) == pytest.approx(runs[0].instructions, rel=0.01)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "printf 'images 1\\ncalibration 1\\nticks 1\\nstack 1\\n'; printf 1234 >features.bin",
            "has too few features of x.elf",
        ),
        ("exec sleep 60", "x.elf: the firmware has not ended in 0.1 s"),
    ],
)
def test_an_emulator_that_hangs_or_cannot_write_is_one_line(script, said, tmp_path, monkeypatch):
    program = tmp_path / "emulator"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(emulate, "require", lambda *_: str(program))
    monkeypatch.setattr(emulate, "IMAGE_TIMEOUT_S", 0.1 if "sleep" in script else 60.0)
    with pytest.raises(UserError, match=re.escape(said)):
        run_firmware(Path("x.elf"), "cortex-m7", noise((1, 2, 2), 1), 2)


@needs_toolchain
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_multiply_accumulate_takes_few_instructions(kernel, tmp_path):
    pads = [kernel // 2] * 4
    path = write_conv(tmp_path / "c.onnx", channels=32, filters=32, kernel=kernel, pads=pads, side=12, scale=1 / 16)
    built = build(path, find_target("stm32h743"), tmp_path)
    run, identical = run_and_compare(built, noise((32, 12, 12), 1))
    (ratio,) = [
        count / step.macs
        for step, count in zip(built.student.steps, run.step_instructions, strict=True)
        if isinstance(step, Conv)
    ]
    assert identical == 1
    assert 1 < ratio <= 3


@needs_toolchain
@pytest.mark.parametrize("memory", ["flash", "ram"])
def test_one_byte_too_few_fails_when_linking(firmware, memory):
    folder = firmware.linked.elf.parent
    objects = compile_sources(folder, firmware.target)
    needed = {"flash": firmware.linked.flash_bytes, "ram": firmware.linked.ram_bytes}[memory]
    exact = dataclasses.replace(firmware.target, **{f"{memory}_bytes": needed})
    assert link(objects, exact, folder / "exact.elf").ram_bytes == firmware.linked.ram_bytes
    less = dataclasses.replace(exact, **{f"{memory}_bytes": needed - 1})
    name = {"flash": "flash", "ram": "RAM"}[memory]
    with pytest.raises(UserError, match=rf"less: does not fit stm32h743: it exceeds {name} by \d+ of {needed - 1:,}"):
        link(objects, less, folder / "less.elf")


@needs_toolchain
def test_the_command_writes_what_it_measured(student, folder, capsys):
    cli.main(["firmware", str(student), "--device", "stm32h743", "--flash-kib", "64", "--ram-kib", "64", "--layers"])
    (entry,) = json.loads((folder / "firmware/firmware.json").read_text())
    assert (entry["network"], entry["student"], entry["device"]) == (student.parent.name, "0", "stm32h743")
    assert entry["images_identical"] == entry["images_checked"] == 1
    assert entry["arena_bytes"] + entry["stack_bytes"] < entry["ram_bytes"] <= 65536
    assert entry["macs"] == sum(layer["macs"] for layer in entry["layers"])
    assert entry["instructions_per_mac"] == pytest.approx(entry["instructions"] / entry["macs"], abs=0.001)
    assert entry["projected_mj"] == pytest.approx(1e-6 * entry["projected_nj_per_mac"] * entry["macs"], abs=0.05)
    ends = [buffer["offset"] + buffer["bytes"] for buffer in entry["buffers"]]
    assert max(ends) <= entry["arena_bytes"] < max(ends) + ALIGNMENT
    assert [b["kind"] for b in entry["buffers"]].count("image") == 1
    assert (folder / "firmware/0/0.elf").is_file()
    assert f"{entry['instructions']:,} instructions" in capsys.readouterr().out


def test_without_the_toolchain_one_line_says_how_to_install_it(student, folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    for arguments, program in (["--run", "0"], COMPILER), (["--run", "1"], EMULATOR):
        with pytest.raises(SystemExit) as error:
            cli.main(["firmware", str(student), "--device", "stm32h743", *arguments])
        assert str(error.value).startswith(f"nonn firmware: {program} is not installed")
        assert str(error.value).endswith("run: make system-deps")


def test_what_has_no_kernels_is_refused(tmp_path):
    path = tmp_path / "0.onnx"
    with pytest.raises(UserError, match="no such file"):
        read_student(path)
    path.write_text("no model")
    with pytest.raises(UserError, match="not a model that ONNX Runtime runs"):
        read_student(path)
    write_conv(path, channels=6)
    model = onnx.load(path)
    quantise = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    conv = next(node for node in model.graph.node if node.op_type == "QLinearConv")
    without, residual, spread = (copy.deepcopy(model) for _ in range(3))
    without.graph.node.remove(conv)
    without.graph.node.remove(quantise)
    without.graph.node.insert(1, helper.make_node("QuantizeLinear", ["float", "one", "out_zero"], ["sums"]))
    onnx.save(without, path)
    with pytest.raises(UserError, match="no convolution of 8-bit integers"):
        read_student(path)
    mean = residual.graph.node.pop()
    residual.graph.node.append(helper.make_node("DequantizeLinear", ["map", "one", "in_zero"], ["before"]))
    residual.graph.node.append(helper.make_node("Add", ["values", "before"], ["joined"]))
    mean.input[0] = "joined"
    residual.graph.node.append(mean)
    onnx.save(residual, path)
    with pytest.raises(UserError, match=r"Add joined joins 2 maps. Give students of .* family fast"):
        read_student(path)
    (spread_conv,) = (node for node in spread.graph.node if node.op_type == "QLinearConv")
    spread_conv.attribute.append(helper.make_attribute("dilations", [2, 2]))
    onnx.save(spread, path)
    with pytest.raises(UserError, match="no kernel for the dilations of QLinearConv sums"):
        read_student(path)
    (mean,) = (node for node in model.graph.node if node.op_type == "ReduceMean")
    del mean.input[1]
    onnx.save(model, path)
    with pytest.raises(UserError, match="ReduceMean features is no mean over all pixels"):
        read_student(path)


def test_documented_figures_are_those_of_the_results():
    entries = json.loads((REPOSITORY / "results/cifar10_int8/firmware.json").read_text())
    text = (REPOSITORY / "docs/firmware.md").read_text()
    assert len(entries) == 4
    assert [entry["images_checked"] for entry in entries] == [1000] * 4
    for entry in entries:
        assert entry["images_identical"] == entry["images_checked"]
        for key in ("flash_bytes", "ram_bytes", "arena_bytes", "instructions", "macs"):
            assert f"{entry[key]:,}" in text
        ratios = [layer["instructions_per_mac"] for layer in entry["layers"] if layer["macs"]]
        rows = [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| conv")]
        assert [float(row) for row in rows] * 2 == [
            round(ratio, len(row) - 2) for ratio, row in zip(ratios, rows * 2, strict=True)
        ]


def test_devices_without_firmware_are_refused():
    with pytest.raises(UserError, match="pi5: firmware is written for cortex_m7, nrf52840, stm32f4"):
        find_target("pi5")
    with pytest.raises(UserError, match="--ram-kib 513: stm32h743 has 512 KiB; give 1 to 512"):
        find_target("stm32h743", ram_kib=513)
    assert all(find_target(name).ram_bytes for name in CHIPS), "all are in the catalogue"


@needs_toolchain
def test_images_of_another_form_are_refused(student, folder):
    command = ["firmware", str(student), "--device", "stm32h743", "--images", "images.npy"]
    for content, why in ((np.zeros((2, 3, 28, 28), np.uint8), "holds uint8"), (None, "cannot be read")):
        if content is None:
            (folder / "images.npy").write_text("images")
        else:
            np.save(folder / "images.npy", content)
        with pytest.raises(SystemExit, match=why):
            cli.main(command)
