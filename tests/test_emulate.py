"""The stage `emulate`: firmware of the students on microcontrollers, and of no others."""

import json
import shutil

import pytest
from clusters import sha256
from experiments import make_dataset, tiny_params, write_dataset
from firmwares import needs_toolchain, write_conv

from nonn.core.errors import UserError
from nonn.core.files import write_json
from nonn.core.jobs import chips_of, list_jobs
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.firmware.plots import draw_firmware
from nonn.stages import emulate

MIXED = {
    "devices": {"small": {"board": "stm32h743", "flash_kib": 64}, "large": {"memory_kib": 60, "mmacs": 5}},
    "design": {"precision": "int8"},
}


def make_params(**changes) -> Params:
    return Params.model_validate(tiny_params(MIXED | changes))


@pytest.fixture
def exported(folder) -> Paths:
    """An export of two students of one convolution each, and the images that they see."""
    paths = Paths("tiny")
    paths.root.mkdir(parents=True)
    write_dataset(make_dataset(), paths)
    folder = paths.export("2s")
    folder.mkdir(parents=True)
    students = []
    for position in range(2):
        path = write_conv(folder / f"{position}.onnx", channels=1, side=28, filters=4 + position, pool=2)
        students.append({"file": path.name, "sha256": sha256(path)})
    write_json(folder / "manifest.json", {"students": students})
    return paths


def test_there_is_a_job_only_for_students_that_can_be_firmware():
    assert chips_of(make_params(), "2s") == {0: "stm32h743"}
    assert list_jobs(make_params())["emulated"] == {"firmware": {}}
    for changes in ({"design": {"precision": "float32"}}, {"design": {"precision": "int8", "family": "mobilenet"}}):
        assert list_jobs(make_params(**changes))["emulated"] == {}
    others = MIXED["devices"] | {"small": {"board": "esp32s3"}}
    assert list_jobs(make_params(devices=others))["emulated"] == {}


@needs_toolchain
def test_students_of_microcontrollers_are_built_and_compared(exported):
    emulate.run(make_params(), exported)
    (entry,) = json.loads(exported.firmware.read_text())
    assert (entry["network"], entry["student"], entry["device"]) == ("2s", "0", "stm32h743")
    assert entry["flash_limit_bytes"] == 64 * 1024
    assert entry["ram_limit_bytes"] == 512 * 1024
    assert entry["images_identical"] == entry["images_checked"] == 15
    assert 0 < entry["weight_bytes"] < entry["table_bytes"] < entry["flash_bytes"] < 16_000
    assert (exported / "figures/firmware.svg").is_file()
    first = exported.firmware.read_bytes()
    emulate.run(make_params(), exported)
    assert exported.firmware.read_bytes() == first


@needs_toolchain
def test_features_that_differ_are_refused(exported, monkeypatch):
    monkeypatch.setattr(emulate, "run_and_compare", lambda _, images: (None, len(images) - 1))
    with pytest.raises(UserError, match="2s/0: features of the firmware differ from those of ONNX Runtime"):
        emulate.run(make_params(), exported)
    assert not exported.firmware.exists()


def test_without_the_toolchain_one_line_says_so(exported, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("arm-none-eabi-gcc") is None
    with pytest.raises(UserError, match=r"no firmware can be built and run here: .* is not installed\. .*system-deps"):
        emulate.run(make_params(), exported)


def test_the_figure_shows_every_student_beside_its_limits():
    entry = {
        **{"network": "4s", "device": "stm32h743", "flash_bytes": 4096, "weight_bytes": 1024, "table_bytes": 1024},
        **{"ram_bytes": 8192, "arena_bytes": 4096, "stack_bytes": 2048, "flash_limit_bytes": 10240},
        "ram_limit_bytes": 20480,
    }
    figure = draw_firmware([entry | {"student": str(position)} for position in range(3)])
    flash, ram = figure.axes
    assert [label.get_text() for label in flash.get_yticklabels()] == [f"4s/{i}, stm32h743" for i in range(3)]
    for axis, total in ((flash, 4.0), (ram, 8.0)):
        assert max(bar.get_x() + bar.get_width() for bar in axis.patches) == total
        assert len(axis.patches) == 9
        assert axis.get_xlim()[1] > 2 * total
