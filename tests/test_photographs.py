"""Everything up to scores and exported files at the sizes of photographs: a teacher of one's own that sees 224 pixels a
side, and students that see 96."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import REPOSITORY, tiny_params, train_network
from pictures import fit_image
from PIL import Image
from ruamel.yaml import YAML

from nonn.core.files import read_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.runtime.predict import classify
from nonn.stages import baseline, benchmark, dataset, distributed, evaluate, export, figures, graph, signals, teacher

N_CLASSES, PER_CLASS = 10, 20
CODE = '''
from torch import nn


def make():
    """The mean colour of a picture, some mixtures of it, and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 10))
'''
CHANGES = {
    "networks": {"2s": {"devices": ["board", "board"], "seeds": 1, "baselines": {}}},
    "devices": {"board": {"memory_kib": 320, "mmacs": 6}},
    "dataset": {"source": "photos", "size": 96, "validation": 0.2, "test": 0.2},
    "signals": {"views": 2, "attention": False, "augment": {"pad": 2, "flip": True}},
    "design": {"family": "mobilenet", "depths": [1], "min_width": 8, "max_width": 16, "step": 8, "precision": "int8"},
    "distill": {"epochs": 3, "batch_size": 16, "lr": 0.05},
}


def hues() -> np.ndarray:
    """A colour for each class, in 0..255."""
    return np.random.default_rng(0).integers(40, 216, (N_CLASSES, 3))


def write_photographs(folder: Path) -> None:
    generator = np.random.default_rng(1)
    for number, hue in enumerate(hues()):
        (folder / f"class{number}").mkdir(parents=True)
        for i in range(PER_CLASS):
            pixels = generator.normal(hue, 40, (200 + i, 256, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{number}/{i}.jpg")


def write_teacher(folder: Path) -> None:
    """Code, and weights whose last layer is fitted to the colours."""
    (folder / "mixtures.py").write_text(CODE)
    torch.manual_seed(0)
    sys.path.insert(0, str(folder))
    network = __import__("mixtures").make()
    sys.path.remove(str(folder))
    colours = torch.from_numpy(np.repeat(hues(), 50, axis=0) / 255).float()
    features = network[3](network[2](colours + 0.01 * torch.randn(colours.shape)))
    targets = torch.eye(N_CLASSES).repeat_interleave(50, dim=0)
    columns = torch.cat([features, torch.ones(len(features), 1)], 1)
    fitted = torch.linalg.lstsq(columns.T @ columns + 1e-4 * torch.eye(33), columns.T @ targets).solution.detach()
    network[4].weight.data, network[4].bias.data = 20 * fitted[:-1].T.contiguous(), 20 * fitted[-1]
    torch.save(network.state_dict(), folder / "best.pth")


@pytest.fixture
def params(folder) -> Params:
    write_photographs(folder / "photos")
    write_teacher(folder)
    raw = tiny_params(CHANGES)
    raw["teacher"] = {"source": "module:mixtures:make", "weights": "best.pth", "size": 224, "threads": 1}
    raw["teacher"] |= {"normalization": {"mean": [0.0] * 3, "std": [1.0] * 3}, "expected_accuracy": 0.95}
    YAML().dump(raw, Path("params.yaml"))
    return Params.model_validate(raw)


def run_up_to_graph(params: Params) -> Paths:
    paths = Paths(params.experiment)
    for stage in (dataset, teacher, signals, graph):
        stage.run(params, paths)
    return paths


def test_photographs_become_a_network_on_devices(params):
    paths = run_up_to_graph(params)
    assert read_json(paths.teacher_info)["validation_accuracy"] > 0.95
    train_network(params, paths)
    export.run(params, paths, "2s")
    manifest = read_json(paths.export("2s") / "manifest.json")
    assert manifest["image"]["size"] == 96
    assert sum(student["n_features"] for student in manifest["students"]) <= 32
    image = fit_image(Image.open("photos/class3/0.jpg"), 96)
    assert classify(paths.export("2s"), image).label in manifest["classes"]


@pytest.mark.slow
def test_photographs_through_every_stage(params):
    """Teacher and students of different sizes are also scored, timed, run on emulated links and drawn."""
    network = params.networks["2s"].model_copy(update={"baselines": {"labels": 1, "kd": 2, "random": 1}})
    section = params.distributed.model_copy(update={"reference": None, "images": 4, "seconds": 0.5})
    params = params.model_copy(update={"networks": {"2s": network}, "distributed": section})
    paths = run_up_to_graph(params)
    train_network(params, paths)
    for name, method, seeds in params.baselines():
        for seed in seeds:
            baseline.run(params, paths, name, method, seed)
    evaluate.run(params, paths)
    for stage in (export, benchmark, distributed):
        for name in ("2s", "solo"):
            stage.run(params, paths, name)
    figures.run(params, paths)
    rows = {row["method"]: row for row in read_json(paths.evaluation)["rows"]}
    assert rows["teacher"]["accuracy_mean"] > 0.95
    solo = read_json(paths.export("solo") / "manifest.json")
    assert [solo[name]["image"]["size"] for name in ("teacher", "2s-kd")] == [224, 96]
    alone = read_json(paths.distributed("solo"))
    assert {row["method"] for row in alone["live"]} == {"teacher", "kd"}
    assert "module:mixtures:make" in (paths / "figures/architectures.svg").read_text()
    assert "NoNN" in (paths / "summary.md").read_text()


@pytest.mark.usefixtures("folder")
def test_the_documented_pictures_are_those_of_the_experiment():
    """The program of the documentation, for few pictures: as many kinds as the network it writes is fitted to."""
    text = (REPOSITORY / "docs/data-and-teacher.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "range(40)" in program
    exec(program.replace("range(40)", "range(1)"), {})
    experiment = YAML(typ="safe").load(REPOSITORY / "workflow/experiments/patterns.yaml")
    assert len(list(Path(experiment["dataset"]["source"]).glob("*/*.jpg"))) == 8
    assert torch.load("random.pth", weights_only=True)["fc.weight"].shape == (1000, 512)
    written = re.search(r"nonn head --start random.pth +# writes (\S+)", text)
    assert written[1] == experiment["teacher"]["weights"]
