"""The schema: what ships is sound, and every mistake is answered with its key and its remedy."""

import os
import re
import threading
from copy import deepcopy

import pytest
from experiments import REPOSITORY, SHIPPED
from ruamel.yaml import YAML

from nonn.core.errors import UserError
from nonn.core.params import load_params

PAIR = {"devices": ["stm32f4"] * 2, "seeds": 1}


def complaint(path) -> str:
    with pytest.raises(UserError) as refusal:
        load_params(path)
    return str(refusal.value)


MISSING = object()


def edited(edits: dict) -> dict:
    """The shipped parameters with other values at dotted keys."""
    params = deepcopy(SHIPPED)
    for key, value in edits.items():
        *sections, last = key.split(".")
        section = params
        for name in sections:
            section[name] = dict(section[name])
            section = section[name]
        if value is MISSING:
            del section[last]
        else:
            section[last] = value
    return params


WRONG = [
    ({"network": {}}, "network: unknown key; remove it (did you mean 'networks'?)"),
    ({"teacher.epoch": 3}, "teacher.epoch: unknown key; remove it (did you mean 'epochs'?)"),
    ({"teacher.architecture.deep": 3}, "teacher.architecture.deep: unknown key; remove it (did you mean 'depth'?)"),
    ({"devices.stm32f4.flops": 3}, "devices.stm32f4.flops: unknown key; remove it"),
    ({"dataset": MISSING}, "dataset: missing; add it"),
    ({"distill.lr": MISSING}, "distill.lr: missing; add it"),
    ({"teacher.lr": -0.1}, "teacher.lr: input should be greater than 0 (it is -0.1); change it"),
    ({"teacher.weights_sha256": "abc"}, "teacher.weights_sha256: string should match pattern"),
    ({"teacher.muon": {"lr": 0.1}}, "teacher.muon.momentum: missing; add it"),
    ({"teacher.muon": {"lr": 0, "momentum": 0.6}}, "teacher.muon.lr: input should be greater than 0 (it is 0)"),
    ({"devices.stm32f4.memory_kib": float("inf")}, "devices.stm32f4.memory_kib: input should be a finite number"),
    (
        {"graph.top_k": 4096},
        "graph.top_k: is 4096, but the teacher has only 192 filters; lower it, or set it to null for all filters",
    ),
    (
        {"teacher.architecture.widths": [8, 8, 2], "graph.top_k": None},
        "networks.4s.devices: 4 devices share 2 filters of the teacher; take fewer devices or a wider teacher",
    ),
    (
        {"teacher.normalization": {"mean": [0.5], "std": [0.5]}},
        "teacher: normalization: is that of imported `weights`, and they are null; set it to null too",
    ),
    (
        {"teacher.architecture": {"family": "fast", "widths": [8, 16, 32], "depth": 2, "width": 2}},
        "teacher.architecture: `width` belongs to families wrn and resnet; family fast takes `widths`",
    ),
    ({"devices.stm32f4.memory_kib": 0}, "devices.stm32f4.memory_kib: input should be greater than 0 (it is 0)"),
    (
        {"devices.stm32f4.memory_kb": 96},
        "devices.stm32f4.memory_kb: unknown key; remove it (did you mean 'memory_kib'?)",
    ),
    ({"networks.2s.latency": 5.0}, "networks.2s.latency: unknown key; remove it (did you mean 'latency_ms'?)"),
    ({"devices.stm32f4.mmacs_per_s": 1e-305}, "devices.stm32f4.mmacs_per_s: is 1e-305; give at least 1e-09"),
    ({"devices.stm32f4.mmacs": 1e-305}, "devices.stm32f4.mmacs: is 1e-305; give at least 1e-09"),
    (
        {"design.widths": [1] * 4, "distill.batch_size": 1},
        "distill.batch_size: is 1, and 4 stages leave one pixel of an image of 28, of which batch norm learns nothing",
    ),
    (
        {"teacher.architecture.widths": [64] * 4, "teacher.batch_size": 1},
        "teacher.batch_size: is 1, and 4 stages leave one pixel of an image of 28, of which batch norm learns nothing",
    ),
    ({"distill.kd_weight": 1.5}, "distill.kd_weight: input should be less than or equal to 1 (it is 1.5)"),
    ({"teacher.epochs": "many"}, "teacher.epochs: input should be a valid integer"),
    ({"teacher.epochs": 1.5}, "teacher.epochs: input should be a valid integer"),
    ({"networks.2s": ["stm32f4"]}, "networks.2s: input should be a valid dictionary or instance of NetworkParams"),
    ({"networks.2s.devices": "stm32f4"}, "networks.2s.devices: input should be a valid list (it is 'stm32f4')"),
    ({"dataset.source": "photos\n2"}, "dataset.source: has a line break; write it on one line"),
    ({"signals": None}, "signals: input should be a valid dictionary"),
    ({"experiment": "my/experiment"}, "experiment: string should match pattern"),
    ({"experiment": 5}, "experiment: input should be a valid string (it is 5); put it in quotes"),
    ({"networks": {2: PAIR}}, "networks.2: input should be a valid string (it is 2); put it in quotes"),
    ({"networks": {}}, "networks: dictionary should have at least 1 item"),
    (
        {"networks.2s.devices": ["stm32f4", "stm32f5"]},
        "networks.2s.devices: 'stm32f5' is not under `devices`; add it there (did you mean 'stm32f4'?)",
    ),
    ({"assemble.missing": "ignore"}, "assemble.missing: input should be 'auto', 'rescale', 'zero_fill'"),
    (
        {"assemble.missing": "subset_layers", "networks.2s.devices": ["stm32f4"] * 9},
        "assemble.missing: subset_layers is for up to 8 devices, and networks.2s has 9; choose auto or another",
    ),
    ({"networks.solo": PAIR}, "networks.solo: this is what models that run alone are called; choose another name"),
    ({"networks.2s.devices": ["stm32f4"]}, "networks.2s.devices: list should have at least 2 items"),
    ({"networks.2s.devices": ["stm32f4"] * 17}, "networks.2s.devices: list should have at most 16 items"),
    ({"networks.2s.seeds": 0}, "networks.2s.seeds: input should be greater than or equal to 1 (it is 0)"),
    ({"networks.2s.seeds": 3.0}, "networks.2s.seeds: input should be a valid integer (it is 3.0)"),
    ({"networks.2s.seeds": True}, "networks.2s.seeds: input should be a valid integer (it is True)"),
    ({"networks.2s.seeds": "3"}, "networks.2s.seeds: input should be a valid integer (it is '3')"),
    ({"networks.2s.baselines.magic": 1}, "networks.2s.baselines.magic: input should be 'labels', 'kd', 'at_kd'"),
    ({"networks.2s.baselines.kd": 0}, "networks.2s.baselines.kd: input should be greater than or equal to 1"),
    ({"distill.epochs": 1e30}, "distill.epochs: input should be a valid integer"),
    ({"distill.epochs": 10**9}, "distill.epochs: input should be less than or equal to 1000000"),
    (
        {"networks.2s.baselines": {"at_kd": 1}},
        "networks.2s.baselines.at_kd: needs attention maps; set signals.attention to true",
    ),
    ({"graph.top_k": 1}, "graph.top_k: input should be greater than or equal to 2 (it is 1)"),
    ({"graph.rule": "hubs"}, "graph.rule: input should be 'activation_hubs' or 'coactivation' (it is 'hubs')"),
    (
        {"teacher.architecture": {"family": "wrn", "depth": 12}},
        "teacher.architecture: family wrn needs depth = 6n + 4, not 12",
    ),
    (
        {"teacher.architecture": {"family": "resnet", "depth": 18}},
        "teacher.architecture: family resnet needs depth = 6n + 2, not 18",
    ),
    (
        {"teacher.architecture": {"family": "fast", "depth": 2}},
        "teacher.architecture: family fast needs `widths`, 3 to 6 numbers, such as [64, 256, 256]",
    ),
    (
        {"teacher.architecture": {"family": "airbench", "widths": [1, 2, 3, 4], "depth": 2}},
        "teacher.architecture: family airbench needs `widths`, three numbers, such as [64, 256, 256]",
    ),
    (
        {"teacher.architecture": {"family": "fast", "widths": [8] * 5, "depth": 2}},
        "teacher.architecture: 5 stages halve an image of 28 pixels to nothing; give at most 4 widths",
    ),
    (
        {"teacher.architecture": {"family": "wrn", "depth": 16, "widths": [1, 2, 3]}},
        "teacher.architecture: `widths` belongs to families fast, airbench and mobilenet; family wrn takes",
    ),
    (
        {"teacher.architecture": {"family": "wrn", "depth": 16, "strided": True}},
        "teacher.architecture: `strided` belongs to family airbench, not to wrn; remove it",
    ),
    (
        {"distributed.reference": {"family": "fast", "widths": [8] * 5, "depth": 2}},
        "distributed.reference: 5 stages halve an image of 28 pixels to nothing; give at most 4 widths",
    ),
    (
        {"teacher.selection": {"keep": 0.5, "proxy": {"family": "fast", "widths": [8] * 6, "depth": 2}}},
        "teacher.selection.proxy: 6 stages halve an image of 28 pixels to nothing; give at most 4 widths",
    ),
    (
        {"signals.augment": {"pad": 2, "flip": False, "cutout": 28}},
        "signals.augment.cutout: hides all of an image of 28 pixels; give less than that",
    ),
    ({"design.strided": True}, "design: `strided` belongs to family airbench, not to fast; remove it"),
    (
        {"design.widths": [1] * 5},
        "design.widths: 5 stages halve an image of 28 pixels to nothing; give at most 4 widths",
    ),
    (
        {"design.widths": [1] * 4, "design.family": "airbench"},
        "design: family airbench has three stages; give three `widths`, or take family fast or mobilenet",
    ),
    ({"design.widths": [1, 2]}, "design.widths: list should have at least 3 items"),
    ({"design.widths": [2, 4, 8]}, "design: widths are in units of the first, so it is 1, not 2"),
    (
        {"design.family": "wrn", "design.widths": [1, 2, 4], "design.depths": [10]},
        "design: `widths` belongs to families fast, airbench and mobilenet; remove it",
    ),
    ({"design.family": "wrn"}, "design: family wrn needs depths of the form 6n + 4 (10, 16, 22, …), not 2"),
    ({"design.min_width": 200}, "design: min_width is above max_width"),
    ({"design.precision": "int4"}, "design.precision: input should be 'float32' or 'int8' (it is 'int4')"),
    ({"dataset.size": 27}, "dataset.size: input should be greater than or equal to 28 (it is 27)"),
    ({"dataset.test": 0.9}, "dataset: validation and test together leave no training images; lower one of them"),
    ({"dataset.sha256": "abc"}, "dataset.sha256: string should match pattern"),
    (
        {"distributed.links": ["wifi20", "pigeon"]},
        "distributed.links: no link 'pigeon'; choose one of ethernet941, ethernet100, wifi100, wifi50, wifi20, "
        "ieee802154",
    ),
    ({"distributed.links": ["wifi20", "wifi20"]}, "distributed.links: a link is listed twice; remove one"),
    *(({"experiment": name}, f"experiment: {name!r} looks like an option to a shell") for name in ("-h", "--help")),
    *(
        ({"experiment": name}, f"experiment: {name!r} reads as something else than text in YAML")
        for name in ("no", "Yes", "null", "TRUE", "on", "1e3", "0x10", "12", "1_000", "0o17", "2001-01-01")
    ),
    ({"experiment": "~"}, "experiment: string should match pattern"),
    ({"networks": {"no": PAIR}}, "networks.no: 'no' reads as something else"),
    ({"networks": {"-h": PAIR}}, "networks.-h: '-h' looks like an option"),
    ({"signals.views": 10**12}, "signals.views: input should be less than or equal to 1000"),
    ({"design.depths": [10**9]}, "design.depths.0: input should be less than or equal to 1000"),
    (
        {"teacher.architecture": {"family": "fast", "widths": [10**9, 1, 1], "depth": 1}},
        "teacher.architecture.widths.0: input should be less than or equal to 16384",
    ),
    ({"distributed.longest": 60}, "distributed.longest: input should be less than or equal to 30 (it is 60)"),
    ({"graph.top_k": 10**9}, "graph.top_k: input should be less than or equal to 16384"),
    ({"distill.epochs": True}, "distill.epochs: input should be a valid integer (it is True)"),
    ({"distill.epochs": "12"}, "distill.epochs: input should be a valid integer (it is '12')"),
    (
        {"distributed.board": "abacus"},
        "distributed.board: no board 'abacus'; choose one of pi3b, pi3b_plus, pi4b, cortex_m7",
    ),
]


