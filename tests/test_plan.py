"""Plans before training: what is said of a set of devices is what the design would do and the links would take."""

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from experiments import REPOSITORY, tiny_params
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from nonn.cli import main
from nonn.core.artifacts import ImageSpec
from nonn.core.boards import OWN_FILE, Range, find_board, shipped_boards
from nonn.core.budgets import Budget
from nonn.core.errors import UserError
from nonn.core.params import DesignParams, Params
from nonn.core.schema import parse_yaml
from nonn.method.planning import Planner, board_budget, deployment_warnings, pareto, parse_devices
from nonn.method.sizing import design_network, design_student

GRID = DesignParams(family="fast", depths=[2], min_width=4, max_width=24, step=1, precision="int8")
IMAGES = ImageSpec(channels=3, size=32, n_classes=10)


@pytest.fixture
def planner():
    return Planner(GRID, IMAGES, 64, "ieee802154", shipped_boards())


def stop(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert len(str(stopped.value.code).splitlines()) == 1
    return str(stopped.value.code)


# Lists of devices


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("2×rp2350 + 1×pi4b", ["rp2350", "rp2350", "pi4b"]),
        ("2xrp2350,pi4b", ["rp2350", "rp2350", "pi4b"]),
        ("2*rp2350 +2 pi4b", ["rp2350", "rp2350", "pi4b", "pi4b"]),
        ("pi4b + pi4b", ["pi4b", "pi4b"]),
    ],
)
def test_a_list_of_devices(text, names):
    assert parse_devices(text, list(shipped_boards())) == names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2×rp2530", r"--devices: no device 'rp2530' \(did you mean 'rp2350'\?\); choose of pi3b,"),
        ("two rp2350", r"'two rp2350' is not NUMBERxNAME; write for example 2xrp2350"),
        ("2××rp2350", r"is not NUMBERxNAME"),
        ("", r"'' is not NUMBERxNAME"),
        ("rp2350 +", r"'' is not NUMBERxNAME"),
        ("1×rp2350", r"a network has 2 to 16 devices, and these are 1$"),
        ("9999×rp2350", r"and these are more than 16$"),
        ("-2×rp2350", r"is not NUMBERxNAME"),
    ],
)
def test_what_is_no_list_of_devices_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse_devices(text, list(shipped_boards()))


@settings(max_examples=50)
@given(st.text("ab2x×*+, -é", max_size=12))
def test_any_text_is_a_list_or_refused(text):
    with contextlib.suppress(UserError):
        assert 2 <= len(parse_devices(text, ["a", "b"])) <= 16


# Plans


def test_a_plan_is_what_the_design_would_do(planner):
    budgets = [board_budget("rp2350", "int8"), board_budget("pi4b", "int8")]
    estimate = planner.estimate(budgets)
    sizes, designs = design_network(GRID, budgets, IMAGES, 64)
    assert estimate.filter_counts == sizes
    for position, device in enumerate(estimate.devices):
        (student,) = designs[str(position)]
        assert student["architecture"] == device.architecture.model_dump()
        assert student["cost"] == vars(device.cost)


def test_times_bytes_and_energy_by_hand(planner):
    budgets = [board_budget("nrf52840", "int8"), board_budget("cortex_m7", "int8")]
    estimate = planner.estimate(budgets)
    for device, rate in zip(estimate.devices, (29.4e6, 227.5e6), strict=True):
        assert device.compute_ms == pytest.approx(1e3 * device.cost.macs / rate)
    # 8 bytes of UDP's header and 20 of IP's; on a shared medium one message goes at a time.
    answers = [4 * n + 28 for n in estimate.filter_counts]
    assert estimate.answer_wire_bytes == sum(answers)
    assert estimate.link_ms == pytest.approx(1e3 * 8 * (sum(answers) + 2 * 36) / 250e3)
    assert estimate.total_ms == pytest.approx(max(d.compute_ms for d in estimate.devices) + estimate.link_ms)
    energy = estimate.devices[1].energy_mj
    computing, radio = 139 * estimate.devices[1].compute_ms / 1e3, 8 * (36 + answers[1]) * 1e3
    assert (energy.low, energy.high) == pytest.approx((computing + 10e-9 * radio, computing + 50e-9 * radio))
    assert estimate.energy_mj == Range(
        *(sum(getattr(d.energy_mj, k) for d in estimate.devices) for k in ("low", "high"))
    )


def test_what_is_not_known_is_not_made_up(planner):
    estimate = planner.estimate([board_budget("rp2040", "float32"), board_budget("cortex_m7", "float32")])
    unknown, known = estimate.devices
    assert unknown.compute_ms is unknown.energy_mj is estimate.total_ms is estimate.energy_mj is None
    assert known.compute_ms > 0


