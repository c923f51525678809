"""The catalogue of boards, and devices that come from it."""

import re
from pathlib import Path

import pytest
from experiments import tiny_params

from nonn.cli import main
from nonn.core.boards import OWN_FILE, all_boards, find_board, shipped_boards
from nonn.core.budgets import Budget, combined_budget
from nonn.core.chips import CHIPS, runs_as
from nonn.core.devices import DeviceParams
from nonn.core.errors import UserError
from nonn.core.jobs import list_jobs
from nonn.core.links import PRESETS
from nonn.core.params import Params

#: Asked for by name: what people have.
EXPECTED = {
    *("pi3b", "pi3b_plus", "pi4b", "pi5", "pi_zero2w", "jetson_nano", "stm32f4", "stm32f746", "stm32h743"),
    *("cortex_m7", "esp32s3", "rp2040", "rp2350", "nrf52840", "imxrt1060"),
}

pytestmark = pytest.mark.usefixtures("folder")  # the clone may have a catalogue of the developer's own


@pytest.fixture
def own(folder):
    """Writes a project's own catalogue."""
    return lambda text: (folder / OWN_FILE).write_text(text)


def test_the_catalogue_has_what_people_have():
    assert set(shipped_boards()) == EXPECTED


@pytest.mark.parametrize("board", shipped_boards().values(), ids=shipped_boards())
def test_every_figure_says_where_it_comes_from(board):
    figures = board.figures
    assert "ram_kib" in figures
    for key, figure in figures.items():
        assert figure.source.startswith("https://"), key
        assert figure.kind != "estimated" or figure.how, key
    known = {f"{precision}_mmacs" for precision, speed in board.mmacs.items() if speed}
    known |= {key for key in ("flash_kib", "active_w", "idle_w", "links") if getattr(board, key)}
    assert known <= set(figures), "a number without a source"
    assert set(board.links or ()) <= set(PRESETS)


def test_estimates_follow_from_what_they_say():
    """A product of the numbers in `how`, to the digits given."""
    boards = shipped_boards()
    for name, key, expected in (
        ("pi3b", "float32", 1820 / 0.49806),
        ("pi4b", "float32", 1820 / 0.32168 * 1.5 / 1.8),
        ("pi5", "float32", 1820 / 0.13698 * 2.4 / 2.0),
        ("pi5", "int8", 1820 / 0.14192 * 2.4 / 2.0),
        ("pi_zero2w", "int8", 1820 / 0.65340 / 1.2),
        ("jetson_nano", "int8", 1820 / 0.26763 * 1.43 / 2.0),
        ("stm32f4", "int8", 12.5 * 4.407 * 168 / 120),
        ("stm32f746", "int8", 24.7 / 2 / 0.0991),
        ("stm32h743", "int8", 12.5 * 18.2 * 480 / 280),
        ("esp32s3", "int8", 7.2 / 0.054),
        ("rp2040", "int8", 7.2 / 0.823658),
        ("rp2350", "int8", 12.5 * 3.146 * 150 / 128),
        ("nrf52840", "float32", 64 / 9),
        ("imxrt1060", "int8", 24.7 / 2 / 0.0991 * 600 / 216),
    ):
        assert boards[name].mmacs[key] == pytest.approx(expected, rel=0.005), (name, key)


