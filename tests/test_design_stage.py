"""Stage `design`: what it writes of a network, and what it says of one that does not fit."""

import pytest

from nonn.core.cost import Cost
from nonn.core.errors import UserError
from nonn.core.files import read_json
from nonn.core.params import DeviceParams
from nonn.deploy.traced_cost import measure_cost
from nonn.stages import design as design_stage
from nonn.stages import partition as partition_stage
from nonn.training.loading import load_design
from nonn.training.networks import ConvNet


def test_the_stage_writes_what_fits(params, experiment):
    devices = params.budgets_of("2s")
    n_live = read_json(experiment.graph_info)["n_live"]
    assert sum(read_json(experiment.filter_counts("2s"))["sizes"]) == n_live
    for position, device in enumerate(devices):
        ((architecture, n_filters),) = load_design(experiment.design("2s", position))
        assert n_filters == read_json(experiment.filter_counts("2s"))["sizes"][position]
        assert device.fits(measure_cost(ConvNet(architecture, 1, 3, n_filters), 1, 28))


def test_a_budget_that_changes_nothing_leaves_the_bytes_alone(params, experiment):
    def artifacts() -> dict:
        files = sorted(path for path in experiment.filter_counts("2s").parent.rglob("*.json"))
        return {path: path.read_bytes() for path in files}

    before = artifacts()
    devices = {name: DeviceParams(memory_kib=d.memory_kib, mmacs=d.mmacs + 0.001) for name, d in params.devices.items()}
    design_stage.run(params.model_copy(update={"devices": devices}), experiment, "2s")
    assert artifacts() == before


def test_a_network_of_mixed_devices_is_designed_and_partitioned(params, experiment, capsys):
    kinds = {
        "pico": DeviceParams(board="rp2350", share=0.2),
        "camera": DeviceParams(flash_kib=60, ram_kib=30, mmacs=5, mmacs_per_s=50),
        "whole": DeviceParams(memory_kib=60, mmacs=5, mmacs_per_s=20),
    }
    network = params.networks["2s"].model_copy(update={"devices": list(kinds), "latency_ms": 40.0})
    mixed = params.model_copy(update={"devices": kinds, "networks": {"2s": network}})
    design_stage.run(mixed, experiment, "2s")
    partition_stage.run(mixed, experiment, "2s")
    sizes = read_json(experiment.filter_counts("2s"))["sizes"]
    assert sum(sizes) == read_json(experiment.graph_info)["n_live"]
    for position, (budget, size) in enumerate(zip(mixed.budgets_of("2s"), sizes, strict=True)):
        (student,) = read_json(experiment.design("2s", position))
        cost = Cost(**student["cost"])
        assert budget.fits(cost)
        assert budget.compute_ms(cost) <= 40
        assert len(read_json(experiment.partition("2s", position))["filters"]) == student["n_filters"] == size
    assert ("lopsided" in capsys.readouterr().err) == (max(sizes) >= 4 * min(sizes))


def test_the_stage_says_what_is_lopsided(params, experiment, capsys):
    kinds = {"small": DeviceParams(memory_kib=36, mmacs=5), "large": DeviceParams(memory_kib=1e9, mmacs=float("inf"))}
    wide = params.design.model_copy(update={"max_width": 64})
    design_stage.run(params.model_copy(update={"devices": kinds, "design": wide}), experiment, "2s")
    assert "networks.2s: lopsided: student 1 (large) imitates " in capsys.readouterr().err


def test_the_stage_names_the_network_that_does_not_fit(params, experiment):
    before = experiment.filter_counts("2s").read_bytes()
    devices = {name: DeviceParams(memory_kib=1, mmacs=1) for name in params.devices}
    with pytest.raises(
        UserError, match=r"params\.yaml: networks\.2s: no student of `design` fits device 'small': memory_kib is 1 KiB"
    ):
        design_stage.run(params.model_copy(update={"devices": devices}), experiment, "2s")
    assert experiment.filter_counts("2s").read_bytes() == before