@pytest.mark.parametrize("latency_ms", [30, 60, 200])
@pytest.mark.parametrize("names", [["rp2350", "rp2350"], ["rp2350", "pi_zero2w", "esp32s3"]])
def test_a_target_is_met_and_used(planner, names, latency_ms):
    budgets = [board_budget(name, "int8") for name in names]
    estimate = planner.estimate(budgets, latency_ms)
    assert estimate.total_ms <= latency_ms
    for device in estimate.devices:
        assert device.budget.fits(device.cost)
        free = design_student(GRID, board_budget(device.budget.name, "int8"), IMAGES, device.n_filters)[1]
        if device.cost != free:  # the target is what holds it back: the next wider one would miss it
            limits = {limit.key: limit for limit in device.budget.limits(free)}
            assert not limits["latency_ms"].is_kept


def test_the_nearest_target_works_and_a_shorter_one_does_not(planner):
    budgets = [board_budget(name, "int8") for name in ("rp2350", "nrf52840")]
    nearest = planner.nearest_target(budgets)
    assert planner.estimate(budgets, nearest).total_ms <= nearest
    with pytest.raises(UserError):
        planner.estimate(budgets, nearest - 0.1)
    assert planner.nearest_target([Budget(memory_kib=1, mmacs_per_s=1)] * 2) is None, "memory is short at any time"


def test_no_set_of_the_catalogue_s_table_is_beaten(planner):
    names = ("rp2350", "nrf52840", "cortex_m7", "pi4b", "pi_zero2w")
    budgets = {name: board_budget(name, "int8") for name in names}
    found = pareto(planner, budgets, 60, 3)
    assert found
    assert all(estimate.total_ms <= 60 and 2 <= len(kinds) <= 3 for kinds, estimate in found)
    assert [estimate.total_ms for _, estimate in found] == sorted(estimate.total_ms for _, estimate in found)
    best = max(
        (planner.estimate([a, b, c], 60) for a in budgets.values() for b in budgets.values() for c in budgets.values()),
        key=lambda estimate: estimate.params,
    )
    assert max(estimate.params for _, estimate in found) >= 0.95 * best.params
    for kinds, estimate in found:
        for other, rival in found:
            if other != kinds and estimate.energy_mj and rival.energy_mj:
                worse = estimate.params < 0.9 * rival.params, estimate.total_ms > 1.1 * rival.total_ms
                assert not all((*worse, estimate.energy_mj.high > 1.1 * rival.energy_mj.high)), (kinds, other)


# The command


@pytest.mark.usefixtures("folder")
def test_a_plan_is_shown_and_can_be_copied(capsys):
    main(["plan", "--devices", "2×rp2350 + 1×pi_zero2w", "--latency-ms", "100", "--filters", "64"])
    shown = capsys.readouterr().out
    assert shown.startswith(
        "Images of 3×32×32, 10 classes, 64 filters to share; fast students in int8; link ieee802154."
    )
    heading, labels, *rows = shown.split("\n\n")[1].splitlines()
    assert labels.split() == ["modelled"] * 7
    assert [row.split()[0] for row in rows] == ["rp2350", "rp2350", "pi_zero2w"]
    assert sum(int(row.split()[3]) for row in rows) == 64
    assert heading.split()[:3] == ["device", "student", "filters"]
    (total,) = re.findall(r"slowest device \+ link +([\d.]+) ms \(target 100\) \(modelled\)", shown)
    assert float(total) <= 100
    assert "with design.precision: int8:" in shown
    text, _, then = shown.split("int8:\n\n")[1].partition("\n\n")
    assert then.startswith("Then run `nonn use NAME`.")
    copied = parse_yaml(text, "copied")
    changes = copied | {"design": {"precision": "int8", "max_width": 128}}
    params = Params.model_validate(tiny_params(changes))
    assert [budget.board for budget in params.budgets_of("3s")] == ["rp2350", "rp2350", "pi_zero2w"]
    sizes, designs = design_network(params.design, params.budgets_of("3s"), IMAGES, 64)
    assert len(sizes) == 3
    assert designs["0"][0]["cost"]["macs"] <= find_board("rp2350").mmacs["int8"] * 1e6 * 0.1


def test_parameters_are_read_where_they_are(folder, capsys):
    YAML().dump(tiny_params(), folder / "params.yaml")
    main(["plan", "--devices", "small + large + pi4b", "--link", "wifi20"])
    shown = capsys.readouterr().out
    assert shown.startswith(
        "Images of 3×28×28, 10 classes, 32 filters to share; fast students in float32; link wifi20. "
    )
    assert "?: the catalogue has no speed or no power of the device" in shown, "the project's own have a budget alone"
    (folder / "params.yaml").write_text("devises: {}")
    assert "params.yaml: devises: unknown key" in str(refused("--devices", "2×pi4b"))


def test_students_that_are_larger_than_their_teacher_are_named(folder, capsys):
    YAML().dump(tiny_params(), folder / "params.yaml")
    main(["plan", "--devices", "small + large"])
    assert "a student should be smaller" not in capsys.readouterr().out
    main(["plan", "--devices", "2×pi4b"])
    assert re.search(r"student has [\d,]+ parameters, the teacher [\d,]+: a student should", capsys.readouterr().out)