def test_a_project_adds_boards_and_replaces_figures(own):
    own("boards: {rp2040: {int8_mmacs: 12.5}, mine: {ram_kib: 100, flash_kib: 500, active_w: [0.1, 0.2]}}")
    boards = all_boards()
    assert boards["rp2040"].mmacs["int8"] == 12.5
    assert boards["rp2040"].ram_kib == shipped_boards()["rp2040"].ram_kib
    assert (boards["mine"].ram_kib, boards["mine"].flash_kib, boards["mine"].active_w.high) == (100, 500, 0.2)
    assert set(boards) == EXPECTED | {"mine"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", r"^devices\.yaml: has one key, `boards`"),
        ("boards: {x: 3}", r"^devices\.yaml: boards\.x: is no mapping of figures"),
        ("boards: {x: {flash_kib: 3}}", r"^devices\.yaml: boards\.x: ram_kib: missing; add it$"),
        ("boards: {x: {ram_kib: -3}}", r"boards\.x: ram_kib: input should be greater than 0 \(it is -3\)"),
        ("boards: {x: {ram_kb: 3, ram_kib: 3}}", r"ram_kb: unknown key; remove it \(did you mean 'ram_kib'\?\)"),
        ("boards: {x: {ram_kib: 3, links: [wifi]}}", r"boards\.x: links: no link 'wifi'; choose one of"),
        ("boards: {x: {ram_kib: 3, active_w: [2, 1]}}", r"boards\.x: active_w: is \[low, high\], and above idle_w"),
        ("boards: {x: {ram_kib: {value: 3, kind: estimated, source: y}}}", r"an estimate says in `how`"),
        ("boards: {3: {ram_kib: 3}}", r"boards: 3 is no name of a board; write a text in quotes"),
        ('boards: {"x\\e[1m": {ram_kib: 3}}', r"boards: 'x\\x1b\[1m' is no name of a board"),
        ("boards: {x: {ram_kib: 3}}\nsources: [a]", r"sources: is no mapping of short names to texts"),
        ("boards: {x: {ram_kib: 3}}\nsources: {a: 3}", r"sources: is no mapping of short names to texts"),
        (
            "boards: {x: {ram_kib: {value: 3, kind: guessed, source: y}}}",
            r"x\.ram_kib: kind: input should be 'measured', ",
        ),
        (
            "boards: {x: {ram_kib: {value: 3, kind: cited}}}",
            r"^devices\.yaml: boards\.x\.ram_kib: source: missing; add it$",
        ),
    ],
)
def test_mistakes_in_a_project_s_catalogue_are_named(own, text, said):
    own(text)
    with pytest.raises(UserError, match=said) as refusal:
        all_boards()
    assert len(str(refusal.value).splitlines()) == 1


def test_a_catalogue_that_is_no_file_is_refused(folder):
    (folder / OWN_FILE).symlink_to("nowhere")
    with pytest.raises(UserError, match=r"devices\.yaml: is a link to nowhere, which is not there"):
        all_boards()


def test_the_catalogue_says_how_a_student_gets_onto_a_board():
    ways = {name: runs_as(name, board.runs_onnx) for name, board in all_boards().items()}
    assert {name for name, way in ways.items() if way == "firmware"} == set(CHIPS)
    assert (ways["pi4b"], ways["rp2350"]) == ("node", "by hand")


def test_figures_of_any_kind_are_shown_on_one_line(own, capsys):
    figure = "{value: %s, kind: cited, source: y}"
    title, flash, runs = figure % '"My\\e[1m board"', figure % "null", figure % "true"
    own(f"boards: {{x: {{ram_kib: 3, title: {title}, flash_kib: {flash}, runs_onnx: {runs}}}}}")
    main(["devices", "x"])
    main(["devices"])
    shown = capsys.readouterr().out
    assert r"x: My\x1b[1m board" in shown
    assert "\x1b" not in shown
    assert "flash_kib       none  (cited)" in shown


def test_what_a_project_states_without_a_source_is_shown(own, capsys):
    own("boards: {rp2040: {int8_mmacs: 9.5}, x: {title: mine, ram_kib: 3, links: []}}")
    main(["devices", "rp2040"])
    main(["devices", "x"])
    shown = capsys.readouterr().out
    assert "int8_mmacs      9.5  (yours, without a source)" in shown
    assert "8.7" not in shown
    assert "ram_kib         3  (yours, without a source)" in shown
    assert "links           none by itself  (yours" in shown
    assert "not known: flash_kib" not in shown


def test_an_unknown_board_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"no board 'rp2450' \(did you mean 'rp2350'\?\); choose one of pi3b, "):
        find_board("rp2450")


# Devices


def test_a_board_gives_flash_and_ram_and_its_speed():
    facts = find_board("rp2350")
    budget = DeviceParams(board="rp2350").budget("pico", "int8", 20.0)
    assert (budget.flash_kib, budget.ram_kib, budget.memory_kib) == (facts.flash_kib, facts.ram_kib, None)
    assert budget.mmacs_per_s == facts.mmacs["int8"]
    assert budget.most_mmacs == pytest.approx(0.02 * facts.mmacs["int8"])
    assert (budget.name, budget.board) == ("pico", "rp2350")
    half = DeviceParams(board="rp2350", share=0.5, mmacs=3, mmacs_per_s=7).budget("pico", "int8")
    assert (half.ram_kib, half.flash_kib, half.mmacs_per_s, half.most_mmacs) == (260, facts.flash_kib, 7, 3)


