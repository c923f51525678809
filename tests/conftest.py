"""What several tests share: a tiny experiment of three easy classes, built once, and handed out as copies."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from clusters import CLASSES, PLENTY_MS, free_ports, make_image, write_export
from experiments import make_dataset, tiny_params, train_network, write_dataset
from foreign import code_package, taught
from hypothesis import settings
from PIL import Image
from reports import DESIGNS, LATENCIES, PARAMS, ROWS, with_figures, write_experiment
from ruamel.yaml import YAML
from splits import write_solo
from torch import nn

from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.dataset import Dataset
from nonn.report import method_table
from nonn.runtime.certs import write_certificates
from nonn.runtime.cluster import Cluster, local_cluster, write_cluster
from nonn.stages import baseline, export, figures, graph, signals, teacher
from nonn.testbed.emulation import missing_privileges
from nonn.training.checkpoint import Checkpoint

# Examples are the same each time, and none fails because it takes more than 200 ms, as any may on a busy machine.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# Repositories that tests make are their own, also where git runs the tests, and whatever the user's settings are.
for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE", "GIT_PREFIX", "GIT_CONFIG_PARAMETERS"):
    os.environ.pop(name, None)
GIT = {"commit.gpgsign": "false", "core.hooksPath": os.devnull}
os.environ["GIT_CONFIG_COUNT"] = str(len(GIT))
for number, (key, value) in enumerate(GIT.items()):
    os.environ.update({f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value})


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Quickest for tiny tensors, and sums come out the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def without_network(monkeypatch) -> None:
    """No connection to any host."""

    def refuse(*_args, **_kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)


@pytest.fixture(scope="session")
def params() -> Params:
    return Params.model_validate(tiny_params())


@pytest.fixture(scope="session")
def data() -> Dataset:
    return make_dataset()


@pytest.fixture(scope="module")
def colour() -> Dataset:
    return make_dataset(channels=3, size=32)


@pytest.fixture(scope="module")
def model(colour) -> nn.Module:
    """A network of the user's own that has learned the coloured images."""
    return taught(colour)


@pytest.fixture
def code(folder):
    """A working directory from which the user's own code can be imported."""
    with code_package(folder):
        yield folder


@pytest.fixture
def checkpoint(folder) -> Checkpoint:
    """A new checkpoint; what it saves lands in the working directory of the test."""
    return Checkpoint(folder / "checkpoint.safetensors")


@pytest.fixture(scope="session")
def built(tmp_path_factory, params, data) -> Path:
    """Folder in which the tiny experiment was run up to its baselines. Not to be changed: see `experiment`."""
    folder, paths = tmp_path_factory.mktemp("built"), Paths(params.experiment)
    with contextlib.chdir(folder):
        YAML().dump(params.model_dump(), Path("params.yaml"))
        write_dataset(data, paths)
        for stage in (teacher, signals, graph):
            stage.run(params, paths)
        train_network(params, paths)
        for network, method, seeds in params.baselines():
            for seed in seeds:
                baseline.run(params, paths, network, method, seed)
    return folder


@pytest.fixture
def experiment(built, tmp_path, monkeypatch, params) -> Paths:
    """A copy of the tiny experiment, as the working directory."""
    shutil.copytree(built, tmp_path / "experiment")
    monkeypatch.chdir(tmp_path / "experiment")
    return Paths(params.experiment)


@pytest.fixture(scope="session")
def exported(built, tmp_path_factory, params) -> Path:
    """Folder of the tiny network's ONNX files. Not to be changed: it takes seconds to make."""
    folder, paths = tmp_path_factory.mktemp("exported") / "experiment", Paths(params.experiment)
    shutil.copytree(built, folder)
    with contextlib.chdir(folder):
        export.run(params, paths, "2s")
    return folder / paths.export("2s")


@pytest.fixture(scope="session")
def network_folder(tmp_path_factory) -> Path:
    """A hand-made export of three students, ready to serve. Not to be changed."""
    folder = tmp_path_factory.mktemp("network")
    with contextlib.chdir(folder):
        return write_export(folder / "export")


@pytest.fixture(scope="session")
def solo_folder(tmp_path_factory) -> Path:
    """An untrained model that runs alone, exported as ``teacher`` and as ``2s-kd``. Not to be changed."""
    return write_solo(tmp_path_factory.mktemp("solo") / "export", ["teacher", "2s-kd"])


@pytest.fixture(scope="session")
def certificates(tmp_path_factory) -> Path:
    """Certificates of three nodes, the coordinator, and one of the same authority that no node allows."""
    folder = tmp_path_factory.mktemp("certificates")
    write_certificates(folder, ["node-0", "node-1", "node-2", "coordinator", "stranger"])
    return folder


@pytest.fixture(scope="session")
def emulation() -> None:
    """Skips tests on emulated links where there can be none."""
    if reason := missing_privileges():
        pytest.skip(reason)


@pytest.fixture
def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens, for what cannot be asked to choose one itself."""
    return free_ports(1)[0]


@pytest.fixture
def cluster(network_folder, certificates, tmp_path, monkeypatch) -> Cluster:
    """Three nodes on free ports under mutual TLS, also written to ``cluster.yaml``."""
    monkeypatch.chdir(tmp_path)
    cluster = local_cluster(network_folder, certificates, 7100, PLENTY_MS)
    nodes = [
        node.model_copy(update={"address": f"127.0.0.1:{port}"})
        for node, port in zip(cluster.nodes, free_ports(3), strict=True)
    ]
    cluster = cluster.model_copy(update={"nodes": nodes})
    write_cluster(Path("cluster.yaml"), cluster)
    return cluster


def pytest_collection_modifyitems(items):
    """Start the tests of the whole pipeline first: they take minutes, and two workers share them out."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")


@pytest.fixture
def pictures_folder(cluster, tmp_path) -> str:
    """Folder of one picture a class; the cluster file beside it waits a second."""
    cluster = cluster.model_copy(update={"deadline_ms": 1000})
    write_cluster(tmp_path / "cluster.yaml", cluster)
    for seed in range(3):
        (tmp_path / "pictures" / CLASSES[seed]).mkdir(parents=True)
        Image.fromarray(make_image(seed)[0]).save(tmp_path / "pictures" / CLASSES[seed] / f"{seed}.png")
    return str(tmp_path / "pictures")


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """Folder of a made-up experiment whose stage `figures` has run, and its parameters; do not change it."""
    folder = tmp_path_factory.mktemp("reported")
    params = with_figures(PARAMS, dpi=50)
    params = params.model_copy(update={"design": params.design.model_copy(update={"step": 16})})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        figures.run(params, write_experiment(params, n_filters=40, n_test=400))
    return folder, params


@pytest.fixture
def inside(reported, monkeypatch):
    """Parameters and paths of that experiment, in the working directory."""
    folder, params = reported
    monkeypatch.chdir(folder)
    return params, Paths(params.experiment)


@pytest.fixture
def methods():
    """Rows of the summary, of the numbers in `reports`."""
    return method_table.summarise_methods(ROWS, DESIGNS, LATENCIES, n_classes=10)
