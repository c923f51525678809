"""Impossible budgets are refused before anything is trained, with what works."""

import re
from pathlib import Path

import pytest
from experiments import tiny_params
from ruamel.yaml import YAML

from nonn.cli import main
from nonn.commands import stage as stage_command
from nonn.core.errors import UserError
from nonn.core.files import read_json, write_json
from nonn.core.jobs import write_jobs
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.method.feasibility import check_budgets, known_dataset, known_filters

NOTHING = Paths("nothing")


def with_devices(**devices) -> Params:
    """The tiny experiment with other devices, by what they have."""
    kinds = {"small": {"memory_kib": 40, "mmacs": 5}, "large": {"memory_kib": 60, "mmacs": 5}} | devices
    return Params.model_validate(tiny_params({"devices": kinds}))


@pytest.mark.usefixtures("folder")
def test_an_impossible_budget_is_refused_before_the_images_are_known():
    with pytest.raises(UserError) as refusal:
        check_budgets(with_devices(small={"memory_kib": 5, "mmacs": 5}), NOTHING)
    start = r"params\.yaml: networks\.2s: no student of `design` fits device 'small': memory_kib is 5 KiB, \d+ KiB less"
    assert re.match(start, str(refusal.value))
    enough = float(re.findall(r"needs memory_kib: (\d+); give as much", str(refusal.value))[0])
    assert check_budgets(with_devices(small={"memory_kib": enough, "mmacs": 5}), NOTHING) == []
    with pytest.raises(UserError, match="'small': memory_kib"):
        check_budgets(with_devices(small={"memory_kib": enough - 1, "mmacs": 5}), NOTHING)


@pytest.mark.usefixtures("folder")
def test_a_budget_for_few_filters_alone_is_said_and_not_refused():
    """How many filters of the teacher are live is known from the stage `graph` on."""

    def check(kib: float) -> list[str]:
        teacher = {"architecture": {"family": "fast", "widths": [8, 16, 2000], "depth": 1}}
        devices = {"small": {"memory_kib": kib, "mmacs": 5}, "large": {"memory_kib": kib, "mmacs": 5}}
        return check_budgets(Params.model_validate(tiny_params({"teacher": teacher, "devices": devices})), NOTHING)

    with pytest.raises(UserError) as refusal:
        check(5)
    (warning,) = check(float(re.findall(r"needs memory_kib: (\d+)", str(refusal.value))[0]))
    assert warning.startswith("networks.2s: if all 2000 filters of the teacher are live, no student of `design` fits ")
    assert check(float(re.findall(r"needs memory_kib: (\d+)", warning)[0])) == []


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("device", "said"),
    [
        ({"memory_kib": 40, "mmacs": 0.01}, r"mmacs is 0\.01 million, 0\.\d+ million less"),
        ({"flash_kib": 2, "ram_kib": 40, "mmacs": 5}, r"flash_kib is 2 KiB, \d+ KiB less"),
        ({"flash_kib": 40, "ram_kib": 2, "mmacs": 5}, r"ram_kib is 2 KiB, \d+ KiB less"),
        ({"board": "rp2350", "share": 0.001}, r"ram_kib is 0\.52 KiB, "),
    ],
)
def test_the_budget_that_fails_is_named(device, said):
    with pytest.raises(UserError, match=rf"fits device 'large': {said}"):
        check_budgets(with_devices(large=device), NOTHING)


def test_a_target_that_is_too_short_is_refused(folder):
    changes = {"devices": {"small": {"board": "nrf52840"}, "large": {"board": "rp2350"}}}
    changes["networks"] = {"2s": {"devices": ["small", "large"], "seeds": 1, "latency_ms": 0.5}}
    YAML().dump(tiny_params(changes), folder / "params.yaml")
    with pytest.raises(SystemExit) as stopped:
        main(["check"])
    assert re.search(
        r"^nonn check: params\.yaml: networks\.2s: .*'small': latency_ms is 0\.5 ms", str(stopped.value.code)
    )


@pytest.mark.usefixtures("folder")
def test_every_device_that_cannot_be_gets_a_line():
    with pytest.raises(UserError) as refusal:
        check_budgets(with_devices(small={"memory_kib": 5, "mmacs": 5}, large={"memory_kib": 6, "mmacs": 5}), NOTHING)
    assert re.findall(r"device '(\w+)'", str(refusal.value)) == ["small", "large"]