def test_a_board_without_flash_has_one_memory():
    budget = DeviceParams(board="pi_zero2w", share=0.25).budget("zero", "float32")
    assert (budget.memory_kib, budget.flash_kib, budget.ram_kib) == (131072, None, None)
    replaced = DeviceParams(board="rp2350", memory_kib=300).budget("pico", "int8")
    assert (replaced.memory_kib, replaced.flash_kib, replaced.ram_kib) == (300, None, None)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ({"memory_kib": 3, "flash_kib": 3, "mmacs": 1}, "memory_kib is for weights and activations together"),
        ({"flash_kib": 3, "mmacs": 1}, "has no memory; give memory_kib, or flash_kib and ram_kib, or a board"),
        ({"memory_kib": 3}, "mmacs: missing; add it"),
        ({"memory_kib": 3, "mmacs": 1, "share": 0.5}, "share: is that of a board's RAM"),
        ({"board": "rp2350", "ram_kib": 64, "share": 0.5}, "which this device states itself"),
        ({"board": "rp2351"}, r"no board 'rp2351' \(did you mean 'rp2350'\?\)"),
    ],
)
def test_a_device_that_is_no_budget_is_refused(device, said):
    with pytest.raises(ValueError, match=said):
        DeviceParams.model_validate(device)


def test_a_target_needs_the_speed_of_each_device():
    changes = {"networks": {"2s": {"devices": ["small", "large"], "seeds": 1, "latency_ms": 5.0}}}
    with pytest.raises(
        ValueError, match=r"networks\.2s\.latency_ms: the speed of device 'small' in float32 is not known"
    ):
        Params.model_validate(tiny_params(changes))
    changes["devices"] = {"small": {"board": "rp2350"}, "large": {"memory_kib": 60.0, "mmacs": 5, "mmacs_per_s": 10}}
    budgets = Params.model_validate(tiny_params(changes)).budgets_of("2s")
    assert [budget.latency_ms for budget in budgets] == [5.0, 5.0]
    assert budgets[1].most_mmacs == pytest.approx(0.05)


def test_the_combined_budget_of_mixed_devices():
    apart, whole = Budget(flash_kib=100, ram_kib=20, mmacs=3), Budget(memory_kib=50, mmacs=4)
    assert combined_budget([apart, apart]) == Budget(flash_kib=200, ram_kib=40, mmacs=6)
    assert combined_budget([apart, whole]) == Budget(memory_kib=170, mmacs=7)


def test_dvc_sees_what_the_catalogue_says(own):
    networks = {"2s": {"devices": ["pico", "large"], "seeds": 1}}
    devices = {"pico": {"board": "mine"}, "large": {"memory_kib": 60, "mmacs": 5}}
    own("boards: {mine: {ram_kib: 100}}")
    params = Params.model_validate(tiny_params({"networks": networks, "devices": devices}))
    before = list_jobs(params)
    assert before["budgets"] == {"2s": [{"memory_kib": 100.0}, {"memory_kib": 60.0, "mmacs": 5.0}]}
    own("boards: {mine: {ram_kib: 120}, other: {ram_kib: 1}, cortex_m7: {active_w: 0.2}}")
    after = list_jobs(params)
    assert {key for key in after if after[key] != before[key]} == {"budgets", "board"}
    assert list_jobs(Params.model_validate(tiny_params()))["budgets"] == {}


# The command


def test_the_catalogue_is_listed(folder, capsys):
    main(["devices"])
    shown = capsys.readouterr().out
    assert {line.split()[0] for line in shown.split("\n\n")[0].splitlines()[1:]} == EXPECTED
    (line,) = [line for line in shown.splitlines() if line.startswith("pi3b ")]
    assert line.split()[1:7] == ["1,048,576", "–", "3,650", "2,790", "1.4", "1.975–3.7"]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_one_board_is_shown_with_its_sources(name, capsys):
    main(["devices", name])
    shown = capsys.readouterr().out
    board = find_board(name)
    assert all(figure.source in shown for figure in board.figures.values())
    missing = re.search(r"not known: (.*)", shown)
    assert bool(missing) == (len(set(board.figures) - {"cores"}) < 6 + (board.flash_kib is not None))


def test_the_catalogue_comes_with_the_package():
    assert '"nonn.core" = ["boards.yaml",' in Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
