"""Figures from a small made-up experiment, and all outputs of the stage."""

from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reports import FIGURES, PARAMS, TABLES, make_log

from nonn.core.architecture import Architecture
from nonn.core.files import read_json
from nonn.core.links import PRESETS
from nonn.report import accuracy_plots, deployment_plots, design_plots, graph_plots, inputs, plots
from nonn.stages import figures as figures_stage
from nonn.training.networks import ConvNet


def test_every_output_is_there(inside):
    _, paths = inside
    for name in FIGURES:
        assert (paths / f"figures/{name}.svg").read_text().startswith("<?xml")
        assert (paths / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in paths.root.glob("*") if path.name in TABLES} == set(TABLES)


def test_running_again_gives_the_same_bytes(inside):
    params, paths = inside
    drawn = [paths / f"figures/{name}.{suffix}" for name in FIGURES for suffix in plots.FORMATS]
    outputs = [*drawn, *(paths / name for name in TABLES)]
    before = [path.read_bytes() for path in outputs]
    figures_stage.run(params, paths)
    assert [path.read_bytes() for path in outputs] == before


TOP_K = {"top_k": None, "n_filters": 600, "modularity": 0.3, "n_communities": 5, "top_k_curve": []}


def draw(file_format):
    with plots.drawing_style():
        plots.save_figure(graph_plots.draw_top_k(TOP_K), Path("figure"), PARAMS.figures)
    return Path(f"figure.{file_format}").read_bytes()


@pytest.mark.parametrize("file_format", plots.FORMATS)
def test_no_format_tells_the_time(file_format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    before = draw(file_format)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert draw(file_format) == before


def test_style_is_ours_whatever_the_users_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = draw("png")
    with matplotlib.rc_context({"font.size": 20}):
        assert draw("png") == plain


def test_strongest_links_by_hand():
    weights = np.array([[0, 3, 1, 0], [3, 0, 2, 0], [1, 2, 0, 0], [0, 0, 0, 0]])
    assert graph_plots.strongest_links(weights, 1).tolist() == [[0, 1], [1, 2]]
    assert graph_plots.strongest_links(weights, 3).tolist() == [[0, 1], [0, 2], [1, 2]]


def test_filters_are_ordered_by_student_then_community():
    split = {"sets": [[0, 2, 5], [1, 4]], "communities": [1, -1, 0, -1, 0, 1]}
    assert graph_plots.order_filters(split).tolist() == [2, 0, 5, 4, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.01, 0.2))
def test_spread_keeps_the_gap_the_order_and_the_bounds(values, gap):
    values = sorted(values)
    placed = accuracy_plots.spread(values, gap, 0, 1)
    fits = min(gap, 1 / max(len(values) - 1, 1))
    assert (np.diff(placed) >= fits - 1e-9).all()
    assert placed[0] >= -1e-9
    assert placed[-1] <= 1 + 1e-9
    if (np.diff(values) >= gap).all():
        assert placed == pytest.approx(values)


