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
from nonn.firmware.build import missing_program
from nonn.firmware.energy import nanojoules_per_mac
from nonn.report.firmware_plots import draw_firmware
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


LAYERS = [("image", 0), ("conv 3×3", 512), ("mean", 0), ("image", 0), ("conv 3×3", 512), ("mean", 0)]
ENTRY = {
    **{"network": "4s", "device": "stm32h743", "flash_bytes": 4096, "weight_bytes": 1024, "table_bytes": 1024},
    **{"ram_bytes": 8192, "arena_bytes": 4096, "stack_bytes": 2048, "flash_limit_bytes": 10240},
    **{"ram_limit_bytes": 20480, "projected_nj_per_mac": 0.5, "projected_mj": 12.5},
    "layers": [{"layer": name, "weight_bytes": size} for name, size in LAYERS],
    "buffers": [
        {"kind": "image", "bytes": 2048, "offset": 0, "first": 0, "last": 3},
        {"kind": "map", "bytes": 1024, "offset": 3072, "first": 1, "last": 2},
    ],
}


def test_the_figure_shows_every_student_beside_its_limits():
    figure = draw_firmware([ENTRY | {"student": str(position)} for position in range(3)])
    flash, ram, energy = figure.subfigs[0].axes
    assert [label.get_text() for label in flash.get_yticklabels()] == [f"4s/{i}, stm32h743" for i in range(3)]
    for axis, total in ((flash, 4.0), (ram, 8.0)):
        assert max(bar.get_x() + bar.get_width() for bar in axis.patches) == total
        assert len(axis.patches) == 9
        assert axis.get_xlim()[1] > 2 * total
    assert [bar.get_width() for bar in energy.patches] == [12.5] * 3
    assert "projected: 0.5 nJ a MAC" in energy.get_xlabel()


def test_the_figure_shows_layers_and_arena_of_each_form_of_student():
    other = ENTRY | {"student": "1", "arena_bytes": 8192, "projected_mj": None, "projected_nj_per_mac": None}
    figure = draw_firmware([ENTRY | {"student": "0"}, ENTRY | {"student": "2"}, other])
    assert len(figure.subfigs) == 3
    layers, arena = figure.subfigs[1].axes
    assert [bar.get_width() for bar in layers.patches] == [0.5], "weights of two passes lie in flash once"
    assert [(*box.get_xy(), box.get_width(), box.get_height()) for box in arena.patches] == [(0, 0, 4, 2), (1, 3, 2, 1)]
    assert [text.get_text() for text in figure.subfigs[0].axes[2].texts] == ["12.5", "12.5", "unknown"]


def test_energy_is_that_of_the_measured_board_of_the_same_core(folder):
    assert nanojoules_per_mac("cortex-m7") == pytest.approx(7615.35 / 12.5e3, rel=0.01)
    assert nanojoules_per_mac("cortex-m4") == pytest.approx(1.385, rel=0.001)
    (folder / "devices.yaml").write_text("boards: {cortex_m7: {active_w: null}}")
    assert nanojoules_per_mac("cortex-m7") is None


def test_where_no_student_has_kernels_the_figure_says_so():
    (text,) = draw_firmware([]).texts
    assert "no student has layers" in text.get_text()


@pytest.mark.usefixtures("experiment")
def test_without_a_microcontroller_there_is_nothing_to_emulate(params, experiment):
    if missing_program():
        pytest.skip("the toolchain or the emulator is not installed")
    with pytest.raises(UserError, match=r"no student runs as firmware\. Set design\.precision to int8"):
        emulate.run(params, experiment)
    assert not experiment.firmware.exists()