@pytest.mark.usefixtures("folder")
def test_every_network_that_cannot_be_gets_a_line():
    networks = {name: {"devices": ["small", "large"], "seeds": 1} for name in ("a", "b")}
    params = tiny_params(
        {
            "networks": networks,
            "devices": {"small": {"memory_kib": 1, "mmacs": 1}, "large": {"memory_kib": 60, "mmacs": 5}},
        }
    )
    with pytest.raises(UserError) as refusal:
        check_budgets(Params.model_validate(params), NOTHING)
    assert [line.split(":")[1].strip() for line in str(refusal.value).splitlines()] == ["networks.a", "networks.b"]


def test_what_is_known_is_used_as_long_as_it_is_of_these_parameters(params, experiment):
    assert known_dataset(params, experiment)["channels"] == 1
    assert known_filters(params, experiment) == read_json(experiment.graph_info)["n_live"]
    assert check_budgets(params, experiment) == []
    larger = params.model_copy(update={"dataset": params.dataset.model_copy(update={"size": 64})})
    assert known_dataset(larger, experiment) is None
    architecture = params.teacher.architecture.model_copy(update={"depth": 2})
    other = params.model_copy(update={"teacher": params.teacher.model_copy(update={"architecture": architecture})})
    assert known_filters(other, experiment) is None
    info = read_json(experiment.dataset_info)
    write_json(experiment.dataset_info, info | {"source": "elsewhere"})
    assert known_dataset(params, experiment) is None


def test_filters_that_are_too_few_do_not_keep_a_better_teacher_from_being_trained(params, experiment):
    write_json(experiment.graph_info, read_json(experiment.graph_info) | {"n_live": 1})
    (warning,) = check_budgets(params, experiment)
    assert warning.startswith("networks.2s: if the teacher keeps its 1 live filters, ")


def test_images_that_are_known_decide_exactly(params, experiment):
    """Colour asks for more than grey: a budget that holds the least student may not hold the true one."""
    info = read_json(experiment.dataset_info)
    write_json(experiment.dataset_info, info | {"channels": 3, "classes": [str(i) for i in range(1000)]})
    with pytest.raises(UserError, match="no student of `design` fits device 'small'"):
        check_budgets(params, experiment)
    assert check_budgets(params, NOTHING) == []


@pytest.mark.usefixtures("folder")
def test_lopsided_shares_are_said_and_not_refused(folder, capsys):
    changes = {
        "devices": {"small": {"memory_kib": 40, "mmacs": 5}, "large": {"memory_kib": 1e9, "mmacs": float("inf")}}
    }
    YAML().dump(tiny_params(changes | {"design": {"max_width": 128}}), folder / "params.yaml")
    main(["check"])
    larger, line, sound = capsys.readouterr().out.splitlines()
    assert re.search(r"networks\.2s: the largest student has [\d,]+ parameters, the teacher [\d,]+: a student", larger)
    assert re.match(r"params\.yaml: networks\.2s: lopsided: student 1 \(large\) imitates \d+ of 32 filters", line)
    assert sound.startswith("params.yaml is sound")


def test_code_of_a_teacher_that_is_not_there_is_refused(folder):
    """What is below the working directory or installed passes; nothing of it is run."""
    raw = tiny_params({"signals": {"attention": False}})
    raw["networks"]["2s"]["baselines"] = {}
    Path("nets").mkdir()
    Path("nets/small.py").write_text("def make(:")

    def check(name: str) -> None:
        raw["teacher"] = {"threads": 1, "source": f"module:{name}:make"}
        YAML().dump(raw, folder / "params.yaml")
        main(["check"])

    for name in ("nets", "nets.small", "torchvision.models"):
        check(name)
    for name in ("nest", "nets.smal", "small"):
        with pytest.raises(SystemExit, match=rf"module:{name}:make: there is no module {name}\. Put it below the work"):
            check(name)


@pytest.mark.parametrize("stage", stage_command.BEFORE_DESIGN)
def test_no_long_stage_begins_with_an_impossible_budget(stage, folder, monkeypatch):
    params = tiny_params({"devices": {"small": {"memory_kib": 5, "mmacs": 5}, "large": {"memory_kib": 60, "mmacs": 5}}})
    YAML().dump(params, folder / "params.yaml")
    write_jobs(Params.model_validate(params))
    monkeypatch.setattr(
        "importlib.import_module",
        lambda name: pytest.fail(f"{name} runs") if "stages" in name else __import__(name, fromlist=["_"]),
    )
    with pytest.raises(
        SystemExit, match=rf"nonn {stage}: params\.yaml: networks\.2s: no student .*'small': memory_kib is 5"
    ):
        main([stage])
    assert not Path("results").exists()