@pytest.mark.usefixtures("folder")
def test_parameters_that_are_no_file_are_refused():
    Path("params.yaml").mkdir()
    assert refused("--devices", "2×pi4b") == "nonn plan: params.yaml: is a folder. Name a regular file."


@pytest.mark.usefixtures("folder")
def test_a_short_time_is_not_rounded_to_none(capsys):
    main(["plan", "--devices", "2×pi5", "--latency-ms", "0.1", "--link", "ethernet941", "--filters", "4"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "latency_ms:" in line]
    assert 0 < float(line.split()[1]) < 0.1


def refused(*arguments: str):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    return stopped.value.code


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "2×rp2350", "--latency-ms", "20"], "20 ms is too short: the link takes "),
        (
            ["--devices", "2×rp2040", "--latency-ms", "20", "--precision", "float32"],
            "--latency-ms: the speed of 'rp2040' in float32 is not known",
        ),
        (["--devices", "2×rp2350", "--link", "wifi"], "no link 'wifi'; choose one of"),
        (["--devices", "2×rp2350", "--channels", "2"], "--channels: images have 1 or 3, not 2"),
        (["--devices", "9×pi4b", "--filters", "8"], "9 devices share 8 live filters"),
        (["--devices", "0×rp2350 + 2×pi4b"], "--devices: '0×rp2350' asks for none"),
        (["--devices", "2×pi4b", "--link", ""], "no link ''; choose one of"),
        (["--catalogue"], "--catalogue: give the time for one image"),
        (["--catalogue", "--latency-ms", "9", "--max-devices", "5"], "--max-devices: 5 is above 4; give 2 to 4"),
        (["--catalogue", "--target-latency", "1"], "no set of devices answers within 1 ms; the nearest that works is"),
    ],
)
def test_what_cannot_be_planned_ends_in_one_line(arguments, said):
    code = stop(*arguments)
    assert code.startswith(f"nonn plan: {said}")
    if nearest := re.search(r"(--[a-z]+-[a-z]+) ([\d.]+)\.$", code):
        at = arguments.index(nearest[1])
        main(["plan", *arguments[: at + 1], nearest[2], *arguments[at + 2 :]])


@pytest.mark.parametrize(
    "arguments",
    [["--size", "2000"], ["--latency-ms", "0"], ["--latency-ms", "nan"], ["--filters", "1"], ["--size", "x"]],
)
def test_numbers_out_of_range_are_refused(arguments):
    assert refused("--devices", "2×pi4b", *arguments) == 2


@pytest.mark.usefixtures("folder")
def test_the_catalogue_s_sets_are_shown(capsys):
    sets = ["--catalogue", "--max-devices", "2", "--filters", "32", "--precision", "float32"]
    main(["plan", "--target-latency", "200", *sets])
    shown = capsys.readouterr().out
    _, labels, *rows = shown.split("\n\n")[1].splitlines()
    assert labels.split() == ["modelled"] * 3
    assert rows
    assert all(float(re.split(r"\s{2,}", row)[2]) <= 200 for row in rows)
    assert "Left out, for want of a speed in float32: esp32s3, rp2040." in shown


def test_a_board_of_the_project_is_planned(folder, capsys):
    (folder / OWN_FILE).write_text("boards: {mine: {ram_kib: 300, int8_mmacs: 100, active_w: 0.1}}")
    main(["plan", "--devices", "2×mine", "--filters", "32"])
    (row, _) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mine ")]
    assert "?" not in row


def test_a_plan_needs_nothing_that_only_the_pipeline_has(folder):
    """Nor does it take the time to import it: that is most of what it takes."""
    code = "import sys; from nonn.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    arguments = ["plan", "--devices", "2×rp2350", "--latency-ms", "100"]
    shown = subprocess.check_output([sys.executable, "-c", code, *arguments], cwd=folder, text=True)
    assert not {"torch", "onnxruntime", "pandas", "dvc"} & set(shown.splitlines()[-1].split())


def test_the_documentation_shows_what_the_commands_print(folder, capsys):
    text = (REPOSITORY / "docs" / "catalogue.md").read_text()
    shown = re.findall(r"```console\n\$ nonn (.*?)\n(.*?)```", text, re.DOTALL)
    assert len(shown) == 5
    for line, expected in shown:
        try:
            main(shlex.split(line))
        except SystemExit as stopped:
            print(stopped.code)
        assert capsys.readouterr().out == expected, line
    assert not list(folder.iterdir())


def test_microcontrollers_get_no_firmware_of_a_family_without_kernels():
    assert list(deployment_warnings(["stm32h743", None], "fast")) == []
    (said,) = deployment_warnings(["stm32h743", "pi4b", "stm32h743"], "mobilenet")
    assert said.startswith("Firmware, for stm32h743, has no kernels for family mobilenet; set design.family to fast")
    assert len(list(deployment_warnings(["rp2350", "stm32h743"], "mobilenet"))) == 2