def test_spread_moves_as_little_as_needed():
    assert accuracy_plots.spread([], 0.1, 0, 1).tolist() == []
    assert accuracy_plots.spread([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
    assert accuracy_plots.spread([0.0, 0.02], 0.1, 0, 1) == pytest.approx([0.0, 0.1])


def test_top_k_is_drawn_without_a_curve():
    figure = graph_plots.draw_top_k(TOP_K)
    assert [axis.lines[1].get_xydata().tolist() for axis in figure.axes] == [[[600, 0.3]], [[600, 5]]]


def test_an_imported_teacher_is_a_level_line():
    teacher = pd.DataFrame({"epoch": [0], "validation_accuracy": [0.9]})
    log = pd.DataFrame(make_log(4, 0.95, np.random.default_rng(0)))
    (axis,) = accuracy_plots.draw_training(teacher, {"2s": {"nonn": [log, log]}}).axes
    assert set(axis.lines[0].get_ydata()) == {0.9}


def test_a_legend_is_no_wider_than_its_figure():
    """A single network makes narrow figures, and all baselines a long legend."""
    log = pd.DataFrame(make_log(4, 0.95, np.random.default_rng(0)))
    trained = ["nonn", "labels", "kd", "at_kd", "total", "random", "classwise", "full"]
    figure = accuracy_plots.draw_training(log, {"2s": {method: [log] for method in trained}})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 1 + len(trained)
    assert figure.bbox.x0 <= legend.get_window_extent().x0 < legend.get_window_extent().x1 <= figure.bbox.x1


def test_a_figure_is_as_wide_as_its_legend():
    figure, _ = plots.panels(1, 1.0, 1.0)
    plots.legend_below(figure, [plots.legend_handle(plots.Look("a name that is wider than an inch", "0", "o"))])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().x1 - legend.get_window_extent().x0 <= figure.bbox.width


def assert_in_view(axis, lines):
    left, right = axis.get_xlim()
    bottom, top = axis.get_ylim()
    assert lines
    for line in lines:
        x, y = np.asarray(line.get_xydata()).T
        assert ((left <= x) & (x <= right) & (bottom <= y) & (y <= top)).all()


def test_all_points_are_in_view(methods):
    missing = pd.DataFrame(
        [
            {
                "method": "nonn",
                "network": "2s",
                "missing": k,
                "mean": 0.9 - k / 9,
                "mean_sd": 0.01,
                "worst": 0.9 - k / 8,
            }
            for k in range(2)
        ]
    ).assign(worst_sd=None)
    (axis,) = accuracy_plots.draw_missing_devices(missing, {"2s": "rescaled"}, {"2s": 3}, 100).axes
    assert_in_view(axis, [line for line in axis.lines if len(line.get_xdata()) == 2])
    (axis,) = accuracy_plots.draw_accuracy_memory(methods, {"2s": [0.1]}, 100).axes
    assert_in_view(axis, [container.lines[0] for container in axis.containers])
    assert len(axis.containers) == len(methods)


def test_every_method_is_named_beside_its_point(methods):
    (axis,) = accuracy_plots.draw_accuracy_memory(methods, {"2s": [0.1]}, 100).axes
    named = [text.get_text() for text in axis.texts if not text.get_text().startswith("budget")]
    assert sorted(named) == sorted(plots.METHODS[m].label for m in methods["method"])


def test_names_of_budgets_that_are_close_stand_on_either_side(methods):
    (axis,) = accuracy_plots.draw_accuracy_memory(methods, {"2s": [4616, 4096, 9000]}, 100).axes
    names = [text for text in axis.texts if text.get_text().startswith("budget")]
    sides = {text.get_text(): text.get_horizontalalignment() for text in names}
    assert sides == {"budget 4,096 KiB": "right", "budget 4,616 KiB": "left", "budget 9,000 KiB": "left"}


def test_numbers_at_the_axis_of_memory_do_not_touch(methods):
    """Also where the teacher takes a thousand times the memory of the smallest."""
    wide = methods.copy()
    wide.loc[wide["method"] == "teacher", "memory_bytes_per_device"] *= 1000
    figure = accuracy_plots.draw_accuracy_memory(wide, {"2s": [0.1]}, 100)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    low, high = axis.get_xlim()
    shown = [label for label in axis.get_xticklabels() if low <= label.get_position()[0] <= high]
    boxes = [label.get_window_extent() for label in shown]
    assert len(boxes) > 2
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_every_method_is_drawn_at_its_memory_and_accuracy(methods):
    """However crowded: a point that is moved aside reads as another number."""
    (axis,) = accuracy_plots.draw_accuracy_memory(methods, {"2s": [0.1]}, 100).axes
    drawn = [container.lines[0] for container in axis.containers]
    assert all(line.get_transform() == axis.transData for line in drawn)
    places = sorted(tuple(line.get_xydata()[0]) for line in drawn)
    wanted = zip(methods["memory_bytes_per_device"] / 1024, methods["accuracy_mean"], strict=True)
    assert np.array(places) == pytest.approx(np.array(sorted(wanted)))
    (budget,) = [line for line in axis.lines if list(line.get_ydata()) == [0, 1]]
    assert list(budget.get_xdata()) == [0.1, 0.1]


def contrast_to_white(colour):
    """Of WCAG 2: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    channels = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)


def test_every_colour_stands_out_from_white():
    """3 to 1 is what WCAG 2.2 asks of graphics (success criterion 1.4.11)."""
    assert contrast_to_white("black") == pytest.approx(21)
    colours = {look.colour for look in plots.METHODS.values()} | set(plots.STUDENT_COLOURS)
    assert len(colours) == len(plots.METHODS) + len(plots.STUDENT_COLOURS), "each means one thing"
    assert {colour for colour in colours if contrast_to_white(colour) < 3} == set()


@pytest.mark.parametrize(
    "architecture",
    [
        {"family": "fast", "widths": [6, 8, 10], "depth": 2},
        {"family": "airbench", "widths": [6, 8, 10], "depth": 2},
        {"family": "airbench", "widths": [6, 8, 10], "depth": 3, "strided": True},
        {"family": "wrn", "depth": 10, "width": 1},
        {"family": "resnet", "depth": 8, "width": 1},
        {"family": "fast", "widths": [6, 7, 8, 10], "depth": 1},
        {"family": "mobilenet", "widths": [4, 6, 8, 10], "depth": 2},
    ],
    ids=lambda architecture: architecture["family"],
)
@pytest.mark.parametrize("size", [28, 30, 32])
def test_blocks_are_those_of_the_network(architecture, size):
    architecture = Architecture(**architecture)
    blocks = design_plots.list_blocks(architecture, 3, size, 5)
    model = ConvNet(architecture, 3, 10, 5).eval()
    maps = model.stage_maps(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    stages = [(width, side) for name, width, side, _ in blocks if name.startswith("stage")]
    assert stages == [tuple(one.shape[1:3]) for one in maps]
    stem = model.stem(model.normalize(torch.zeros(1, 3, size, size)))
    assert ("stem", stem.shape[1]) in [block[:2] for block in blocks]
    assert blocks[-1] == ("bridge", 5, maps[-1].shape[-1], 1)


def test_chosen_students_stand_within_their_budgets(inside):
    params, paths = inside
    network = next(iter(params.networks))
    students, devices = inputs.load_student_designs(params, paths)[network], params.budgets_of(network)
    candidates = read_json(paths.candidates(network))
    drawn = design_plots.draw_student_selection({network: candidates}, {network: students}, {network: devices})
    (axis,) = drawn.axes
    (chosen,) = [line for line in axis.lines if line.get_marker() == "o"]
    x, y = chosen.get_xydata().T
    assert (x <= devices[0].memory_kib).all()
    assert (y <= devices[0].mmacs).all()
    (curve,) = [line for line in axis.lines if line.get_marker() == "."]
    assert len(curve.get_xdata()) == len(candidates) > 1


def test_links_are_called_as_people_call_them():
    assert [deployment_plots.link_name(link) for link in PRESETS] == [
        "Ethernet, 941 Mbit/s",
        "Ethernet, 100 Mbit/s",
        "Wi-Fi, 100 Mbit/s + 2 ms",
        "Wi-Fi, 50 Mbit/s + 2 ms",
        "Wi-Fi, 20 Mbit/s + 2 ms",
        "802.15.4, 250 kbit/s",
    ]


def test_boards_are_called_as_people_call_them():
    names = [deployment_plots.board_name(board) for board in ("pi3b_plus", "pi5", "pi_zero2w", "cortex_m7", "pico2")]
    assert names == ["Raspberry Pi 3B+", "Raspberry Pi 5", "Raspberry Pi Zero 2 W", "Cortex-M7", "pico2"]