@pytest.mark.parametrize(
    ("edits", "expected"), WRONG, ids=lambda value: next(iter(value), "") * isinstance(value, dict)
)
def test_a_mistake_is_named_with_its_remedy(edits, expected, tmp_path):
    path = tmp_path / "params.yaml"
    YAML().dump(edited(edits), path)
    assert complaint(path).startswith(f"{path}: {expected}")


def test_every_mistake_has_its_line(tmp_path):
    path = tmp_path / "params.yaml"
    YAML().dump(edited({"teacher.lr": -1, "graph.top_k": 0, "evaluate": MISSING}), path)
    lines = complaint(path).splitlines()
    assert [re.match(r".*?: ([\w.]+):", line)[1] for line in lines] == ["teacher.lr", "graph.top_k", "evaluate"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"seeds: [0\nstudents: []\n", " line 2 is not valid YAML"),
        (b"seeds: [0]\n\nseeds: [1]\n", ' line 3 is not valid YAML: found duplicate key "seeds"'),
        (b"seeds:\n\t- 0\n", " line 2 is not valid YAML: found character "),
        (b"seed: 0\nteacher: {a: timm:net}\n", " line 2 is not valid YAML: found unexpected ':'. Put values with"),
        (b"- seeds\n", " holds no keys. Restore it from version control."),
        (b"", " holds no keys. Restore it from version control."),
        (b"seeds: \xff\xfe\n", " is not text in UTF-8"),
        (b"seeds: \x00\n", " is not text in UTF-8"),
    ],
    ids=["not closed", "key twice", "tab", "colon", "list", "empty", "other encoding", "binary"],
)
def test_files_that_are_no_parameters_are_refused(content, expected, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    assert complaint(path).startswith(f"{path}:{expected}")


def test_a_missing_file_says_where_to_run(tmp_path):
    path = tmp_path / "params.yaml"
    assert complaint(path) == f"{path}: no such file. Run nonn from the repository's top folder."


def test_baselines_and_the_pool_of_ensembles_by_hand(params):
    assert list(params.baselines()) == [
        ("2s", "labels", range(1)),
        ("2s", "kd", range(2)),
        ("2s", "random", range(1)),
        ("2s", "at_kd", range(1)),
    ]
    network = params.networks["2s"]
    more = {name: network.model_copy(update={"baselines": {"kd": n}}) for name, n in (("2s", 2), ("4s", 3), ("8s", 3))}
    assert params.pool == ("2s", "kd")
    assert params.model_copy(update={"networks": more}).pool == ("4s", "kd"), "most seeds, the first of equals"
    alike = params.model_copy(update={"networks": more})
    assert [alike.pool_of(name) for name in more] == [("4s", "kd")] * 3
    other = network.model_copy(update={"devices": ["larger", "larger"], "baselines": {}})
    unlike = params.model_copy(update={"networks": more | {"other": other}})
    assert unlike.pool_of("other") is None, "students for other devices are no rivals"
    assert unlike.pool_of("8s") == ("4s", "kd")
    none = {"2s": network.model_copy(update={"baselines": {}})}
    assert params.model_copy(update={"networks": none}).pool is None


def test_parameters_cannot_be_changed_by_a_stage(params):
    with pytest.raises(ValueError, match="frozen"):
        params.experiment = "other"
    with pytest.raises(ValueError, match="frozen"):
        params.distill.lr = 1.0


HOSTILE = {
    "nested brackets": "a: " + "[" * 3000 + "]" * 3000,
    "many nested brackets": "[" * 200_000,
    "nested mappings": "{a: " * 500 + "1" + "}" * 500,
    "digits": "experiment: " + "9" * 5000,
    "hexadecimal digits": "experiment: 0x" + "f" * 5000,
    "no integer": "experiment: !!int abc",
    "no float": "experiment: !!float abc",
    "no date": "experiment: 2001-99-99",
    "unknown tag": "experiment: !!python/object/apply:os.system [ls]",
    "holds itself": "experiment: &a [*a]",
    "two documents": "a: 1\n---\nb: 2\n",
    "no such alias": "a: *b\n",
    "laughs": "\n".join(
        ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
        + ["dataset: {source: *a9}"]
    ),
    "merged laughs": "\n".join(
        ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 10)]
    ),
    "long": "#" * 2_000_000,
    "keys that are no names": "? [a, b]\n: c\n",
    "escapes": 'experiment: "\\e[2J\\n"',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_in_short_lines(content, tmp_path):
    """At once, too: what took for ever before would here reach the limit of the whole test."""
    path = tmp_path / "params.yaml"
    path.write_text(content)
    said = complaint(path)
    assert all(line.startswith(f"{path}:") and len(line) < len(str(path)) + 300 for line in said.splitlines())
    assert "\x1b" not in said


def test_anchors_that_a_person_writes_are_read(tmp_path):
    text = (REPOSITORY / "params.yaml").read_text()
    text = text.replace("stm32f4: {", "stm32f4: &board {")
    (tmp_path / "params.yaml").write_text(text.replace("devices:\n", "devices:\n  other: *board\n", 1))
    with pytest.raises(UserError, match="found undefined alias"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text(text.replace("mmacs: 10}\n", "mmacs: 10}\n  other: *board\n", 1))
    params = load_params(tmp_path / "params.yaml")
    assert params.devices["other"] == params.devices["stm32f4"]


def test_parameters_that_are_no_regular_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "params.yaml")
    empty = threading.Thread(target=(tmp_path / "params.yaml").write_text, args=("",), daemon=True)
    empty.start()  # so that who opens the pipe does not wait
    assert complaint(tmp_path / "params.yaml").endswith("is a named pipe. Name a regular file.")
    (tmp_path / "link.yaml").symlink_to("nowhere")
    assert "is a link to nowhere, which is not there" in complaint(tmp_path / "link.yaml")
