"""The network that comes with the package: it is put there verified, it ships, and it answers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
import urllib.request

import pytest
from clusters import PATIENCE
from experiments import REPOSITORY
from processes import running
from safetensors.torch import load_file, save_file
from test_packaging import run_without

from nonn import demo
from nonn.cli import main
from nonn.commands.ship import ship
from nonn.core.errors import UserError
from nonn.core.images import read_image
from nonn.live.demo import open_browser
from nonn.runtime.exported import read_manifest
from nonn.runtime.predict import classify


def test_what_is_shipped_is_the_export_and_a_test_image_of_each_class(exported, experiment, data, tmp_path):
    network, pictures = tmp_path / "network", tmp_path / "pictures"
    for _ in range(2):  # the second time in place of the first
        ship(exported, experiment.dataset, network, pictures)
    assert {p.name: p.read_bytes() for p in network.iterdir()} == {p.name: p.read_bytes() for p in exported.iterdir()}
    assert sorted(path.name for path in pictures.iterdir()) == sorted(data.classes)
    for path in pictures.glob("*/*.png"):
        index = int(data.test[int(path.stem.split("-")[-1])])
        assert path.parent.name == data.classes[data.labels[index]]
        assert (read_image(path, data.channels, data.size) == data.images[index].numpy()).all()


def test_a_damaged_export_is_not_shipped(exported, experiment, tmp_path):
    shutil.copytree(exported, tmp_path / "export")
    (tmp_path / "export/1.onnx").write_bytes(b"another")
    with pytest.raises(UserError, match=r"1\.onnx: its SHA-256 is not that of the manifest"):
        ship(tmp_path / "export", experiment.dataset, tmp_path / "network", tmp_path / "pictures")
    assert not (tmp_path / "network").exists()


def test_without_a_picture_of_each_class_nothing_is_shipped(exported, experiment, data, tmp_path):
    shipped = tmp_path / "network", tmp_path / "pictures"
    tensors = load_file(experiment.dataset)
    tensors["test"] = tensors["test"][tensors["labels"][tensors["test"]] > 0]
    save_file(tensors, tmp_path / "dataset.safetensors")
    with pytest.raises(UserError, match=f"has no test image of class '{data.classes[0]}'. Ship another network"):
        ship(exported, tmp_path / "dataset.safetensors", *shipped)
    assert not any(folder.exists() for folder in shipped)


@pytest.mark.parametrize("name", ["cat/dog", "../up", "/abs", "..", "x" * 300])
def test_a_class_that_no_folder_can_be_named_as_is_not_shipped(name, exported, experiment, tmp_path):
    export, shipped = tmp_path / "export", (tmp_path / "network", tmp_path / "pictures")
    shutil.copytree(exported, export)
    manifest = json.loads((export / "manifest.json").read_text())
    info = experiment.dataset.with_suffix(".json")
    shutil.copy(experiment.dataset, tmp_path)
    known = json.loads(info.read_text())
    manifest["classes"][0] = known["classes"][0] = name
    (export / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / info.name).write_text(json.dumps(known))
    with pytest.raises(UserError, match="cannot be the name of a folder of pictures"):
        ship(export, tmp_path / experiment.dataset.name, *shipped)
    assert not any(folder.exists() for folder in shipped)


@pytest.mark.usefixtures("experiment")
def test_a_network_that_is_not_there_is_refused():
    with pytest.raises(SystemExit, match=r"params\.yaml: networks: no '9s'; choose one of 2s"):
        main(["ship", "9s"])


def test_without_a_network_one_line_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "NETWORK", tmp_path)
    with pytest.raises(SystemExit, match="holds no network"):
        main(["demo", "--once"])


# The network that is shipped


def test_it_is_in_the_wheel():
    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    root = REPOSITORY / "nonn/demo"
    packed = {path for pattern in patterns["nonn.demo"] for path in root.glob(pattern)}
    there = {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert packed == there
    assert sum(path.stat().st_size for path in there) < 2e6


def test_it_knows_most_of_its_pictures():
    manifest = read_manifest(demo.NETWORK)
    assert len(manifest.temperatures) == len(manifest.students)
    pictures = sorted(demo.PICTURES.glob("*/*.png"))
    assert {path.parent.name for path in pictures} == set(manifest.classes)
    shape = manifest.image
    right = [classify(demo.NETWORK, read_image(p, shape.channels, shape.size)).label == p.parent.name for p in pictures]
    assert sum(right) >= 0.8 * len(right)


@pytest.mark.usefixtures("folder")
def test_once_prints_an_answer_without_what_only_the_pipeline_has():
    done = run_without("demo", "--once")
    assert done.returncode == 0, done.stderr
    first, *shares = done.stdout.splitlines()
    assert "in truth" in first
    assert len(shares) == len(read_manifest(demo.NETWORK).students)
    assert all("of the lead" in line for line in shares)


@pytest.mark.usefixtures("folder")
def test_the_page_is_served_until_control_c():
    command = [sys.executable, "-m", "nonn", "demo", "--no-browser", "--port", "0"]
    with running(command, stdout=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stdout if line.startswith("live page: "))
        with urllib.request.urlopen(line.split()[2], timeout=PATIENCE) as page:
            assert b"NoNN live" in page.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 0


def test_a_browser_is_opened_only_where_there_is_a_screen(monkeypatch):
    """And nobody waits until it is closed."""
    opened, closed = [], threading.Event()
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or closed.wait(PATIENCE))
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    open_browser("http://127.0.0.1:1")
    assert opened == []
    monkeypatch.setitem(os.environ, "DISPLAY", ":0")
    before = set(threading.enumerate())
    open_browser("http://127.0.0.1:1")
    (browser,) = set(threading.enumerate()) - before
    closed.set()
    browser.join(PATIENCE)
    assert opened == ["http://127.0.0.1:1"]
